//! Reading an archive, from a stream and with every byte doubted.

use std::io::{ErrorKind, Read};

use super::record::{Coding, HEADER, Header, Kind, MAX_RAW};
use super::{ArchiveError, MAGIC, Manifest, Parts, VERSION, failed};

/// What comes after the manifest.
#[derive(Debug)]
pub enum Part<'a> {
    Disk {
        offset: u64,
        data: &'a [u8],
    },
    Memory {
        offset: u64,
        data: &'a [u8],
    },
    /// All of it was read, and is as it was written.
    End,
}

pub struct Reader<R> {
    records: Records<R>,
    manifest: Manifest,
    /// Where the next disk record may begin, and bytes of them so far.
    disk_end: u64,
    disk_data: u64,
    memory_end: u64,
    ended: bool,
}

impl<R: Read> Reader<R> {
    /// Reads up to and including the manifest.
    pub fn new(from: R) -> Result<Self, ArchiveError> {
        let mut records = Records::new(from)?;
        let (header, _) = records.next()?;
        if header.kind != Kind::Manifest {
            return Err(ArchiveError::Record { number: 0, reason: "is not the manifest" });
        }
        let manifest = Manifest::decode(&records.raw)?;
        Ok(Self { records, manifest, disk_end: 0, disk_data: 0, memory_end: 0, ended: false })
    }
}

impl<R: Read> Parts for Reader<R> {
    type Error = ArchiveError;

    fn manifest(&self) -> &Manifest {
        &self.manifest
    }

    fn part(&mut self) -> Result<Part<'_>, Self::Error> {
        let number = self.records.number;
        let wrong = |reason| ArchiveError::Record { number, reason };
        if self.ended {
            return Ok(Part::End);
        }
        let (header, before) = self.records.next()?;
        let raw = &self.records.raw;
        let Header { kind, offset, .. } = header;
        let length = raw.len() as u64;
        let end = offset.checked_add(length).ok_or_else(|| wrong("lies beyond everything"))?;
        match kind {
            Kind::Manifest => Err(wrong("is a second manifest")),
            Kind::Disk => {
                if self.memory_end > 0 || offset < self.disk_end {
                    return Err(wrong("is out of order"));
                }
                if end > self.manifest.disk.bytes {
                    return Err(wrong("lies beyond the disk's end"));
                }
                self.disk_data += length;
                if self.disk_data > self.manifest.disk.data_bytes {
                    return Err(wrong("is more data than was announced"));
                }
                self.disk_end = end;
                Ok(Part::Disk { offset, data: raw })
            }
            Kind::Memory => {
                let expected = self.manifest.memory.as_ref().map_or(0, |memory| memory.bytes);
                if offset != self.memory_end || end > expected {
                    return Err(wrong("is not the memory that belongs here"));
                }
                self.memory_end = end;
                Ok(Part::Memory { offset, data: raw })
            }
            Kind::End => {
                if self.manifest.memory.as_ref().map_or(0, |m| m.bytes) != self.memory_end {
                    return Err(wrong("comes before all of the memory"));
                }
                if raw != before.as_bytes() {
                    return Err(ArchiveError::Total);
                }
                match fill(&mut self.records.from, &mut [0]) {
                    Err(ArchiveError::Truncated) => self.ended = true,
                    Ok(()) => return Err(ArchiveError::Trailing),
                    Err(error) => return Err(error),
                }
                Ok(Part::End)
            }
        }
    }
}

/// The records of a stream, one after the other, each whole.
struct Records<R> {
    from: R,
    total: blake3::Hasher,
    decompressor: zstd::bulk::Decompressor<'static>,
    stored: Vec<u8>,
    /// The last one's payload.
    raw: Vec<u8>,
    number: u64,
}

impl<R: Read> Records<R> {
    fn new(mut from: R) -> Result<Self, ArchiveError> {
        let mut preamble = [0; 16];
        fill(&mut from, &mut preamble)?;
        if preamble[..8] != *MAGIC {
            return Err(ArchiveError::NotAnArchive);
        }
        let version = u32::from_le_bytes([preamble[8], preamble[9], preamble[10], preamble[11]]);
        if version != VERSION {
            return Err(ArchiveError::Version(version));
        }
        if preamble[12..] != [0; 4] {
            return Err(ArchiveError::NotAnArchive);
        }
        let mut total = blake3::Hasher::new();
        total.update(&preamble);
        let decompressor =
            zstd::bulk::Decompressor::new().map_err(failed("prepare to decompress"))?;
        Ok(Self { from, total, decompressor, stored: Vec::new(), raw: Vec::new(), number: 0 })
    }

    /// Reads a record into `raw`. Also the total of what came before it.
    fn next(&mut self) -> Result<(Header, blake3::Hash), ArchiveError> {
        let before = self.total.finalize();
        let mut head = [0; HEADER];
        fill(&mut self.from, &mut head)?;
        let header = Header::decode(&head, self.number)?;
        self.stored.resize(header.stored as usize, 0);
        fill(&mut self.from, &mut self.stored)?;
        Header::check(&head, &self.stored, self.number)?;
        self.total.update(&head);
        self.total.update(&self.stored);
        match header.coding {
            Coding::Plain => std::mem::swap(&mut self.stored, &mut self.raw),
            Coding::Zstd => {
                self.raw.resize(MAX_RAW, 0);
                let decoded =
                    self.decompressor.decompress_to_buffer(&self.stored, &mut self.raw[..]);
                let wrong = |reason| ArchiveError::Record { number: self.number, reason };
                let length = decoded.map_err(|_| wrong("can't be decompressed"))?;
                if length != header.raw as usize {
                    return Err(wrong("is not as long as it says"));
                }
                self.raw.truncate(length);
            }
        }
        self.number += 1;
        Ok((header, before))
    }
}

fn fill(from: &mut impl Read, buffer: &mut [u8]) -> Result<(), ArchiveError> {
    from.read_exact(buffer).map_err(|error| match error.kind() {
        ErrorKind::UnexpectedEof => ArchiveError::Truncated,
        _ => failed("read the archive")(error),
    })
}
