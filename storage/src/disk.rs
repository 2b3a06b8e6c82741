//! Account disks: sparse raw files with an ext4 in them that the host never looks into.
//!
//! A new disk is a copy of the image's template, extended to its size; the guest grows the file system
//! when it mounts it. Only data is copied, so this takes milliseconds whatever the size.
//!
//! One writer: who opens a disk for a machine takes a write lock that belongs to the *open file*
//! (`F_OFD_SETLK`, fcntl(2)), not to the process. It moves along when the descriptor is passed to the
//! machine's process and ends when the last copy is closed, however that comes about; no crash leaves a
//! stale lock or two writers.
//!
//! The *tag* ties a disk to a snapshot of a machine's memory (`docs/formats/diff.md`): it is on the disk
//! as long as a snapshot with the same tag was taken with exactly what the disk holds now, and is
//! removed, durably, before anything may write to the disk again.

use crate::StateDir;
use crate::checkpoint;
use crate::faults::{self, Point};
use crate::publish::{self, NewFile};
use crate::sparse;
use nix::errno::Errno;
use nix::fcntl::{FcntlArg, fcntl};
use nix::libc;
use rustix::fs::{XattrFlags, fgetxattr, fremovexattr, fsetxattr};
use rustix::io::Errno as RustixErrno;
use std::fs::{self, DirBuilder, File, OpenOptions};
use std::io;
use std::os::unix::fs::{DirBuilderExt, MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use uuid::Uuid;

/// Disks are whole 4 KiB blocks: what a guest's block device and its ext4 count in.
const BLOCK: u64 = 4096;

#[derive(Debug, thiserror::Error)]
pub enum DiskError {
    #[error("{} is in use: another process has it open for a machine", .0.display())]
    InUse(PathBuf),
    #[error("there is no disk {}", .0.display())]
    Missing(PathBuf),
    #[error("{} is not a regular file", .0.display())]
    NotAFile(PathBuf),
    #[error(
        "a disk of {size} bytes can't be made: it must be a multiple of {BLOCK} and hold the template's \
         {template} bytes"
    )]
    Size { size: u64, template: u64 },
    #[error(
        "{} has {now} bytes and can't get {size}: a disk is only enlarged, to a multiple of {BLOCK}",
        path.display()
    )]
    Resize { path: PathBuf, now: u64, size: u64 },
    #[error("{}: {doing}: {source}", path.display())]
    Io { path: PathBuf, doing: &'static str, source: io::Error },
}

fn failed(path: &Path, doing: &'static str) -> impl FnOnce(io::Error) -> DiskError {
    move |source| DiskError::Io { path: path.to_owned(), doing, source }
}

/// Makes an account's disk from the template unless it has one. True: it was made now.
///
/// `template` is `disk-template.img` of a guest image.
pub fn provision(
    state: &StateDir,
    account: Uuid,
    template: &Path,
    size: u64,
) -> Result<bool, DiskError> {
    let disk = state.disk(account);
    if disk.exists() {
        return Ok(false);
    }
    let dir = state.account_dir(account);
    let made = DirBuilder::new().recursive(true).mode(0o700).create(&dir);
    made.and_then(|()| publish::sync_dir(&state.accounts_dir()))
        .map_err(failed(&dir, "making the account's folder"))?;
    create(template, &disk, size).inspect_err(|_| {
        // Only an empty folder goes; one that was there before may hold more.
        let _ = fs::remove_dir(&dir);
    })?;
    Ok(true)
}

/// Puts a new disk in the place of an account's, which nobody may have open: from one moment to the next, so that
/// there always is one.
pub fn renew(disk: &Path, template: &Path, size: u64) -> Result<(), DiskError> {
    let _old = open_locked(disk)?;
    let new = unpublished(template, disk, size)?;
    new.publish().map_err(failed(disk, "putting a new disk in its place"))
}

/// Makes a disk of `size` bytes from the template. It appears whole or not at all.
pub fn create(template: &Path, disk: &Path, size: u64) -> Result<(), DiskError> {
    let new = unpublished(template, disk, size)?;
    new.publish_new().map_err(failed(disk, "making the disk"))
}

