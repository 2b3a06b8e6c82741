//! One machine's group: made before its process, removed after it.

use std::{
    fs::{self, File},
    os::fd::{AsFd, BorrowedFd},
    path::{Path, PathBuf},
    sync::{Arc, Mutex, PoisonError},
};

use super::{Ceilings, CgroupError, Tree, ceilings::Setting};
use crate::limits::Share;

pub struct Group {
    tree: Arc<Tree>,
    name: String,
    path: PathBuf,
    /// `cgroup.procs`, which the new process writes itself into.
    procs: File,
    /// What is in force.
    now: Mutex<Option<Ceilings>>,
}

impl Group {
    pub(super) fn new(tree: Arc<Tree>, name: String, path: PathBuf) -> Result<Self, CgroupError> {
        let procs = path.join("cgroup.procs");
        let opened = File::options().append(true).create(cfg!(test)).open(&procs);
        match opened {
            Ok(procs) => Ok(Self { tree, name, path, procs, now: Mutex::default() }),
            Err(source) => {
                tree.remove(&name);
                Err(CgroupError::File { doing: "open", path: procs, source })
            }
        }
    }

    pub fn path(&self) -> &Path {
        &self.path
    }

    /// For the machine's process.
    pub fn procs(&self) -> BorrowedFd<'_> {
        self.procs.as_fd()
    }

    /// Writes what is to be in force from now on. All that can be is written, whatever can't; the first
    /// fault is told.
    pub fn apply(&self, ceilings: &Ceilings) -> Result<(), CgroupError> {
        let mut now = self.now.lock().unwrap_or_else(PoisonError::into_inner);
        let mut fault = None;
        for setting in ceilings.settings() {
            if let Err(error) = self.set(&setting) {
                fault.get_or_insert(error);
            }
        }
        let limited_before = now.as_ref().is_some_and(|now| now.io().is_some());
        let io = ceilings.io();
        // The first word about a device makes the kernel's throttle for it: not where nobody wants one.
        if (io.is_some() || limited_before)
            && let Err(error) = self.set_io(io)
        {
            fault.get_or_insert(error);
        }
        *now = Some(*ceilings);
        fault.map_or(Ok(()), Err)
    }

    /// The same with another share.
    pub fn change(&self, share: Share) -> Result<(), CgroupError> {
        let before = *self.now.lock().unwrap_or_else(PoisonError::into_inner);
        match before {
            Some(before) if before.share == share => Ok(()),
            before => {
                self.apply(&Ceilings { shape: before.and_then(|before| before.shape), share })
            }
        }
    }

    fn set(&self, setting: &Setting) -> Result<(), CgroupError> {
        if !self.tree.enabled.contains(&setting.controller) {
            return match setting.limits {
                true => Err(CgroupError::NoController(setting.controller)),
                false => Ok(()),
            };
        }
        let path = self.path.join(setting.file);
        if setting.optional && !path.exists() {
            return Ok(());
        }
        write(path, setting.value.clone())
    }

    fn set_io(&self, value: Option<String>) -> Result<(), CgroupError> {
        if !self.tree.enabled.contains(&"io") {
            return Err(CgroupError::NoController("io"));
        }
        let device = self.tree.device.as_ref().ok_or(CgroupError::NoDevice)?;
        let value = value.as_deref().unwrap_or(Ceilings::NO_IO);
        write(self.path.join("io.max"), format!("{device} {value}"))
    }
}

fn write(path: PathBuf, value: String) -> Result<(), CgroupError> {
    fs::write(&path, &value).map_err(|source| CgroupError::Write { value, path, source })
}

impl Drop for Group {
    /// The process is gone, or was never there. Where it is not yet, it is tried again.
    fn drop(&mut self) {
        if !self.tree.remove(&self.name) {
            self.tree.left().insert(self.name.clone());
            // Not so when the whole service ends: the next one looks.
            if tokio::runtime::Handle::try_current().is_ok() {
                self.tree.sweep();
            }
        }
    }
}
