//! What a client sends on its channels, on the way to programs: queued, counted in bytes, and never
//! more than the connection may have.
//!
//! russh gives the receive window back when data arrives, not when a program takes it, and has no call
//! that gives it back later. Blocking in the data callback would bound what is queued, but the callback
//! holds up the whole connection; so would not reading it. Either way a program that ignores its input
//! would stop all others of its connection, and one that echoes what it reads could stop for ever: its
//! output waits for window adjustments that are not read any more.
//!
//! What russh does ask, each time it gives back, is how large the window shall be from then on
//! ([`Inflow::window`]). While more is queued than programs take, the answer is two bytes. What is on
//! its way still comes, then the client can send two bytes, gets two more, and so on: everything else
//! it says passes, and the first two bytes after the queue is short again bring the whole window back.
//! The trickle is paced by the connection's stream ([`Inflow::calm`]), so that it costs neither
//! processor nor, for hours, memory. A limit that no honest client reaches stops the reads.

use std::{
    collections::VecDeque,
    sync::{
        Arc, Mutex, MutexGuard, OnceLock, PoisonError,
        atomic::{AtomicUsize, Ordering},
    },
    task::{Context, Waker},
};

use tokio::sync::Notify;

use crate::watch::Live;

/// Queued bytes of a connection at which its windows close.
const CALM: usize = 1 << 20;

/// Queued bytes at which its reads stop.
const HIGHEST: usize = 16 << 20;

/// What a channel may have on its way to us, in bytes: the window we offer.
pub const WINDOW: u32 = 2 << 20;

/// The smallest window that russh ever gives back: it does so below half of it.
const TRICKLE: u32 = 2;

/// Chunks smaller than this are put together: a byte per packet must not cost a hundred.
const SMALL: usize = 4096;

/// A connection's account of queued input.
#[derive(Default)]
pub struct Inflow {
    queued: AtomicUsize,
    reader: Mutex<Option<Waker>>,
}

impl Inflow {
    /// Whether the connection may be read now. If not, the reader is woken when it may.
    pub fn may_read(&self, context: &Context<'_>) -> bool {
        if self.has_room() {
            return true;
        }
        *self.reader() = Some(context.waker().clone());
        // What was taken in between woke nobody.
        self.has_room()
    }

    /// The window to offer from now on.
    pub fn window(&self) -> u32 {
        if self.calm() { WINDOW } else { TRICKLE }
    }

    /// Whether programs keep up with their input.
    pub fn calm(&self) -> bool {
        self.queued.load(Ordering::Acquire) < CALM
    }

    fn has_room(&self) -> bool {
        self.queued.load(Ordering::Acquire) < HIGHEST
    }

    fn took(&self, bytes: usize) {
        self.queued.fetch_sub(bytes, Ordering::AcqRel);
        if self.has_room()
            && let Some(waker) = self.reader().take()
        {
            waker.wake();
        }
    }

    fn reader(&self) -> MutexGuard<'_, Option<Waker>> {
        self.reader.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// One channel's input.
pub struct InputQueue {
    inflow: Arc<Inflow>,
    state: Mutex<State>,
    changed: Notify,
    /// Whose client is heard by it.
    live: OnceLock<Arc<Live>>,
}

#[derive(Default)]
struct State {
    chunks: VecDeque<Vec<u8>>,
    ended: bool,
    discarding: bool,
}

impl InputQueue {
    pub fn new(inflow: Arc<Inflow>) -> Self {
        let (state, changed) = (Mutex::default(), Notify::new());
        Self { inflow, state, changed, live: OnceLock::new() }
    }

    /// From now on what comes is a sign of life of that session's client.
    pub fn on_input(&self, live: Arc<Live>) {
        // What came before was for it as well.
        live.traffic.received(self.state().chunks.iter().map(Vec::len).sum());
        let _ = self.live.set(live);
    }

