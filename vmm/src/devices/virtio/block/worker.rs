//! The thread that does the disk's work.

use std::{
    collections::VecDeque,
    io,
    sync::{
        Arc, Condvar, Mutex, MutexGuard, PoisonError,
        atomic::{AtomicUsize, Ordering},
    },
    thread,
    time::Instant,
};

use vm_memory::Bytes;

use super::{
    Block, BlockStats,
    copying::{CopyOrder, Copying},
    disk::{Disk, REST},
    held::Held,
    request::{Request, Status, Work},
    work::{Failure, attempt, attempt_without_disk, has_hole},
};
use crate::{
    devices::virtio::{chain::total, transport::Handle},
    memory::GuestMemory,
};

const ONE_AT_A_TIME: &str = "a copy of the disk is being made already";

/// A request that is over.
pub struct Done {
    pub head: u16,
    pub written: u32,
    pub stats: BlockStats,
}

/// The way to the thread. It ends when this is dropped, after the request it is at.
pub struct Worker(Arc<Shared>);

#[derive(Default)]
struct Shared {
    inbox: Mutex<Inbox>,
    wake: Condvar,
    /// Writes that wait for room, to be looked at from outside.
    held: AtomicUsize,
}

/// Which copy is given up.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Which {
    Any,
    Number(u64),
}

impl Which {
    fn is(self, number: u64) -> bool {
        match self {
            Self::Any => true,
            Self::Number(which) => which == number,
        }
    }
}

#[derive(Default)]
struct Inbox {
    requests: VecDeque<Request>,
    disk: Option<Arc<Disk>>,
    /// No write waits for room: it fails instead, at once.
    impatient: bool,
    /// A copy that is to be begun.
    copy: Option<CopyOrder>,
    /// Which are to be given up, and why.
    no_copy: VecDeque<(Which, String)>,
    closed: bool,
}

