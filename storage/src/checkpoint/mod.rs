//! Checkpoints: states of an account, files and memory together, that it can go back to.
//!
//! `docs/formats/checkpoint.md` is the normative text, with the order of steps and what a crash after each of them
//! leaves. Whoever takes one or goes back to one has the account at rest ([`AtRest`]), so that its disk stands
//! still. What keeps memory and disk together is their tag, here as everywhere ([`crate::saved`]).

mod create;
mod name;
mod rollback;

pub use create::{InUse, create, create_in_use};
pub use name::Name;
pub use rollback::{RolledBack, rollback};

use std::fs::{self, File, OpenOptions};
use std::io::{self, ErrorKind, Read as _};
use std::os::unix::fs::{MetadataExt as _, OpenOptionsExt as _};
use std::path::{Path, PathBuf};

use nix::libc;
use rustix::fs::{FlockOperation, flock};
use serde::{Deserialize, Serialize};
use uuid::Uuid;

use crate::StateDir;
use crate::base::BaseId;
use crate::disk::{self, Tag};
use crate::publish::{self, sync_dir};
use crate::rest::AtRest;
use crate::snapshot::SnapshotError;
use crate::sparse;

/// Most checkpoints of an account.
pub const MOST: usize = 8;

const VERSION: u32 = 1;
const ABOUT: &str = "checkpoint.json";
/// Longest [`ABOUT`].
const MOST_ABOUT: u64 = 64 * 1024;
/// Holds the tag of a disk that is to take the place of the live one.
const PENDING: &str = "pending";

/// What a checkpoint says of itself.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct About {
    version: u32,
    /// Seconds since 1970-01-01 UTC.
    pub created: i64,
    pub memory: Option<Memory>,
    /// It is what a restore replaced.
    pub kept: bool,
}

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Memory {
    pub base: String,
    /// As in the database: the terminals that wait for their user, and what was at work.
    pub terminals: Option<String>,
    pub paused: Option<String>,
}

/// A checkpoint, as it is listed.
#[derive(Clone, Debug)]
pub struct Checkpoint {
    pub name: Name,
    /// Or why it can't be used.
    pub about: Result<About, String>,
    /// Bytes it takes on the host; blocks that it shares with others are counted here as well.
    pub allocated: u64,
}

/// Of the state that is there now, what the database knows.
#[derive(Clone, Debug, Default)]
pub struct Known {
    pub terminals: Option<String>,
    pub paused: Option<String>,
}

