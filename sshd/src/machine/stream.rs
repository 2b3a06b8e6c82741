//! Byte streams between the service and a machine's process, under tokio.
//!
//! tokio's own `UnixStream` asks epoll for readiness to write as long as it lives. A Unix socket says so each time
//! its peer takes bytes out of it: so each small packet to a machine would wake this process once more, for
//! nothing, just when the machine is to answer. Here epoll is asked for it only while a write waits for room.

use std::{
    io::{self, ErrorKind, Read as _, Write as _},
    net::Shutdown,
    os::{fd::OwnedFd, unix::net::UnixStream},
    pin::Pin,
    sync::Arc,
    task::{Context, Poll, ready},
};

use tokio::io::{AsyncRead, AsyncWrite, Interest, ReadBuf, unix::AsyncFd};

/// A connected stream socket.
pub struct ByteStream(Arc<AsyncFd<UnixStream>>);

/// Reads; the other direction is not its.
pub struct ReadHalf(Arc<AsyncFd<UnixStream>>);

/// Writes. The peer sees the end when this is dropped.
pub struct WriteHalf {
    stream: Arc<AsyncFd<UnixStream>>,
    /// A duplicate that is watched for room. Kept from one write that waits to the next.
    room: Option<AsyncFd<UnixStream>>,
    /// The write under way found no room at first.
    waited: bool,
}

impl ByteStream {
    /// Takes a stream socket and makes it non-blocking. Within a runtime.
    pub fn new(socket: impl Into<OwnedFd>) -> io::Result<Self> {
        let socket = UnixStream::from(socket.into());
        socket.set_nonblocking(true)?;
        Ok(Self(Arc::new(watch(socket, Interest::READABLE)?)))
    }

    pub fn into_split(self) -> (ReadHalf, WriteHalf) {
        (ReadHalf(self.0.clone()), WriteHalf { stream: self.0, room: None, waited: false })
    }
}

impl ReadHalf {
    /// For good: who writes to it gets an error from now on (EPIPE).
    pub fn shut_down(self) {
        let mut socket = self.0.get_ref();
        // A peer that is gone can't be told.
        let _ = socket.shutdown(Shutdown::Read);
        // A peer that waits for room does not try to write. Nothing comes after what is there, and then an end.
        let mut rest = [0; 4096];
        while socket.read(&mut rest).is_ok_and(|count| count > 0) {}
    }
}

impl AsyncRead for ReadHalf {
    fn poll_read(
        self: Pin<&mut Self>,
        context: &mut Context<'_>,
        buffer: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        poll_read(&self.0, context, buffer)
    }
}

impl AsyncRead for ByteStream {
    fn poll_read(
        self: Pin<&mut Self>,
        context: &mut Context<'_>,
        buffer: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        poll_read(&self.0, context, buffer)
    }
}

/// tokio has since made its callers promise, in an unsafe call, that the descriptor stays the same one and open.
/// A `UnixStream` of the standard library's keeps that promise by itself.
#[expect(deprecated, reason = "what came instead is unsafe, which this crate forbids")]
fn watch(socket: UnixStream, interest: Interest) -> io::Result<AsyncFd<UnixStream>> {
    AsyncFd::with_interest(socket, interest)
}

fn poll_read(
    socket: &AsyncFd<UnixStream>,
    context: &mut Context<'_>,
    buffer: &mut ReadBuf<'_>,
) -> Poll<io::Result<()>> {
    loop {
        let mut ready = ready!(socket.poll_read_ready(context))?;
        let room = buffer.initialize_unfilled();
        match socket.get_ref().read(room) {
            Ok(count) => {
                // Less than there was room for: that was all, and what comes next is told anew. An end that is
                // there already stays told.
                if count > 0 && count < room.len() {
                    ready.clear_ready();
                }
                buffer.advance(count);
                return Poll::Ready(Ok(()));
            }
            Err(error) if error.kind() == ErrorKind::WouldBlock => ready.clear_ready(),
            Err(error) if error.kind() == ErrorKind::Interrupted => {}
            Err(error) => return Poll::Ready(Err(error)),
        }
    }
}