fn unpublished(template: &Path, disk: &Path, size: u64) -> Result<NewFile, DiskError> {
    let source = File::open(template).map_err(failed(template, "opening the disk template"))?;
    let meta = source.metadata().map_err(failed(template, "reading the disk template"))?;
    if !size.is_multiple_of(BLOCK) || size < meta.len() {
        return Err(DiskError::Size { size, template: meta.len() });
    }
    let made = || -> io::Result<NewFile> {
        let new = NewFile::create(disk, 0o600)?;
        sparse::copy(&source, new.file())?;
        new.file().set_len(size)?;
        Ok(new)
    };
    made().map_err(failed(disk, "making the disk"))
}

/// Opens a disk for its one writer. The lock lasts as long as the returned file or a copy of its
/// descriptor, in whatever process, is open.
pub fn open_locked(path: &Path) -> Result<File, DiskError> {
    let opened =
        OpenOptions::new().read(true).write(true).custom_flags(libc::O_NOFOLLOW).open(path);
    let file = opened.map_err(|error| match error.kind() {
        io::ErrorKind::NotFound => DiskError::Missing(path.to_owned()),
        _ => failed(path, "opening the disk")(error),
    })?;
    if !file.metadata().map_err(failed(path, "reading the disk"))?.is_file() {
        return Err(DiskError::NotAFile(path.to_owned()));
    }
    lock_as(path, &file)?;
    Ok(file)
}

/// Locks what was opened by this name. Until then somebody may have put another disk in its place: who goes back to a
/// checkpoint does, and what is locked then is a checkpoint's.
fn lock_as(path: &Path, file: &File) -> Result<(), DiskError> {
    lock(file).map_err(|errno| match errno {
        Errno::EAGAIN | Errno::EACCES => DiskError::InUse(path.to_owned()),
        errno => failed(path, "locking the disk")(errno.into()),
    })?;
    let looked = file.metadata().and_then(|opened| Ok((opened, fs::symlink_metadata(path)?)));
    let (opened, there) = looked.map_err(failed(path, "reading the disk"))?;
    match (opened.dev(), opened.ino()) == (there.dev(), there.ino()) {
        true => Ok(()),
        false => Err(DiskError::InUse(path.to_owned())),
    }
}

/// A write lock of the open file on all of it, or an error at once.
pub(crate) fn lock(file: &File) -> Result<(), Errno> {
    let whole = libc::flock {
        l_type: libc::F_WRLCK as libc::c_short,
        l_whence: libc::SEEK_SET as libc::c_short,
        l_start: 0,
        l_len: 0,
        l_pid: 0,
    };
    fcntl(file, FcntlArg::F_OFD_SETLK(&whole)).map(drop)
}

/// Whether somebody has such a lock; takes none.
pub(crate) fn is_locked(file: &File) -> Result<bool, Errno> {
    let mut whole = libc::flock {
        l_type: libc::F_WRLCK as libc::c_short,
        l_whence: libc::SEEK_SET as libc::c_short,
        l_start: 0,
        l_len: 0,
        l_pid: 0,
    };
    fcntl(file, FcntlArg::F_OFD_GETLK(&mut whole))?;
    Ok(whole.l_type != libc::F_UNLCK as libc::c_short)
}

/// Names a snapshot; chosen at random for each.
pub type Tag = [u8; 16];

/// The extended attribute (xattr(7)) that holds it: it belongs to the file whatever its name, and is
/// synced with it.
const TAG: &str = "user.hermitage.snapshot";

/// The tag on a disk. An attribute that can't be a tag counts as none: no snapshot has that one.
pub fn tag(disk: &File) -> io::Result<Option<Tag>> {
    // One byte more, so that a longer value is not mistaken for its beginning.
    let mut value = [0; size_of::<Tag>() + 1];
    match fgetxattr(disk, TAG, &mut value[..]) {
        Ok(length) => Ok(value[..length].try_into().ok()),
        Err(RustixErrno::NODATA | RustixErrno::OPNOTSUPP | RustixErrno::RANGE) => Ok(None),
        Err(errno) => Err(errno.into()),
    }
}

