//! Guest physical memory.

/// RAM and the root image, as the guest addresses them.
pub type GuestMemory = vm_memory::GuestMemoryMmap<()>;
