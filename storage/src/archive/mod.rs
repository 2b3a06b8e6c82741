//! Account archives: an account as one stream of bytes, to be put away or brought to another host.
//!
//! `docs/formats/archive.md` is the normative text. [`write`] makes one of an account whose disk nobody writes to,
//! [`Reader`] gives back what is in one, checked record by record; what is made of it then is
//! [`crate::incoming`]'s. Both hold one record in memory, and neither seeks.

mod manifest;
mod reader;
mod record;
mod restore;
mod writer;

pub use manifest::{Disk, Manifest, Memory, Settings, describe};
pub use reader::{Part, Reader};
pub use record::MAX_RAW;
pub use restore::{BackMemory, Parts, RestoreError, Restored, Wish, restore};
pub use writer::{Source, Written, write};

use crate::accounts::{AccountsError, KeyError, NameError, PasswordError};
use std::io;

/// Version of the format.
pub const VERSION: u32 = 1;

const MAGIC: &[u8; 8] = b"hrmtacct";

/// Why an archive can't be read or written.
#[derive(Debug, thiserror::Error)]
pub enum ArchiveError {
    #[error("this is not an account's archive")]
    NotAnArchive,
    #[error("the archive's format version is {0}, this program knows {VERSION}")]
    Version(u32),
    #[error("the archive ends too early: it was cut short, or is not written to its end")]
    Truncated,
    #[error("something follows the archive's end")]
    Trailing,
    #[error("record {number} of the archive was altered: its checksum does not fit")]
    Altered { number: u64 },
    #[error("record {number} of the archive {reason}")]
    Record { number: u64, reason: &'static str },
    #[error("the archive's total does not fit: something was taken out or put in")]
    Total,
    #[error("the archive's manifest can't be read: {0}")]
    Manifest(serde_json::Error),
    #[error("the archive's manifest says {what} {value}, which can't be")]
    Field { what: &'static str, value: String },
    #[error("the name in the archive: {0}")]
    Name(#[from] NameError),
    #[error("a key in the archive: {0}")]
    Key(#[from] KeyError),
    #[error("the password's hash in the archive: {0}")]
    Password(#[from] PasswordError),
    #[error(transparent)]
    Accounts(#[from] AccountsError),
    #[error("the disk was changed while it was read; nothing of it can be used")]
    Torn,
    #[error("{doing}: {source}")]
    Io { doing: &'static str, source: io::Error },
}

fn failed(doing: &'static str) -> impl FnOnce(io::Error) -> ArchiveError {
    move |source| ArchiveError::Io { doing, source }
}

#[cfg(test)]
pub(crate) mod tests;
