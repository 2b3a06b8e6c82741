//! An account whose machine does not run, for as long as somebody works on what is kept of it.
//!
//! Whoever has an [`AtRest`] has the disk's lock: no machine starts, and neither the disk nor the saved memory changes
//! (invariant 1 in the design). A login meanwhile waits, then is told that the former machine has not ended.

use std::fs::File;

use uuid::Uuid;

use crate::StateDir;
use crate::disk::{self, DiskError};
use crate::saved::{self, Found};
use crate::snapshot::Header;

/// What there is of an account to be put away: nobody writes to it as long as this is read.
#[derive(Clone, Copy)]
pub struct Kept<'a> {
    pub disk: &'a File,
    pub memory: Option<(&'a File, &'a Header)>,
}

pub struct AtRest {
    pub account: Uuid,
    /// Locked.
    pub disk: File,
    pub memory: Resting,
}

/// What is saved of the machine's memory.
pub enum Resting {
    /// Taken with exactly what the disk holds. Only its header was checked.
    Saved(File, Box<Header>),
    /// There is some, which is not of this disk or can't be used here; why not.
    Unusable(String),
    Nothing,
}

impl AtRest {
    /// [`DiskError::InUse`]: its machine runs.
    pub fn take(state: &StateDir, account: Uuid) -> Result<Self, DiskError> {
        let disk = disk::open_locked(&state.disk(account))?;
        let memory = match saved::find(state, account, &disk) {
            Found::Usable(file, header) => Resting::Saved(file, header),
            Found::Unusable(reason) => Resting::Unusable(reason),
            Found::Nothing => Resting::Nothing,
        };
        Ok(Self { account, disk, memory })
    }

    pub fn kept(&self) -> Kept<'_> {
        Kept { disk: &self.disk, memory: self.saved() }
    }

    pub fn saved(&self) -> Option<(&File, &Header)> {
        match &self.memory {
            Resting::Saved(file, header) => Some((file, header.as_ref())),
            Resting::Unusable(_) | Resting::Nothing => None,
        }
    }
}
