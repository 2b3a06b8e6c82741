//! A page of the host's that a guest can read and not write.

use std::{io, sync::Arc, sync::atomic::Ordering};

use vm_memory::{Bytes as _, MmapRegion, VolatileMemory as _};

use super::PAGE_SIZE;

/// Zero at first. Clones are the same page, which goes with the last of them.
#[derive(Clone)]
pub struct ShownPage(Arc<MmapRegion<()>>);

impl ShownPage {
    pub fn new() -> io::Result<Self> {
        MmapRegion::new(PAGE_SIZE).map(|region| Self(Arc::new(region))).map_err(io::Error::other)
    }

    /// Where this process has it.
    pub fn address(&self) -> u64 {
        self.0.as_ptr() as u64
    }

    /// Sets the aligned word at `offset`; a guest reads the old or the new one. Nothing lies outside of the page.
    pub fn put(&self, offset: u64, word: u32) {
        if let Ok(at) = usize::try_from(offset) {
            // Fails only for what is not a whole word of the page.
            let _ = self.0.as_volatile_slice().store(word.to_le(), at, Ordering::SeqCst);
        }
    }

    /// What a guest reads there.
    #[cfg(test)]
    pub fn get(&self, offset: u64) -> u32 {
        u32::from_le(self.0.as_volatile_slice().load(offset as usize, Ordering::SeqCst).unwrap())
    }
}
