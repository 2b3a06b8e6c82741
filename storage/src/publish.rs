//! Making files and directories appear whole or not at all.
//!
//! Written beside under a name that starts with `.new-`, synced, renamed, and the directory synced: a
//! crash at any moment leaves the old state or the new one, and perhaps a `.new-` entry that
//! [`sweep`] removes. The maker holds a lock on its entry, so sweeping never takes away what somebody
//! is still writing.

use rustix::fs::{FlockOperation, RenameFlags, flock, renameat_with};
use std::ffi::OsStr;
use std::fs::{self, DirBuilder, File, OpenOptions};
use std::io::{self, Write};
use std::os::unix::fs::{DirBuilderExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

const PREFIX: &str = ".new-";

/// Replaces or makes a small file.
pub fn write_file(path: &Path, content: &[u8], mode: u32) -> io::Result<()> {
    let mut new = NewFile::create(path, mode)?;
    new.file.write_all(content)?;
    new.publish()
}

/// Makes the entries of a directory durable.
pub fn sync_dir(dir: &Path) -> io::Result<()> {
    File::open(dir)?.sync_all()
}

/// A file that is not there yet. Dropped without [`Self::publish`], it never was.
#[derive(Debug)]
pub struct NewFile {
    file: File,
    beside: Beside,
}

impl NewFile {
    pub fn create(target: &Path, mode: u32) -> io::Result<Self> {
        let beside = Beside::of(target)?;
        let file = OpenOptions::new()
            .read(true)
            .write(true)
            .create_new(true)
            .mode(mode)
            .open(&beside.path)?;
        flock(&file, FlockOperation::NonBlockingLockExclusive)?;
        Ok(Self { file, beside })
    }

    pub fn file(&self) -> &File {
        &self.file
    }

    /// Its name until then.
    pub fn path(&self) -> &Path {
        &self.beside.path
    }

    pub fn file_mut(&mut self) -> &mut File {
        &mut self.file
    }

    /// As [`Self::publish`], for one of many that the caller syncs together before anything depends on them.
    pub fn publish_unsynced(mut self) -> io::Result<()> {
        fs::rename(&self.beside.path, &self.beside.target)?;
        self.beside.published = true;
        Ok(())
    }

    /// Replaces what is there by that name.
    pub fn publish(mut self) -> io::Result<()> {
        self.file.sync_all()?;
        fs::rename(&self.beside.path, &self.beside.target)?;
        self.beside.published = true;
        sync_dir(self.beside.parent())
    }

    /// Fails with `AlreadyExists` when something is there by that name.
    pub fn publish_new(mut self) -> io::Result<()> {
        self.file.sync_all()?;
        self.beside.rename_new()?;
        sync_dir(self.beside.parent())
    }
}

/// A directory that is not there yet. Dropped without [`Self::publish`], it never was.
#[derive(Debug)]
pub struct NewDir {
    lock: File,
    beside: Beside,
}

impl NewDir {
    pub fn create(target: &Path, mode: u32) -> io::Result<Self> {
        let beside = Beside::of(target)?;
        DirBuilder::new().mode(mode).create(&beside.path)?;
        let lock = File::open(&beside.path)?;
        flock(&lock, FlockOperation::NonBlockingLockExclusive)?;
        Ok(Self { lock, beside })
    }

    /// Where to put its files meanwhile.
    pub fn path(&self) -> &Path {
        &self.beside.path
    }

    /// As [`Self::publish`], with the lock on it still held as long as what is returned is open.
    pub fn publish_held(mut self) -> io::Result<File> {
        sync_dir(&self.beside.path)?;
        self.beside.rename_new()?;
        sync_dir(self.beside.parent())?;
        self.lock.try_clone()
    }

    /// The files in it must have been synced. Fails with `AlreadyExists` when something is there by
    /// that name.
    pub fn publish(mut self) -> io::Result<()> {
        sync_dir(&self.beside.path)?;
        self.beside.rename_new()?;
        sync_dir(self.beside.parent())
    }
}

/// The name beside; what is still there by it goes when this is dropped.
#[derive(Debug)]
struct Beside {
    path: PathBuf,
    target: PathBuf,
    published: bool,
}

impl Beside {
    fn of(target: &Path) -> io::Result<Self> {
        let name = target.file_name().ok_or_else(|| {
            io::Error::new(io::ErrorKind::InvalidInput, "the path does not end with a name")
        })?;
        let mut beside = format!("{PREFIX}{}-", uuid::Uuid::new_v4().simple()).into_bytes();
        beside.extend_from_slice(name.as_encoded_bytes());
        // A long target name would not fit with the prefix; it need not be repeated in full.
        beside.truncate(128);
        let beside = String::from_utf8_lossy(&beside).into_owned();
        Ok(Self {
            path: target.with_file_name(beside),
            target: target.to_owned(),
            published: false,
        })
    }

    fn parent(&self) -> &Path {
        match self.target.parent() {
            Some(parent) if parent != Path::new("") => parent,
            _ => Path::new("."),
        }
    }

    fn rename_new(&mut self) -> io::Result<()> {
        let here = rustix::fs::CWD;
        renameat_with(here, &self.path, here, &self.target, RenameFlags::NOREPLACE)?;
        self.published = true;
        Ok(())
    }
}

impl Drop for Beside {
    fn drop(&mut self) {
        if !self.published {
            // Best effort: what stays is swept up later.
            let _ = remove(&self.path);
        }
    }
}

/// Removes what crashed makers left in a directory. Returns the names.
pub fn sweep(dir: &Path) -> io::Result<Vec<PathBuf>> {
    abandoned(dir)?.into_iter().map(|(path, _lock)| remove(&path).map(|()| path)).collect()
}

/// What [`sweep`] would remove.
pub fn leftovers(dir: &Path) -> io::Result<Vec<PathBuf>> {
    Ok(abandoned(dir)?.into_iter().map(|(path, _lock)| path).collect())
}

/// Unfinished entries that nobody writes to, each held.
fn abandoned(dir: &Path) -> io::Result<Vec<(PathBuf, File)>> {
    let mut found = Vec::new();
    for entry in fs::read_dir(dir)? {
        let entry = entry?;
        let path = entry.path();
        if !is_beside(&entry.file_name()) || entry.file_type()?.is_symlink() {
            continue;
        }
        let Ok(lock) = File::open(&path) else { continue };
        if flock(&lock, FlockOperation::NonBlockingLockExclusive).is_ok() {
            found.push((path, lock));
        }
    }
    Ok(found)
}

/// This name, or `NAME-2` and so on where it is taken.
pub fn unused(name: &str, taken: impl Fn(&str) -> bool) -> String {
    let (mut unused, mut count) = (name.to_owned(), 1);
    while taken(&unused) {
        count += 1;
        unused = format!("{name}-{count}");
    }
    unused
}

/// Is this the name of something unfinished?
pub fn is_beside(name: &OsStr) -> bool {
    name.as_encoded_bytes().starts_with(PREFIX.as_bytes())
}

fn remove(path: &Path) -> io::Result<()> {
    match fs::symlink_metadata(path) {
        Ok(meta) if meta.is_dir() => fs::remove_dir_all(path),
        Ok(_) => fs::remove_file(path),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(()),
        Err(error) => Err(error),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::PermissionsExt;

    fn names(dir: &Path) -> Vec<String> {
        let entries = fs::read_dir(dir).unwrap();
        entries.map(|e| e.unwrap().file_name().into_string().unwrap()).collect()
    }

    #[test]
    fn a_file_is_replaced_whole() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("current");
        write_file(&path, b"one", 0o600).unwrap();
        write_file(&path, b"two", 0o644).unwrap();
        assert_eq!(fs::read(&path).unwrap(), b"two");
        assert_eq!(fs::metadata(&path).unwrap().permissions().mode() & 0o777, 0o644);
        assert_eq!(names(dir.path()), ["current"]);
    }

    #[test]
    fn what_is_not_published_never_was() {
        let dir = tempfile::tempdir().unwrap();
        let new = NewFile::create(&dir.path().join("a"), 0o600).unwrap();
        new.file().set_len(5).unwrap();
        drop(new);
        let new = NewDir::create(&dir.path().join("b"), 0o700).unwrap();
        fs::write(new.path().join("x"), "x").unwrap();
        drop(new);
        assert!(names(dir.path()).is_empty());
    }

    #[test]
    fn a_directory_is_not_replaced() {
        let dir = tempfile::tempdir().unwrap();
        let target = dir.path().join("b");
        for expected in [true, false] {
            let new = NewDir::create(&target, 0o700).unwrap();
            let result = new.publish();
            assert_eq!(result.is_ok(), expected, "{result:?}");
        }
        let new = NewFile::create(&target, 0o600).unwrap();
        assert_eq!(new.publish_new().unwrap_err().kind(), io::ErrorKind::AlreadyExists);
        assert_eq!(names(dir.path()), ["b"]);
    }

    #[test]
    fn sweeping_takes_what_nobody_writes() {
        let dir = tempfile::tempdir().unwrap();
        fs::create_dir(dir.path().join(".new-dead-b")).unwrap();
        fs::write(dir.path().join(".new-dead-b/x"), "x").unwrap();
        fs::write(dir.path().join(".new-dead-a"), "x").unwrap();
        fs::write(dir.path().join("kept"), "x").unwrap();
        let alive = NewDir::create(&dir.path().join("c"), 0o700).unwrap();
        assert_eq!(leftovers(dir.path()).unwrap().len(), 2);
        assert_eq!(sweep(dir.path()).unwrap().len(), 2);
        assert!(leftovers(dir.path()).unwrap().is_empty());
        alive.publish().unwrap();
        let mut left = names(dir.path());
        left.sort();
        assert_eq!(left, ["c", "kept"]);
    }

    #[test]
    fn a_name_that_is_taken_is_numbered() {
        assert_eq!(unused("a", |_| false), "a");
        assert_eq!(unused("a", |name| ["a", "a-2"].contains(&name)), "a-3");
    }
}
