//! Making a run.

use std::collections::{HashMap, HashSet};
use std::fs::File;
use std::os::unix::fs::{FileExt as _, MetadataExt as _};
use std::path::Path;

use uuid::Uuid;

use super::account::{Object, Stamp};
use super::chunks::{CHUNK, Hash, Store};
use super::run::{self, Content, Database, LeftOut, Listed, Run};
use super::{Backup, BackupError, VERSION, failed, named};
use crate::accounts::Accounts;
use crate::archive::Manifest;
use crate::publish::{self, NewFile};
use crate::rest::Kept;
use crate::sparse::next_data;

/// A change as recent as this may have another of the same time after it.
const TOO_RECENT_S: i64 = 2;

pub struct Writer {
    backup: Backup,
    /// What runs name: it is on the medium, and whole unless the medium lost it.
    known: HashSet<Hash>,
    /// Of the last run, by the account's id.
    before: HashMap<Uuid, Object>,
    accounts: Vec<Listed>,
    left_out: Vec<LeftOut>,
    /// Bytes that were written.
    written: u64,
    now: i64,
}

/// What became of an account.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Added {
    /// Its disk was not read: it is as it was.
    pub unchanged: bool,
    /// Bytes that were written for it.
    pub written: u64,
}

#[derive(Debug)]
pub struct Written {
    pub run: Run,
    pub bytes: u64,
}

impl Writer {
    /// `now` in seconds since 1970-01-01 UTC.
    pub fn begin(backup: Backup, now: i64) -> Result<Self, BackupError> {
        let (mut known, mut before) = (HashSet::new(), HashMap::new());
        let ids = backup.runs()?;
        for id in &ids {
            // What can't be read is not counted on: what it names is written anew. `verify` tells of it.
            let Ok(run) = backup.run(Some(id)) else { continue };
            known.extend(run.content.database.chunks.iter().copied());
            let last = Some(id) == ids.last();
            for listed in &run.content.accounts {
                // The same account of several runs is read once.
                if known.contains(&listed.object) && !last {
                    continue;
                }
                let Ok(object) = backup.object(&listed.object) else { continue };
                known.insert(listed.object);
                known.extend(named(&object).copied());
                if last {
                    before.insert(object.manifest.account.id, object);
                }
            }
        }
        let (accounts, left_out) = Default::default();
        Ok(Self { backup, known, before, accounts, left_out, written: 0, now })
    }

    /// An account; `manifest` describes it as for an archive.
    pub fn add(&mut self, manifest: Manifest, kept: Kept<'_>) -> Result<Added, BackupError> {
        let written = self.written;
        let now = stamp(kept.disk)?;
        let mut manifest = manifest;
        // When it was read is the run's to say: the same account is the same object.
        manifest.created = 0;
        let former = self.before.get(&manifest.account.id);
        let former = former.filter(|former| former.stamp.as_ref() == Some(&now));
        let unchanged = former.is_some();
        let disk = match former {
            Some(former) => {
                manifest.disk = former.manifest.disk.clone();
                former.disk.clone()
            }
            None => self.disk(kept.disk, &mut manifest)?,
        };
        if stamp(kept.disk)? != now {
            return Err(BackupError::Torn);
        }
        let memory = match (&manifest.memory, kept.memory) {
            (Some(memory), Some((file, _))) => self.whole(file, memory.bytes)?,
            _ => vec![],
        };
        let name = manifest.account.name.clone();
        let stamp = Some(now).filter(|now| now.seconds < self.now - TOO_RECENT_S);
        // An unchanged disk keeps the stamp that it is known by.
        let object = Object { manifest, disk, memory, stamp };
        let json = serde_json::to_vec(&object).map_err(|error| BackupError::Damaged {
            what: "account",
            name: name.clone(),
            reason: error.to_string(),
        })?;
        let object = Hash::of(&json);
        put(&self.backup.objects, &mut self.known, &mut self.written, &object, &json)?;
        self.accounts.push(Listed { name, object });
        Ok(Added { unchanged, written: self.written - written })
    }

    /// An account that can't be had, and why.
    pub fn leave_out(&mut self, name: &str, reason: String) {
        self.left_out.push(LeftOut { name: name.to_owned(), reason });
    }

