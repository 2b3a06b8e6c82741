//! Taking a checkpoint.

use std::fs::{self, File};
use std::io;
use std::os::unix::fs::MetadataExt as _;
use std::path::{Path, PathBuf};

use uuid::Uuid;

use super::{
    ABOUT, About, CheckpointError, Known, MOST, Memory, Name, Place, VERSION, copy_disk, failed,
    list, write_new,
};
use crate::StateDir;
use crate::disk;
use crate::faults::{self, Point};
use crate::publish::NewDir;
use crate::rest::AtRest;
use crate::snapshot::{self, Header};

/// Keeps the account as it is now under this name. At most `room` bytes are written.
pub fn create(
    state: &StateDir,
    at_rest: &AtRest,
    name: &Name,
    known: Known,
    now: i64,
    room: u64,
) -> Result<About, CheckpointError> {
    let place = Place::lock(state, at_rest.account)?;
    place.recover(at_rest)?;
    let new = New::begin(&place, state, at_rest.account, name)?;
    faults::at(Point::CheckpointCopy).map_err(new.failing("copying the disk"))?;
    let disk = copy_disk(&at_rest.disk, &new.dir.path().join(StateDir::DISK), room)?;
    if let Some((memory, header)) = at_rest.saved() {
        // Found to be damaged when it is needed would be too late.
        snapshot::verify(memory)?;
        new.tag(&disk, header)?;
        link_memory(state, at_rest, new.dir.path())
            .map_err(new.failing("keeping the saved memory"))?;
    }
    new.publish(&disk, about(at_rest, known, now, false))
}

/// Of an account whose machine runs: the state of one moment, in files of the account's folder that nobody writes to
/// any more. They get second names here.
pub struct InUse<'a> {
    pub disk: &'a Path,
    /// Saved at the moment that the disk's copy is of.
    pub memory: Option<&'a Path>,
}

/// Keeps what was copied of an account in use under this name.
pub fn create_in_use(
    state: &StateDir,
    account: Uuid,
    copies: &InUse<'_>,
    name: &Name,
    known: Known,
    now: i64,
) -> Result<About, CheckpointError> {
    let place = Place::lock(state, account)?;
    let new = New::begin(&place, state, account, name)?;
    faults::at(Point::CheckpointCopy).map_err(new.failing("copying the disk"))?;
    let path = new.dir.path().join(StateDir::DISK);
    fs::hard_link(copies.disk, &path).map_err(new.failing("keeping the copy of the disk"))?;
    let disk = File::open(&path).map_err(new.failing("opening the copy of the disk"))?;
    let mut memory = None;
    if let Some(saved) = copies.memory {
        let path = new.dir.path().join(StateDir::SNAPSHOT);
        fs::hard_link(saved, &path).map_err(new.failing("keeping the memory"))?;
        let file = File::open(&path).map_err(new.failing("opening the memory"))?;
        let header = snapshot::verify(&file)?;
        if header.description.account != account {
            let other = io::Error::other("it is another account's");
            return Err(new.failing("looking at the memory")(other));
        }
        new.tag(&disk, &header)?;
        memory = Some(remembered(&header, known));
    }
    new.publish(&disk, About { version: VERSION, created: now, memory, kept: false })
}

/// A checkpoint that is being made: dropped before [`New::publish`], it never was.
struct New {
    target: PathBuf,
    dir: NewDir,
}

impl New {
    fn begin(
        place: &Place,
        state: &StateDir,
        account: Uuid,
        name: &Name,
    ) -> Result<Self, CheckpointError> {
        let there = list(state, account)?;
        if there.iter().any(|one| one.name == *name) {
            return Err(CheckpointError::Taken(name.clone()));
        }
        if there.len() >= MOST {
            return Err(CheckpointError::TooMany);
        }
        let target = place.dir.join(name.as_str());
        let dir =
            NewDir::create(&target, 0o700).map_err(failed(&target, "making a folder for it"))?;
        Ok(Self { target, dir })
    }

    fn failing(&self, doing: &'static str) -> impl FnOnce(io::Error) -> CheckpointError {
        failed(&self.target, doing)
    }

    /// The memory is of exactly this disk.
    fn tag(&self, disk: &File, memory: &Header) -> Result<(), CheckpointError> {
        disk::set_tag(disk, memory.description.disk_tag).map_err(self.failing("tagging the disk"))
    }

    fn publish(self, disk: &File, about: About) -> Result<About, CheckpointError> {
        let target = self.target;
        let failing = |doing| failed(&target, doing);
        disk.sync_all().map_err(failing("syncing the disk"))?;
        let text =
            serde_json::to_vec(&about).map_err(|error| failing("describing it")(error.into()))?;
        write_new(&self.dir.path().join(ABOUT), &text).map_err(failing("describing it"))?;
        faults::at(Point::CheckpointPublish)
            .and_then(|()| self.dir.publish())
            .and_then(|()| faults::at(Point::CheckpointDone))
            .map_err(failing("putting it in its place"))?;
        Ok(about)
    }
}

/// What is at rest now.
pub(super) fn about(at_rest: &AtRest, known: Known, now: i64, kept: bool) -> About {
    let memory = at_rest.saved().map(|(_, header)| remembered(header, known));
    About { version: VERSION, created: now, memory, kept }
}

fn remembered(memory: &Header, known: Known) -> Memory {
    Memory {
        base: memory.description.base.as_str().to_owned(),
        terminals: known.terminals,
        paused: known.paused,
    }
}

/// A second name for the live memory, which nobody writes to: only names of it come and go.
pub(super) fn link_memory(
    state: &StateDir,
    at_rest: &AtRest,
    folder: &std::path::Path,
) -> std::io::Result<()> {
    let Some((memory, _)) = at_rest.saved() else { return Ok(()) };
    let link = folder.join(StateDir::SNAPSHOT);
    fs::hard_link(state.snapshot(at_rest.account), &link)?;
    let (linked, open) = (fs::symlink_metadata(&link)?, memory.metadata()?);
    match (linked.dev(), linked.ino()) == (open.dev(), open.ino()) {
        true => Ok(()),
        false => Err(std::io::Error::other("it was replaced meanwhile; try again")),
    }
}
