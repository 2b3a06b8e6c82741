//! The thread that does the disk's work.

use std::{
    collections::VecDeque,
    fs::File,
    io,
    os::unix::fs::FileExt,
    sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError},
    thread,
};

use vm_memory::Bytes;

use super::{
    Block, BlockStats,
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
}

#[derive(Default)]
struct Inbox {
    requests: VecDeque<Request>,
    disk: Option<Arc<File>>,
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
}

impl Drop for Worker {
    fn drop(&mut self) {
        self.0.inbox().closed = true;
        self.0.wake.notify_one();
    }
}

fn run(shared: &Shared, memory: &GuestMemory, device: &Handle<Block>) {
    let mut failures = 0u64;
    loop {
        let mut inbox = shared.inbox();
        let (request, disk) = loop {
            if inbox.closed {
                return;
            }
            if let Some(request) = inbox.requests.pop_front() {
                break (request, inbox.disk.clone());
            }
            inbox = shared.wake.wait(inbox).unwrap_or_else(PoisonError::into_inner);
        };
        drop(inbox);
        let done = execute(&request, disk.as_deref(), memory, &mut failures);
        let Some(device) = device.upgrade() else { return };
        if let Err(fault) = device.with(|block, context| block.finish(&[done], context)) {
            device.leave_fault(fault);
        }
    }
}

/// Does one request, whatever comes of it.
fn execute(
    request: &Request,
    disk: Option<&File>,
    memory: &GuestMemory,
    failures: &mut u64,
) -> Done {
    let mut stats = BlockStats::default();
    let result = match disk {
        // Without a disk the capacity is 0, so only what touches no data comes this far.
        None => attempt_without_disk(request, memory),
        Some(disk) => attempt(&request.work, disk, memory, &mut stats),
    };
    let (status, written) = match result {
        Ok(written) => (Status::Ok, written),
        Err(Failure::Status(status)) => (status, 0),
        Err(Failure::Io(error)) => {
            *failures += 1;
            // The first ones, then ever fewer: a guest with a full disk would fill the log.
            if failures.is_power_of_two() {
                tracing::warn!(%error, failures, "disk request failed");
            }
            (Status::IoError, 0)
        }
    };
    stats.errors = u64::from(status == Status::IoError);
    // The address was checked when the request was read, and memory does not go away.
    let _ = memory.write_obj(status as u8, request.status);
    Done { head: request.head, written: written.saturating_add(1), stats }
}

enum Failure {
    Status(Status),
    Io(io::Error),
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
            stats.written_bytes = transfer(from, *offset, write)?;
            Ok(0)
        }
        Work::Flush => {
            disk.sync_data()?;
            stats.flushes = 1;
            Ok(0)
        }
        Work::Discard(ranges) => {
            // A file system that can't give space back has kept the data, which is allowed.
            for range in ranges {
                ignore_unsupported(punch(disk, range))?;
            }
            Ok(0)
        }
        Work::WriteZeroes(ranges) => {
            ranges.iter().try_for_each(|range| write_zeroes(disk, range))?;
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

fn ignore_unsupported(result: io::Result<()>) -> io::Result<()> {
    match result {
        Err(error) if is_unsupported(&error) => Ok(()),
        result => result,
    }
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
