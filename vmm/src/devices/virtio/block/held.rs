//! Writes that met a full disk of the host, and when to try them again.
//!
//! Answered with an error they would be lost: the guest's ext4 takes an i/o error for a broken disk and
//! shuts the file system down under all sessions. They are not complete, so nobody relies on them yet,
//! and they may wait for as long as it takes. There are at most as many as the queue has entries.

use std::{
    collections::VecDeque,
    io,
    time::{Duration, Instant},
};

use super::request::Request;

const FIRST_PAUSE: Duration = Duration::from_millis(100);
const LONGEST_PAUSE: Duration = Duration::from_secs(1);

/// The file system, or the quota of whoever owns the file, has no room.
pub fn is_no_room(error: &io::Error) -> bool {
    matches!(error.raw_os_error(), Some(libc::ENOSPC | libc::EDQUOT))
}

/// Oldest first. Only the oldest is tried, after a pause: meeting the end of the room may be slow (ext4
/// commits its journal to find some), and as writes may be done in parts, none fits where the oldest
/// does not. When that one fits the others follow at once.
#[derive(Debug)]
pub struct Held {
    requests: VecDeque<Request>,
    next: Instant,
    pause: Duration,
}

impl Held {
    pub fn new() -> Self {
        Self { requests: VecDeque::new(), next: Instant::now(), pause: FIRST_PAUSE }
    }

    pub fn len(&self) -> usize {
        self.requests.len()
    }

    pub fn is_empty(&self) -> bool {
        self.requests.is_empty()
    }

    /// Takes a request that there is no room for.
    pub fn push(&mut self, request: Request, now: Instant) {
        if self.requests.is_empty() {
            self.pause = FIRST_PAUSE;
            self.next = now + self.pause;
        }
        self.requests.push_back(request);
    }

    /// How long until there is something to try; None: nothing is held.
    pub fn due_in(&self, now: Instant) -> Option<Duration> {
        (!self.requests.is_empty()).then(|| self.next.saturating_duration_since(now))
    }

    /// The oldest, if it is time; to be given back by [`again`](Self::again) if it still does not fit.
    pub fn take(&mut self, now: Instant) -> Option<Request> {
        if self.due_in(now)? > Duration::ZERO {
            return None;
        }
        self.requests.pop_front()
    }

    /// It did not fit.
    pub fn again(&mut self, request: Request, now: Instant) {
        self.pause = (self.pause * 2).min(LONGEST_PAUSE);
        self.next = now + self.pause;
        self.requests.push_front(request);
    }

    /// It did.
    pub fn fitted(&mut self, now: Instant) {
        self.pause = FIRST_PAUSE;
        self.next = now;
    }

    /// All of them, to be answered otherwise.
    pub fn drain(&mut self) -> Vec<Request> {
        self.requests.drain(..).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::devices::virtio::block::request::Work;
    use vm_memory::GuestAddress;

    fn request(head: u16) -> Request {
        Request { head, status: GuestAddress(0), work: Work::Flush }
    }

    #[test]
    fn the_oldest_is_tried_ever_more_rarely_and_the_others_follow_it() {
        let mut held = Held::new();
        let mut now = Instant::now();
        assert_eq!(held.due_in(now), None);
        (0..3).for_each(|head| held.push(request(head), now));
        assert!(held.take(now).is_none(), "it has failed just now");
        let mut pauses = Vec::new();
        for _ in 0..6 {
            let pause = held.due_in(now).unwrap();
            pauses.push(pause.as_millis());
            now += pause;
            let oldest = held.take(now).unwrap();
            assert_eq!(oldest.head, 0);
            held.again(oldest, now);
            assert!(held.take(now).is_none());
        }
        assert_eq!(pauses, [100, 200, 400, 800, 1000, 1000]);
        now += LONGEST_PAUSE;
        for head in 0..3 {
            assert_eq!(held.take(now).unwrap().head, head);
            held.fitted(now);
        }
        assert_eq!((held.len(), held.due_in(now)), (0, None));
    }
}
