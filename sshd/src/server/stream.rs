//! The TCP connection as russh sees it, with two taps: reads pause while too much input is queued
//! ([`Inflow`]), and the connection can be cut at any moment. russh offers neither: its handle can
//! only ask politely, and not at all before the key exchange is done.

use std::{
    io,
    pin::Pin,
    sync::{
        Arc, Mutex, MutexGuard, PoisonError,
        atomic::{AtomicBool, Ordering},
    },
    task::{Context, Poll, Waker},
};

use tokio::{
    io::{AsyncRead, AsyncWrite, ReadBuf},
    net::TcpStream,
};
use tokio_util::sync::CancellationToken;

use crate::session::Inflow;

pub struct Stream {
    tcp: TcpStream,
    inflow: Arc<Inflow>,
    switch: Arc<Switch>,
}

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
        (Self { tcp, inflow, switch: switch.clone() }, switch)
    }
}

impl AsyncRead for Stream {
    fn poll_read(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        buffer: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        if self.switch.is_cut(READER, context) {
            return Poll::Ready(Ok(()));
        }
        if !self.inflow.may_read(context) {
            return Poll::Pending;
        }
        Pin::new(&mut self.tcp).poll_read(context, buffer)
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
