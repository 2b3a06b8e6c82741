//! One virtual machine a process: KVM, guest memory, devices, snapshots.

pub mod base_state;
pub mod boot;
pub mod build_base;
pub mod devices;
pub mod fork_server;
pub mod kvm;
pub mod machine;
pub mod memory;
pub mod poller;
pub mod probe;
pub mod sandbox;
pub mod snapshot;
pub mod stages;
pub mod working_set;

/// Version of what is written to `state.bin` ([`base_state::BaseState`]). Any change of
/// what is saved or of its order is a new version.
pub const SNAPSHOT_VERSION: u32 = 4;
