//! The thread that does the disk's work.

use std::{
    collections::VecDeque,
    fs::File,
    io,
    os::unix::fs::FileExt,
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
    held::{Held, is_no_room},
    request::{ID_BYTES, Range, Request, Status, Work},
};
use crate::{
    devices::virtio::{
        chain::{Segment, total, window, write_prefix},
        io as vio,
        transport::Handle,
    },
    memory::GuestMemory,
};

/// Names the disk in the guest (`/dev/disk/by-id/virtio-…`).
const SERIAL: &str = "hermitage-account";
const _: () = assert!(SERIAL.len() <= ID_BYTES);

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

#[derive(Default)]
struct Inbox {
    requests: VecDeque<Request>,
    disk: Option<Arc<File>>,
    /// No write waits for room: it fails instead, at once.
    impatient: bool,
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

    pub fn set_disk(&self, disk: Arc<File>) {
        self.0.inbox().disk = Some(disk);
    }

    pub fn set_impatient(&self, impatient: bool) {
        self.0.inbox().impatient = impatient;
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
    let mut disk_work = DiskWork { memory, held: Held::new(), failures: 0, shortages: 0 };
    let mut retried = false;
    while let Some((turn, disk)) = next(shared, &mut disk_work.held, retried) {
        retried = matches!(turn, Turn::Retry(_));
        let done = disk_work.take_turn(turn, disk.as_deref());
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
    New {
        request: Request,
        may_wait: bool,
    },
    Retry(Request),
    /// Answers what waits for room with an error.
    GiveUp(Vec<Request>),
}

/// Waits for something to do. Held requests and new ones take turns. None: the thread's end.
fn next(shared: &Shared, held: &mut Held, retried: bool) -> Option<(Turn, Option<Arc<File>>)> {
    let mut inbox = shared.inbox();
    loop {
        if inbox.closed {
            return None;
        }
        let now = Instant::now();
        let may_wait = !inbox.impatient;
        if !may_wait && !held.is_empty() {
            return Some((Turn::GiveUp(held.drain()), None));
        }
        let new = |inbox: &mut Inbox| {
            inbox.requests.pop_front().map(|request| Turn::New { request, may_wait })
        };
        let turn = if retried {
            new(&mut inbox).or_else(|| held.take(now).map(Turn::Retry))
        } else {
            held.take(now).map(Turn::Retry).or_else(|| new(&mut inbox))
        };
        if let Some(turn) = turn {
            return Some((turn, inbox.disk.clone()));
        }
        inbox = match held.due_in(now) {
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
    /// Requests that failed, and times that the room ran out, for the log.
    failures: u64,
    shortages: u64,
}

impl DiskWork<'_> {
    /// The requests that are over after it.
    fn take_turn(&mut self, turn: Turn, disk: Option<&File>) -> Vec<Done> {
        match turn {
            Turn::GiveUp(requests) => {
                requests.iter().map(|request| self.answer(request, Status::IoError)).collect()
            }
            // In vain: it would be slow and find nothing.
            Turn::New { request, may_wait } if may_wait && self.is_in_vain(&request, disk) => {
                self.held.push(request, Instant::now());
                vec![]
            }
            Turn::New { request, may_wait } => match self.execute(&request, disk) {
                Ok(done) => vec![done],
                Err(error) if may_wait => {
                    self.hold(request, &error);
                    vec![]
                }
                Err(error) => vec![self.failed(&request, &error)],
            },
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
    fn is_in_vain(&self, request: &Request, disk: Option<&File>) -> bool {
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
    fn execute(&mut self, request: &Request, disk: Option<&File>) -> Result<Done, io::Error> {
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

enum Failure {
    Status(Status),
    /// May go better later; nothing is lost by doing all of it again.
    NoRoom(io::Error),
    Io(io::Error),
}

impl Failure {
    /// Of what takes room on the host.
    fn of_writing(error: io::Error) -> Self {
        if is_no_room(&error) { Self::NoRoom(error) } else { Self::Io(error) }
    }
}

impl From<io::Error> for Failure {
    fn from(error: io::Error) -> Self {
        Self::Io(error)
    }
}

fn attempt_without_disk(request: &Request, memory: &GuestMemory) -> Result<u32, Failure> {
    match &request.work {
        Work::Identify { into } => Ok(identify(memory, into)),
        Work::Refuse(status) => Err(Failure::Status(*status)),
        _ => Err(Failure::Status(Status::IoError)),
    }
}

/// Bytes written to the guest, without the status.
fn attempt(
    work: &Work,
    disk: &File,
    memory: &GuestMemory,
    stats: &mut BlockStats,
) -> Result<u32, Failure> {
    match work {
        Work::Read { offset, into } => {
            let read = |segments: &[Segment], at| vio::read_at(disk, memory, segments, at);
            stats.read_bytes = transfer(into, *offset, read)?;
            // A request is bounded to 126 MiB.
            Ok(stats.read_bytes as u32)
        }
        Work::Write { offset, from } => {
            let write = |segments: &[Segment], at| vio::write_at(disk, memory, segments, at);
            stats.written_bytes = transfer(from, *offset, write).map_err(Failure::of_writing)?;
            Ok(0)
        }
        Work::Flush => {
            // Not to be tried again, not even for want of room: a second fdatasync forgets what the
            // first could not write (fsync(2)).
            disk.sync_data()?;
            stats.flushes = 1;
            Ok(0)
        }
        Work::Discard(ranges) => {
            // A file system that can't give space back has kept the data, which is allowed. One that
            // is full may need room to note a hole.
            for range in ranges {
                match punch(disk, range) {
                    Err(error) if !is_unsupported(&error) && !is_no_room(&error) => {
                        return Err(error.into());
                    }
                    _ => {}
                }
            }
            Ok(0)
        }
        Work::WriteZeroes(ranges) => {
            let mut zeroed = ranges.iter().map(|range| write_zeroes(disk, range));
            zeroed.try_for_each(|result| result.map_err(Failure::of_writing))?;
            Ok(0)
        }
        Work::Identify { into } => Ok(identify(memory, into)),
        Work::Refuse(status) => Err(Failure::Status(*status)),
    }
}

/// Goes on until everything is transferred: reads and writes may be short.
fn transfer(
    segments: &[Segment],
    offset: u64,
    mut step: impl FnMut(&[Segment], u64) -> io::Result<usize>,
) -> io::Result<u64> {
    let whole = total(segments);
    let mut done = 0;
    while done < whole {
        let count = match done {
            0 => step(segments, offset)?,
            _ => step(&window(segments, done, u64::MAX), offset + done)?,
        };
        if count == 0 {
            let at = offset + done;
            let message = format!("the disk's file ends at {at}, before its capacity");
            return Err(io::Error::new(io::ErrorKind::UnexpectedEof, message));
        }
        done += count as u64;
    }
    Ok(done)
}

/// Where the file system can't tell, there is none: trying tells.
fn has_hole(disk: &File, offset: u64, length: u64) -> bool {
    rustix::fs::seek(disk, rustix::fs::SeekFrom::Hole(offset))
        .is_ok_and(|hole| hole < offset.saturating_add(length))
}

fn punch(disk: &File, range: &Range) -> io::Result<()> {
    if range.length == 0 {
        return Ok(());
    }
    let mode = libc::FALLOC_FL_PUNCH_HOLE | libc::FALLOC_FL_KEEP_SIZE;
    vio::allocate(disk, mode, range.offset, range.length)
}

fn write_zeroes(disk: &File, range: &Range) -> io::Result<()> {
    if range.length == 0 {
        return Ok(());
    }
    let zero_range = libc::FALLOC_FL_ZERO_RANGE | libc::FALLOC_FL_KEEP_SIZE;
    let first = if range.unmap {
        punch(disk, range)
    } else {
        vio::allocate(disk, zero_range, range.offset, range.length)
    };
    match first {
        Err(error) if is_unsupported(&error) => write_zeroes_by_hand(disk, range),
        result => result,
    }
}

fn write_zeroes_by_hand(disk: &File, range: &Range) -> io::Result<()> {
    const ZEROES: [u8; 16 * 1024] = [0; 16 * 1024];
    let mut done = 0;
    while done < range.length {
        let count = (range.length - done).min(ZEROES.len() as u64);
        disk.write_all_at(&ZEROES[..count as usize], range.offset + done)?;
        done += count;
    }
    Ok(())
}

fn is_unsupported(error: &io::Error) -> bool {
    error.raw_os_error() == Some(libc::EOPNOTSUPP)
}

/// Writes the serial, padded with zeroes (§5.2.6).
fn identify(memory: &GuestMemory, into: &[Segment]) -> u32 {
    let mut id = [0; ID_BYTES];
    for (to, from) in id.iter_mut().zip(SERIAL.bytes()) {
        *to = from;
    }
    // The room was checked when the request was read.
    if write_prefix(memory, into, &id) { ID_BYTES as u32 } else { 0 }
}