    pub fn push(&self, data: &[u8]) {
        if let Some(live) = self.live.get() {
            live.heard();
            live.traffic.received(data.len());
        }
        let mut state = self.state();
        if state.ended || state.discarding || data.is_empty() {
            return;
        }
        self.inflow.queued.fetch_add(data.len(), Ordering::AcqRel);
        match state.chunks.back_mut() {
            Some(last) if last.len() + data.len() <= SMALL => last.extend_from_slice(data),
            _ => state.chunks.push_back(data.to_vec()),
        }
        drop(state);
        self.changed.notify_one();
    }

    /// No more will come.
    pub fn end(&self) {
        self.state().ended = true;
        self.changed.notify_one();
    }

    /// Nobody reads any more: what is there and what comes is dropped.
    pub fn discard(&self) {
        let mut state = self.state();
        state.discarding = true;
        let bytes = state.chunks.drain(..).map(|chunk| chunk.len()).sum();
        drop(state);
        self.inflow.took(bytes);
    }

    /// The next bytes, or None at the end. One reader; cancellation-safe.
    pub async fn next(&self) -> Option<Chunk<'_>> {
        loop {
            {
                let mut state = self.state();
                if let Some(bytes) = state.chunks.pop_front() {
                    return Some(Chunk { bytes, inflow: &self.inflow });
                }
                if state.ended {
                    return None;
                }
            }
            self.changed.notified().await;
        }
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Bytes out of the queue. They count until this is dropped: when they have reached the program.
pub struct Chunk<'a> {
    pub bytes: Vec<u8>,
    inflow: &'a Inflow,
}

impl Drop for Chunk<'_> {
    fn drop(&mut self) {
        self.inflow.took(self.bytes.len());
    }
}

impl Drop for InputQueue {
    fn drop(&mut self) {
        self.discard();
    }
}

#[cfg(test)]
mod tests {
    use std::{
        sync::atomic::AtomicBool,
        task::{Wake, Waker},
    };

    use super::*;

    #[derive(Default)]
    struct Woken(AtomicBool);

    impl Wake for Woken {
        fn wake(self: Arc<Self>) {
            self.0.store(true, Ordering::Release);
        }
    }

    #[tokio::test]
    async fn reads_pause_above_the_limit_and_go_on_below() {
        let inflow = Arc::new(Inflow::default());
        let queue = InputQueue::new(inflow.clone());
        let woken = Arc::new(Woken::default());
        let waker = Waker::from(woken.clone());
        let context = Context::from_waker(&waker);
        while inflow.may_read(&context) {
            queue.push(&[7; 32768]);
        }
        assert!(inflow.queued.load(Ordering::Acquire) < HIGHEST + 32768);
        assert!(!woken.0.load(Ordering::Acquire));
        let chunk = queue.next().await.unwrap();
        assert!(!inflow.may_read(&context), "only what a program took makes room");
        drop(chunk);
        assert!(woken.0.load(Ordering::Acquire));
        assert!(inflow.may_read(&context));
    }

    #[tokio::test]
    async fn the_window_closes_when_programs_do_not_keep_up() {
        let inflow = Arc::new(Inflow::default());
        let queue = InputQueue::new(inflow.clone());
        assert_eq!(inflow.window(), WINDOW);
        while inflow.calm() {
            queue.push(&[7; 32768]);
        }
        assert_eq!(inflow.window(), TRICKLE);
        drop(queue.next().await);
        assert_eq!(inflow.window(), WINDOW);
        drop(queue);
        assert_eq!(inflow.queued.load(Ordering::Acquire), 0, "a dropped queue gives all back");
    }

    #[tokio::test]
    async fn bytes_come_out_as_they_went_in_and_then_the_end() {
        let queue = InputQueue::new(Arc::default());
        let sent: Vec<u8> = (0..100_000u32).map(|n| n as u8).collect();
        for piece in sent.chunks(777) {
            queue.push(piece);
        }
        queue.end();
        queue.push(b"after the end");
        let mut got = vec![];
        while let Some(chunk) = queue.next().await {
            got.extend_from_slice(&chunk.bytes);
        }
        assert_eq!(got, sent);
        assert_eq!(queue.inflow.queued.load(Ordering::Acquire), 0);
    }
}