impl WriteHalf {
    /// What is watched for room, from now on if nothing was.
    fn room(&mut self) -> io::Result<&AsyncFd<UnixStream>> {
        Ok(match &mut self.room {
            Some(room) => room,
            room => {
                let duplicate = self.stream.get_ref().try_clone()?;
                room.insert(watch(duplicate, Interest::WRITABLE)?)
            }
        })
    }
}

impl AsyncWrite for WriteHalf {
    fn poll_write(
        self: Pin<&mut Self>,
        context: &mut Context<'_>,
        bytes: &[u8],
    ) -> Poll<io::Result<usize>> {
        let this = self.get_mut();
        loop {
            // Said before the try: room that comes after a try in vain is then told anew.
            let ready = match (this.waited, &this.room) {
                (true, Some(room)) => Some(ready!(room.poll_write_ready(context))?),
                _ => None,
            };
            match this.stream.get_ref().write(bytes) {
                Err(error) if error.kind() == ErrorKind::WouldBlock => {
                    if let Some(mut ready) = ready {
                        ready.clear_ready();
                    }
                    this.waited = true;
                    this.room()?;
                }
                Err(error) if error.kind() == ErrorKind::Interrupted => {}
                result => {
                    // Two writes in a row that found room: nobody need watch for it.
                    if !std::mem::take(&mut this.waited) {
                        this.room = None;
                    }
                    return Poll::Ready(result);
                }
            }
        }
    }

