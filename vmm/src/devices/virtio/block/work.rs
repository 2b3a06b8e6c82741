//! What a request does to the disk's file.

use std::{fs::File, io, os::unix::fs::FileExt};

use super::{
    BlockStats,
    disk::Disk,
    held::is_no_room,
    request::{ID_BYTES, Range, Request, Status, Work},
};
use crate::{
    devices::virtio::{
        chain::{Segment, total, window, write_prefix},
        io as vio,
    },
    memory::GuestMemory,
};

/// Names the disk in the guest (`/dev/disk/by-id/virtio-…`).
const SERIAL: &str = "hermitage-account";
const _: () = assert!(SERIAL.len() <= ID_BYTES);

pub enum Failure {
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

pub fn attempt_without_disk(request: &Request, memory: &GuestMemory) -> Result<u32, Failure> {
    match &request.work {
        Work::Identify { into } => Ok(identify(memory, into)),
        Work::Refuse(status) => Err(Failure::Status(*status)),
        _ => Err(Failure::Status(Status::IoError)),
    }
}

/// Bytes written to the guest, without the status.
pub fn attempt(
    work: &Work,
    disk: &Disk,
    memory: &GuestMemory,
    stats: &mut BlockStats,
) -> Result<u32, Failure> {
    let done = carry_out(work, disk, memory, stats);
    if let Work::Write { .. } | Work::Discard(_) | Work::WriteZeroes(_) = work {
        disk.changed();
    }
    done
}

fn carry_out(
    work: &Work,
    disk: &Disk,
    memory: &GuestMemory,
    stats: &mut BlockStats,
) -> Result<u32, Failure> {
    match work {
        Work::Read { offset, into } => {
            let read = |segments: &[Segment], at| vio::read_at(&**disk, memory, segments, at);
            stats.read_bytes = transfer(into, *offset, read)?;
            // A request is bounded to 126 MiB.
            Ok(stats.read_bytes as u32)
        }
        Work::Write { offset, from } => {
            let write = |segments: &[Segment], at| vio::write_at(&**disk, memory, segments, at);
            stats.written_bytes = transfer(from, *offset, write).map_err(Failure::of_writing)?;
            Ok(0)
        }
        Work::Flush => {
            // Not to be tried again, not even for want of room: a second fdatasync forgets what the
            // first could not write (fsync(2)).
            disk.sync()?;
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
pub fn has_hole(disk: &File, offset: u64, length: u64) -> bool {
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
