use std::{
    io::{Read, Write},
    os::unix::net::UnixStream,
    sync::Arc,
    time::Duration,
};

use hermitage_vmm_proto::stream_pair;

use super::*;
use crate::devices::virtio::testing::{Dice, Driver};

const OWNER: u8 = 7;
const INPUT_BUFFER: u32 = 4096;

/// A driver that does with a console what Linux does.
struct Guest {
    driver: Driver<Console>,
    poller: Arc<Poller>,
    /// By queue and head, where a receive buffer is.
    buffers: std::collections::HashMap<(usize, u16), u64>,
    /// One buffer for each descriptor of each transmit queue.
    output: Vec<u64>,
}

fn console() -> (Console, Arc<Poller>) {
    let poller = Arc::new(Poller::new().unwrap());
    (Console::new(poller.clone(), OWNER), poller)
}

impl Guest {
    fn start() -> Self {
        let (console, poller) = console();
        let mut driver = Driver::start(console);
        let slots = usize::from(QUEUE_SIZE) * Console::QUEUES.len();
        let output = (0..slots).map(|_| driver.allocate(32 * 1024)).collect();
        let mut guest = Self { driver, poller, buffers: Default::default(), output };
        for queue in (0..Console::QUEUES.len()).filter(|queue| queue.is_multiple_of(2)) {
            for _ in 0..QUEUE_SIZE {
                let address = guest.driver.allocate(INPUT_BUFFER);
                guest.give_buffer(queue, address);
            }
        }
        guest
    }

    fn give_buffer(&mut self, queue: usize, address: u64) {
        let head = self.driver.submit(queue, &[(address, INPUT_BUFFER, true)]).unwrap();
        self.buffers.insert((queue, head), address);
    }

    /// What came in on a receive queue; buffers are given back if `refill`.
    fn received(&mut self, queue: usize, refill: bool) -> Vec<Vec<u8>> {
        let (mut out, mut back) = (Vec::new(), Vec::new());
        for (head, length) in self.driver.used(queue) {
            let address = self.buffers.remove(&(queue, head)).unwrap();
            out.push(self.driver.bytes(address, length as usize));
            back.push(address);
        }
        if refill {
            back.into_iter().for_each(|address| self.give_buffer(queue, address));
        }
        out
    }

    fn say(&mut self, port: u32, event: u16, value: u16) {
        let address = self.output[0];
        self.driver.put(address, &Message { port, event, value }.encode());
        self.driver.submit(CONTROL_TRANSMIT, &[(address, MESSAGE as u32, false)]).unwrap();
        assert_eq!(self.driver.used(CONTROL_TRANSMIT).len(), 1);
    }

    fn heard(&mut self) -> Vec<(Message, Vec<u8>)> {
        let split = |bytes: Vec<u8>| {
            let (fixed, name) = bytes.split_at(MESSAGE);
            (Message::decode(fixed.try_into().unwrap()), name.to_vec())
        };
        self.received(CONTROL_RECEIVE, true).into_iter().map(split).collect()
    }

    /// Writes to a terminal as much as there is room for in its queue; returns how much that is.
    fn write(&mut self, port: usize, bytes: &[u8]) -> usize {
        let queue = transmit_queue(port);
        self.driver.used_quietly(queue);
        let mut written = 0;
        for chunk in bytes.chunks(32 * 1024) {
            if self.driver.free_descriptors(queue) == 0 {
                break;
            }
            let slot = self.driver.next_descriptor(queue);
            let address = self.output[queue * usize::from(QUEUE_SIZE) + usize::from(slot)];
            self.driver.put(address, chunk);
            self.driver.submit(queue, &[(address, chunk.len() as u32, false)]).unwrap();
            written += chunk.len();
        }
        written
    }

    /// Serves the device's sockets until nothing is left to do now.
    fn serve(&mut self) {
        self.driver.turn();
        let mut events = Vec::new();
        for _ in 0..1000 {
            self.poller.wait(&mut events, Some(Duration::ZERO)).unwrap();
            if events.is_empty() {
                return;
            }
            for event in &events {
                assert_eq!(event.key.owner, OWNER);
                self.driver.device.ready(event).unwrap();
            }
        }
        panic!("the device's sockets never come to rest");
    }

    fn attach(&mut self, terminal: u8) -> UnixStream {
        self.attach_with(terminal, None)
    }

    fn attach_with(&mut self, terminal: u8, redraw: Option<(u16, u16)>) -> UnixStream {
        let (ours, theirs) = stream_pair(true).unwrap();
        self.driver.device.attach(terminal, theirs, redraw).unwrap();
        UnixStream::from(ours)
    }
}

