//! What a driver may ask of a disk (virtio 1.2 §5.2.6), read and checked against its bounds.

use vm_memory::GuestAddress;

use super::{MAX_DISCARD_SECTORS, MAX_DISCARD_SEGMENTS, MAX_SEGMENT_BYTES};
use crate::{
    devices::virtio::chain::{Chain, Segment, read_prefix, total, window},
    memory::GuestMemory,
};

/// The unit of positions and lengths, whatever the block size (§5.2.4).
pub const SECTOR: u64 = 512;

const HEADER: usize = 16;
const RANGE: usize = 16;
/// Bytes of a device id (§5.2.6, VIRTIO_BLK_T_GET_ID).
pub const ID_BYTES: usize = 20;

mod kind {
    pub const IN: u32 = 0;
    pub const OUT: u32 = 1;
    pub const FLUSH: u32 = 4;
    pub const GET_ID: u32 = 8;
    pub const DISCARD: u32 = 11;
    pub const WRITE_ZEROES: u32 = 13;
}

/// A range's flag: the space may be given back.
const UNMAP: u32 = 1;

/// Outcome of a request.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub enum Status {
    Ok = 0,
    IoError = 1,
    Unsupported = 2,
}

#[derive(Debug, PartialEq, Eq)]
pub struct Request {
    pub head: u16,
    /// Where the status byte goes.
    pub status: GuestAddress,
    pub work: Work,
}

/// What to do. Positions and lengths are in bytes and lie within the disk.
#[derive(Debug, PartialEq, Eq)]
pub enum Work {
    Read {
        offset: u64,
        into: Vec<Segment>,
    },
    Write {
        offset: u64,
        from: Vec<Segment>,
    },
    Flush,
    Discard(Vec<Range>),
    WriteZeroes(Vec<Range>),
    Identify {
        into: Vec<Segment>,
    },
    /// Nothing: the request was wrong in a way that has a status of its own.
    Refuse(Status),
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Range {
    pub offset: u64,
    pub length: u64,
    pub unmap: bool,
}

impl Request {
    /// Reads a request. An error is one that can't even be answered.
    pub fn parse(memory: &GuestMemory, chain: &Chain, capacity: u64) -> Result<Self, String> {
        let mut header = [0; HEADER];
        if !read_prefix(memory, &chain.readable, &mut header) {
            return Err(format!("a request of {} bytes", chain.readable_bytes()));
        }
        let [k0, k1, k2, k3, _, _, _, _, s0, s1, s2, s3, s4, s5, s6, s7] = header;
        let kind = u32::from_le_bytes([k0, k1, k2, k3]);
        let sector = u64::from_le_bytes([s0, s1, s2, s3, s4, s5, s6, s7]);
        let Some((into, status)) = split_status(&chain.writable) else {
            return Err("a request without a place for its status".into());
        };
        let from = window(&chain.readable, HEADER as u64, u64::MAX);
        let work = match kind {
            kind::IN => transfer(capacity, sector, &into)
                .map_or(Work::Refuse(Status::IoError), |offset| Work::Read { offset, into }),
            kind::OUT => transfer(capacity, sector, &from)
                .map_or(Work::Refuse(Status::IoError), |offset| Work::Write { offset, from }),
            kind::FLUSH => Work::Flush,
            kind::GET_ID if total(&into) >= ID_BYTES as u64 => Work::Identify { into },
            kind::GET_ID => Work::Refuse(Status::IoError),
            kind::DISCARD | kind::WRITE_ZEROES => {
                let zeroes = kind == kind::WRITE_ZEROES;
                match ranges(memory, &from, capacity, zeroes) {
                    Ok(ranges) if zeroes => Work::WriteZeroes(ranges),
                    Ok(ranges) => Work::Discard(ranges),
                    Err(status) => Work::Refuse(status),
                }
            }
            _ => Work::Refuse(Status::Unsupported),
        };
        Ok(Self { head: chain.head, status, work })
    }
}

/// The status is the last writable byte, wherever the descriptors are cut (§2.7.4).
fn split_status(writable: &[Segment]) -> Option<(Vec<Segment>, GuestAddress)> {
    let last = writable.last()?;
    let data = window(writable, 0, total(writable) - 1);
    Some((data, GuestAddress(last.address.0.checked_add(u64::from(last.length) - 1)?)))
}

/// Where a transfer starts, if all of it lies within the disk and what the driver was told to keep to.
fn transfer(capacity: u64, sector: u64, data: &[Segment]) -> Option<u64> {
    let length = total(data);
    let whole = length.is_multiple_of(SECTOR);
    let small = data.iter().all(|segment| segment.length <= MAX_SEGMENT_BYTES);
    let end = sector.checked_add(length / SECTOR)?;
    (whole && small && end <= capacity).then(|| sector * SECTOR)
}

/// The ranges of a discard or write-zeroes request (§5.2.6).
fn ranges(
    memory: &GuestMemory,
    data: &[Segment],
    capacity: u64,
    zeroes: bool,
) -> Result<Vec<Range>, Status> {
    let length = total(data);
    let most = u64::from(MAX_DISCARD_SEGMENTS) * RANGE as u64;
    if length == 0 || !length.is_multiple_of(RANGE as u64) || length > most {
        return Err(Status::IoError);
    }
    // Bounded by `most` just above.
    let mut raw = vec![0; length as usize];
    if !read_prefix(memory, data, &mut raw) {
        return Err(Status::IoError);
    }
    let (entries, _) = raw.as_chunks::<RANGE>();
    entries.iter().map(|raw| range(raw, capacity, zeroes)).collect()
}

fn range(raw: &[u8; RANGE], capacity: u64, zeroes: bool) -> Result<Range, Status> {
    let [s0, s1, s2, s3, s4, s5, s6, s7, n0, n1, n2, n3, f0, f1, f2, f3] = *raw;
    let sector = u64::from_le_bytes([s0, s1, s2, s3, s4, s5, s6, s7]);
    let count = u32::from_le_bytes([n0, n1, n2, n3]);
    let flags = u32::from_le_bytes([f0, f1, f2, f3]);
    // §5.2.6.2: reserved flags, and unmap on a discard, are unsupported.
    if flags & !UNMAP != 0 || flags & UNMAP != 0 && !zeroes {
        return Err(Status::Unsupported);
    }
    let end = sector.checked_add(u64::from(count)).ok_or(Status::IoError)?;
    if end > capacity || count > MAX_DISCARD_SECTORS {
        return Err(Status::IoError);
    }
    let unmap = flags & UNMAP != 0;
    Ok(Range { offset: sector * SECTOR, length: u64::from(count) * SECTOR, unmap })
}
