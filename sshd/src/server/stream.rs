//! The TCP connection as russh sees it, with two taps: reads are paced while too much input is queued
//! ([`Inflow`]), and the connection can be cut at any moment. russh offers neither: its handle can
//! only ask politely, and not at all before the key exchange is done.

use std::{
    io,
    pin::Pin,
    sync::{
        Arc, Mutex, MutexGuard, PoisonError,
        atomic::{AtomicBool, Ordering},
    },
    task::{Context, Poll, Waker, ready},
    time::Duration,
};

use tokio::{
    io::{AsyncRead, AsyncWrite, BufReader, ReadBuf},
    net::TcpStream,
    time::{Instant, Sleep, sleep},
};
use tokio_util::sync::CancellationToken;

use crate::session::Inflow;

pub struct Stream {
    /// russh reads a packet's length and then the rest: buffered, small packets are one read of the socket.
    tcp: BufReader<TcpStream>,
    inflow: Arc<Inflow>,
    switch: Arc<Switch>,
    pace: Pace,
}

/// Reads that a connection still has while its programs do not keep up. A packet takes two or three.
struct Pace {
    reads: u32,
    refill: Pin<Box<Sleep>>,
}

/// Enough for what is on its way when the windows close.
const MOST_READS: u32 = 1024;

/// Then 100 packets a second.
const REFILL: u32 = 30;
const REFILL_EVERY: Duration = Duration::from_millis(100);

/// Cuts its connection.
#[derive(Default)]
pub struct Switch {
    cut: AtomicBool,
    /// The tasks that wait for the connection: its reader and its writer.
    wakers: Mutex<[Option<Waker>; 2]>,
    /// The server has said all it has to say: what remains is the client's closing.
    pub finished: CancellationToken,
}

const READER: usize = 0;
const WRITER: usize = 1;

impl Switch {
    pub fn cut(&self) {
        self.cut.store(true, Ordering::Release);
        self.wakers().iter_mut().filter_map(Option::take).for_each(Waker::wake);
    }

    /// Whether the connection is cut; if not, the task is woken when it is.
    fn is_cut(&self, who: usize, context: &Context<'_>) -> bool {
        if let Some(waker) = self.wakers().get_mut(who) {
            match waker {
                Some(waker) => waker.clone_from(context.waker()),
                None => *waker = Some(context.waker().clone()),
            }
        }
        self.cut.load(Ordering::Acquire)
    }

    fn wakers(&self) -> MutexGuard<'_, [Option<Waker>; 2]> {
        self.wakers.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Stream {
    pub fn new(tcp: TcpStream, inflow: Arc<Inflow>) -> (Self, Arc<Switch>) {
        let switch = Arc::new(Switch::default());
        let pace = Pace { reads: MOST_READS, refill: Box::pin(sleep(REFILL_EVERY)) };
        let tcp = BufReader::new(tcp);
        (Self { tcp, inflow, switch: switch.clone(), pace }, switch)
    }
}

impl Pace {
    /// Whether one more read is due; if not, the task is woken when it is.
    fn poll_read(&mut self, calm: bool, context: &mut Context<'_>) -> Poll<()> {
        if calm {
            self.reads = MOST_READS;
            return Poll::Ready(());
        }
        if self.refill.as_mut().poll(context).is_ready() {
            self.reads = (self.reads + REFILL).min(MOST_READS);
            self.refill.as_mut().reset(Instant::now() + REFILL_EVERY);
            // Registers the new time.
            let _ = self.refill.as_mut().poll(context);
        }
        if self.reads == 0 {
            return Poll::Pending;
        }
        Poll::Ready(())
    }

    fn read(&mut self) {
        self.reads = self.reads.saturating_sub(1);
    }
}

impl AsyncRead for Stream {
    fn poll_read(
        self: Pin<&mut Self>,
        context: &mut Context<'_>,
        buffer: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        if self.switch.is_cut(READER, context) {
            return Poll::Ready(Ok(()));
        }
        if !self.inflow.may_read(context) {
            return Poll::Pending;
        }
        let this = self.get_mut();
        ready!(this.pace.poll_read(this.inflow.calm(), context));
        ready!(Pin::new(&mut this.tcp).poll_read(context, buffer))?;
        this.pace.read();
        Poll::Ready(Ok(()))
    }
}

impl AsyncWrite for Stream {
    fn poll_write(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        bytes: &[u8],
    ) -> Poll<io::Result<usize>> {
        if self.switch.is_cut(WRITER, context) {
            return Poll::Ready(Err(io::ErrorKind::ConnectionAborted.into()));
        }
        Pin::new(&mut self.tcp).poll_write(context, bytes)
    }

    fn poll_flush(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.tcp).poll_flush(context)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        self.switch.finished.cancel();
        Pin::new(&mut self.tcp).poll_shutdown(context)
    }
}
