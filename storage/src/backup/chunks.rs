//! Pieces that are named by what is in them.

use std::fmt;
use std::fs::{self, DirBuilder, File};
use std::io::{ErrorKind, Read as _, Write as _};
use std::os::unix::fs::DirBuilderExt as _;
use std::path::PathBuf;

use serde::{Deserialize, Deserializer, Serialize, Serializer, de};

use super::{BackupError, failed};
use crate::publish::NewFile;

/// What a disk, a memory and the database are cut into.
pub const CHUNK: usize = 1 << 20;

const LEVEL: i32 = 3;

/// BLAKE3 of the bytes; as text 64 digits.
#[derive(Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Hash([u8; 32]);

impl Hash {
    pub fn of(bytes: &[u8]) -> Self {
        Self(*blake3::hash(bytes).as_bytes())
    }

    pub fn parse(text: &str) -> Option<Self> {
        // In one form only: names of files are compared with it.
        let plain = text.bytes().all(|byte| byte.is_ascii_digit() || (b'a'..=b'f').contains(&byte));
        let hash = blake3::Hash::from_hex(text).ok().filter(|_| plain)?;
        Some(Self(*hash.as_bytes()))
    }
}

impl fmt::Display for Hash {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(blake3::Hash::from_bytes(self.0).to_hex().as_str())
    }
}

impl fmt::Debug for Hash {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

impl Serialize for Hash {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(self)
    }
}

impl<'de> Deserialize<'de> for Hash {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let text = String::deserialize(deserializer)?;
        Self::parse(&text).ok_or_else(|| de::Error::custom("a hash is 64 digits"))
    }
}

/// A folder of them.
#[derive(Debug)]
pub struct Store {
    pub dir: PathBuf,
    /// What they are, in words.
    pub what: &'static str,
    /// Most bytes of one.
    pub most: usize,
}

impl Store {
    fn path(&self, hash: &Hash) -> PathBuf {
        let name = hash.to_string();
        self.dir.join(&name[..2]).join(name)
    }

    pub fn has(&self, hash: &Hash) -> bool {
        self.path(hash).exists()
    }

    /// In place of what may be there by that name. Not synced. How many bytes it takes.
    pub fn put(&self, hash: &Hash, bytes: &[u8]) -> Result<u64, BackupError> {
        let path = self.path(hash);
        let failing = || failed(&path, "writing");
        let packed = zstd::bulk::compress(bytes, LEVEL).map_err(failing())?;
        let dir = path.parent().unwrap_or(&self.dir);
        match DirBuilder::new().mode(0o700).create(dir) {
            Err(error) if error.kind() != ErrorKind::AlreadyExists => {
                return Err(failed(dir, "making")(error));
            }
            _ => {}
        }
        let mut new = NewFile::create(&path, 0o600).map_err(failing())?;
        new.file_mut().write_all(&packed).map_err(failing())?;
        new.publish_unsynced().map_err(failing())?;
        Ok(packed.len() as u64)
    }

    /// What is named so, and is what its name says.
    pub fn get(&self, hash: &Hash) -> Result<Vec<u8>, BackupError> {
        let path = self.path(hash);
        let damaged = |reason: String| BackupError::Damaged {
            what: self.what,
            name: hash.to_string(),
            reason,
        };
        let file = match File::open(&path) {
            Ok(file) => file,
            Err(error) if error.kind() == ErrorKind::NotFound => {
                return Err(damaged("it is not there".into()));
            }
            Err(error) => return Err(failed(&path, "opening")(error)),
        };
        let mut packed = vec![];
        // What does not get smaller gets a little larger.
        let most = zstd::zstd_safe::compress_bound(self.most) as u64;
        file.take(most + 1).read_to_end(&mut packed).map_err(failed(&path, "reading"))?;
        if packed.len() as u64 > most {
            return Err(damaged("it is too long".into()));
        }
        let size = zstd::zstd_safe::get_frame_content_size(&packed).ok().flatten();
        let size = size.filter(|size| *size <= self.most as u64);
        let size = size.ok_or_else(|| damaged("it does not say a length that can be".into()))?;
        let bytes = zstd::bulk::decompress(&packed, size as usize)
            .map_err(|error| damaged(error.to_string()))?;
        match Hash::of(&bytes) == *hash {
            true => Ok(bytes),
            false => Err(damaged("it is not what it is named by".into())),
        }
    }

    /// Deletes those for which `keep` is false, and what was never finished. How many bytes that frees.
    pub fn retain(&self, keep: impl Fn(&Hash) -> bool) -> Result<u64, BackupError> {
        let failing = || failed(&self.dir, "looking for what nobody names");
        let mut freed = 0;
        for folder in fs::read_dir(&self.dir).map_err(failing())? {
            let folder = folder.map_err(failing())?.path();
            crate::publish::sweep(&folder).map_err(failing())?;
            for file in fs::read_dir(&folder).map_err(failing())? {
                let file = file.map_err(failing())?;
                let hash = file.file_name().to_str().and_then(Hash::parse);
                if hash.is_some_and(|hash| !keep(&hash)) {
                    freed += file.metadata().map_err(failing())?.len();
                    fs::remove_file(file.path()).map_err(failing())?;
                }
            }
        }
        Ok(freed)
    }
}
