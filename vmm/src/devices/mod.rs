//! What a machine has besides processors and memory.

pub mod bus;
pub mod serial;
pub mod virtio;
