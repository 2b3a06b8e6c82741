//! What each packet of a conversation costs: a notification is an exit of the guest, and so is an interrupt.

use std::{
    io::Write as _,
    os::unix::net::UnixStream,
    time::{Duration, Instant},
};

use super::{
    super::{MAX_PAYLOAD, QUIET_TIME, TRANSMIT, op},
    guest::Guest,
    read_all,
};

/// A request of the host's, read whole and answered by the guest, as Linux does it.
fn ask(guest: &mut Guest, peer: &mut UnixStream, port: u32) {
    peer.write_all(b"request").unwrap();
    guest.run();
    assert_eq!(guest.read(port, 100), b"request");
    assert_eq!(guest.write(port, b"answer"), 6);
    assert_eq!(read_all(peer), b"answer");
}

/// A guest that is known to say first that it has read.
fn acquainted() -> (Guest, UnixStream, u32) {
    let mut guest = Guest::start();
    let (mut peer, port) = guest.connect(1, 1025);
    (0..3).for_each(|_| ask(&mut guest, &mut peer, port));
    (guest, peer, port)
}

/// Serves what the device left for the lull, until the guest is listened to again.
fn wait_for_the_lull(guest: &mut Guest) {
    let start = Instant::now();
    let mut events = Vec::new();
    while guest.driver.device.look(|vsock| vsock.waiting.unasked.is_some()) {
        assert!(start.elapsed() < Duration::from_secs(10));
        guest.poller.wait(&mut events, Some(Duration::from_secs(10))).unwrap();
        events.iter().for_each(|event| guest.driver.device.ready(event).unwrap());
    }
}

/// Until the device has no timer set.
fn wait_for_silence(guest: &mut Guest) {
    let mut events = Vec::new();
    loop {
        guest.poller.wait(&mut events, Some(QUIET_TIME * 5)).unwrap();
        if events.is_empty() {
            return;
        }
        events.iter().for_each(|event| guest.driver.device.ready(event).unwrap());
    }
}

#[test]
fn an_answer_is_one_notification() {
    let (mut guest, mut peer, port) = acquainted();
    for _ in 0..50 {
        let before = guest.driver.notifications;
        ask(&mut guest, &mut peer, port);
        // One more after a lull, should the test stand still that long in the middle.
        let noisy = guest.driver.notifications - before;
        assert!((1..=2).contains(&noisy), "{noisy}");
    }
    let before = guest.driver.notifications;
    (0..50).for_each(|_| ask(&mut guest, &mut peer, port));
    let noisy = guest.driver.notifications - before;
    assert!(noisy < 75, "{noisy} notifications for 50 answers");
}

#[test]
fn a_packet_alone_is_heard_in_the_lull_and_the_next_at_once() {
    let (mut guest, mut peer, port) = acquainted();
    wait_for_silence(&mut guest);
    for round in 0..3 {
        peer.write_all(b"request").unwrap();
        guest.run();
        let before = guest.driver.notifications;
        // It answers without having read all.
        guest.write(port, b"answer");
        if round == 0 {
            assert_eq!((guest.driver.notifications - before, read_all(&mut peer)), (0, vec![]));
            wait_for_the_lull(&mut guest);
        } else {
            assert_eq!(guest.driver.notifications - before, 1, "it was trusted again");
        }
        assert_eq!(read_all(&mut peer), b"answer");
    }
    // In good time it is trusted again.
    guest.read(port, 100);
    (0..100).for_each(|_| ask(&mut guest, &mut peer, port));
    guest.driver.notifications = 0;
    (0..20).for_each(|_| ask(&mut guest, &mut peer, port));
    assert!(guest.driver.notifications < 30, "{}", guest.driver.notifications);
}

/// That it has read is all it says, and the room it gives back is not lost.
#[test]
fn what_is_read_and_not_answered_is_heard_of_in_the_lull() {
    let (mut guest, mut peer, port) = acquainted();
    peer.write_all(b"request").unwrap();
    guest.run();
    let before = guest.driver.notifications;
    guest.read(port, 100);
    assert_eq!(guest.driver.notifications, before);
    wait_for_the_lull(&mut guest);
    // Asked to notify again.
    guest.write(port, b"late");
    assert_eq!(guest.driver.notifications, before + 1);
    assert_eq!(read_all(&mut peer), b"late");
}

#[test]
fn who_has_little_room_is_listened_to() {
    let mut guest = Guest::start();
    guest.room = MAX_PAYLOAD - 1;
    let (mut peer, port) = guest.connect(1, 1025);
    (0..3).for_each(|_| ask(&mut guest, &mut peer, port));
    let before = guest.driver.notifications;
    (0..10).for_each(|_| ask(&mut guest, &mut peer, port));
    assert_eq!(guest.driver.notifications, before + 20);
}

#[test]
fn a_new_connection_is_answered_at_once() {
    let (mut guest, mut peer, port) = acquainted();
    peer.write_all(b"request").unwrap();
    guest.run();
    // Not a word of having read it. The connection's answer is the guest's next packet.
    let before = guest.driver.notifications;
    guest.connect(2, 1024);
    assert_eq!(guest.driver.notifications, before + 1);
    assert_eq!(guest.read(port, 100), b"request");
}

/// A state says nothing of it, so a fork would wait for ever.
#[test]
fn a_fork_hears_of_the_next_packet_at_once() {
    let (mut guest, mut peer, _) = acquainted();
    peer.write_all(b"request").unwrap();
    guest.run();
    let mut fork = guest.fork();
    fork.driver.device.resume().unwrap();
    fork.run();
    fork.driver.notifications = 0;
    let header = super::super::packet::Header { op: op::RST, ..Default::default() };
    fork.send_raw(&header, &[]).unwrap();
    assert_eq!(fork.driver.notifications, 1);
}

/// The interrupt for bytes tells also that packets were taken: there is none of its own for that.
#[test]
fn an_interrupt_for_bytes_tells_of_packets_taken() {
    let (mut guest, mut peer, port) = acquainted();
    let is_quiet = |guest: &Guest| {
        let look = guest.driver.device.with(|_, context| Ok(context.queues[TRANSMIT].is_quiet()));
        look.unwrap()
    };
    // Not in one go if there was a lull just then.
    let quiet = (0..100).any(|_| {
        ask(&mut guest, &mut peer, port);
        is_quiet(&guest)
    });
    assert!(quiet, "each answer is an interrupt");
    peer.write_all(b"request").unwrap();
    guest.run();
    assert!(!is_quiet(&guest));
}