#[derive(Debug, thiserror::Error)]
pub enum CheckpointError {
    #[error(
        "\"{0}\" is no name of a checkpoint: 1 to 32 of a-z, 0-9, - and _, the first a letter or digit"
    )]
    Name(String),
    #[error("there is a checkpoint \"{0}\" already")]
    Taken(Name),
    #[error("there is no checkpoint \"{0}\"")]
    Unknown(Name),
    #[error("there are {MOST} checkpoints already, and an account has no more; drop one first")]
    TooMany,
    #[error("somebody else works on this account's checkpoints; try again")]
    Busy,
    #[error("a copy of the disk takes {needed} bytes, and there is room for {room}")]
    NoRoom { needed: u64, room: u64 },
    #[error("the checkpoint \"{name}\" can't be used: {reason}")]
    Damaged { name: Name, reason: String },
    #[error("the saved memory: {0}")]
    Memory(#[from] SnapshotError),
    #[error("{}: {doing}: {source}", path.display())]
    Io { path: PathBuf, doing: &'static str, source: io::Error },
}

fn failed(path: &Path, doing: &'static str) -> impl FnOnce(io::Error) -> CheckpointError {
    move |source| CheckpointError::Io { path: path.to_owned(), doing, source }
}

/// All of an account's, by age.
pub fn list(state: &StateDir, account: Uuid) -> Result<Vec<Checkpoint>, CheckpointError> {
    let dir = state.checkpoints_dir(account);
    let mut found = vec![];
    let entries = match fs::read_dir(&dir) {
        Ok(entries) => entries,
        Err(error) if error.kind() == ErrorKind::NotFound => return Ok(found),
        Err(error) => return Err(failed(&dir, "listing checkpoints")(error)),
    };
    for entry in entries {
        let path = entry.map_err(failed(&dir, "listing checkpoints"))?.path();
        let name = path.file_name().and_then(|name| name.to_str());
        let Some(name) = name.and_then(|name| Name::parse(name).ok()) else { continue };
        let about = match path.join(PENDING).exists() {
            true => Err("a restore was cut off; the next command completes or drops it".into()),
            false => read_about(&path).map_err(|error| error.to_string()),
        };
        found.push(Checkpoint { name, about, allocated: allocated(&path) });
    }
    let created = |one: &Checkpoint| one.about.as_ref().map_or(i64::MAX, |about| about.created);
    found.sort_by(|a, b| (created(a), &a.name).cmp(&(created(b), &b.name)));
    Ok(found)
}

/// The one of that name.
pub fn find(state: &StateDir, account: Uuid, name: &Name) -> Result<Checkpoint, CheckpointError> {
    let found = list(state, account)?.into_iter().find(|one| one.name == *name);
    found.ok_or_else(|| CheckpointError::Unknown(name.clone()))
}

/// Bytes that an account's checkpoints take on the host.
pub fn usage(state: &StateDir, account: Uuid) -> u64 {
    usage_in(&state.checkpoints_dir(account))
}

/// The same of such a folder, wherever it lies.
pub(crate) fn usage_in(dir: &Path) -> u64 {
    let entries = fs::read_dir(dir).into_iter().flatten();
    entries.flatten().map(|entry| allocated(&entry.path())).sum()
}

/// The bases that memories in an account's checkpoints need, each with the checkpoint's name.
pub fn bases(state: &StateDir, account: Uuid) -> Result<Vec<(BaseId, Name)>, CheckpointError> {
    let needed = |one: Checkpoint| {
        let base = one.about.ok()?.memory?.base;
        Some((BaseId::parse(&base)?, one.name))
    };
    Ok(list(state, account)?.into_iter().filter_map(needed).collect())
}

/// Deletes one.
pub fn remove(state: &StateDir, account: Uuid, name: &Name) -> Result<(), CheckpointError> {
    let place = Place::lock(state, account)?;
    let path = place.dir.join(name.as_str());
    if !path.is_dir() {
        return Err(CheckpointError::Unknown(name.clone()));
    }
    discard(&path).map_err(failed(&path, "deleting a checkpoint"))
}

/// By a name under which nobody takes it for whole any more.
fn discard(path: &Path) -> io::Result<()> {
    let aside = path.with_file_name(format!(".new-{}", Uuid::new_v4().simple()));
    fs::rename(path, &aside)?;
    sync_dir(path.parent().unwrap_or(Path::new("/")))?;
    fs::remove_dir_all(aside)
}

/// An account's checkpoints, for one who changes them.
struct Place {
    dir: PathBuf,
    _lock: File,
}

impl Place {
    fn lock(state: &StateDir, account: Uuid) -> Result<Self, CheckpointError> {
        let dir = state.checkpoints_dir(account);
        match fs::create_dir(&dir) {
            Ok(()) => sync_dir(&state.account_dir(account))
                .map_err(failed(&dir, "making the folder of checkpoints"))?,
            Err(error) if error.kind() == ErrorKind::AlreadyExists => {}
            Err(error) => return Err(failed(&dir, "making the folder of checkpoints")(error)),
        }
        let lock = File::open(&dir).map_err(failed(&dir, "opening"))?;
        flock(&lock, FlockOperation::NonBlockingLockExclusive)
            .map_err(|_| CheckpointError::Busy)?;
        Ok(Self { dir, _lock: lock })
    }

    /// Brings what was cut off to an end. The account is at rest.
    fn recover(&self, _at_rest: &AtRest) -> Result<(), CheckpointError> {
        let failing = |doing| failed(&self.dir, doing);
        publish::sweep(&self.dir).map_err(failing("sweeping"))?;
        for entry in fs::read_dir(&self.dir).map_err(failing("sweeping"))? {
            let path = entry.map_err(failing("sweeping"))?.path();
            let mark = path.join(PENDING);
            let Ok(text) = fs::read_to_string(&mark) else { continue };
            let opened = File::open(path.join(StateDir::DISK));
            let tag = opened.and_then(|disk| disk::tag(&disk));
            let tag = tag.map_err(failed(&path, "looking at a restore that was cut off"))?;
            let done = if tag.is_some_and(|tag| digits(&tag) == text.trim_end()) {
                // The disks have not changed places: this one is a copy that was not used.
                discard(&path)
            } else {
                fs::remove_file(&mark).and_then(|()| sync_dir(&path))
            };
            done.map_err(failed(&path, "completing a restore that was cut off"))?;
        }
        Ok(())
    }
}

fn digits(tag: &Tag) -> String {
    format!("{:032x}", u128::from_be_bytes(*tag))
}

fn read_about(path: &Path) -> io::Result<About> {
    let file =
        OpenOptions::new().read(true).custom_flags(libc::O_NOFOLLOW).open(path.join(ABOUT))?;
    let mut text = vec![];
    file.take(MOST_ABOUT + 1).read_to_end(&mut text)?;
    let wrong = |reason: String| io::Error::new(ErrorKind::InvalidData, reason);
    if text.len() as u64 > MOST_ABOUT {
        return Err(wrong(format!("{ABOUT} is longer than {MOST_ABOUT} bytes")));
    }
    let about: About =
        serde_json::from_slice(&text).map_err(|error| wrong(format!("{ABOUT}: {error}")))?;
    match about.version {
        VERSION => Ok(about),
        other => Err(wrong(format!("its version is {other}, this program knows {VERSION}"))),
    }
}

fn new_file(path: &Path) -> io::Result<File> {
    OpenOptions::new().read(true).write(true).create_new(true).mode(0o600).open(path)
}

/// A synced file with this content.
fn write_new(path: &Path, content: &[u8]) -> io::Result<()> {
    let mut file = new_file(path)?;
    io::Write::write_all(&mut file, content)?;
    file.sync_all()
}

/// A copy of a disk, if there is room for it; not synced.
fn copy_disk(from: &File, to: &Path, room: u64) -> Result<File, CheckpointError> {
    let failing = || failed(to, "copying the disk");
    let file = new_file(to).map_err(failing())?;
    if !sparse::share(from, &file).map_err(failing())? {
        let needed = sparse::data_bytes(from).map_err(failing())?;
        if needed > room {
            return Err(CheckpointError::NoRoom { needed, room });
        }
        sparse::copy(from, &file).map_err(failing())?;
    }
    Ok(file)
}

fn allocated(path: &Path) -> u64 {
    let files = fs::read_dir(path).into_iter().flatten().flatten();
    files.filter_map(|file| file.metadata().ok()).map(|meta| meta.blocks() * 512).sum()
}

#[cfg(test)]
mod tests;
