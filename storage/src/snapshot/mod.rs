//! Diff snapshots: the pages and the device state in which a machine differs from its base.
//!
//! `docs/formats/diff.md` is the normative text. A snapshot is written once by [`Writer`], published by
//! a rename, and checked whole by [`Snapshot::open`] before anything of it is used. Page data is
//! aligned, and lies in the order of the guest's memory, so that a reader can map it instead of copying.
//!
//! Whoever reads one takes every byte as hostile: it was written by a process that a guest may have
//! taken over.

mod append;
mod header;
mod index;
mod reader;
mod writer;

pub use header::{Description, HEADER_BYTES, Header, MAX_STATE, VERSION};
pub use index::{Content, MAX_RUNS, Run};
pub use reader::{Snapshot, read_header, readdress, verify};
pub use writer::Writer;

use std::io;

/// The unit of memory. Guest page *n* is byte *n* × 4096 of the base's `memory.img`.
pub const PAGE: usize = 4096;

/// Why a snapshot can't be used, or can't be written.
#[derive(Debug, thiserror::Error)]
pub enum SnapshotError {
    #[error("it is not a snapshot of a machine")]
    NotASnapshot,
    #[error("its format version is {0}, this program knows {VERSION}")]
    Version(u32),
    #[error("its {part} was altered: the checksum is {found:032x} and should be {expected:032x}")]
    Altered { part: &'static str, found: u128, expected: u128 },
    #[error("it was {}: it has {found} bytes and should have {expected}",
        if found < expected { "truncated" } else { "lengthened" })]
    Length { found: u64, expected: u64 },
    #[error("its header says {what} {value}, which can't be")]
    Field { what: &'static str, value: u64 },
    #[error("run {index} of its index {reason}")]
    Run { index: u64, reason: &'static str },
    #[error("{what}: {value} is more than the {limit} that are allowed")]
    TooMuch { what: &'static str, value: u64, limit: u64 },
    #[error("page {page} was written after page {last}")]
    Order { page: u64, last: u64 },
    #[error("{doing}: {source}")]
    Io { doing: &'static str, source: io::Error },
}

fn failed(doing: &'static str) -> impl FnOnce(io::Error) -> SnapshotError {
    move |source| SnapshotError::Io { doing, source }
}

#[cfg(test)]
mod tests;
