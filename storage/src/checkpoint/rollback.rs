//! Going back to a checkpoint: docs/formats/checkpoint.md, "Going back to one", has the steps by number.

use std::fs::{self, File};
use std::io;
use std::path::Path;

use rustix::fs::{CWD, RenameFlags, renameat_with};
use uuid::Uuid;

use super::create::{about, link_memory};
use super::{
    ABOUT, About, CheckpointError, Known, MOST, Name, PENDING, Place, copy_disk, digits, discard,
    failed, list, read_about, write_new,
};
use crate::StateDir;
use crate::disk::{self, Tag};
use crate::faults::{self, Point};
use crate::publish::{self, NewDir, NewFile, sync_dir};
use crate::rest::AtRest;
use crate::snapshot;
use crate::sparse;

#[derive(Debug)]
pub struct RolledBack {
    /// What the account is now.
    pub about: About,
    /// The checkpoint that is what it was.
    pub kept: Name,
    /// An older one of its kind that had to make room.
    pub dropped: Option<Name>,
    /// The account's new disk. Nobody else has it until this is dropped: time to write down what the account is now.
    pub held: File,
}

/// Makes the account what it was when this checkpoint was taken. What it is now is kept as `keep`.
pub fn rollback(
    state: &StateDir,
    at_rest: AtRest,
    name: &Name,
    keep: &Name,
    known: Known,
    now: i64,
    room: u64,
) -> Result<RolledBack, CheckpointError> {
    let account = at_rest.account;
    let place = Place::lock(state, account)?;
    place.recover(&at_rest)?;
    publish::sweep(&state.account_dir(account))
        .map_err(failed(&state.account_dir(account), "sweeping"))?;
    let source = Source::open(&place.dir.join(name.as_str()), name, account)?;
    let oldest_kept = room_for_one(state, account, name, keep)?;
    let folder = place.dir.join(keep.as_str());
    let new = New::make(state, &at_rest, &source, &folder, room)?;
    let kept = about(&at_rest, known, now, true);
    let held = new.put_in_place(state, &at_rest, &kept)?;
    let mut dropped = None;
    if let Some(oldest) = oldest_kept {
        let path = place.dir.join(oldest.as_str());
        discard(&path).map_err(failed(&path, "deleting the oldest kept checkpoint"))?;
        dropped = Some(oldest);
    }
    Ok(RolledBack { about: source.about, kept: keep.clone(), dropped, held })
}

/// Whether `keep` can be added. What was kept before may have to go for it: that checkpoint's name.
fn room_for_one(
    state: &StateDir,
    account: Uuid,
    name: &Name,
    keep: &Name,
) -> Result<Option<Name>, CheckpointError> {
    let there = list(state, account)?;
    if there.iter().any(|one| one.name == *keep) {
        return Err(CheckpointError::Taken(keep.clone()));
    }
    if there.len() < MOST {
        return Ok(None);
    }
    let is_kept = |one: &&super::Checkpoint| one.about.as_ref().is_ok_and(|about| about.kept);
    let oldest = there.iter().filter(is_kept).find(|one| one.name != *name);
    oldest.map(|one| Some(one.name.clone())).ok_or(CheckpointError::TooMany)
}

/// A checkpoint that was found whole.
struct Source {
    about: About,
    disk: File,
    memory: Option<File>,
}

impl Source {
    fn open(path: &Path, name: &Name, account: Uuid) -> Result<Self, CheckpointError> {
        if !path.is_dir() {
            return Err(CheckpointError::Unknown(name.clone()));
        }
        let damaged = |reason: String| CheckpointError::Damaged { name: name.clone(), reason };
        let about = read_about(path).map_err(|error| damaged(error.to_string()))?;
        let open = |file| File::open(path.join(file)).map_err(|e| damaged(format!("{file}: {e}")));
        let disk = open(StateDir::DISK)?;
        let meta = disk.metadata().map_err(|error| damaged(error.to_string()))?;
        if !meta.is_file() || meta.len() == 0 || meta.len() % 4096 != 0 {
            return Err(damaged(format!("its disk has {} bytes", meta.len())));
        }
        let memory = match &about.memory {
            None => None,
            Some(memory) => {
                let file = open(StateDir::SNAPSHOT)?;
                let header = snapshot::verify(&file).map_err(|error| damaged(error.to_string()))?;
                let is = header.description;
                let tag = disk::tag(&disk).map_err(|error| damaged(error.to_string()))?;
                if is.account != account || is.base.as_str() != memory.base {
                    return Err(damaged("its memory is of another account or base".into()));
                }
                if tag != Some(is.disk_tag) {
                    return Err(damaged("its memory was not taken with its disk".into()));
                }
                Some(file)
            }
        };
        Ok(Self { about, disk, memory })
    }
}

