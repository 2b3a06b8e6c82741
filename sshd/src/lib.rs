//! Hermitage: shell accounts, each in a virtual machine of its own.
//!
//! This is the part that strangers talk to: it authenticates them, starts and stops their machines and
//! relays bytes. It never touches guest memory, guest file systems or formats that a guest wrote
//! (docs/architecture.md), and has no unsafe code.
#![forbid(unsafe_code)]

pub mod admin;
mod auth;
pub mod cgroup;
pub mod checkpoints;
pub mod closing;
pub mod config;
mod copies;
mod forward;
pub mod history;
mod lifecycle;
pub mod limits;
mod link;
mod lobby;
pub mod logging;
mod machine;
pub mod process;
mod promises;
pub mod quota;
mod room;
pub mod server;
mod session;
pub mod size;
pub mod span;
mod store;
pub mod time;
pub mod watch;
