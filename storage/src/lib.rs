//! What Hermitage keeps: accounts, their disks, and the base snapshots that machines are forked from.
//!
//! A leaf: it knows files and their formats, not machines or sessions. The service and the machine
//! processes both stand on it, with different halves: the accounts database is behind the `accounts`
//! feature, which a machine's process is built without (it must never hold accounts).
#![forbid(unsafe_code)]

#[cfg(feature = "accounts")]
pub mod accounts;
#[cfg(feature = "accounts")]
pub mod archive;
#[cfg(feature = "accounts")]
pub mod backup;
pub mod base;
pub mod checkpoint;
pub mod disk;
pub mod faults;
pub mod footprint;
pub mod image;
#[cfg(feature = "accounts")]
pub mod incoming;
#[cfg(feature = "accounts")]
pub mod leftovers;
pub mod publish;
pub mod rest;
pub mod saved;
pub mod snapshot;
pub mod sparse;
mod state_dir;

pub use state_dir::StateDir;
