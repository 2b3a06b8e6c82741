//! An account out of an archive.

use super::{ArchiveError, Manifest, Part};
use crate::StateDir;
use crate::accounts::{Account, Accounts, AccountsError};
use crate::backup::BackupError;
use crate::incoming::{Incoming, IncomingError, Remembered};

/// What whoever restores wants.
#[derive(Clone, Copy, Debug)]
pub struct Wish<'a> {
    /// Another name than the one it had.
    pub name: Option<&'a str>,
    /// Its memory, should there be some.
    pub memory: bool,
    /// Bytes that may be written.
    pub room: u64,
}

#[derive(Debug, thiserror::Error)]
pub enum RestoreError {
    #[error(transparent)]
    Archive(#[from] ArchiveError),
    #[error(transparent)]
    Backup(#[from] BackupError),
    #[error(transparent)]
    Incoming(#[from] IncomingError),
    #[error(transparent)]
    Accounts(#[from] AccountsError),
    #[error("it needs {needed} bytes, and there is room for {room}; nothing was restored")]
    NoRoom { needed: u64, room: u64 },
}

/// What became of its memory.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum BackMemory {
    /// There was none.
    None,
    /// Why it is not there.
    LeftOut(&'static str),
    /// It is of this base.
    Kept(String),
}

#[derive(Debug)]
pub struct Restored {
    pub account: Account,
    pub memory: BackMemory,
    /// Bytes of the disk that were there.
    pub disk_data: u64,
}

/// Where an account can be had from, part by part.
pub trait Parts {
    type Error: Into<RestoreError>;

    fn manifest(&self) -> &Manifest;

    /// The next part, checked; [`Part::End`] when all of it was there.
    fn part(&mut self) -> Result<Part<'_>, Self::Error>;
}

/// Makes an account of an archive, or of what else has its parts: all of it, or nothing.
pub fn restore(
    state: &StateDir,
    accounts: &mut Accounts,
    mut from: impl Parts,
    wish: &Wish,
) -> Result<Restored, RestoreError> {
    let manifest = from.manifest().clone();
    let name = wish.name.unwrap_or(&manifest.account.name);
    let (new, mut identity) = manifest.account(name)?;
    // Also checked when it is written; here, before a long way in vain.
    if accounts.by_name(new.name.as_str())?.is_some() {
        return Err(AccountsError::NameTaken(new.name.to_string()).into());
    }
    if accounts.knows_machine(&identity.machine_id)? {
        identity.machine_id = *uuid::Uuid::new_v4().as_bytes();
    }
    let (remembered, memory) = memory(&manifest, wish);
    let needed = manifest.disk.data_bytes
        + manifest
            .memory
            .as_ref()
            .filter(|_| remembered.is_some())
            .map_or(0, |memory| memory.bytes);
    if needed > wish.room {
        return Err(RestoreError::NoRoom { needed, room: wish.room });
    }
    let mut incoming = Incoming::begin(state, identity.id, manifest.disk.bytes)?;
    let mut disk_data = 0;
    loop {
        match from.part().map_err(Into::into)? {
            Part::Disk { offset, data } => {
                incoming.disk(offset, data)?;
                disk_data += data.len() as u64;
            }
            Part::Memory { offset, data } if remembered.is_some() => {
                incoming.memory(offset, data)?;
            }
            Part::Memory { .. } => {}
            Part::End => break,
        }
    }
    let account = incoming.publish(accounts, &new, identity, remembered.as_ref())?;
    Ok(Restored { account, memory, disk_data })
}

fn memory(manifest: &Manifest, wish: &Wish) -> (Option<Remembered>, BackMemory) {
    let Some(memory) = &manifest.memory else { return (None, BackMemory::None) };
    let left_out = if !wish.memory {
        "it was not wanted"
    } else if wish.name.is_some_and(|name| name != manifest.account.name) {
        "the machine in it knows itself by the old name"
    } else {
        let base = memory.base.clone();
        let (terminals, paused) = (memory.terminals.clone(), memory.paused.clone());
        let remembered = Remembered { base: base.clone(), terminals, paused };
        return (Some(remembered), BackMemory::Kept(base));
    };
    (None, BackMemory::LeftOut(left_out))
}
