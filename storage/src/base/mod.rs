//! Base snapshots: the sealed folder that machines are forked from.
//!
//! `docs/formats/base.md` is the normative text. A base is written once by [`BaseWriter`], never
//! changed again, and checked whole by [`Base::open`] before anything of it is used: what was forked
//! from a damaged base would be damaged in ways nobody could tell.

mod manifest;
mod open;
mod remove;
mod writer;

pub use manifest::{
    BaseId, Content, FORMAT_VERSION, FileSeal, Files, HostKind, MANIFEST, MAX_MEMORY, MAX_VCPUS,
    MEMORY, MEMORY_BLOCK, Machine, Manifest, ROOT, STATE, Size,
};
pub use open::{Base, BaseError, Listed, MAX_STATE, list};
pub use remove::Removal;
pub use writer::{BaseWriter, Description};

#[cfg(test)]
mod tests;