impl Shared {
    fn inbox(&self) -> MutexGuard<'_, Inbox> {
        self.inbox.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Worker {
    pub fn start(memory: GuestMemory, device: Handle<Block>) -> io::Result<Self> {
        let shared = Arc::new(Shared::default());
        let mine = shared.clone();
        thread::Builder::new()
            .name("disk".into())
            // It has no deep calls, and its stack is memory of every machine.
            .stack_size(256 * 1024)
            .spawn(move || run(&mine, &memory, &device))?;
        Ok(Self(shared))
    }

    pub fn submit(&self, request: Request) {
        self.0.inbox().requests.push_back(request);
        self.0.wake.notify_one();
    }

    pub fn set_disk(&self, disk: Arc<Disk>) {
        self.0.inbox().disk = Some(disk);
    }

    pub fn set_impatient(&self, impatient: bool) {
        self.0.inbox().impatient = impatient;
        self.0.wake.notify_one();
    }

    pub fn copy(&self, order: CopyOrder) {
        let mut inbox = self.0.inbox();
        match inbox.copy {
            Some(_) => order.refuse(ONE_AT_A_TIME),
            None => inbox.copy = Some(order),
        }
        drop(inbox);
        self.0.wake.notify_one();
    }

    /// Gives up the copy that is being made, if it is such a one.
    pub fn no_copy(&self, which: Which, reason: String) {
        let mut inbox = self.0.inbox();
        if let Some(order) = inbox.copy.take_if(|order| which.is(order.number)) {
            order.refuse(reason.clone());
        }
        inbox.no_copy.push_back((which, reason));
        drop(inbox);
        self.0.wake.notify_one();
    }

    /// Writes that wait for room.
    pub fn held(&self) -> usize {
        self.0.held.load(Ordering::Relaxed)
    }
}

impl Drop for Worker {
    fn drop(&mut self) {
        self.0.inbox().closed = true;
        self.0.wake.notify_one();
    }
}

fn run(shared: &Shared, memory: &GuestMemory, device: &Handle<Block>) {
    let mut disk_work = DiskWork {
        memory,
        held: Held::new(),
        copying: None,
        rests: None,
        failures: 0,
        shortages: 0,
    };
    let mut last = Last::Other;
    while let Some(job) = next(shared, &mut disk_work, last) {
        last = match job.turn {
            Turn::Retry(_) => Last::Retry,
            Turn::CopyStep => Last::CopyStep,
            _ => Last::Other,
        };
        let (disk, rested) = (job.disk.clone(), matches!(job.turn, Turn::Rest));
        let done = disk_work.take_turn(job);
        let to_sync = !rested && disk.is_some_and(|disk| disk.is_unsynced());
        disk_work.rests = to_sync.then(|| Instant::now() + REST);
        shared.held.store(disk_work.held.len(), Ordering::Relaxed);
        if done.is_empty() {
            continue;
        }
        let Some(device) = device.upgrade() else { return };
        if let Err(fault) = device.with(|block, context| block.finish(&done, context)) {
            device.leave_fault(fault);
        }
    }
}

/// What the thread does next.
enum Turn {
    New(Request),
    Retry(Request),
    /// Answers what waits for room with an error.
    GiveUp(Vec<Request>),
    BeginCopy(CopyOrder),
    EndCopy(Which, String),
    CopyStep,
    /// There is nothing to do, and was not for a while.
    Rest,
}

struct Job {
    turn: Turn,
    disk: Option<Arc<Disk>>,
    /// A write may wait for room.
    may_wait: bool,
}

/// What was done last: what there may be much of alternates with the guest's requests.
#[derive(Clone, Copy, PartialEq)]
enum Last {
    Retry,
    CopyStep,
    Other,
}

/// Waits for something to do. None: the thread's end.
fn next(shared: &Shared, work: &mut DiskWork, last: Last) -> Option<Job> {
    let mut inbox = shared.inbox();
    loop {
        if inbox.closed {
            return None;
        }
        let now = Instant::now();
        let may_wait = !inbox.impatient;
        let steps = work.copying.as_ref().and_then(|copying| copying.due_in(now));
        let turn = if let Some((which, reason)) = inbox.no_copy.pop_front() {
            Some(Turn::EndCopy(which, reason))
        } else if let Some(order) = inbox.copy.take() {
            Some(Turn::BeginCopy(order))
        } else if !may_wait && work.copying.is_some() {
            Some(Turn::EndCopy(Which::Any, "the guest has reset its disk".into()))
        } else if !may_wait && !work.held.is_empty() {
            Some(Turn::GiveUp(work.held.drain()))
        } else if steps.is_some_and(|due| due.is_zero())
            && (last != Last::CopyStep
                || inbox.requests.is_empty()
                    && !work.held.due_in(now).is_some_and(|due| due.is_zero()))
        {
            Some(Turn::CopyStep)
        } else {
            let new = |inbox: &mut Inbox| inbox.requests.pop_front().map(Turn::New);
            if last == Last::Retry {
                new(&mut inbox).or_else(|| work.held.take(now).map(Turn::Retry))
            } else {
                work.held.take(now).map(Turn::Retry).or_else(|| new(&mut inbox))
            }
        };
        let rest = work.rests.map(|then| then.saturating_duration_since(now));
        let turn = turn.or_else(|| rest.filter(|rest| rest.is_zero()).map(|_| Turn::Rest));
        if let Some(turn) = turn {
            return Some(Job { turn, disk: inbox.disk.clone(), may_wait });
        }
        inbox = match work.held.due_in(now).into_iter().chain(steps).chain(rest).min() {
            None => shared.wake.wait(inbox).unwrap_or_else(PoisonError::into_inner),
            Some(time) => {
                let woken = shared.wake.wait_timeout(inbox, time);
                woken.unwrap_or_else(PoisonError::into_inner).0
            }
        };
    }
}

struct DiskWork<'a> {
    memory: &'a GuestMemory,
    held: Held,
    copying: Option<Copying>,
    /// When the disk is synced unasked, if nothing is asked of it until then.
    rests: Option<Instant>,
    /// Requests that failed, and times that the room ran out, for the log.
    failures: u64,
    shortages: u64,
}