/// Reads what there is.
fn drain(peer: &mut UnixStream) -> Vec<u8> {
    let mut out = Vec::new();
    let mut buffer = [0; 8192];
    loop {
        match peer.read(&mut buffer) {
            Ok(0) => return out,
            Ok(count) => out.extend(&buffer[..count]),
            Err(error) if error.kind() == std::io::ErrorKind::WouldBlock => return out,
            Err(error) => panic!("{error}"),
        }
    }
}

fn is_at_end(peer: &mut UnixStream) -> bool {
    matches!(peer.read(&mut [0]), Ok(0))
}

#[test]
fn the_driver_learns_of_eight_open_ports_with_names() {
    let mut guest = Guest::start();
    assert_eq!(guest.driver.config::<4>(4), 8u32.to_le_bytes());
    guest.say(u32::MAX, 0, 1);
    let added = guest.heard();
    assert_eq!(added.len(), TERMINALS);
    for (port, (message, _)) in added.iter().enumerate() {
        assert_eq!(*message, Message { port: port as u32, event: 1, value: 1 });
    }
    for port in 0..TERMINALS as u32 {
        guest.say(port, 3, 1);
        let name = format!("terminal.{port}").into_bytes();
        let expected = [
            (Message { port, event: 7, value: 1 }, name),
            (Message { port, event: 6, value: 1 }, vec![]),
        ];
        assert_eq!(guest.heard(), expected);
    }
    assert_eq!(guest.driver.acknowledge(), 1);
}

#[test]
fn messages_wait_for_buffers_and_do_not_pile_up() {
    let mut guest = Guest::start();
    for _ in 0..1000 {
        guest.say(u32::MAX, 0, 1);
        guest.say(9999, 3, 1);
        guest.say(3, 77, 1);
    }
    let address = guest.driver.allocate(INPUT_BUFFER);
    let mut heard = guest.received(CONTROL_RECEIVE, false);
    assert_eq!(heard.len(), usize::from(QUEUE_SIZE));
    for _ in 0..100 {
        guest.give_buffer(CONTROL_RECEIVE, address);
        heard = guest.received(CONTROL_RECEIVE, false);
        if heard.is_empty() {
            return;
        }
    }
    panic!("messages without end: {heard:?}");
}

#[test]
fn bytes_pass_both_ways_unchanged_whatever_their_cuts() {
    let mut guest = Guest::start();
    let mut dice = Dice::new(1);
    for terminal in [0, 1, 7] {
        let port = usize::from(terminal);
        let mut peer = guest.attach(terminal);
        let (out, input) = (dice.bytes(1 << 20), dice.bytes(1 << 19));
        let (mut seen, mut typed) = (Vec::new(), Vec::new());
        let (mut out_at, mut in_at) = (0, 0);
        while seen.len() < out.len() || typed.len() < input.len() {
            let count = 1 + dice.below(70_000) as usize;
            let end = (out_at + count).min(out.len());
            out_at += guest.write(port, &out[out_at..end]);
            let end = (in_at + 1 + dice.below(9_000) as usize).min(input.len());
            match peer.write(&input[in_at..end]) {
                Ok(count) => in_at += count,
                Err(error) => assert_eq!(error.kind(), std::io::ErrorKind::WouldBlock),
            }
            guest.serve();
            if dice.one_in(3) {
                seen.extend(drain(&mut peer));
            }
            typed.extend(guest.received(receive_queue(port), true).concat());
        }
        assert!(seen == out && typed == input, "terminal {terminal}");
        assert!(guest.driver.device.detach(terminal).unwrap());
    }
    let stats = guest.driver.device.stats();
    assert_eq!(stats, ConsoleStats { output: 3 << 20, input: 3 << 19 });
}

#[test]
fn output_to_nobody_is_consumed() {
    let mut guest = Guest::start();
    for _ in 0..100 {
        assert_eq!(guest.write(4, &[b'y'; 200_000]), 200_000);
    }
}

#[test]
fn a_peer_that_stops_reading_stops_the_writer_and_nothing_is_held_here() {
    let mut guest = Guest::start();
    let mut peer = guest.attach(2);
    let mut other = guest.attach(3);
    let mut written = 0;
    let stream: Vec<u8> = (0..16 << 20).map(|i: u32| (i % 251) as u8).collect();
    loop {
        let count = guest.write(2, &stream[written..]);
        guest.serve();
        written += count;
        if count == 0 {
            break;
        }
    }
    // The socket's buffer (a few hundred KiB) and the virtqueue, no more.
    assert!(written < 2 << 20, "{written} bytes were taken from a terminal nobody reads");
    assert_eq!(guest.driver.free_descriptors(transmit_queue(2)), 0);
    // Nobody else notices.
    guest.write(3, b"hello");
    assert_eq!(drain(&mut other), b"hello");
    // When reading goes on, so does the writer, and nothing is lost.
    let mut seen = Vec::new();
    while seen.len() < 4 << 20 {
        seen.extend(drain(&mut peer));
        guest.serve();
        written += guest.write(2, &stream[written..]);
    }
    assert!(seen == stream[..seen.len()]);
}

