//! Taking a checkpoint.

use std::fs;
use std::os::unix::fs::MetadataExt as _;

use super::{
    ABOUT, About, CheckpointError, Known, MOST, Memory, Name, Place, VERSION, copy_disk, failed,
    list, write_new,
};
use crate::StateDir;
use crate::disk;
use crate::faults::{self, Point};
use crate::publish::NewDir;
use crate::rest::AtRest;
use crate::snapshot;

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
    let there = list(state, at_rest.account)?;
    if there.iter().any(|one| one.name == *name) {
        return Err(CheckpointError::Taken(name.clone()));
    }
    if there.len() >= MOST {
        return Err(CheckpointError::TooMany);
    }
    let target = place.dir.join(name.as_str());
    let failing = |doing| failed(&target, doing);
    let new = NewDir::create(&target, 0o700).map_err(failing("making a folder for it"))?;
    faults::at(Point::CheckpointCopy).map_err(failing("copying the disk"))?;
    let disk = copy_disk(&at_rest.disk, &new.path().join(StateDir::DISK), room)?;
    if let Some((memory, header)) = at_rest.saved() {
        // Found to be damaged when it is needed would be too late.
        snapshot::verify(memory)?;
        disk::set_tag(&disk, header.description.disk_tag).map_err(failing("tagging the disk"))?;
        link_memory(state, at_rest, new.path()).map_err(failing("keeping the saved memory"))?;
    }
    disk.sync_all().map_err(failing("syncing the disk"))?;
    let about = about(at_rest, known, now, false);
    let text =
        serde_json::to_vec(&about).map_err(|error| failing("describing it")(error.into()))?;
    write_new(&new.path().join(ABOUT), &text).map_err(failing("describing it"))?;
    faults::at(Point::CheckpointPublish)
        .and_then(|()| new.publish())
        .and_then(|()| faults::at(Point::CheckpointDone))
        .map_err(failing("putting it in its place"))?;
    Ok(about)
}

/// What is at rest now.
pub(super) fn about(at_rest: &AtRest, known: Known, now: i64, kept: bool) -> About {
    let memory = at_rest.saved().map(|(_, header)| Memory {
        base: header.description.base.as_str().to_owned(),
        terminals: known.terminals,
        paused: known.paused,
    });
    About { version: VERSION, created: now, memory, kept }
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
