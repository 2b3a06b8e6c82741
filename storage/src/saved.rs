//! A snapshot's way into its place and out of it, against the tag on the account's disk
//! (`docs/formats/diff.md`): which of the two is written first is what keeps stale memory from ever
//! meeting a newer disk.
//!
//! - [`publish`]: tag and name, then the syncs of both. A crash in between leaves any of the two: a tag without a
//!   snapshot means nothing, and a snapshot without its tag is never resumed.
//! - [`consume`]: the tag goes before the first instruction of the resumed machine. A crash after it
//!   leaves a snapshot whose tag no disk has: it is never resumed.
//!
//! `storage/tests/crash.rs` ends processes and cuts the power between any two of the steps here.

use crate::StateDir;
use crate::disk::{self, Tag};
use crate::faults::{self, Point};
use crate::publish::sync_dir;
use crate::snapshot::{self, Header};
use std::fs::{self, File, OpenOptions};
use std::io::{self, ErrorKind};
use std::os::unix::fs::{MetadataExt, OpenOptionsExt};
use uuid::Uuid;

/// What there is of a snapshot, for a disk that is about to be used.
pub enum Found {
    /// Taken with exactly what the disk holds. Only its header was checked.
    Usable(File, Box<Header>),
    /// Why not, in words for the user.
    Unusable(String),
    Nothing,
}

/// Looks for the account's snapshot. `disk` is locked by the caller: nobody changes either meanwhile.
pub fn find(state: &StateDir, account: Uuid, disk: &File) -> Found {
    let path = state.snapshot(account);
    let file = match faults::at(Point::ResumeFind).and_then(|()| File::open(path)) {
        Ok(file) => file,
        Err(error) if error.kind() == ErrorKind::NotFound => return Found::Nothing,
        Err(error) => return Found::Unusable(format!("it can't be opened: {error}")),
    };
    let header = match snapshot::read_header(&file) {
        Ok(header) => header,
        Err(error) => return Found::Unusable(error.to_string()),
    };
    match misfit(state, account, &header, disk) {
        Some(reason) => Found::Unusable(reason),
        None => Found::Usable(file, Box::new(header)),
    }
}

/// Why a snapshot and this account's disk do not belong together.
fn misfit(state: &StateDir, account: Uuid, header: &Header, disk: &File) -> Option<String> {
    let about = &header.description;
    if about.account != account {
        return Some("it belongs to another account".into());
    }
    match disk::tag(disk) {
        Err(error) => return Some(format!("the disk's tag can't be read: {error}")),
        Ok(None) => return Some("the disk was used since your machine was saved".into()),
        Ok(Some(tag)) if tag != about.disk_tag => {
            return Some("it was not taken with this disk".into());
        }
        Ok(Some(_)) => {}
    }
    let base = &about.base;
    (!state.base(base).is_dir()).then(|| format!("the base {} it needs is gone", base.as_str()))
}

/// An empty file beside the account's disk, for a snapshot to be written to.
pub fn create(state: &StateDir, account: Uuid) -> io::Result<File> {
    faults::at(Point::SaveCreate)?;
    let path = state.new_snapshot(account);
    remove(&path)?;
    OpenOptions::new().read(true).write(true).create_new(true).mode(0o600).open(path)
}

/// Makes what was written to [`create`]'s file the account's snapshot. Durable when it returns; after an
/// error [`withdraw`] has to be called.
pub fn publish(state: &StateDir, account: Uuid, tag: Tag) -> io::Result<()> {
    let disk = tagged(state, account)?;
    disk::write_tag(&disk, tag)?;
    faults::at(Point::PublishRename)?;
    fs::rename(state.new_snapshot(account), state.snapshot(account))?;
    // Of one file system's journal, so both are one commit, and the folder's own sync finds nothing left to do.
    disk::sync_tag(&disk)?;
    faults::at(Point::PublishDirSync)?;
    sync_dir(&state.account_dir(account))?;
    faults::at(Point::PublishDone)
}

/// The snapshot is used up: durable before the machine's first instruction.
pub fn consume(state: &StateDir, account: Uuid) -> io::Result<()> {
    disk::clear_tag(&tagged(state, account)?)?;
    faults::at(Point::ConsumeDone)
}

/// Deletes a snapshot that was used up: `used`, should there be another one by that name already.
pub fn remove_used(state: &StateDir, account: Uuid, used: &File) -> io::Result<()> {
    faults::at(Point::ResumeRemove)?;
    let path = state.snapshot(account);
    let there = match fs::metadata(&path) {
        Ok(there) => there,
        Err(error) if error.kind() == ErrorKind::NotFound => return Ok(()),
        Err(error) => return Err(error),
    };
    let used = used.metadata()?;
    if (there.dev(), there.ino()) == (used.dev(), used.ino()) {
        remove(&path)?;
    }
    faults::at(Point::ResumeRemoved)
}