impl DiskWork<'_> {
    /// The requests that are over after it.
    fn take_turn(&mut self, Job { turn, disk, may_wait }: Job) -> Vec<Done> {
        let disk = disk.as_ref();
        match turn {
            Turn::GiveUp(requests) => {
                requests.iter().map(|request| self.answer(request, Status::IoError)).collect()
            }
            Turn::New(request) => {
                let copying = self.copying.as_mut().filter(|copying| copying.is_of(disk));
                let passed = match copying {
                    Some(copying) => copying.pass(request),
                    None => Some(request),
                };
                passed.and_then(|request| self.begin(request, disk, may_wait)).into_iter().collect()
            }
            Turn::Retry(request) => match self.execute(&request, disk) {
                Ok(done) => {
                    self.held.fitted(Instant::now());
                    if self.held.is_empty() {
                        tracing::debug!("no write waits for room any more");
                    }
                    vec![done]
                }
                Err(_) => {
                    self.held.again(request, Instant::now());
                    vec![]
                }
            },
            Turn::BeginCopy(order) => {
                match (&self.copying, disk) {
                    (Some(_), _) => order.refuse(ONE_AT_A_TIME),
                    (None, None) => order.refuse("the machine has no disk"),
                    (None, Some(disk)) => self.copying = order.begin(disk),
                }
                vec![]
            }
            Turn::EndCopy(which, reason) => {
                match self.copying.as_ref().is_some_and(|copying| which.is(copying.number())) {
                    true => self.end_copy(Err(reason), disk, may_wait),
                    false => vec![],
                }
            }
            Turn::CopyStep => match self.copying.as_mut().map(Copying::step) {
                Some(Ok(step)) if step.whole => self.end_copy(Ok(()), disk, may_wait),
                Some(Ok(step)) => {
                    let free = step.free.into_iter();
                    free.filter_map(|request| self.begin(request, disk, may_wait)).collect()
                }
                Some(Err(reason)) => self.end_copy(Err(reason), disk, may_wait),
                None => vec![],
            },
            Turn::Rest => {
                if let Some(disk) = disk {
                    disk.sync_at_rest();
                }
                vec![]
            }
        }
    }

    /// Requests that waited for it are done.
    fn end_copy(
        &mut self,
        outcome: Result<(), String>,
        disk: Option<&Arc<Disk>>,
        may_wait: bool,
    ) -> Vec<Done> {
        let Some(copying) = self.copying.take() else { return vec![] };
        let waited = copying.end(outcome);
        waited.into_iter().filter_map(|request| self.begin(request, disk, may_wait)).collect()
    }

    /// Does a request, or has it wait for room.
    fn begin(
        &mut self,
        request: Request,
        disk: Option<&Arc<Disk>>,
        may_wait: bool,
    ) -> Option<Done> {
        if may_wait && self.is_in_vain(&request, disk.map(Arc::as_ref)) {
            // It would be slow and find nothing.
            self.held.push(request, Instant::now());
            return None;
        }
        match self.execute(&request, disk) {
            Ok(done) => Some(done),
            Err(error) if may_wait => {
                self.hold(request, &error);
                None
            }
            Err(error) => Some(self.failed(&request, &error)),
        }
    }

    fn hold(&mut self, request: Request, error: &io::Error) {
        if self.held.is_empty() {
            self.shortages += 1;
            // As with failures: the guest decides how often.
            if self.shortages.is_power_of_two() {
                let times = self.shortages;
                tracing::warn!(%error, times, "the host has no room for the disk; writes wait");
            }
        }
        self.held.push(request, Instant::now());
    }

    /// It needs room of the host's disk, and others wait for that already. What only overwrites goes on:
    /// without the guest's journal nothing in it would.
    fn is_in_vain(&self, request: &Request, disk: Option<&Disk>) -> bool {
        let Some(disk) = disk.filter(|_| !self.held.is_empty()) else { return false };
        match &request.work {
            Work::Write { offset, from } => has_hole(disk, *offset, total(from)),
            Work::WriteZeroes(ranges) => ranges
                .iter()
                .any(|range| !range.unmap && has_hole(disk, range.offset, range.length)),
            _ => false,
        }
    }

    /// Does one request, whatever comes of it. An error means that it met the end of the host's room
    /// and can be tried again.
    fn execute(&mut self, request: &Request, disk: Option<&Arc<Disk>>) -> Result<Done, io::Error> {
        self.copy_before(&request.work, disk);
        let mut stats = BlockStats::default();
        let result = match disk {
            // Without a disk the capacity is 0, so only what touches no data comes this far.
            None => attempt_without_disk(request, self.memory),
            Some(disk) => attempt(&request.work, disk, self.memory, &mut stats),
        };
        match result {
            Ok(written) => {
                let done = self.answer(request, Status::Ok);
                Ok(Done { written: written.saturating_add(1), stats, ..done })
            }
            Err(Failure::Status(status)) => Ok(self.answer(request, status)),
            Err(Failure::NoRoom(error)) => Err(error),
            Err(Failure::Io(error)) => Ok(self.failed(request, &error)),
        }
    }

    /// What a copy still needs of what this changes is copied. A copy that fails is none; the guest's request
    /// is done all the same.
    fn copy_before(&mut self, work: &Work, disk: Option<&Arc<Disk>>) {
        let Some(copying) = &mut self.copying else { return };
        let outcome = match copying.is_of(disk) {
            true => copying.protect(work),
            false => Err("another disk was put in its place".into()),
        };
        if let Err(reason) = outcome {
            copying.fail(reason);
        }
    }

    fn failed(&mut self, request: &Request, error: &io::Error) -> Done {
        self.failures += 1;
        // The first ones, then ever fewer: a guest with a broken disk would fill the log.
        if self.failures.is_power_of_two() {
            tracing::warn!(%error, failures = self.failures, "disk request failed");
        }
        self.answer(request, Status::IoError)
    }

    fn answer(&self, request: &Request, status: Status) -> Done {
        // The address was checked when the request was read, and memory does not go away.
        let _ = self.memory.write_obj(status as u8, request.status);
        let errors = u64::from(status == Status::IoError);
        Done { head: request.head, written: 1, stats: BlockStats { errors, ..Default::default() } }
    }
}
