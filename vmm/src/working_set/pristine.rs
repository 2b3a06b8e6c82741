//! The base's own contents of the pages that every login writes, beside each other and in huge pages.
//!
//! A save compares what a machine has written with the base, and in the machine's memory the base is no longer
//! to be seen there. Reading each place from the base's file is a system call for some three pages; these few
//! megabytes are most of what is compared, so the fork server keeps them mapped, and machines inherit that.

use std::{fs::File, io, ops::Range, os::unix::fs::FileExt as _};

use nix::sys::memfd::{MFdFlags, memfd_create};
use vm_memory::{Bytes as _, GuestAddress};

use super::{HUGE, WorkingSet, hot};
use crate::memory::{self, GuestMemory, PAGE_SIZE};

#[derive(Default)]
pub struct Pristine {
    /// Guest addresses, in order, and where what lies there is kept.
    ranges: Vec<(Range<u64>, u64)>,
    kept: Option<GuestMemory>,
}

impl Pristine {
    /// Keeps what `memory`, which is checked, has where the set is written. To be called before any machine is
    /// forked. A machine's writes to it would be its own: it is mapped privately, and nobody has the file.
    pub fn keep(memory: &GuestMemory, set: &WorkingSet) -> io::Result<Self> {
        let length = set.written_bytes().next_multiple_of(HUGE);
        if length == 0 {
            return Ok(Self::default());
        }
        let file = File::from(memfd_create(c"pristine", MFdFlags::MFD_CLOEXEC)?);
        file.set_len(length)?;
        let mut ranges = Vec::with_capacity(set.written.len());
        let mut at = 0;
        for run in &set.written {
            let mut bytes = vec![0; run.length as usize];
            memory.read_slice(&mut bytes, GuestAddress(run.start)).map_err(io::Error::other)?;
            file.write_all_at(&bytes, at)?;
            ranges.push((run.start..run.start + run.length, at));
            at += run.length;
        }
        for offset in (0..length).step_by(HUGE as usize) {
            // Without huge pages there are more faults, and that is all.
            if !hot::collapse(&file, offset)? {
                break;
            }
        }
        let kept = memory::map_beside(&file, length).map_err(io::Error::other)?;
        Ok(Self { ranges, kept: Some(kept) })
    }

    /// The base's pages from this guest address on, as far as they are kept: `most` at most, perhaps none.
    pub fn pages(&self, address: u64, most: usize) -> &[[u8; PAGE_SIZE]] {
        self.find(address, most).unwrap_or_default()
    }

    fn find(&self, address: u64, most: usize) -> Option<&[[u8; PAGE_SIZE]]> {
        let n = self.ranges.partition_point(|(range, _)| range.end <= address);
        let (range, at) = self.ranges.get(n).filter(|(range, _)| range.contains(&address))?;
        let count = ((range.end - address) as usize / PAGE_SIZE).min(most);
        // SAFETY: nobody writes to it: it is not known to any guest, and this is all that it is used for.
        unsafe { memory::pages(self.kept.as_ref()?, at + (address - range.start), count) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{
        memory::{Backing, layout::Layout, map},
        working_set::Run,
    };

    #[test]
    fn what_is_kept_is_the_base_s_whatever_a_machine_writes() {
        let layout = Layout::new(16 << 20, 16 << 20, HUGE).unwrap();
        let (ram, root) = (tempfile::tempfile().unwrap(), tempfile::tempfile().unwrap());
        root.set_len(HUGE).unwrap();
        let page = PAGE_SIZE as u64;
        let content: Vec<u8> = (0..16 << 20).map(|n: u64| (n / page % 251) as u8).collect();
        ram.write_all_at(&content, 0).unwrap();
        let memory = map(&layout, Backing::Base(&ram), &root).unwrap();
        let run = |first: u64, pages: u64| Run { start: first * page, length: pages * page };
        let written = vec![run(3, 2), run(9, 1), run(100, 600)];
        let set = WorkingSet { written, ..WorkingSet::default() };
        let pristine = Pristine::keep(&memory, &set).unwrap();
        let open = std::fs::read_dir("/proc/self/fd").unwrap().flatten();
        let mut links = open.filter_map(|entry| std::fs::read_link(entry.path()).ok());
        let file = links.find(|link| link.to_string_lossy().contains("memfd:pristine"));
        assert_eq!(file, None, "machines would inherit it");
        memory.write_slice(&[255; 3], GuestAddress(3 * page)).unwrap();
        let found = |first: u64, most: usize| {
            let pages = pristine.pages(first * page, most).iter();
            pages.map(|page| page.to_vec()).collect::<Vec<_>>().concat()
        };
        let expected =
            |pages: Range<usize>| &content[pages.start * PAGE_SIZE..pages.end * PAGE_SIZE];
        for (first, most, pages) in [
            (3, 64, 3..5),
            (3, 1, 3..4),
            (4, 64, 4..5),
            (9, 64, 9..10),
            (100, 1000, 100..700),
            (699, 64, 699..700),
        ] {
            assert!(found(first, most) == expected(pages), "{first}");
        }
        for nowhere in [0, 2, 5, 8, 10, 99, 700, 1 << 40] {
            assert!(found(nowhere, 64).is_empty(), "{nowhere}");
        }
        let none = Pristine::keep(&memory, &WorkingSet::default()).unwrap();
        assert!(none.pages(3 * page, 1).is_empty());
    }
}