#[test]
fn input_nobody_takes_stays_in_the_socket() {
    let mut guest = Guest::start();
    let mut peer = guest.attach(5);
    let input = Dice::new(2).bytes(8 << 20);
    let mut sent = 0;
    while let Ok(count) = peer.write(&input[sent..]) {
        sent += count;
        guest.serve();
    }
    assert!(sent < 2 << 20, "{sent} bytes were taken for a guest that does not read");
    let mut typed = Vec::<u8>::new();
    while typed.len() < sent {
        let got = guest.received(receive_queue(5), true).concat();
        typed.extend(&got);
        guest.serve();
    }
    assert!(typed == input[..sent]);
}

#[test]
fn detach_delivers_what_was_written_then_ends() {
    let mut guest = Guest::start();
    for extra in [0, 5, 400_000] {
        let mut peer = guest.attach(6);
        let stream = Dice::new(extra as u64).bytes(300_000 + extra);
        let mut written = 0;
        loop {
            let count = guest.write(6, &stream[written..]);
            written += count;
            if count == 0 || written == stream.len() {
                break;
            }
        }
        assert_eq!(written, stream.len(), "the test's writer must fit socket and queue");
        peer.write_all(b"unread input").unwrap();
        assert!(guest.driver.device.detach(6).unwrap());
        assert!(!guest.driver.device.detach(6).unwrap());
        // What is written from here on is for the next one.
        guest.write(6, b"not for you");
        let mut seen = Vec::new();
        while !is_at_end_after(&mut peer, &mut seen) {
            guest.serve();
        }
        assert!(seen == stream, "{} of {} bytes", seen.len(), stream.len());
        guest.received(receive_queue(6), true);
    }
}

fn is_at_end_after(peer: &mut UnixStream, seen: &mut Vec<u8>) -> bool {
    seen.extend(drain(peer));
    is_at_end(peer)
}

#[test]
fn a_new_peer_gets_nothing_of_the_former_ones() {
    let mut guest = Guest::start();
    let mut first = guest.attach(0);
    let stream = Dice::new(3).bytes(1 << 20);
    let written = guest.write(0, &stream);
    let mut second = guest.attach(0);
    guest.write(0, b"second");
    guest.serve();
    assert_eq!(drain(&mut second), b"second");
    let mut seen = Vec::new();
    while !is_at_end_after(&mut first, &mut seen) {
        guest.serve();
    }
    assert!(seen == stream[..written]);
}

#[test]
fn a_peer_that_goes_leaves_the_writer_running() {
    let mut guest = Guest::start();
    let peer = guest.attach(1);
    let mut written = 0;
    while guest.write(1, &[b'y'; 100_000]) > 0 {
        guest.serve();
        written += 1;
        assert!(written < 100);
    }
    drop(peer);
    guest.serve();
    for _ in 0..20 {
        assert_eq!(guest.write(1, &[b'y'; 100_000]), 100_000);
    }
    assert!(!guest.driver.device.detach(1).unwrap());
}

#[test]
fn input_written_before_the_peer_went_arrives() {
    let mut guest = Guest::start();
    let mut peer = guest.attach(1);
    let input = Dice::new(4).bytes(120_000);
    peer.write_all(&input).unwrap();
    drop(peer);
    let mut typed = Vec::<u8>::new();
    while typed.len() < input.len() {
        guest.serve();
        let got = guest.received(receive_queue(1), true).concat();
        typed.extend(&got);
    }
    guest.serve();
    assert!(typed == input);
    assert!(!guest.driver.device.detach(1).unwrap());
}

#[test]
fn a_half_closed_peer_still_sees_output() {
    let mut guest = Guest::start();
    let mut peer = guest.attach(1);
    peer.shutdown(std::net::Shutdown::Write).unwrap();
    guest.serve();
    guest.write(1, b"still here");
    assert_eq!(drain(&mut peer), b"still here");
}

#[test]
fn a_console_is_saved_and_goes_on_in_a_fork() {
    let mut guest = Guest::start();
    guest.say(u32::MAX, 0, 1);
    guest.heard();
    guest.driver.acknowledge();
    let attached = guest.attach(0);
    let (fresh, poller) = console();
    let driver = guest.driver.fork(fresh);
    let mut fork = Guest { driver, poller, buffers: guest.buffers, output: guest.output };
    fork.driver.device.resume().unwrap();
    let mut peer = fork.attach(3);
    fork.write(3, b"from the fork");
    peer.write_all(b"to the fork").unwrap();
    fork.serve();
    assert_eq!(drain(&mut peer), b"from the fork");
    assert_eq!(fork.received(receive_queue(3), true).concat(), b"to the fork");
    fork.say(3, 3, 1);
    assert_eq!(fork.heard().len(), 2);
    drop(attached);
}

