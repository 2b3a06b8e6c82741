//! A snapshot's way into its place and out of it, against the tag on the account's disk
//! (`docs/formats/diff.md`): which of the two is written first is what keeps stale memory from ever
//! meeting a newer disk.
//!
//! - [`publish`]: tag, then name. A crash in between leaves a tag without a snapshot, which means nothing.
//! - [`consume`]: the tag goes before the first instruction of the resumed machine. A crash after it
//!   leaves a snapshot whose tag no disk has: it is never resumed.

use crate::StateDir;
use crate::disk::{self, Tag};
use crate::publish::sync_dir;
use std::fs::{self, File, OpenOptions};
use std::io;
use std::os::unix::fs::OpenOptionsExt;
use uuid::Uuid;

/// An empty file beside the account's disk, for a snapshot to be written to.
pub fn create(state: &StateDir, account: Uuid) -> io::Result<File> {
    let path = state.new_snapshot(account);
    remove(&path)?;
    OpenOptions::new().read(true).write(true).create_new(true).mode(0o600).open(path)
}

/// Makes what was written to [`create`]'s file the account's snapshot. Durable when it returns; after an
/// error [`withdraw`] has to be called.
pub fn publish(state: &StateDir, account: Uuid, tag: Tag) -> io::Result<()> {
    disk::set_tag(&tagged(state, account)?, tag)?;
    fs::rename(state.new_snapshot(account), state.snapshot(account))?;
    sync_dir(&state.account_dir(account))
}

/// The snapshot is used up: durable before the machine's first instruction.
pub fn consume(state: &StateDir, account: Uuid) -> io::Result<()> {
    disk::clear_tag(&tagged(state, account)?)
}

/// Takes back whatever there is of a snapshot, finished or not.
pub fn withdraw(state: &StateDir, account: Uuid) -> io::Result<()> {
    let disk = tagged(state, account)?;
    // What is not tagged is worth nothing, so this comes first.
    if disk::tag(&disk)?.is_some() {
        disk::clear_tag(&disk)?;
    }
    remove(&state.new_snapshot(account))?;
    remove(&state.snapshot(account))
}

/// Keeps a snapshot that can't be resumed for the operator to look at: the last one of each account.
pub fn set_aside(state: &StateDir, account: Uuid) -> io::Result<()> {
    fs::rename(state.snapshot(account), state.unusable_snapshot(account))
}

fn remove(path: &std::path::Path) -> io::Result<()> {
    match fs::remove_file(path) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => Err(error),
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
