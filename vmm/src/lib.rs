//! One virtual machine a process: KVM, guest memory, devices, snapshots.

pub mod devices;
pub mod memory;
pub mod poller;
