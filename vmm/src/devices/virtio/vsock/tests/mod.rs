mod guest;
mod lull;
mod quiet;

use std::{io::Write, net::Shutdown, os::unix::net::UnixStream};

use hermitage_vmm_proto::stream_pair;

use super::{packet::shutdown, *};
use crate::devices::virtio::testing::Dice;
use guest::{Guest, drain};

/// Most bytes a Unix socket of this system holds, with room to spare.
const SOCKET: usize = 1 << 20;

/// Writes as much as the socket takes.
fn fill(peer: &mut UnixStream, bytes: &[u8]) -> usize {
    let mut written = 0;
    while written < bytes.len() {
        match peer.write(&bytes[written..]) {
            Ok(count) => written += count,
            Err(error) if error.kind() == std::io::ErrorKind::WouldBlock => break,
            Err(error) => panic!("{error}"),
        }
    }
    written
}

fn read_all(peer: &mut UnixStream) -> Vec<u8> {
    let mut out = Vec::new();
    drain(peer, &mut out);
    out
}

#[test]
fn the_guest_has_its_address() {
    let guest = Guest::start();
    assert_eq!(guest.driver.config::<8>(0), 3u64.to_le_bytes());
}

#[test]
fn a_connection_carries_bytes_both_ways() {
    let mut guest = Guest::start();
    let (mut peer, port) = guest.connect(77, 1025);
    peer.write_all(b"hello guest").unwrap();
    guest.run();
    assert_eq!(guest.read(port, 100), b"hello guest");
    assert_eq!(guest.write(port, b"hello host"), 10);
    guest.run();
    assert_eq!(read_all(&mut peer), b"hello host");
    let stats = guest.driver.device.stats();
    assert_eq!(stats, VsockStats { from_guest: 10, to_guest: 11, open: 1 });
}

#[test]
fn what_was_written_before_the_answer_arrives_after_it() {
    let mut guest = Guest::start();
    let mut peer = guest.ask(1, 1025);
    peer.write_all(b"early").unwrap();
    peer.shutdown(Shutdown::Write).unwrap();
    guest.run();
    assert_eq!(guest.outcomes(), [VsockOutcome::Connected { stream: 1 }]);
    let port = guest.log[0].src_port;
    assert_eq!(guest.read(port, 100), b"early");
    assert_eq!(guest.sockets[&port].closed, shutdown::SEND);
}

#[test]
fn a_port_nobody_listens_on_is_refused_by_name() {
    let mut guest = Guest::start();
    let mut peer = guest.ask(5, 4444);
    guest.run();
    let [VsockOutcome::Failed { stream: 5, reason }] = &guest.outcomes()[..] else { panic!() };
    assert!(reason.contains("4444"), "{reason}");
    assert!(drain(&mut peer, &mut Vec::new()));
    assert_eq!(guest.open(), 0);
}

#[test]
fn who_gives_up_before_the_answer_leaves_nothing() {
    let mut guest = Guest::start();
    guest.refill = false;
    let peers: Vec<_> = (0..100).map(|stream| guest.ask(stream, 1025)).collect();
    drop(peers);
    guest.refill = true;
    guest.give_buffers(usize::MAX);
    guest.run();
    assert_eq!(guest.open(), 0);
    assert!(guest.sockets.values().all(|socket| socket.reset));
}

#[test]
fn what_the_guest_asks_for_is_refused() {
    let mut guest = Guest::start();
    let request = Header {
        src_cid: GUEST_CID,
        dst_cid: HOST_CID,
        src_port: 5000,
        dst_port: 22,
        kind: STREAM,
        op: op::REQUEST,
        ..Header::default()
    };
    guest.send_raw(&request, &[]).unwrap();
    guest.send_raw(&Header { kind: 2, ..request }, &[]).unwrap();
    // Not for us, or not from this guest: no answer.
    guest.send_raw(&Header { dst_cid: 7, ..request }, &[]).unwrap();
    guest.send_raw(&Header { src_cid: 7, ..request }, &[]).unwrap();
    // A reset is never answered.
    guest.send_raw(&Header { op: op::RST, ..request }, &[]).unwrap();
    guest.run();
    assert_eq!(
        guest.log,
        [Header::reset_for(&request), Header::reset_for(&Header { kind: 2, ..request })]
    );
    assert_eq!(guest.open(), 0);
}

