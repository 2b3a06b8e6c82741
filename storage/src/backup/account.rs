//! An account in a backup.

use serde::{Deserialize, Serialize};

use super::chunks::{CHUNK, Hash};
use super::{Backup, BackupError};
use crate::archive::{ArchiveError, Manifest, Part, Parts};

#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Object {
    pub manifest: Manifest,
    /// MiB of the disk by their number; the others are zero.
    pub disk: Vec<(u64, Hash)>,
    pub memory: Vec<Hash>,
    /// Of the disk, for who asks whether it has changed.
    pub stamp: Option<Stamp>,
}

/// What changes whenever a file does.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Stamp {
    pub device: u64,
    pub inode: u64,
    pub length: u64,
    pub seconds: i64,
    pub nanoseconds: i64,
}

impl Backup {
    pub(super) fn object(&self, hash: &Hash) -> Result<Object, BackupError> {
        let bytes = self.objects.get(hash)?;
        serde_json::from_slice(&bytes).map_err(|error| BackupError::Damaged {
            what: "account",
            name: hash.to_string(),
            reason: error.to_string(),
        })
    }
}

/// Gives back what was put in.
pub struct AccountReader<'a> {
    backup: &'a Backup,
    object: Object,
    next: usize,
    chunk: Vec<u8>,
}

impl<'a> AccountReader<'a> {
    pub(super) fn open(backup: &'a Backup, hash: &Hash) -> Result<Self, BackupError> {
        let object = backup.object(hash)?;
        object.manifest.check()?;
        let disk = &object.manifest.disk;
        let ascending = object.disk.windows(2).all(|two| two[0].0 < two[1].0);
        let within =
            object.disk.last().is_none_or(|(last, _)| *last < disk.bytes.div_ceil(CHUNK as u64));
        let memory = object.manifest.memory.as_ref().map_or(0, |memory| memory.bytes);
        if !ascending || !within || object.memory.len() as u64 != memory.div_ceil(CHUNK as u64) {
            return Err(BackupError::Damaged {
                what: "account",
                name: hash.to_string(),
                reason: "its pieces are not those of a disk and a memory".into(),
            });
        }
        Ok(Self { backup, object, next: 0, chunk: vec![] })
    }

    /// Reads all of it; how many bytes that were.
    pub(super) fn read_through(&mut self) -> Result<u64, BackupError> {
        let mut bytes = 0;
        loop {
            match self.part()? {
                Part::Disk { data, .. } | Part::Memory { data, .. } => bytes += data.len() as u64,
                Part::End => return Ok(bytes),
            }
        }
    }

    /// A piece that has to end where the whole does, if it is the last one.
    fn get(&mut self, hash: &Hash, number: u64, whole: u64) -> Result<u64, BackupError> {
        self.chunk = self.backup.chunks.get(hash)?;
        let offset = number * CHUNK as u64;
        let expected = (whole - offset).min(CHUNK as u64);
        if self.chunk.len() as u64 != expected {
            return Err(ArchiveError::Field {
                what: "a piece at its end, and it has",
                value: format!("{} bytes", self.chunk.len()),
            }
            .into());
        }
        Ok(offset)
    }
}

impl Parts for AccountReader<'_> {
    type Error = BackupError;

    fn manifest(&self) -> &Manifest {
        &self.object.manifest
    }

    fn part(&mut self) -> Result<Part<'_>, BackupError> {
        let next = self.next;
        self.next += 1;
        if let Some((number, hash)) = self.object.disk.get(next).copied() {
            let offset = self.get(&hash, number, self.object.manifest.disk.bytes)?;
            return Ok(Part::Disk { offset, data: &self.chunk });
        }
        let number = next - self.object.disk.len();
        if let Some(hash) = self.object.memory.get(number).copied() {
            let whole = self.object.manifest.memory.as_ref().map_or(0, |memory| memory.bytes);
            let offset = self.get(&hash, number as u64, whole)?;
            return Ok(Part::Memory { offset, data: &self.chunk });
        }
        self.next = next;
        Ok(Part::End)
    }
}
