//! The base that is measured, and disks for machines forked from it.

use std::{
    fs::{self, File},
    os::fd::OwnedFd,
    path::{Path, PathBuf},
};

use anyhow::Context as _;
use hermitage_storage::{
    StateDir, base,
    disk::{self, DiskError},
    image::{DISK_TEMPLATE, Image, ImageId},
};
use hermitage_vmm::{base_state::BaseState, machine::MachineState, memory::layout::Layout};

/// The service's default size of an account's disk.
pub const DISK_BYTES: u64 = 10 << 30;

pub struct Base {
    pub id: String,
    pub dir: PathBuf,
    pub layout: Layout,
    pub state: MachineState,
    pub memory: File,
    pub root: File,
    /// The disk of an account that never logged in.
    pub new_disk: PathBuf,
    /// Where disks are made.
    scratch: tempfile::TempDir,
}

impl Base {
    /// The one new machines are forked from. Disks are made in `disks`, by default in the state directory.
    pub fn current(state_dir: &Path, disks: Option<&Path>) -> anyhow::Result<Self> {
        let disks = disks.unwrap_or(state_dir);
        let dirs = StateDir::new(state_dir);
        let id = dirs.current_base()?.with_context(|| {
            format!("no base in {}: make one with `hermitage base build`", state_dir.display())
        })?;
        let dir = dirs.base(&id);
        let found = base::Base::open(&dir)?;
        let content = &found.manifest.content;
        let image = ImageId::parse(&content.image)
            .with_context(|| format!("base {id} names no image but {:?}", content.image))?;
        let image = Image::open(&dirs.image(&image))?;
        let (least, most) = (content.machine.least(), content.machine.most());
        let layout = Layout::new(least.memory_bytes, most.memory_bytes, content.files.root.length)?;
        let mut state = BaseState::decode(&found.state)
            .with_context(|| format!("state.bin of base {id}"))?
            .machine;
        // The others are not made for a machine that is given nothing more.
        state.vcpus.truncate(least.vcpus.into());
        let scratch = tempfile::Builder::new()
            .prefix("bench-")
            .tempdir_in(disks)
            .with_context(|| format!("make a folder in {}", disks.display()))?;
        Ok(Self {
            id: id.to_string(),
            dir,
            layout,
            state,
            memory: found.memory,
            root: found.root,
            new_disk: image.path(DISK_TEMPLATE),
            scratch,
        })
    }

    /// A folder for files of the measurement; gone with this.
    pub fn scratch(&self) -> &Path {
        self.scratch.path()
    }

    /// A copy of a disk, locked, without a name: it is gone with its last descriptor.
    pub fn disk(&self, template: &Path) -> Result<OwnedFd, DiskError> {
        let path = self.scratch.path().join("disk.img");
        disk::create(template, &path, DISK_BYTES)?;
        let file = disk::open_locked(&path);
        let _ = fs::remove_file(&path);
        Ok(file?.into())
    }

    /// A disk with a name, for as long as this lives. One at a time: the former one is deleted.
    pub fn kept_disk(&self, template: &Path) -> Result<(PathBuf, OwnedFd), DiskError> {
        let path = self.scratch.path().join("kept.img");
        let _ = fs::remove_file(&path);
        disk::create(template, &path, DISK_BYTES)?;
        let file = disk::open_locked(&path)?;
        Ok((path, file.into()))
    }
}