/// The pair that is to become the live one, and the folder of what it replaces: step 1.
struct New<'a> {
    keep: &'a Path,
    folder: NewDir,
    disk: File,
    memory: Option<NewFile>,
    tag: Tag,
}

impl<'a> New<'a> {
    fn make(
        state: &StateDir,
        at_rest: &AtRest,
        source: &Source,
        keep: &'a Path,
        room: u64,
    ) -> Result<Self, CheckpointError> {
        let failing = |doing| failed(keep, doing);
        let folder = NewDir::create(keep, 0o700).map_err(failing("making a folder"))?;
        let disk = copy_disk(&source.disk, &folder.path().join(StateDir::DISK), room)?;
        // Nobody else has it: when it takes its place it is locked already.
        disk::lock(&disk).map_err(|errno| failing("locking the new disk")(errno.into()))?;
        let tag = *Uuid::new_v4().as_bytes();
        let memory = match &source.memory {
            None => None,
            Some(from) => {
                let path = state.snapshot(at_rest.account);
                let new =
                    NewFile::create(&path, 0o600).map_err(failed(&path, "copying the memory"))?;
                sparse::copy(from, new.file()).map_err(failed(&path, "copying the memory"))?;
                snapshot::readdress(new.file(), at_rest.account, tag)?;
                new.file().sync_all().map_err(failed(&path, "copying the memory"))?;
                Some(new)
            }
        };
        // Without memory it says which disk this is, and nothing else: a tag of no snapshot.
        disk::set_tag(&disk, tag).map_err(failing("tagging the new disk"))?;
        Ok(Self { keep, folder, disk, memory, tag })
    }

    fn put_in_place(
        self,
        state: &StateDir,
        at_rest: &AtRest,
        kept: &About,
    ) -> Result<File, CheckpointError> {
        let Self { keep, folder, disk, memory, tag } = self;
        let failing = |doing| failed(keep, doing);
        let text =
            serde_json::to_vec(kept).map_err(|error| failing("describing it")(error.into()))?;
        let marked = || -> io::Result<()> {
            faults::at(Point::RollbackMark)?;
            link_memory(state, at_rest, folder.path())?;
            write_new(&folder.path().join(ABOUT), &text)?;
            write_new(&folder.path().join(PENDING), digits(&tag).as_bytes())?;
            faults::at(Point::RollbackKeep)
        };
        marked().map_err(failing("keeping what there is"))?;
        // Step 2.
        folder.publish().map_err(failing("keeping what there is"))?;
        // Step 3. Before it, the folder is a copy of no use.
        let live = state.disk(at_rest.account);
        let exchanged = faults::at(Point::RollbackExchange).and_then(|()| {
            let theirs = keep.join(StateDir::DISK);
            Ok(renameat_with(CWD, theirs, CWD, &live, RenameFlags::EXCHANGE)?)
        });
        if let Err(error) = exchanged {
            let _ = discard(keep);
            return Err(failed(&live, "exchanging the disks")(error));
        }
        let rest = || -> io::Result<()> {
            faults::at(Point::RollbackSync)?;
            sync_dir(keep)?;
            sync_dir(&state.account_dir(at_rest.account))?;
            // Step 4.
            faults::at(Point::RollbackMemory)?;
            match memory {
                Some(memory) => memory.publish()?,
                None => {
                    let path = state.snapshot(at_rest.account);
                    if path.exists() {
                        fs::remove_file(path)?;
                    }
                    disk::clear_tag(&disk)?;
                }
            }
            // Step 5.
            faults::at(Point::RollbackUnmark)?;
            fs::remove_file(keep.join(PENDING))?;
            sync_dir(keep)?;
            faults::at(Point::RollbackDone)
        };
        rest().map_err(failing("the files are those of the checkpoint, but it is not complete"))?;
        Ok(disk)
    }
}
