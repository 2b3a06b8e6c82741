//! When the guest hears that its packets were taken: an interrupt for each would be several exits.

use std::time::{Duration, Instant};

use super::{
    super::{
        QUEUES, QUIET_TIME, TRANSMIT,
        packet::{Header, op},
    },
    guest::{Guest, OWNER},
};

/// How often the guest sends until it hears of it.
fn sent_until_heard(guest: &mut Guest, length: usize) -> u32 {
    guest.driver.used_quietly(TRANSMIT);
    guest.driver.acknowledge();
    for sent in 1..=u32::from(QUEUES[TRANSMIT]) {
        send(guest, length);
        if guest.driver.line.is_high() {
            return sent;
        }
    }
    panic!("a full ring and no interrupt");
}

/// From a sender that does not exist, and so answered by nothing.
fn send(guest: &mut Guest, length: usize) {
    let header = Header { op: op::RW, length: length as u32, ..Header::default() };
    guest.put_packet(&header, &vec![7; length]).unwrap();
}

#[test]
fn the_guest_hears_of_small_packets_by_the_quarter_ring() {
    let mut guest = Guest::start();
    // One descriptor without payload, two with any.
    let quarter = u32::from(QUEUES[TRANSMIT]) / 4;
    for (length, wanted) in [(0, quarter), (1, quarter / 2)] {
        sent_until_heard(&mut guest, length);
        assert_eq!(sent_until_heard(&mut guest, length), wanted);
        assert_eq!(sent_until_heard(&mut guest, length), wanted);
    }
}

/// A writer's packets hold its send buffer, and Linux does not wake it for new room at the other end
/// while they hold half of that.
#[test]
fn the_guest_hears_of_large_packets_at_once() {
    let mut guest = Guest::start();
    for (length, wanted) in [(64 * 1024, 1), (32 * 1024, 1), (8 * 1024, 4)] {
        sent_until_heard(&mut guest, length);
        assert_eq!(sent_until_heard(&mut guest, length), wanted, "{length} bytes");
    }
}

#[test]
fn the_guest_hears_of_the_last_packet_in_a_while() {
    let mut guest = Guest::start();
    sent_until_heard(&mut guest, 0);
    for _ in 0..3 {
        guest.driver.used_quietly(TRANSMIT);
        guest.driver.acknowledge();
        send(&mut guest, 0);
        assert!(!guest.driver.line.is_high());
        let sent = Instant::now();
        while !guest.driver.line.is_high() {
            // The timer may have been set for an earlier packet, and is set again then.
            assert!(sent.elapsed() < Duration::from_secs(10));
            let mut events = Vec::new();
            guest.poller.wait(&mut events, Some(QUIET_TIME + Duration::from_secs(10))).unwrap();
            for event in &events {
                assert_eq!(event.key.owner, OWNER);
                guest.driver.device.ready(event).unwrap();
            }
        }
        assert!(sent.elapsed() >= QUIET_TIME);
    }
}

#[test]
fn a_fork_hears_of_what_was_not_said_before() {
    // By level: with edges, which nobody acknowledges, a fork is interrupted once in any case.
    let mut guest = Guest::start_level();
    sent_until_heard(&mut guest, 0);
    guest.driver.used_quietly(TRANSMIT);
    guest.driver.acknowledge();
    let heard = guest.fork();
    heard.driver.device.resume().unwrap();
    assert!(!heard.driver.line.is_high());

    send(&mut guest, 0);
    assert!(!guest.driver.line.is_high());
    let fork = guest.fork();
    fork.driver.device.resume().unwrap();
    assert!(fork.driver.line.is_high());
}