/// One direction of a connection in the test below.
#[derive(Default)]
struct Flow {
    bytes: Vec<u8>,
    sent: usize,
    seen: Vec<u8>,
    ended: bool,
}

impl Flow {
    fn random(dice: &mut Dice) -> Self {
        let length = dice.below(1_500_000) as usize;
        Self { bytes: dice.bytes(length), ..Self::default() }
    }

    fn next(&self, dice: &mut Dice) -> std::ops::Range<usize> {
        let count = 1 + dice.below(100_000) as usize;
        self.sent..(self.sent + count).min(self.bytes.len())
    }
}

#[test]
fn many_streams_at_random_arrive_whole_and_end_in_order() {
    let mut guest = Guest::start();
    let mut dice = Dice::new(21);
    guest.room = 50_000;
    let mut streams: Vec<_> = (0..6)
        .map(|stream| {
            let (peer, port) = guest.connect(stream, 1025);
            (peer, port, Flow::random(&mut dice), Flow::random(&mut dice))
        })
        .collect();
    for _ in 0..100_000 {
        let which = dice.below(6) as usize;
        let (peer, port, down, up) = &mut streams[which];
        match dice.below(5) {
            0 if down.sent < down.bytes.len() => {
                let range = down.next(&mut dice);
                down.sent += fill(peer, &down.bytes[range]);
            }
            0 if !down.ended => {
                peer.shutdown(Shutdown::Write).unwrap();
                down.ended = true;
            }
            1 if up.sent < up.bytes.len() => {
                let range = up.next(&mut dice);
                let bytes = up.bytes[range].to_vec();
                up.sent += guest.write(*port, &bytes);
            }
            1 if !up.ended => {
                guest.send_packet(*port, op::SHUTDOWN, shutdown::SEND, &[]);
                up.ended = true;
            }
            2 => drop(drain(peer, &mut up.seen)),
            3 => {
                let count = dice.below(60_000) as usize;
                let bytes = guest.read(*port, count);
                down.seen.extend(bytes);
            }
            _ => guest.run(),
        }
    }
    guest.run();
    for (peer, port, down, up) in &mut streams {
        assert!(down.ended && up.ended, "the test must be long enough");
        loop {
            guest.run();
            let bytes = guest.read(*port, usize::MAX);
            let ended = drain(peer, &mut up.seen);
            down.seen.extend(&bytes);
            if bytes.is_empty() && ended {
                break;
            }
        }
        assert!(down.seen == down.bytes && up.seen == up.bytes);
        assert!(guest.sockets[port].closed & shutdown::SEND != 0);
    }
    // The guest's programs exit: Linux closes both directions and waits for the reset.
    for (_, port, ..) in &streams {
        guest.send_packet(*port, op::SHUTDOWN, shutdown::BOTH, &[]);
    }
    guest.run();
    assert!(guest.sockets.values().all(|socket| socket.reset));
    assert_eq!(guest.open(), 0);
}

#[test]
fn a_host_that_does_not_read_stops_the_guest() {
    let mut guest = Guest::start();
    let (mut peer, port) = guest.connect(1, 1025);
    let (mut other, other_port) = guest.connect(2, 1025);
    let bytes = Dice::new(22).bytes(8 << 20);
    let mut written = guest.fill(port, &bytes);
    assert!(written < SOCKET + credit::BUFFER as usize, "{written} bytes");
    guest.write(other_port, b"not delayed");
    guest.run();
    assert_eq!(read_all(&mut other), b"not delayed");
    let mut seen = Vec::new();
    while seen.len() < bytes.len() {
        drain(&mut peer, &mut seen);
        guest.run();
        written += guest.write(port, &bytes[written..]);
    }
    assert!(seen == bytes);
}

#[test]
fn a_guest_that_does_not_read_stops_the_host() {
    let mut guest = Guest::start();
    guest.room = 10_000;
    let (mut peer, port) = guest.connect(1, 1025);
    let bytes = Dice::new(23).bytes(8 << 20);
    let mut written = fill(&mut peer, &bytes);
    guest.run();
    written += fill(&mut peer, &bytes[written..]);
    guest.run();
    assert!(written < SOCKET + 10_000, "{written} bytes");
    assert_eq!(guest.sockets[&port].unread.len(), 10_000);
    let mut seen = Vec::new();
    while seen.len() < written {
        seen.extend(guest.read(port, 3_000));
        guest.run();
    }
    assert!(seen == bytes[..written]);
}

