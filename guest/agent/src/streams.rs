//! vsock streams between their arrival and the `Exec` that names them by token. Either may come
//! first; what waits is bounded in number and time.

use std::fs::File;
use std::io::Read;
use std::os::fd::OwnedFd;
use std::time::{Duration, Instant};

use hermitage_guest_proto::StreamToken;

/// Unclaimed streams kept at once.
pub const UNCLAIMED_MAX: usize = 64;
/// How long a stream waits for its `Exec`, and an `Exec` for its streams.
pub const PATIENCE: Duration = Duration::from_secs(30);

/// Streams that no `Exec` has claimed.
#[derive(Default)]
pub struct Streams {
    waiting: Vec<Unclaimed>,
}

struct Unclaimed {
    socket: File,
    deadline: Instant,
    /// The token as far as it has come: exactly these bytes are read, what follows is the program's.
    token: [u8; 8],
    received: usize,
}

impl Unclaimed {
    fn token(&self) -> Option<StreamToken> {
        (self.received == self.token.len()).then(|| StreamToken::from_le_bytes(self.token))
    }
}

impl Streams {
    /// Takes in a new connection; the oldest makes room when there are too many.
    pub fn arrived(&mut self, socket: OwnedFd, now: Instant) {
        if self.waiting.len() >= UNCLAIMED_MAX {
            self.waiting.remove(0);
        }
        self.waiting.push(Unclaimed {
            socket: socket.into(),
            deadline: now + PATIENCE,
            token: [0; 8],
            received: 0,
        });
        let newest = self.waiting.len() - 1;
        self.readable(newest);
    }

    /// Streams whose token is not complete, by index: to be polled for reading.
    pub fn incomplete(&self) -> impl Iterator<Item = (usize, &File)> {
        self.waiting
            .iter()
            .enumerate()
            .filter(|(_, stream)| stream.token().is_none())
            .map(|(index, stream)| (index, &stream.socket))
    }

    /// Reads on at a token. A stream that ends before its token is complete, or brings one that
    /// waits already, is marked for [`expire`](Self::expire). Indices stay valid until that is called.
    pub fn readable(&mut self, index: usize) {
        let Some(stream) = self.waiting.get_mut(index) else { return };
        while stream.received < stream.token.len() {
            match stream.socket.read(&mut stream.token[stream.received..]) {
                Ok(count) if count > 0 => stream.received += count,
                Err(error) if error.kind() == std::io::ErrorKind::WouldBlock => return,
                Err(error) if error.kind() == std::io::ErrorKind::Interrupted => {}
                Ok(_) | Err(_) => {
                    stream.deadline = Instant::now();
                    return;
                }
            }
        }
    }

    /// Hands a stream over if it is there.
    pub fn claim(&mut self, token: StreamToken) -> Option<OwnedFd> {
        let index = self.waiting.iter().position(|stream| stream.token() == Some(token))?;
        Some(self.waiting.remove(index).socket.into())
    }

    pub fn has(&self, token: StreamToken) -> bool {
        self.waiting.iter().any(|stream| stream.token() == Some(token))
    }

    /// Closes the streams nobody claimed in time.
    pub fn expire(&mut self, now: Instant) {
        self.waiting.retain(|stream| stream.deadline > now);
    }

    pub fn deadline(&self) -> Option<Instant> {
        self.waiting.iter().map(|stream| stream.deadline).min()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::Write;
    use std::os::unix::net::UnixStream;

    fn stream(streams: &mut Streams, now: Instant) -> UnixStream {
        let (near, far) = UnixStream::pair().unwrap();
        near.set_nonblocking(true).unwrap();
        streams.arrived(near.into(), now);
        far
    }

    #[test]
    fn a_token_in_pieces_and_not_a_byte_more() {
        let now = Instant::now();
        let mut streams = Streams::default();
        let mut far = stream(&mut streams, now);
        far.write_all(&[1, 0, 0]).unwrap();
        streams.readable(0);
        assert_eq!(streams.incomplete().count(), 1);
        far.write_all(&[0, 0, 0, 0, 2, b'h', b'i']).unwrap();
        streams.readable(0);
        assert_eq!(streams.incomplete().count(), 0);

        let token = 1 | 2 << 56;
        assert!(streams.claim(1).is_none());
        assert!(streams.has(token));
        let mut claimed = File::from(streams.claim(token).unwrap());
        let mut rest = [0; 8];
        assert_eq!(claimed.read(&mut rest).unwrap(), 2);
        assert_eq!(&rest[..2], b"hi");
        assert!(streams.claim(token).is_none(), "claimed twice");
    }

    #[test]
    fn waiting_is_bounded_in_number_and_time() {
        let now = Instant::now();
        let mut streams = Streams::default();
        let far: Vec<_> = (0..=UNCLAIMED_MAX as u64)
            .map(|token| {
                let (near, mut far) = UnixStream::pair().unwrap();
                near.set_nonblocking(true).unwrap();
                far.write_all(&token.to_le_bytes()).unwrap();
                streams.arrived(near.into(), now);
                far
            })
            .collect();
        assert!(!streams.has(0), "the oldest made room");
        assert!(streams.has(1) && streams.has(UNCLAIMED_MAX as u64));
        streams.expire(now + PATIENCE - Duration::from_secs(1));
        assert!(streams.has(1));
        streams.expire(now + PATIENCE);
        assert!(streams.deadline().is_none());
        let mut byte = [0];
        assert_eq!((&far[1]).read(&mut byte).unwrap(), 0, "closed");
    }

    #[test]
    fn one_that_ends_before_its_token_goes() {
        let now = Instant::now();
        let mut streams = Streams::default();
        drop(stream(&mut streams, now));
        streams.readable(0);
        streams.expire(Instant::now());
        assert!(streams.deadline().is_none());
    }
}
