//! Backups: a directory with accounts as they were at several times, each piece of them once.
//!
//! `docs/formats/backup.md` is the normative text, `docs/decisions/0006-backups-are-chunks-by-their-content.md` says why
//! it is like this. [`Writer`] makes a run; [`Backup`] lists, reads, checks and prunes what is there.

mod account;
mod chunks;
mod prune;
mod run;
mod writer;

pub use account::AccountReader;
pub use prune::{Pruned, prune};
pub use run::{LeftOut, Listed, Run};
pub use writer::{Added, Writer, Written};

use std::fs::{self, DirBuilder, File};
use std::io::{self, ErrorKind, Write as _};
use std::os::unix::fs::DirBuilderExt as _;
use std::path::{Path, PathBuf};

use rustix::fs::{FlockOperation, flock};

use crate::accounts::CopyError;
use crate::archive::ArchiveError;
use chunks::{Hash, Store};

const VERSION: u32 = 1;
const MARK: &str = "hermitage-backup";
const MARK_TEXT: &str = "hermitage backup 1\n";

#[derive(Debug, thiserror::Error)]
pub enum BackupError {
    #[error("{} is no backup, and not empty; name an empty directory, or one that is not there", .0.display())]
    NotABackup(PathBuf),
    #[error("{} is of a version that this program does not know", .0.display())]
    Version(PathBuf),
    #[error("{} is in use by another command", .0.display())]
    Busy(PathBuf),
    #[error("there is no run \"{0}\" (hermitage backup list shows which there are)")]
    UnknownRun(String),
    #[error("there is no run yet")]
    NoRun,
    #[error("the run {run} has no account \"{name}\"")]
    UnknownAccount { run: String, name: String },
    #[error("the {what} {name} is damaged: {reason}")]
    Damaged { what: &'static str, name: String, reason: String },
    #[error(transparent)]
    Archive(#[from] ArchiveError),
    #[error(transparent)]
    Database(#[from] CopyError),
    #[error("the disk was changed while it was read; nothing of it can be used")]
    Torn,
    #[error("{}: {doing}: {source}", path.display())]
    Io { path: PathBuf, doing: &'static str, source: io::Error },
}

fn failed(path: &Path, doing: &'static str) -> impl FnOnce(io::Error) -> BackupError {
    move |source| BackupError::Io { path: path.to_owned(), doing, source }
}

const PARTS: [&str; 3] = ["chunks", "objects", "runs"];

/// Whether there is nothing in a directory but what one that was killed while it made a backup of it leaves.
fn is_begun(dir: &Path) -> io::Result<bool> {
    for entry in fs::read_dir(dir)? {
        let entry = entry?;
        let name = entry.file_name();
        let part = PARTS.iter().any(|part| *name == **part) && entry.file_type()?.is_dir();
        let empty = part && fs::read_dir(entry.path())?.next().is_none();
        if !empty && !crate::publish::is_beside(&name) {
            return Ok(false);
        }
    }
    Ok(true)
}

/// A backup's directory, for as long as somebody works with it.
#[derive(Debug)]
pub struct Backup {
    dir: PathBuf,
    lock: File,
    chunks: Store,
    objects: Store,
}

impl Backup {
    /// For reading.
    pub fn open(dir: &Path) -> Result<Self, BackupError> {
        Self::take(dir, FlockOperation::NonBlockingLockShared)
    }

    /// For changing it, alone.
    pub fn open_alone(dir: &Path) -> Result<Self, BackupError> {
        Self::take(dir, FlockOperation::NonBlockingLockExclusive)
    }

    /// The same; made if there is nothing there.
    pub fn open_or_make(dir: &Path) -> Result<Self, BackupError> {
        let failing = || failed(dir, "making a backup's directory");
        DirBuilder::new().recursive(true).mode(0o700).create(dir).map_err(failing())?;
        if !dir.join(MARK).exists() {
            if !is_begun(dir).map_err(failing())? {
                return Err(BackupError::NotABackup(dir.to_owned()));
            }
            for part in PARTS {
                DirBuilder::new()
                    .recursive(true)
                    .mode(0o700)
                    .create(dir.join(part))
                    .map_err(failing())?;
            }
            crate::publish::sweep(dir).map_err(failing())?;
            crate::publish::write_file(&dir.join(MARK), MARK_TEXT.as_bytes(), 0o600)
                .map_err(failing())?;
        }
        Self::open_alone(dir)
    }

    fn take(dir: &Path, how: FlockOperation) -> Result<Self, BackupError> {
        let mark = dir.join(MARK);
        let text = match fs::read(&mark) {
            Ok(text) => text,
            Err(error) if error.kind() == ErrorKind::NotFound => {
                return Err(BackupError::NotABackup(dir.to_owned()));
            }
            Err(error) => return Err(failed(&mark, "reading")(error)),
        };
        if text != MARK_TEXT.as_bytes() {
            return Err(BackupError::Version(dir.to_owned()));
        }
        let lock = File::open(&mark).map_err(failed(&mark, "opening"))?;
        flock(&lock, how).map_err(|_| BackupError::Busy(dir.to_owned()))?;
        let store = |name: &str, what, most| Store { dir: dir.join(name), what, most };
        Ok(Self {
            chunks: store("chunks", "chunk", chunks::CHUNK),
            objects: store("objects", "account", 256 << 20),
            dir: dir.to_owned(),
            lock,
        })
    }

    fn runs_dir(&self) -> PathBuf {
        self.dir.join("runs")
    }

    /// The ids of all runs, the oldest first.
    pub fn runs(&self) -> Result<Vec<String>, BackupError> {
        let dir = self.runs_dir();
        let mut ids = vec![];
        for entry in fs::read_dir(&dir).map_err(failed(&dir, "listing the runs"))? {
            let name = entry.map_err(failed(&dir, "listing the runs"))?.file_name();
            ids.extend(name.to_str().filter(|name| run::is_id(name)).map(str::to_owned));
        }
        ids.sort();
        Ok(ids)
    }

    /// This run; the last one if none is named.
    pub fn run(&self, id: Option<&str>) -> Result<Run, BackupError> {
        let ids = self.runs()?;
        let id = match id {
            Some(id) if ids.iter().any(|known| known == id) => id,
            Some(id) => return Err(BackupError::UnknownRun(id.chars().take(64).collect())),
            None => ids.last().ok_or(BackupError::NoRun)?,
        };
        run::read(&self.runs_dir().join(id), id)
    }

    /// Reads everything that a run names and compares it with its names. Returns how many bytes that were.
    pub fn verify(&self, run: &Run) -> Result<u64, BackupError> {
        let mut bytes = 0;
        for listed in &run.content.accounts {
            let mut reader = self.account(run, &listed.name)?;
            bytes += reader.read_through()?;
        }
        for hash in &run.content.database.chunks {
            bytes += self.chunks.get(hash)?.len() as u64;
        }
        Ok(bytes)
    }

    /// An account as it was then.
    pub fn account(&self, run: &Run, name: &str) -> Result<AccountReader<'_>, BackupError> {
        let listed = run.content.accounts.iter().find(|listed| listed.name == name);
        let listed = listed.ok_or_else(|| BackupError::UnknownAccount {
            run: run.id.clone(),
            name: name.to_owned(),
        })?;
        AccountReader::open(self, &listed.object)
    }

    /// The accounts database as it was then, into a file that is not there yet.
    pub fn database(&self, run: &Run, to: &Path) -> Result<(), BackupError> {
        let made = || -> Result<(), BackupError> {
            let new = crate::publish::NewFile::create(to, 0o600).map_err(failed(to, "making"))?;
            for hash in &run.content.database.chunks {
                let chunk = self.chunks.get(hash)?;
                new.file().write_all(&chunk).map_err(failed(to, "writing"))?;
            }
            new.publish_new().map_err(failed(to, "putting it in its place"))
        };
        made()
    }

    /// Everything that has to be on the medium before a name is given to it.
    fn sync(&self) -> Result<(), BackupError> {
        rustix::fs::syncfs(&self.lock)
            .map_err(|errno| failed(&self.dir, "syncing the file system")(errno.into()))
    }
}

/// All chunks that an object names.
fn named(object: &account::Object) -> impl Iterator<Item = &Hash> {
    object.disk.iter().map(|(_, hash)| hash).chain(&object.memory)
}

#[cfg(test)]
mod tests;