#[test]
fn without_receive_buffers_everything_waits_and_then_goes_on() {
    let mut guest = Guest::start();
    guest.refill = false;
    let (mut peer, port) = guest.connect(1, 1025);
    let bytes = Dice::new(24).bytes(SOCKET);
    let mut written = 0;
    for _ in 0..3 {
        written += fill(&mut peer, &bytes[written..]);
        guest.run();
    }
    let before = guest.sockets[&port].unread.len();
    assert!(before < written);
    guest.run();
    assert_eq!(guest.sockets[&port].unread.len(), before);
    let mut seen = Vec::new();
    while seen.len() < written {
        guest.give_buffers(1);
        guest.run();
        seen.extend(guest.read(port, usize::MAX));
    }
    assert!(seen == bytes[..written]);
}

#[test]
fn a_flood_of_strangers_is_stopped_by_its_own_answers() {
    let mut guest = Guest::start();
    guest.refill = false;
    let stranger = Header {
        src_cid: GUEST_CID,
        dst_cid: HOST_CID,
        src_port: 1,
        dst_port: 2,
        kind: STREAM,
        op: op::CREDIT_REQUEST,
        ..Header::default()
    };
    let mut sent = 0;
    while guest.driver.free_descriptors(TRANSMIT) > 1 && sent < 10_000 {
        guest.send_raw(&stranger, &[]).unwrap();
        sent += 1;
    }
    let most = usize::from(QUEUES[RECEIVE] + QUEUES[TRANSMIT]) + MAX_RESETS;
    assert!(sent <= most, "{sent} packets were taken");
    guest.refill = true;
    guest.run();
    guest.give_buffers(usize::MAX);
    guest.run();
    assert_eq!(guest.log.len(), sent);
    assert_eq!(guest.driver.free_descriptors(TRANSMIT), usize::from(QUEUES[TRANSMIT]));
}

#[test]
fn the_last_words_of_a_program_arrive_before_the_end() {
    let mut guest = Guest::start();
    for last in [op::SHUTDOWN, op::RST] {
        let (mut peer, port) = guest.connect(1, 1025);
        let bytes = Dice::new(25).bytes(credit::BUFFER as usize);
        let mut written = 0;
        // Until some of it is held by the device.
        for _ in 0..3 {
            written += guest.write(port, &bytes[written..]);
            guest.run();
        }
        assert_eq!(written, bytes.len());
        guest.send_packet(port, last, shutdown::BOTH, &[]);
        guest.run();
        assert_eq!(guest.sockets[&port].reset, last == op::SHUTDOWN);
        let mut seen = Vec::new();
        while !drain(&mut peer, &mut seen) {
            guest.run();
        }
        assert!(seen == bytes);
        assert_eq!(guest.open(), 0);
    }
}

#[test]
fn a_host_that_stops_reading_for_good_is_told_to_the_guest() {
    let mut guest = Guest::start();
    let (peer, port) = guest.connect(1, 1025);
    peer.shutdown(Shutdown::Read).unwrap();
    guest.write(port, b"into a closed pipe");
    guest.run();
    assert_eq!(guest.sockets[&port].closed, shutdown::RECEIVE);
    // The other direction lives on.
    (&peer).write_all(b"still").unwrap();
    guest.run();
    assert_eq!(guest.read(port, 10), b"still");
}

/// As long as it waits for room nobody tries to write; what the host throws away makes room.
#[test]
fn a_guest_that_writes_as_fast_as_it_can_is_told_as_well() {
    let mut guest = Guest::start();
    let (mut peer, port) = guest.connect(1, 1025);
    let bytes = Dice::new(28).bytes(SOCKET + credit::BUFFER as usize);
    let written = guest.fill(port, &bytes);
    assert!(written < bytes.len() && guest.sockets[&port].closed == 0);
    peer.shutdown(Shutdown::Read).unwrap();
    assert!(read_all(&mut peer).len() < written);
    guest.run();
    assert_eq!(guest.sockets[&port].closed, shutdown::RECEIVE);
    // What the device held is dropped, and so is what the guest had on its way: its credit comes back.
    assert!(guest.write(port, &bytes) > 0);
    guest.run();
    assert!(read_all(&mut peer).is_empty());
    // Its last word still ends the connection for both.
    peer.write_all(b"still").unwrap();
    guest.run();
    assert_eq!(guest.read(port, 10), b"still");
    guest.send_packet(port, op::SHUTDOWN, shutdown::BOTH, &[]);
    guest.run();
    assert!(guest.sockets[&port].reset);
    assert_eq!(guest.open(), 0);
}

