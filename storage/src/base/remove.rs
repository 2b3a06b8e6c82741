//! Removing a base that nothing needs any more.
//!
//! Whoever uses a base shares a lock on its memory file (flock(2)): the fork server that opened it, and
//! every machine forked from it, since a lock of this kind lives as long as its open file does anywhere.
//! A removal takes the lock alone. What no lock shows is a machine that was saved on the base and sleeps:
//! its snapshot is published before its process ends, so who looks for snapshots *after* taking the lock
//! misses none.

use super::open::open;
use super::{BaseId, MANIFEST, MEMORY};
use crate::StateDir;
use crate::publish;
use rustix::fs::{FlockOperation, flock};
use rustix::io::Errno;
use std::fs::{self, File};
use std::io;

/// A base that no process uses, and none can begin to while this is there.
#[derive(Debug)]
pub struct Removal {
    state: StateDir,
    id: BaseId,
    /// None: half a base, which can't be used anyway.
    _lock: Option<File>,
}

impl Removal {
    /// None: a process uses the base.
    pub fn begin(state: &StateDir, id: &BaseId) -> io::Result<Option<Self>> {
        let lock = match open(&state.base(id).join(MEMORY)) {
            Ok(memory) => match flock(&memory, FlockOperation::NonBlockingLockExclusive) {
                Ok(()) => Some(memory),
                Err(Errno::WOULDBLOCK) => return Ok(None),
                Err(errno) => return Err(errno.into()),
            },
            Err(error) if error.kind() == io::ErrorKind::NotFound => None,
            Err(error) => return Err(error),
        };
        Ok(Some(Self { state: state.clone(), id: id.clone(), _lock: lock }))
    }

    /// Deletes it.
    pub fn finish(self) -> io::Result<()> {
        let dir = self.state.base(&self.id);
        // The manifest first: half a base must not look like one.
        match fs::remove_file(dir.join(MANIFEST)) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
            _ => publish::sync_dir(&dir)?,
        }
        fs::remove_dir_all(&dir)?;
        publish::sync_dir(&self.state.bases_dir())
    }
}