/// Puts a tag on a disk, in place of any; it is on the medium on return.
pub fn set_tag(disk: &File, tag: Tag) -> io::Result<()> {
    write_tag(disk, tag)?;
    sync_tag(disk)
}

/// The first half of [`set_tag`]: what is done before the second shares its sync.
pub fn write_tag(disk: &File, tag: Tag) -> io::Result<()> {
    faults::at(Point::PublishTag)?;
    Ok(fsetxattr(disk, TAG, &tag, XattrFlags::empty())?)
}

pub fn sync_tag(disk: &File) -> io::Result<()> {
    faults::at(Point::PublishTagSync)?;
    disk.sync_all()
}

/// Removes the tag, if there is one; it is gone from the medium on return.
pub fn clear_tag(disk: &File) -> io::Result<()> {
    faults::at(Point::Untag)?;
    match fremovexattr(disk, TAG) {
        // A removal before a crash of ours may not have reached the medium: still sync.
        Ok(()) | Err(RustixErrno::NODATA) => {}
        Err(RustixErrno::OPNOTSUPP) => return Ok(()),
        Err(errno) => return Err(errno.into()),
    }
    faults::at(Point::UntagSync)?;
    disk.sync_all()
}

/// Makes a disk larger, for a guest that grows its file system into it. Nobody may have it open. What it
/// holds, and the tag of a snapshot, stay.
pub fn enlarge(path: &Path, size: u64) -> Result<(), DiskError> {
    let disk = open_locked(path)?;
    let now = disk.metadata().map_err(failed(path, "reading the disk"))?.len();
    if !size.is_multiple_of(BLOCK) || size < now {
        return Err(DiskError::Resize { path: path.to_owned(), now, size });
    }
    disk.set_len(size).and_then(|()| disk.sync_all()).map_err(failed(path, "enlarging the disk"))
}

/// The size that a machine sees.
pub fn size(path: &Path) -> Result<u64, DiskError> {
    Ok(fs::metadata(path).map_err(failed(path, "reading the disk"))?.len())
}

/// Bytes that a disk takes on the host, as against its size.
pub fn allocated(path: &Path) -> io::Result<u64> {
    Ok(fs::metadata(path)?.blocks() * 512)
}

/// Puts what a removed account has aside. It must not be in use. Nothing there: nothing to do.
pub fn retire(state: &StateDir, account: Uuid) -> Result<(), DiskError> {
    let (dir, aside) = (state.account_dir(account), state.removed_dir(account));
    if !dir.exists() {
        return Ok(());
    }
    let _lock = match open_locked(&state.disk(account)) {
        Err(DiskError::Missing(_)) => None,
        opened => Some(opened?),
    };
    let moved = fs::rename(&dir, &aside)
        .and_then(|()| publish::sync_dir(&state.removed_accounts_dir()))
        .and_then(|()| publish::sync_dir(&state.accounts_dir()));
    moved.map_err(failed(&dir, "putting a removed account's disk aside"))
}

/// Deletes what was put aside of a removed account. Returns the bytes that were freed.
pub fn purge(state: &StateDir, account: Uuid) -> Result<u64, DiskError> {
    let aside = state.removed_dir(account);
    let freed = allocated(&aside.join(StateDir::DISK)).unwrap_or(0)
        + checkpoint::usage_in(&aside.join(StateDir::CHECKPOINTS));
    match fs::remove_dir_all(&aside) {
        Ok(()) => {}
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(0),
        Err(error) => return Err(failed(&aside, "deleting a removed account's disk")(error)),
    }
    publish::sync_dir(&state.removed_accounts_dir())
        .map_err(failed(&aside, "deleting a removed account's disk"))?;
    Ok(freed)
}

#[cfg(test)]
#[path = "disk_tests.rs"]
mod tests;