#[test]
fn a_buffer_for_the_wrong_direction_ends_the_machine() {
    let mut guest = Guest::start();
    let address = guest.driver.allocate(64);
    let fault = guest.driver.submit(transmit_queue(2), &[(address, 64, true)]).unwrap_err();
    assert!(matches!(fault, Fault::Guest { device: "console", .. }), "{fault}");
}

#[test]
fn what_was_made_available_and_not_looked_at_before_the_snapshot_is_served_after_it() {
    let mut guest = Guest::start();
    let address = guest.driver.allocate(64);
    guest.driver.put(address, &Message { port: 3, event: 3, value: 1 }.encode());
    // Available, but the notification has not been made.
    guest.driver.add(CONTROL_TRANSMIT, &[(address, 8, false)]);
    guest.driver.add(transmit_queue(6), &[(address, 8, false)]);
    let (fresh, poller) = console();
    let driver = guest.driver.fork(fresh);
    let mut fork = Guest { driver, poller, buffers: guest.buffers, output: guest.output };
    assert_eq!(fork.driver.used(transmit_queue(6)), []);
    fork.driver.device.resume().unwrap();
    assert_eq!(fork.driver.used_quietly(transmit_queue(6)).len(), 1);
    assert_eq!(fork.driver.used(CONTROL_TRANSMIT).len(), 1);
    assert_eq!(fork.heard().len(), 2);
}

#[test]
fn who_comes_back_gets_the_screen_then_what_follows() {
    let mut guest = Guest::start();
    let mut peer = guest.attach(2);
    guest.driver.device.resize(2, 60, 20).unwrap();
    guest.write(2, b"seen ");
    assert_eq!(drain(&mut peer), b"seen ", "bytes pass untouched while the screen follows");
    assert!(guest.driver.device.detach(2).unwrap());
    guest.write(2, b"missed");
    let mut peer = guest.attach_with(2, Some((40, 10)));
    guest.write(2, b" live");
    let shown = drain(&mut peer);
    assert!(shown.ends_with(b" live"));
    let mut parser = vt100::Parser::new(10.try_into().unwrap(), 40.try_into().unwrap(), 0);
    parser.process(&shown);
    assert_eq!(parser.screen().contents(), "seen missed live");
    // The next program on it starts with nothing.
    let mut peer = guest.attach(2);
    guest.write(2, b"new");
    assert_eq!(drain(&mut peer), b"new");
    let mut peer = guest.attach_with(2, Some((40, 10)));
    parser.process(&drain(&mut peer));
    assert_eq!(parser.screen().contents(), "");
}

#[test]
fn a_screen_larger_than_the_socket_comes_whole_and_before_what_follows() {
    let mut guest = Guest::start();
    guest.driver.device.resize(1, 500, 200).unwrap();
    let mut wanted = Vec::new();
    for n in 0..500u32 * 200 {
        wanted.extend(format!("\x1b[38;2;{};{};7mx", n % 256, n / 256 % 256).bytes());
    }
    let mut sent = 0;
    while sent < wanted.len() {
        sent += guest.write(1, &wanted[sent..]);
        guest.serve();
    }
    let mut peer = guest.attach_with(1, Some((500, 200)));
    guest.write(1, b"\x1b[mend");
    let mut shown = drain(&mut peer);
    assert!(!shown.ends_with(b"end"), "the socket took all at once: the test tests nothing");
    for _ in 0..1000 {
        guest.serve();
        shown.extend(drain(&mut peer));
        if shown.ends_with(b"end") {
            break;
        }
    }
    let mut parser = vt100::Parser::new(200.try_into().unwrap(), 500.try_into().unwrap(), 0);
    parser.process(&shown);
    assert_eq!(parser.screen().contents().matches('x').count(), 500 * 200 - 500);
    assert!(parser.screen().contents().ends_with("end"));
}

#[test]
fn a_screen_goes_along_into_a_snapshot() {
    let mut guest = Guest::start();
    guest.driver.device.resize(4, 60, 20).unwrap();
    guest.write(4, b"\x1b[1mkept");
    let state = guest.driver.device.save().unwrap();
    assert!(state.device.screens[4].is_some() && state.device.screens[3].is_none());
    let (fresh, poller) = console();
    let driver = guest.driver.fork(fresh);
    let mut fork = Guest { driver, poller, buffers: guest.buffers, output: guest.output };
    let shown = drain(&mut fork.attach_with(4, Some((60, 20))));
    assert!(String::from_utf8(shown).unwrap().contains("\x1b[1mkept"));
}
