//! Where the account lies, and what a crash does to that.

use hermitage_storage::disk;
use std::fs::File;
use std::path::{Path, PathBuf};
use std::process::Command;

pub trait Medium {
    fn root(&self) -> &Path;
    /// The process that used it is dead. `how` is a random number.
    fn crash(&mut self, how: u64);
}

/// In memory where that will do: syncs by the thousand cost minutes on a disk, and prove nothing here.
pub fn dir() -> tempfile::TempDir {
    let probe = |dir: &tempfile::TempDir| {
        let file = File::create(dir.path().join("probe")).unwrap();
        disk::set_tag(&file, [1; 16]).is_ok() && disk::tag(&file).is_ok_and(|tag| tag.is_some())
    };
    let memory = tempfile::tempdir_in("/dev/shm").ok().filter(probe);
    memory.unwrap_or_else(|| tempfile::tempdir().unwrap())
}

/// A folder: everything that was written stays.
pub struct Folder(pub PathBuf);

impl Medium for Folder {
    fn root(&self) -> &Path {
        &self.0
    }

    fn crash(&mut self, _how: u64) {}
}

/// An ext4 of its own in a file. What was not synced when the process died is lost.
pub struct PowerCut {
    dir: tempfile::TempDir,
    root: PathBuf,
}

const BYTES: u64 = 48 << 20;

impl PowerCut {
    /// Needs root, loop devices and mke2fs.
    pub fn new() -> Result<Self, String> {
        let dir = dir();
        let root = dir.path().join("mounted");
        std::fs::create_dir(&root).map_err(|error| error.to_string())?;
        let medium = Self { dir, root };
        let image = medium.image();
        let made = File::create(&image).and_then(|file| file.set_len(BYTES));
        made.map_err(|error| error.to_string())?;
        call(Command::new("mke2fs").args(["-q", "-F", "-t", "ext4"]).arg(&image))?;
        medium.mount()?;
        Ok(medium)
    }

    fn image(&self) -> PathBuf {
        self.dir.path().join("medium.img")
    }

    fn mount(&self) -> Result<(), String> {
        call(Command::new("mount").args(["-o", "loop"]).arg(self.image()).arg(&self.root))
    }

    fn unmount(&self) -> Result<(), String> {
        call(Command::new("umount").arg(&self.root))
    }
}

impl Medium for PowerCut {
    fn root(&self) -> &Path {
        &self.root
    }

    fn crash(&mut self, how: u64) {
        // The process alone, now and then: the power is cut later, with more that was not synced.
        if how.is_multiple_of(4) {
            return;
        }
        let now = self.dir.path().join("now.img");
        // What the kernel has not written by this moment is not in the copy.
        call(Command::new("cp").arg("--sparse=always").arg(self.image()).arg(&now)).unwrap();
        self.unmount().unwrap();
        std::fs::rename(&now, self.image()).unwrap();
        self.mount().unwrap();
    }
}

impl Drop for PowerCut {
    fn drop(&mut self) {
        // The folder can't be removed while it is there; it may never have been.
        let _ = self.unmount();
    }
}

fn call(command: &mut Command) -> Result<(), String> {
    let name = command.get_program().to_string_lossy().into_owned();
    let output = command.output().map_err(|error| format!("{name}: {error}"))?;
    match output.status.success() {
        true => Ok(()),
        false => Err(format!("{name}: {}", String::from_utf8_lossy(&output.stderr).trim())),
    }
}
