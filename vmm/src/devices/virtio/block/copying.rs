//! What the disk's thread has of a copy while it is made: when its next step is due, what waits for it, and whom
//! to tell.
//!
//! The guest comes first. A step is a fraction of a millisecond's work, or one read and one write of a slow disk;
//! while requests come, steps take at most half of the time. A request that changes more than can be copied on the
//! way (a discard of gigabytes) steps aside and the others go on: until it is complete nobody relies on it, and
//! virtio gives requests under way no order.

use std::{
    collections::VecDeque,
    fs::File,
    io,
    sync::Arc,
    time::{Duration, Instant},
};

use super::{
    copy::{Begun, DiskCopy},
    disk::Disk,
    held::is_no_room,
    request::{Request, Work},
};

/// What may be copied on a request's way, in bytes.
const ON_THE_WAY: u64 = 1 << 20;

/// Longest pause between two steps: a disk that stalls stalls the guest as well.
const LONGEST_PAUSE: Duration = Duration::from_millis(100);

/// How often progress is told.
const TELL: Duration = Duration::from_millis(500);

/// How a copy stands.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum CopyNews {
    /// What the guest writes from now on is not in it. So many bytes are to be copied.
    Begun(u64),
    Copied(u64),
    /// The last word: so many bytes were copied, or why there is no copy.
    Over(Result<u64, String>),
}

/// A copy that is wanted. Exactly one [`CopyNews::Over`] comes of it, unless the machine ends.
pub struct CopyOrder {
    /// What it is given up by.
    pub number: u64,
    /// An empty file, open for reading and writing, that becomes the copy.
    pub side: File,
    /// Bytes that it may get.
    pub room: u64,
    /// Called by the disk's thread; must not wait.
    pub tell: Box<dyn Fn(CopyNews) + Send>,
}

impl CopyOrder {
    pub fn refuse(&self, reason: impl Into<String>) {
        (self.tell)(CopyNews::Over(Err(reason.into())));
    }

    /// None: it is over already.
    pub fn begin(self, disk: &Arc<Disk>) -> Option<Copying> {
        let Self { number, side, room, tell } = self;
        match DiskCopy::begin(disk.clone(), side, room) {
            Ok(Begun::Whole) => {
                tell(CopyNews::Begun(0));
                tell(CopyNews::Over(Ok(0)));
                None
            }
            Ok(Begun::Copying(copy, bytes)) => {
                tell(CopyNews::Begun(bytes));
                let now = Instant::now();
                Some(Copying {
                    number,
                    copy,
                    tell,
                    aside: VecDeque::new(),
                    failed: None,
                    due: now,
                    served: false,
                    told: now,
                })
            }
            Err(error) => {
                tell(CopyNews::Over(Err(words(&error))));
                None
            }
        }
    }
}

pub struct Copying {
    number: u64,
    copy: Box<DiskCopy>,
    tell: Box<dyn Fn(CopyNews) + Send>,
    /// Requests that change more than can be copied on their way. At most as many as the queue has entries.
    aside: VecDeque<Request>,
    /// It has come to nothing, and is to be ended.
    failed: Option<String>,
    due: Instant,
    /// A request was served since the last step.
    served: bool,
    told: Instant,
}

/// What a step has brought.
pub struct Step {
    pub whole: bool,
    /// A request that need not wait any more.
    pub free: Option<Request>,
}

impl Copying {
    pub fn number(&self) -> u64 {
        self.number
    }

    pub fn is_of(&self, disk: Option<&Arc<Disk>>) -> bool {
        disk.is_some_and(|disk| self.copy.is_of(disk))
    }

    /// How long until the next step; None: there is none.
    pub fn due_in(&self, now: Instant) -> Option<Duration> {
        Some(self.due.saturating_duration_since(now))
    }

    /// Gives a request back that can be done now; keeps one that has to wait.
    pub fn pass(&mut self, request: Request) -> Option<Request> {
        if self.failed.is_none() && self.copy.owes_more_than(ON_THE_WAY, &request.work) {
            self.aside.push_back(request);
            return None;
        }
        Some(request)
    }

    /// Copies what this is about to change.
    pub fn protect(&mut self, work: &Work) -> Result<(), String> {
        self.served = true;
        if self.failed.is_some() {
            return Ok(());
        }
        self.copy.protect(work).map_err(|error| words(&error))
    }

    /// From here on nothing of the copy counts; the next step says so.
    pub fn fail(&mut self, reason: String) {
        self.failed.get_or_insert(reason);
        self.due = Instant::now();
    }

    /// An error is the copy's end.
    pub fn step(&mut self) -> Result<Step, String> {
        if let Some(reason) = &self.failed {
            return Err(reason.clone());
        }
        let begun = Instant::now();
        let stepped = match self.aside.front() {
            Some(request) => {
                let free = self.copy.step_for(&request.work);
                free.map(|free| Step {
                    whole: false,
                    free: free.then(|| self.aside.pop_front()).flatten(),
                })
            }
            None => self.copy.step().map(|whole| Step { whole, free: None }),
        };
        let now = Instant::now();
        let pause = match std::mem::take(&mut self.served) {
            true => (now - begun).min(LONGEST_PAUSE),
            false => Duration::ZERO,
        };
        self.due = now + pause;
        if now - self.told >= TELL {
            self.told = now;
            (self.tell)(CopyNews::Copied(self.copy.copied()));
        }
        stepped.map_err(|error| words(&error))
    }

    /// Says how it ended. The requests that waited for it.
    pub fn end(self, outcome: Result<(), String>) -> VecDeque<Request> {
        if let Err(reason) = &outcome {
            tracing::info!(reason, "no copy of the disk");
        }
        (self.tell)(CopyNews::Over(outcome.map(|()| self.copy.copied())));
        self.aside
    }
}

fn words(error: &io::Error) -> String {
    match is_no_room(error) {
        true => format!("the host has no room for the copy: {error}"),
        false => format!("copying the disk: {error}"),
    }
}
