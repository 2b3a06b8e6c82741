//! Writing an archive.

use std::fs::File;
use std::io::{self, Write};
use std::os::unix::fs::{FileExt as _, MetadataExt as _};

use super::record::{Coding, HEADER, Header, Kind, MAX_RAW};
use super::{ArchiveError, MAGIC, Manifest, VERSION, failed};
use crate::sparse::next_data;

/// As fast as a disk on ordinary data.
const LEVEL: i32 = 3;

/// What goes into an archive. Nobody writes to either file meanwhile: the caller has the disk's lock, or a copy
/// of its own.
pub struct Source<'a> {
    pub manifest: &'a Manifest,
    pub disk: &'a File,
    pub memory: Option<&'a File>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Written {
    /// Bytes of the archive.
    pub bytes: u64,
    /// Bytes of the disk that are in it.
    pub disk_data: u64,
}

/// Writes all of it. Whoever gets an error has no archive.
pub fn write(out: impl Write, source: &Source) -> Result<Written, ArchiveError> {
    let compressor = zstd::bulk::Compressor::new(LEVEL).map_err(failed("prepare to compress"))?;
    let total = blake3::Hasher::new();
    let mut writer = Writer { out, total, compressor, packed: Vec::new(), number: 0, bytes: 0 };
    let mut preamble = [0; 16];
    preamble[..8].copy_from_slice(MAGIC);
    preamble[8..12].copy_from_slice(&VERSION.to_le_bytes());
    writer.put(&preamble)?;
    let manifest = serde_json::to_vec(source.manifest).map_err(ArchiveError::Manifest)?;
    if manifest.len() > MAX_RAW {
        let value = manifest.len().to_string();
        return Err(ArchiveError::Field { what: "so many bytes about the account:", value });
    }
    writer.record(Kind::Manifest, 0, &manifest)?;
    let disk_data = writer.disk(source.disk, source.manifest.disk.bytes)?;
    if let Some(memory) = source.memory {
        writer.memory(memory)?;
    }
    let total = *writer.total.finalize().as_bytes();
    writer.record(Kind::End, 0, &total)?;
    writer.out.flush().map_err(failed("write the archive"))?;
    Ok(Written { bytes: writer.bytes, disk_data })
}

struct Writer<W> {
    out: W,
    total: blake3::Hasher,
    compressor: zstd::bulk::Compressor<'static>,
    packed: Vec<u8>,
    number: u64,
    bytes: u64,
}

impl<W: Write> Writer<W> {
    /// The disk's data. Its length and the time of its last change must be the same before and after.
    fn disk(&mut self, disk: &File, length: u64) -> Result<u64, ArchiveError> {
        let stamp = |meta: std::fs::Metadata| (meta.len(), meta.mtime(), meta.mtime_nsec());
        let before = stamp(disk.metadata().map_err(failed("look at the disk"))?);
        if before.0 != length {
            return Err(ArchiveError::Torn);
        }
        let (mut at, mut total) = (0, 0);
        let mut chunk = vec![0; MAX_RAW];
        while let Some((data, hole)) =
            next_data(disk, at, length).map_err(failed("look for the disk's data"))?
        {
            at = data;
            while at < hole {
                // Records begin at multiples of their length, wherever data does.
                let part = MAX_RAW as u64 - at % MAX_RAW as u64;
                let part = &mut chunk[..part.min(hole - at) as usize];
                disk.read_exact_at(part, at).map_err(failed("read the disk"))?;
                if part.iter().any(|byte| *byte != 0) {
                    self.record(Kind::Disk, at, part)?;
                    total += part.len() as u64;
                }
                at += part.len() as u64;
            }
        }
        let after = stamp(disk.metadata().map_err(failed("look at the disk"))?);
        if after == before { Ok(total) } else { Err(ArchiveError::Torn) }
    }

    fn memory(&mut self, memory: &File) -> Result<(), ArchiveError> {
        let length = memory.metadata().map_err(failed("look at the saved memory"))?.len();
        let mut chunk = vec![0; MAX_RAW];
        let mut at = 0;
        while at < length {
            let part = &mut chunk[..(length - at).min(MAX_RAW as u64) as usize];
            memory.read_exact_at(part, at).map_err(failed("read the saved memory"))?;
            self.record(Kind::Memory, at, part)?;
            at += part.len() as u64;
        }
        Ok(())
    }

    fn record(&mut self, kind: Kind, offset: u64, raw: &[u8]) -> Result<(), ArchiveError> {
        self.packed.resize(zstd::zstd_safe::compress_bound(raw.len()), 0);
        let packed = self
            .compressor
            .compress_to_buffer(raw, &mut self.packed[..])
            .map_err(failed("compress"))?;
        // What does not get smaller is stored as it is, so a payload is never longer than its bytes.
        let (coding, length) = match packed < raw.len() {
            true => (Coding::Zstd, packed),
            false => (Coding::Plain, raw.len()),
        };
        let header = Header {
            kind,
            coding,
            stored: length as u32,
            raw: raw.len() as u32,
            offset,
            number: self.number,
        };
        self.number += 1;
        let packed = std::mem::take(&mut self.packed);
        let payload = if coding == Coding::Zstd { &packed[..length] } else { raw };
        let head: [u8; HEADER] = header.encode(payload);
        let put = self.put(&head).and_then(|()| self.put(payload));
        self.packed = packed;
        put
    }

    fn put(&mut self, bytes: &[u8]) -> Result<(), ArchiveError> {
        self.total.update(bytes);
        self.bytes += bytes.len() as u64;
        self.out.write_all(bytes).map_err(|error: io::Error| failed("write the archive")(error))
    }
}