/// Takes back whatever there is of a snapshot, finished or not.
pub fn withdraw(state: &StateDir, account: Uuid) -> io::Result<()> {
    faults::at(Point::WithdrawBegin)?;
    // What is not tagged is worth nothing, so this comes first. Also when no tag is seen: a process that
    // died may have removed it without a sync, and the power may fail while the snapshot is still there.
    disk::clear_tag(&tagged(state, account)?)?;
    faults::at(Point::WithdrawRemove)?;
    remove(&state.new_snapshot(account))?;
    remove(&state.snapshot(account))?;
    faults::at(Point::WithdrawDone)
}

/// Before a start from the disk where [`find`] found nothing: whatever may be left of a save means nothing
/// any more.
pub fn forget(state: &StateDir, account: Uuid, disk: &File) -> io::Result<()> {
    // Almost always there is no tag, and this is the login path.
    match disk::tag(disk) {
        Ok(None) => Ok(()),
        Ok(Some(_)) | Err(_) => withdraw(state, account),
    }
}

/// Keeps a snapshot that can't be resumed for the operator to look at: the last one of each account.
/// The tag goes first: without it the file can't come back, wherever it lies.
pub fn set_aside(state: &StateDir, account: Uuid) -> io::Result<()> {
    consume(state, account)?;
    faults::at(Point::AsideRename)?;
    fs::rename(state.snapshot(account), state.unusable_snapshot(account))?;
    faults::at(Point::AsideDone)
}

fn remove(path: &std::path::Path) -> io::Result<()> {
    match fs::remove_file(path) {
        Err(error) if error.kind() != ErrorKind::NotFound => Err(error),
        _ => Ok(()),
    }
}

/// The disk, for its tag alone: without its lock, which is the machine's.
fn tagged(state: &StateDir, account: Uuid) -> io::Result<File> {
    File::open(state.disk(account))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn account() -> (tempfile::TempDir, StateDir, Uuid) {
        let dir = tempfile::tempdir().unwrap();
        let state = StateDir::new(dir.path());
        let account = Uuid::new_v4();
        fs::create_dir_all(state.account_dir(account)).unwrap();
        File::create(state.disk(account)).unwrap();
        (dir, state, account)
    }

    fn tag(state: &StateDir, account: Uuid) -> Option<Tag> {
        disk::tag(&tagged(state, account).unwrap()).unwrap()
    }

    #[test]
    fn a_snapshot_comes_and_goes_with_its_tag() {
        let (_dir, state, account) = account();
        io::Write::write_all(&mut create(&state, account).unwrap(), b"memory").unwrap();
        assert!(!state.snapshot(account).exists());
        publish(&state, account, [7; 16]).unwrap();
        assert_eq!(fs::read(state.snapshot(account)).unwrap(), b"memory");
        assert_eq!(tag(&state, account), Some([7; 16]));
        consume(&state, account).unwrap();
        assert_eq!(tag(&state, account), None);
        assert!(state.snapshot(account).exists());
        set_aside(&state, account).unwrap();
        assert!(!state.snapshot(account).exists() && state.unusable_snapshot(account).exists());
    }

    #[test]
    fn a_used_snapshot_is_deleted_and_its_successor_is_not() {
        let (_dir, state, account) = account();
        let used = create(&state, account).unwrap();
        publish(&state, account, [1; 16]).unwrap();
        create(&state, account).unwrap();
        publish(&state, account, [2; 16]).unwrap();
        remove_used(&state, account, &used).unwrap();
        assert!(state.snapshot(account).exists());
        let used = File::open(state.snapshot(account)).unwrap();
        for _ in 0..2 {
            remove_used(&state, account, &used).unwrap();
            assert!(!state.snapshot(account).exists());
        }
    }

    #[test]
    fn what_is_withdrawn_leaves_nothing() {
        let (_dir, state, account) = account();
        withdraw(&state, account).unwrap();
        create(&state, account).unwrap();
        withdraw(&state, account).unwrap();
        create(&state, account).unwrap();
        publish(&state, account, [7; 16]).unwrap();
        create(&state, account).unwrap();
        withdraw(&state, account).unwrap();
        assert_eq!(tag(&state, account), None);
        assert!(!state.snapshot(account).exists() && !state.new_snapshot(account).exists());
    }

    #[test]
    fn a_disk_without_a_lock_on_it_stays_locked_for_its_owner() {
        let (_dir, state, account) = account();
        let locked = disk::open_locked(&state.disk(account)).unwrap();
        create(&state, account).unwrap();
        publish(&state, account, [1; 16]).unwrap();
        consume(&state, account).unwrap();
        assert!(disk::open_locked(&state.disk(account)).is_err());
        drop(locked);
        assert!(disk::open_locked(&state.disk(account)).is_ok());
    }
}