#[test]
fn a_guest_that_stops_reading_for_good_breaks_the_hosts_pipe() {
    let mut guest = Guest::start();
    let (mut peer, port) = guest.connect(1, 1025);
    guest.send_packet(port, op::SHUTDOWN, shutdown::RECEIVE, &[]);
    guest.run();
    assert_eq!(peer.write(b"x").unwrap_err().kind(), std::io::ErrorKind::BrokenPipe);
    guest.write(port, b"still");
    guest.run();
    assert_eq!(read_all(&mut peer), b"still");
}

#[test]
fn a_host_that_goes_away_ends_the_connection_after_its_last_bytes() {
    let mut guest = Guest::start();
    guest.room = 1000;
    let (mut peer, port) = guest.connect(1, 1025);
    let bytes = Dice::new(26).bytes(50_000);
    peer.write_all(&bytes).unwrap();
    drop(peer);
    let mut seen = Vec::new();
    while !guest.sockets[&port].reset {
        guest.run();
        seen.extend(guest.read(port, usize::MAX));
    }
    assert!(seen == bytes);
    guest.run();
    assert_eq!(guest.open(), 0);
}

#[test]
fn connections_are_bounded_and_those_only_the_guest_keeps_make_room() {
    let mut guest = Guest::start();
    let mut peers = Vec::new();
    for stream in 0..MAX_CONNECTIONS as u64 {
        peers.push(guest.connect(stream, 1025));
    }
    guest.ask(999, 1025);
    let outcomes = guest.outcomes();
    assert!(matches!(outcomes[..], [VsockOutcome::Failed { stream: 999, .. }]), "{outcomes:?}");
    // The host is done with one, but its program in the guest does not read on.
    let (mut peer, port) = peers.pop().unwrap();
    peer.write_all(b"unread").unwrap();
    drop(peer);
    guest.run();
    assert_eq!(guest.open(), MAX_CONNECTIONS as u32);
    let (_peer, _) = guest.connect(1000, 1025);
    assert!(guest.sockets[&port].reset);
}

#[test]
fn a_guest_that_overdraws_its_credit_loses_the_connection() {
    let mut guest = Guest::start();
    let (mut peer, port) = guest.connect(1, 1025);
    let chunk = vec![b'x'; MAX_PAYLOAD as usize];
    for _ in 0..40 {
        guest.send_packet(port, op::RW, 0, &chunk);
    }
    guest.run();
    assert!(guest.sockets[&port].reset);
    let mut seen = Vec::new();
    while !drain(&mut peer, &mut seen) {
        guest.run();
    }
    assert!(seen.len() <= SOCKET + credit::BUFFER as usize);
    assert!(seen.iter().all(|byte| *byte == b'x'));
}

#[test]
fn packets_that_are_not_what_they_say_end_the_machine() {
    for (length, data) in [(100, 99), (1, 0), (MAX_PAYLOAD + 1, 10), (u32::MAX, 10)] {
        let mut guest = Guest::start();
        let (_peer, port) = guest.connect(1, 1025);
        let header = Header {
            src_cid: GUEST_CID,
            dst_cid: HOST_CID,
            src_port: 1025,
            dst_port: port,
            length,
            kind: STREAM,
            op: op::RW,
            ..Header::default()
        };
        let fault = guest.send_raw(&header, &vec![0; data]).unwrap_err();
        assert!(matches!(fault, Fault::Guest { device: "vsock", .. }), "{fault}");
    }
}

