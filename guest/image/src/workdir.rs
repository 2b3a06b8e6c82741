//! Where an image grows before it is published: a directory beside its destination, so that
//! publishing is one rename on one file system, and so that a killed build leaves its remains under
//! a name the next build knows and clears away.

use std::fs::{self, File};
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail};
use rustix::fs::{FlockOperation, flock};

pub struct WorkDir {
    root: PathBuf,
    lock_path: PathBuf,
    /// Held for as long as the directory is in use; a killed process lets go of it.
    _lock: File,
}

impl WorkDir {
    pub fn create(out: &Path) -> Result<WorkDir> {
        if fs::symlink_metadata(out).is_ok() {
            bail!("{} exists: choose another --out or remove it", out.display());
        }
        let name = out
            .file_name()
            .with_context(|| format!("--out {} does not name a directory", out.display()))?
            .to_string_lossy()
            .into_owned();
        let parent = match out.parent() {
            Some(parent) if !parent.as_os_str().is_empty() => parent,
            _ => Path::new("."),
        };
        fs::create_dir_all(parent).with_context(|| format!("making {}", parent.display()))?;
        let parent = parent.canonicalize()?;

        let lock_path = parent.join(format!(".{name}.lock"));
        let lock = File::create(&lock_path)
            .with_context(|| format!("creating {}", lock_path.display()))?;
        if flock(&lock, FlockOperation::NonBlockingLockExclusive).is_err() {
            bail!("another build of {} is running", out.display());
        }
        let root = parent.join(format!(".{name}.building"));
        remove_tree(&root)?;
        fs::create_dir(&root).with_context(|| format!("creating {}", root.display()))?;
        Ok(WorkDir { root, lock_path, _lock: lock })
    }

    pub fn root(&self) -> &Path {
        &self.root
    }

    pub fn path(&self, name: &str) -> PathBuf {
        self.root.join(name)
    }

    /// Renames `finished` (inside this directory) to `out`.
    pub fn publish(&self, finished: &Path, out: &Path) -> Result<()> {
        fs::rename(finished, out)
            .with_context(|| format!("renaming {} to {}", finished.display(), out.display()))?;
        if let Some(parent) = self.root.parent() {
            File::open(parent)?.sync_all()?;
        }
        Ok(())
    }
}

impl Drop for WorkDir {
    fn drop(&mut self) {
        if let Err(error) = remove_tree(&self.root) {
            eprintln!("hermitage-image: {error:#}");
        }
        let _ = fs::remove_file(&self.lock_path);
    }
}

/// Removes what an earlier build left, unless something is still mounted in it: removing through a
/// bind mount of /dev would reach the host's.
fn remove_tree(root: &Path) -> Result<()> {
    if fs::symlink_metadata(root).is_err() {
        return Ok(());
    }
    let mounts = fs::read_to_string("/proc/self/mountinfo").unwrap_or_default();
    if let Some(mount) = mount_below(&mounts, root) {
        bail!("{mount} is mounted: unmount it, then remove {}", root.display());
    }
    fs::remove_dir_all(root).with_context(|| format!("removing {}", root.display()))
}

/// The first mount point at or below `root` in the text of /proc/PID/mountinfo (proc(5): field 5).
fn mount_below<'a>(mountinfo: &'a str, root: &Path) -> Option<&'a str> {
    mountinfo
        .lines()
        .filter_map(|line| line.split(' ').nth(4))
        .find(|point| Path::new(point).starts_with(root))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_a_killed_build_left_is_cleared_and_publishing_is_a_rename() {
        let temp = tempfile::tempdir().unwrap();
        let out = temp.path().join("image");
        let stale = temp.path().join(".image.building/tree");
        fs::create_dir_all(&stale).unwrap();

        let work = WorkDir::create(&out).unwrap();
        assert!(!stale.exists());
        assert!(WorkDir::create(&out).is_err(), "two builds of one directory");
        let finished = work.path("out");
        fs::create_dir(&finished).unwrap();
        fs::write(finished.join("file"), "x").unwrap();
        assert!(!out.exists());
        work.publish(&finished, &out).unwrap();
        drop(work);

        assert_eq!(fs::read_to_string(out.join("file")).unwrap(), "x");
        let left: Vec<_> =
            fs::read_dir(temp.path()).unwrap().map(|e| e.unwrap().file_name()).collect();
        assert_eq!(left, ["image"]);
        assert!(WorkDir::create(&out).is_err(), "an image is never replaced");
    }

    #[test]
    fn mounts_inside_are_noticed() {
        let info = "22 1 0:20 / /proc rw - proc proc rw\n40 1 0:5 / /a/.i.building/tree/dev rw - devtmpfs d rw\n";
        assert_eq!(mount_below(info, Path::new("/a/.i.building")), Some("/a/.i.building/tree/dev"));
        assert_eq!(mount_below(info, Path::new("/a/.i")), None);
    }
}
