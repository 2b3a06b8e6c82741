//! One virtual machine a process: KVM, guest memory, devices, snapshots.

pub mod boot;
pub mod build_base;
pub mod devices;
pub mod fork_server;
pub mod kvm;
pub mod machine;
pub mod memory;
pub mod poller;
pub mod probe;
