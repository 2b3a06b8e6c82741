//! Bytes between a connection and its stream to the host, both ways, each with an end of its own.
//! A direction holds [`CAPACITY`](crate::buffer::CAPACITY) bytes and reads no more until they are gone.

use std::fs::File;
use std::os::fd::{AsRawFd, OwnedFd};

use hermitage_guest_proto::forward::ForwardId;
use nix::sys::socket::{Shutdown, shutdown};

use crate::buffer::{Buffer, Transfer};

/// Reads and writes in a row before others have their turn.
const ROUNDS: usize = 8;

pub struct Relay {
    pub id: ForwardId,
    stream: File,
    socket: File,
    /// From the stream to the socket.
    inward: Direction,
    outward: Direction,
}

struct Direction {
    buffer: Buffer,
    /// Nothing more comes from where it reads.
    ended: bool,
    /// All is delivered, or can't be.
    over: bool,
}

pub struct Wanted {
    pub readable: bool,
    pub writable: bool,
}

impl Relay {
    pub fn new(id: ForwardId, stream: OwnedFd, socket: OwnedFd) -> Self {
        Self {
            id,
            stream: stream.into(),
            socket: socket.into(),
            inward: Direction::new(),
            outward: Direction::new(),
        }
    }

    pub fn interest(&self) -> [(&File, Wanted); 2] {
        let wanted = |from: &Direction, to: &Direction| Wanted {
            readable: from.wants_to_read(),
            writable: to.wants_to_write(),
        };
        [
            (&self.stream, wanted(&self.inward, &self.outward)),
            (&self.socket, wanted(&self.outward, &self.inward)),
        ]
    }

    pub fn go_on(&mut self) {
        self.inward.go_on(&self.stream, &self.socket);
        self.outward.go_on(&self.socket, &self.stream);
    }

    /// The host wants nothing more of it. What it has sent is still delivered: it may be on its way.
    pub fn abandon(&mut self) {
        self.outward.over = true;
    }

    pub fn is_over(&self) -> bool {
        self.inward.over && self.outward.over
    }
}

impl Direction {
    fn new() -> Self {
        Self { buffer: Buffer::new(), ended: false, over: false }
    }

    fn wants_to_read(&self) -> bool {
        !self.over && !self.ended && self.buffer.is_empty()
    }

    fn wants_to_write(&self) -> bool {
        !self.over && !self.buffer.is_empty()
    }

    fn go_on(&mut self, from: &File, to: &File) {
        for _ in 0..ROUNDS {
            let mut blocked = false;
            if self.wants_to_read() {
                match self.buffer.fill(from) {
                    Ok(Transfer::Moved(_)) => {}
                    Ok(Transfer::Blocked) => blocked = true,
                    // A reset ends it as well: what was read before it is delivered.
                    Ok(Transfer::Ended) | Err(_) => self.ended = true,
                }
            }
            if self.wants_to_write()
                && !matches!(self.buffer.drain(to), Ok(Transfer::Moved(_) | Transfer::Blocked))
            {
                // Nobody takes it any more: whoever sends it is told by not being read.
                let _ = shutdown(from.as_raw_fd(), Shutdown::Read);
                return self.over = true;
            }
            if self.over || !self.buffer.is_empty() {
                return;
            }
            if self.ended {
                let _ = shutdown(to.as_raw_fd(), Shutdown::Write);
                return self.over = true;
            }
            if blocked {
                return;
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use std::io::{Read, Write};
    use std::os::unix::net::UnixStream;

    use super::*;

    /// A relay, the host's end and the other program's end.
    fn relay() -> (Relay, UnixStream, UnixStream) {
        let ((stream, host), (socket, program)) =
            (UnixStream::pair().unwrap(), UnixStream::pair().unwrap());
        for end in [&stream, &host, &socket, &program] {
            end.set_nonblocking(true).unwrap();
        }
        (Relay::new(1, stream.into(), socket.into()), host, program)
    }

    fn read(mut from: &UnixStream) -> Option<Vec<u8>> {
        let mut bytes = vec![0; 1 << 20];
        match from.read(&mut bytes) {
            Ok(count) => {
                bytes.truncate(count);
                Some(bytes)
            }
            Err(_) => None,
        }
    }

    #[test]
    fn one_end_is_closed_and_the_other_goes_on() {
        let (mut relay, mut host, mut program) = relay();
        host.write_all(b"question").unwrap();
        host.shutdown(std::net::Shutdown::Write).unwrap();
        relay.go_on();
        assert_eq!(read(&program).unwrap(), b"question");
        assert_eq!(read(&program).unwrap(), b"", "half-closed");
        assert!(!relay.is_over());
        program.write_all(b"answer").unwrap();
        drop(program);
        relay.go_on();
        assert_eq!(read(&host).unwrap(), b"answer");
        assert_eq!(read(&host).unwrap(), b"");
        assert!(relay.is_over());
    }

    #[test]
    fn a_program_that_does_not_read_stops_the_host() {
        let (mut relay, mut host, program) = relay();
        let mut sent = 0;
        loop {
            match host.write(&[7; 4096]) {
                Ok(count) => sent += count,
                Err(_) => {
                    let before = sent;
                    relay.go_on();
                    // Once the socket and the buffer are full nothing moves any more.
                    match host.write(&[7; 4096]) {
                        Ok(count) => sent += count,
                        Err(_) => break assert_eq!(before, sent),
                    }
                }
            }
            assert!(sent < 16 << 20, "no bound");
        }
        let [(_, stream), (_, socket)] = relay.interest();
        assert!(!stream.readable && socket.writable);
        let mut got = 0;
        while got < sent {
            got += read(&program).map_or(0, |bytes| bytes.len());
            relay.go_on();
        }
        assert_eq!(got, sent);
    }

    #[test]
    fn a_program_that_is_gone_ends_the_stream() {
        let (mut relay, mut host, program) = relay();
        drop(program);
        host.write_all(b"to nobody").unwrap();
        relay.go_on();
        assert!(relay.is_over());
        assert_eq!(read(&host).unwrap(), b"");
        assert!(host.write(b"more").is_err());
    }

    #[test]
    fn what_was_sent_before_it_was_abandoned_arrives() {
        let (mut relay, mut host, mut program) = relay();
        host.write_all(b"last words").unwrap();
        relay.abandon();
        drop(host);
        program.write_all(b"nobody wants this").unwrap();
        relay.go_on();
        assert_eq!(read(&program).unwrap(), b"last words");
        assert!(relay.is_over());
    }
}
