//! Reading a snapshot: everything is checked before anything is used, through the descriptor that is
//! then used.

use super::index::{self, Expected, Run};
use super::{HEADER_BYTES, Header, PAGE, SnapshotError, failed};
use crate::disk::Tag;
use std::fs::File;
use std::os::unix::fs::FileExt;
use twox_hash::XxHash3_128;
use uuid::Uuid;

/// Read and summed at once.
const CHUNK: usize = 256 * 1024;

/// A snapshot that was checked whole.
#[derive(Debug)]
pub struct Snapshot {
    pub file: File,
    pub header: Header,
    /// In ascending order, without overlaps, within RAM; their data lies within the file.
    pub runs: Vec<Run>,
    /// The vmm's, in its own encoding.
    pub state: Vec<u8>,
}

impl Snapshot {
    /// Checks header, lengths, index and every checksum. Reads the whole file.
    pub fn open(file: File) -> Result<Self, SnapshotError> {
        let header = read_header(&file)?;
        let (runs, state) = read_rest(&file, &header)?;
        Ok(Self { file, header, runs, state })
    }
}

/// Reads and checks the header, and that the file is as long as it says. The rest may still be damaged.
pub fn read_header(file: &File) -> Result<Header, SnapshotError> {
    let meta = file.metadata().map_err(failed("read the size of the file"))?;
    if !meta.is_file() {
        return Err(SnapshotError::NotASnapshot);
    }
    let found = meta.len();
    let expected = HEADER_BYTES as u64;
    if found < expected {
        return Err(SnapshotError::Length { found, expected });
    }
    let mut raw = [0; HEADER_BYTES];
    file.read_exact_at(&mut raw, 0).map_err(failed("read the header"))?;
    let header = Header::decode(&raw)?;
    let expected = header.file_bytes();
    if found != expected {
        return Err(SnapshotError::Length { found, expected });
    }
    Ok(header)
}

/// Makes a snapshot that was checked whole, and that nobody else has yet, one of another account and disk.
pub fn readdress(file: &File, account: Uuid, disk_tag: Tag) -> Result<(), SnapshotError> {
    let mut header = read_header(file)?;
    header.description.account = account;
    header.description.disk_tag = disk_tag;
    file.write_all_at(&header.encode(), 0).map_err(failed("write the header"))
}

/// Checks all of a snapshot and keeps nothing of it.
pub fn verify(file: &File) -> Result<Header, SnapshotError> {
    let header = read_header(file)?;
    read_rest(file, &header)?;
    Ok(header)
}

fn read_rest(file: &File, header: &Header) -> Result<(Vec<Run>, Vec<u8>), SnapshotError> {
    // Their lengths are bounded by the header's check, and by the file's.
    let part = |at: u64, length: u64, doing| {
        let mut bytes = vec![0; length as usize];
        file.read_exact_at(&mut bytes, at).map_err(failed(doing)).map(|()| bytes)
    };
    let raw = part(header.index_at(), header.runs * index::RECORD as u64, "read the index")?;
    compare("index", XxHash3_128::oneshot(&raw), header.index_sum)?;
    let expected = Expected {
        ram_pages: header.description.ram / PAGE as u64,
        data_pages: header.data_pages,
        zero_pages: header.zero_pages,
    };
    let runs = index::decode(&raw, &expected)?;
    drop(raw);
    let state = part(header.state_at(), header.state, "read the state")?;
    compare("state", XxHash3_128::oneshot(&state), header.state_sum)?;
    compare("page data", data_sum(file, header)?, header.data_sum)?;
    Ok((runs, state))
}

fn data_sum(file: &File, header: &Header) -> Result<u128, SnapshotError> {
    let mut sum = XxHash3_128::new();
    let end = header.index_at();
    let mut at = HEADER_BYTES as u64;
    let mut chunk = vec![0; CHUNK];
    while at < end {
        let length = (end - at).min(CHUNK as u64) as usize;
        file.read_exact_at(&mut chunk[..length], at).map_err(failed("read page data"))?;
        sum.write(&chunk[..length]);
        at += length as u64;
    }
    Ok(sum.finish_128())
}

fn compare(part: &'static str, found: u128, expected: u128) -> Result<(), SnapshotError> {
    if found == expected { Ok(()) } else { Err(SnapshotError::Altered { part, found, expected }) }
}
