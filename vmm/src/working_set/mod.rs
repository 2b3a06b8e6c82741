//! What every login touches of a base's memory, found out once by a rehearsal ([`rehearse`]) when the base
//! is made, so that a fork need not find it out page by page.
//!
//! A fork starts with nothing mapped: each page that the guest touches first is an exit, a fault in this
//! process and, if it is written, a copy. Most of these are the same for every login. So:
//!
//! - parts that logins read and never write ([`WorkingSet::hot`]) are kept in huge pages ([`hot`]): one
//!   exit for 2 MiB instead of 512;
//! - pages that logins write ([`WorkingSet::written`]) are copied in one go ([`populate`]);
//! - what the base has in these is kept for saves ([`Pristine`]).
//!
//! This is an expectation, not a promise: a login that touches other pages is slower, not wrong.

pub mod hot;
mod pristine;
mod record;
mod rehearse;

use serde::{Deserialize, Serialize};
use vm_memory::{GuestAddress, GuestMemoryBackend as _, GuestMemoryRegion as _};

pub use pristine::Pristine;
pub use record::record;
pub use rehearse::rehearse;

use crate::memory::{GuestMemory, HUGE_PAGE, PAGE_SIZE};

/// Bytes of a huge page, and their alignment.
pub const HUGE: u64 = HUGE_PAGE as u64;

/// Guest physical addresses, in bytes.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct WorkingSet {
    /// Runs of pages, by address, that do not touch each other.
    pub written: Vec<Run>,
    /// Starts of aligned ranges of [`HUGE`] bytes.
    pub hot: Vec<u64>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Run {
    pub start: u64,
    pub length: u64,
}

#[derive(Debug, thiserror::Error)]
#[error("the base's working set names {0:#x}, where its memory has no such range")]
pub struct WorkingSetError(u64);

impl WorkingSet {
    /// Checks that everything named lies in `memory`.
    pub fn check(&self, memory: &GuestMemory) -> Result<(), WorkingSetError> {
        let inside = |start: u64, length: u64, alignment: u64| {
            let fits = memory.find_region(GuestAddress(start)).is_some_and(|region| {
                let offset = start - region.start_addr().0;
                length > 0 && length <= region.len() - offset
            });
            let aligned = start.is_multiple_of(alignment) && length.is_multiple_of(alignment);
            if fits && aligned { Ok(()) } else { Err(WorkingSetError(start)) }
        };
        self.written.iter().try_for_each(|run| inside(run.start, run.length, PAGE_SIZE as u64))?;
        self.hot.iter().try_for_each(|&start| inside(start, HUGE, HUGE))
    }

    pub fn written_bytes(&self) -> u64 {
        self.written.iter().map(|run| run.length).sum()
    }
}

/// Copies the pages that will be written. What can't be copied now is copied when it is written.
pub fn populate(memory: &GuestMemory, written: &[Run]) {
    for run in written {
        let Ok(slice) = memory.get_slice(GuestAddress(run.start), run.length as usize) else {
            continue;
        };
        let pages = slice.ptr_guard_mut();
        // SAFETY: `get_slice` has checked that the range is mapped as part of `memory`, which lives for
        // longer than this call. Populating a private mapping changes no byte of it (madvise(2)).
        let populated = unsafe {
            rustix::mm::madvise(
                pages.as_ptr().cast(),
                run.length as usize,
                rustix::mm::Advice::LinuxPopulateWrite,
            )
        };
        // Before Linux 5.14 there is no such thing; without memory there is no hurry.
        if populated.is_err() {
            return;
        }
    }
}