    /// Adds the database and gives the run its name. `scratch` is a folder for a copy of the database.
    pub fn finish(
        mut self,
        accounts: &Accounts,
        scratch: &Path,
        id: &str,
        version: &str,
    ) -> Result<Written, BackupError> {
        let copy = scratch.join(format!(".new-{}-database", Uuid::new_v4().simple()));
        let database = self.database(accounts, &copy);
        let _ = std::fs::remove_file(&copy);
        let content = Content {
            version: VERSION,
            created: self.now,
            hermitage: version.to_owned(),
            accounts: self.accounts,
            left_out: self.left_out,
            database: database?,
        };
        let dir = self.backup.runs_dir();
        let bytes = run::encode(&content)
            .map_err(|error| failed(&dir, "describing the run")(error.into()))?;
        self.backup.sync()?;
        let taken = self.backup.runs()?;
        let id = publish::unused(id, |id| taken.iter().any(|one| one == id));
        let path = dir.join(&id);
        let failing = || failed(&path, "writing the run");
        let mut new = NewFile::create(&path, 0o600).map_err(failing())?;
        std::io::Write::write_all(new.file_mut(), &bytes).map_err(failing())?;
        // Nobody else makes runs here, and not every file system can refuse to replace a file.
        new.publish().map_err(failing())?;
        let bytes = self.written + bytes.len() as u64;
        Ok(Written { run: Run { id, content }, bytes })
    }

    fn database(&mut self, accounts: &Accounts, copy: &Path) -> Result<Database, BackupError> {
        accounts.copy_to(copy)?;
        let file = File::open(copy).map_err(failed(copy, "opening"))?;
        let bytes = file.metadata().map_err(failed(copy, "looking at"))?.len();
        Ok(Database { bytes, chunks: self.whole(&file, bytes)? })
    }

    /// The pieces of the disk that are not zero. What the manifest says of them is set right.
    fn disk(
        &mut self,
        disk: &File,
        manifest: &mut Manifest,
    ) -> Result<Vec<(u64, Hash)>, BackupError> {
        let length = manifest.disk.bytes;
        let failing = || failed(Path::new("the account's disk"), "reading");
        let mut chunk = vec![0; CHUNK];
        let (mut pieces, mut at) = (vec![], 0);
        manifest.disk.data_bytes = 0;
        while let Some((data, _)) = next_data(disk, at, length).map_err(failing())? {
            let number = data / CHUNK as u64;
            let begin = number * CHUNK as u64;
            let part = &mut chunk[..(length - begin).min(CHUNK as u64) as usize];
            disk.read_exact_at(part, begin).map_err(failing())?;
            if part.iter().any(|byte| *byte != 0) {
                pieces.push((number, self.chunk(part)?));
                manifest.disk.data_bytes += part.len() as u64;
            }
            at = begin + part.len() as u64;
            if at >= length {
                break;
            }
        }
        Ok(pieces)
    }

    /// All pieces of a file.
    fn whole(&mut self, file: &File, length: u64) -> Result<Vec<Hash>, BackupError> {
        let failing = || failed(Path::new("a file"), "reading");
        let mut chunk = vec![0; CHUNK];
        let (mut pieces, mut at) = (vec![], 0);
        while at < length {
            let part = &mut chunk[..(length - at).min(CHUNK as u64) as usize];
            file.read_exact_at(part, at).map_err(failing())?;
            pieces.push(self.chunk(part)?);
            at += part.len() as u64;
        }
        Ok(pieces)
    }

    fn chunk(&mut self, bytes: &[u8]) -> Result<Hash, BackupError> {
        let hash = Hash::of(bytes);
        put(&self.backup.chunks, &mut self.known, &mut self.written, &hash, bytes)?;
        Ok(hash)
    }
}

/// Unless it is there, and named by a run.
fn put(
    store: &Store,
    known: &mut HashSet<Hash>,
    written: &mut u64,
    hash: &Hash,
    bytes: &[u8],
) -> Result<(), BackupError> {
    if known.insert(*hash) || !store.has(hash) {
        *written += store.put(hash, bytes)?;
    }
    Ok(())
}

fn stamp(disk: &File) -> Result<Stamp, BackupError> {
    let meta = disk.metadata().map_err(failed(Path::new("the account's disk"), "looking at"))?;
    Ok(Stamp {
        device: meta.dev(),
        inode: meta.ino(),
        length: meta.len(),
        seconds: meta.mtime(),
        nanoseconds: meta.mtime_nsec(),
    })
}