#[test]
fn the_control_connection_goes_on_in_a_fork_without_a_word_to_the_guest() {
    let mut guest = Guest::start();
    let (mut control, port) = guest.connect(0, 1024);
    let (mut stream, stream_port) = guest.connect(1, 1025);
    control.write_all(b"before").unwrap();
    stream.write_all(b"before").unwrap();
    guest.run();
    assert_eq!(guest.read(port, 100), b"before");
    guest.write(port, b"ready");
    guest.run();
    guest.driver.acknowledge();
    for round in 0..3 {
        let mut fork = guest.fork();
        let (ours, theirs) = stream_pair(true).unwrap();
        let mut agent = UnixStream::from(ours);
        agent.write_all(b"attach").unwrap();
        fork.driver.device.adopt(1024, theirs).unwrap();
        assert!(!fork.driver.line.is_high(), "nothing is raised before the machine is ready");
        fork.driver.device.resume().unwrap();
        assert!(fork.driver.line.is_high());
        fork.run();
        // The very first packet is data; then the connection that was not adopted ends.
        assert_eq!(fork.log[0].op, op::RW);
        assert_eq!(fork.read(port, 100), b"attach");
        assert!(fork.sockets[&stream_port].reset);
        assert_eq!(fork.write(port, b"attached"), 8);
        fork.run();
        assert_eq!(read_all(&mut agent), b"attached");
        // New ones have ports of their own.
        let (_peer, other) = fork.connect(7, 1025);
        assert!(other != port && other != stream_port, "round {round}");
        // Much may pass; credit goes on from where it was.
        let bytes = Dice::new(27).bytes(1 << 20);
        let (mut sent, mut seen) = (0, Vec::new());
        while seen.len() < bytes.len() {
            sent += fork.write(port, &bytes[sent..]);
            fork.run();
            drain(&mut agent, &mut seen);
        }
        assert!(seen == bytes);
        assert_eq!(fork.open(), 2);
    }
    // The machine the snapshot was taken of has not noticed.
    guest.write(port, b"still");
    guest.run();
    assert_eq!(read_all(&mut control), b"readystill");
}

#[test]
fn a_connection_with_bytes_under_way_is_not_saved() {
    let mut guest = Guest::start();
    let (mut peer, port) = guest.connect(0, 1024);
    assert!(guest.driver.device.save().is_ok());
    let bytes = vec![0; SOCKET];
    let mut written = 0;
    for _ in 0..20 {
        written += guest.write(port, &bytes[written..]);
        guest.run();
    }
    assert!(matches!(guest.driver.device.save(), Err(StateError::Busy { .. })));
    let mut seen = Vec::new();
    while seen.len() < written {
        drain(&mut peer, &mut seen);
        guest.run();
    }
    assert!(guest.driver.device.save().is_ok());
}

#[test]
fn every_other_connection_is_reset_when_the_guest_goes_on() {
    let mut guest = Guest::start();
    let (_control, port) = guest.connect(0, 1024);
    let (_idle, idle_port) = guest.connect(1, 1025);
    let (half, half_port) = guest.connect(2, 1025);
    half.shutdown(Shutdown::Write).unwrap();
    let (_full, full_port) = guest.connect(3, 1025);
    guest.run();
    let bytes = vec![0; SOCKET];
    let mut written = 0;
    for _ in 0..20 {
        written += guest.write(full_port, &bytes[written..]);
        guest.run();
    }
    guest.driver.acknowledge();
    let mut fork = guest.fork();
    let (ours, theirs) = stream_pair(true).unwrap();
    fork.driver.device.adopt(1024, theirs).unwrap();
    fork.driver.device.resume().unwrap();
    fork.run();
    for ended in [idle_port, half_port, full_port] {
        assert!(fork.sockets[&ended].reset, "the stream at {ended}");
    }
    assert!(!fork.sockets[&port].reset);
    assert_eq!(fork.open(), 1);
    assert_eq!(fork.write(port, b"here"), 4);
    fork.run();
    assert_eq!(read_all(&mut UnixStream::from(ours)), b"here");
}

#[test]
fn a_reset_of_the_device_ends_every_connection() {
    let mut guest = Guest::start();
    let (mut peer, _) = guest.connect(1, 1025);
    guest.refill = false;
    guest.listening.clear();
    let mut asking = guest.ask(2, 1025);
    guest.driver.initialise().unwrap();
    assert!(drain(&mut peer, &mut Vec::new()));
    assert!(drain(&mut asking, &mut Vec::new()));
    assert!(matches!(guest.outcomes()[..], [VsockOutcome::Failed { stream: 2, .. }]));
}