    fn poll_flush(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<io::Result<()>> {
        Poll::Ready(Ok(()))
    }

    fn poll_shutdown(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<io::Result<()>> {
        Poll::Ready(self.stream.get_ref().shutdown(Shutdown::Write))
    }
}

impl Drop for WriteHalf {
    fn drop(&mut self) {
        // A peer that is gone can't be told.
        let _ = self.stream.get_ref().shutdown(Shutdown::Write);
    }
}

#[cfg(test)]
mod tests {
    use std::{os::fd::AsRawFd as _, time::Duration};

    use hermitage_vmm_proto::stream_pair;
    use tokio::{
        io::{AsyncReadExt as _, AsyncWriteExt as _},
        time::timeout,
    };

    use super::*;

    fn pair() -> (ByteStream, UnixStream) {
        let (ours, theirs) = stream_pair(true).unwrap();
        (ByteStream::new(ours).unwrap(), UnixStream::from(theirs))
    }

    #[tokio::test]
    async fn bytes_pass_whole_both_ways_however_full_the_socket_is() {
        let (ours, theirs) = pair();
        let (mut from, mut to) = ours.into_split();
        let sent: Vec<u8> = (0..3_000_000u32).map(|n| (n / 7) as u8).collect();
        theirs.set_nonblocking(false).unwrap();
        let echo = std::thread::spawn(move || {
            let (mut socket, mut back) = (&theirs, Vec::new());
            // In bursts, so that the writer finds room, then none, then room.
            let mut chunk = vec![0; 300_000];
            loop {
                let count = socket.read(&mut chunk).unwrap();
                if count == 0 {
                    break;
                }
                back.extend_from_slice(&chunk[..count]);
                std::thread::sleep(Duration::from_micros(300));
            }
            socket.write_all(&back).unwrap();
        });
        to.write_all(&sent).await.unwrap();
        to.shutdown().await.unwrap();
        let mut got = Vec::new();
        timeout(Duration::from_secs(60), from.read_to_end(&mut got)).await.unwrap().unwrap();
        assert!(got == sent, "{} bytes of {}", got.len(), sent.len());
        echo.join().unwrap();
    }

    #[tokio::test]
    async fn an_end_that_comes_with_the_last_bytes_is_seen() {
        for _ in 0..100 {
            let (ours, mut theirs) = pair();
            theirs.write_all(b"last").unwrap();
            drop(theirs);
            let (mut from, _to) = ours.into_split();
            let mut got = vec![];
            let read = from.read_to_end(&mut got);
            timeout(Duration::from_secs(10), read).await.unwrap().unwrap();
            assert_eq!(got, b"last");
        }
    }

    #[tokio::test]
    async fn dropping_the_writer_ends_the_peers_input_and_nothing_else() {
        let (ours, mut theirs) = pair();
        let (mut from, to) = ours.into_split();
        drop(to);
        assert_eq!(theirs.read(&mut [0]).unwrap(), 0);
        theirs.write_all(b"x").unwrap();
        assert_eq!(from.read_u8().await.unwrap(), b'x');
    }

    #[tokio::test]
    async fn shutting_down_the_reader_fails_the_peer_that_waits_for_room_and_nothing_else() {
        let (ours, mut theirs) = pair();
        theirs.set_nonblocking(false).unwrap();
        let (from, mut to) = ours.into_split();
        let (writes, refused) = std::sync::mpsc::channel();
        let mut writing = theirs.try_clone().unwrap();
        std::thread::spawn(move || {
            let error = loop {
                if let Err(error) = writing.write(&[0; 65536]) {
                    break error;
                }
            };
            writes.send(error.kind()).unwrap();
        });
        // Until it waits.
        let full = refused.recv_timeout(Duration::from_millis(200));
        assert!(full.is_err(), "endless room in a socket that nobody reads: {full:?}");
        from.shut_down();
        let told = refused.recv_timeout(Duration::from_secs(10)).unwrap();
        assert_eq!(told, ErrorKind::BrokenPipe);
        to.write_all(b"x").await.unwrap();
        assert_eq!(theirs.read(&mut [0]).unwrap(), 1);
    }

    /// What epoll is asked for about a descriptor (proc_pid_fdinfo(5)). None: nothing, not even of its end.
    fn asked_of_epoll(socket: &UnixStream) -> Option<u32> {
        let mut asked = None;
        for info in std::fs::read_dir("/proc/self/fdinfo").unwrap() {
            // Other tests' descriptors come and go.
            let Ok(text) = std::fs::read_to_string(info.unwrap().path()) else { continue };
            for line in text.lines() {
                let words: Vec<_> = line.split_whitespace().collect();
                if let ["tfd:", fd, "events:", events, ..] = words[..]
                    && fd == socket.as_raw_fd().to_string()
                {
                    asked = Some(u32::from_str_radix(events, 16).unwrap());
                }
            }
        }
        asked
    }

    /// Each time a peer takes bytes, a Unix socket says that it has room. Nobody is to be woken by that.
    #[tokio::test]
    async fn room_is_asked_for_only_by_a_write_that_waits() {
        const IN: u32 = 1;
        const OUT: u32 = 4;
        let (ours, mut theirs) = pair();
        let (_from, mut to) = ours.into_split();
        to.write_all(b"request").await.unwrap();
        let asked = asked_of_epoll(to.stream.get_ref());
        assert_eq!(asked.map(|events| events & (IN | OUT)), Some(IN));

        let full = vec![0; 4 << 20];
        let waited = timeout(Duration::from_millis(50), to.write_all(&full)).await;
        assert!(waited.is_err(), "4 MiB in a socket that nobody reads");
        let room = to.room.as_ref().expect("the write waits");
        assert_eq!(asked_of_epoll(room.get_ref()).map(|events| events & OUT), Some(OUT));
        while theirs.read(&mut [0; 65536]).is_ok() {}
        for _ in 0..2 {
            timeout(Duration::from_secs(10), to.write_all(b"x")).await.unwrap().unwrap();
        }
        assert!(to.room.is_none(), "room is still watched for");
    }
}
