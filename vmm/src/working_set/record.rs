//! Which pages of a machine's memory its process has touched, from the kernel's own books
//! (Documentation/admin-guide/mm/pagemap.rst).

use std::{fs::File, io, os::unix::fs::FileExt as _};

use vm_memory::{GuestMemoryBackend as _, GuestMemoryRegion as _};

use super::{HUGE, Run, WorkingSet};
use crate::{
    memory::{GuestMemory, PAGE_SIZE},
    snapshot::pagemap::Entry,
};

/// Pages read in a huge page's range that make it worth one: below that, page by page is as good.
const WORTH_IT: usize = 16;

/// What this process has touched of `memory`. Pages that the kernel mapped around those that were read
/// count as read, too.
pub fn record(memory: &GuestMemory) -> io::Result<WorkingSet> {
    let pagemap = File::open("/proc/self/pagemap")?;
    let mut set = WorkingSet::default();
    let mut entries = vec![0; (HUGE as usize / PAGE_SIZE) * 8];
    for region in memory.iter() {
        let (start, host) = (region.start_addr().0, region.as_ptr() as usize as u64);
        let mut done = 0;
        while done < region.len() {
            // From one huge page's border to the next.
            let length = (HUGE - (start + done) % HUGE).min(region.len() - done);
            let entries = &mut entries[..(length as usize / PAGE_SIZE) * 8];
            pagemap.read_exact_at(entries, (host + done) / PAGE_SIZE as u64 * 8)?;
            add(&mut set, start + done, length, entries);
            done += length;
        }
    }
    Ok(set)
}

fn add(set: &mut WorkingSet, start: u64, length: u64, entries: &[u8]) {
    let mut read = 0;
    let mut written = 0;
    for (page, entry) in entries.as_chunks::<8>().0.iter().enumerate() {
        let entry = Entry(u64::from_le_bytes(*entry));
        if entry.is_own() {
            written += 1;
            let address = start + (page * PAGE_SIZE) as u64;
            match set.written.last_mut() {
                Some(run) if run.start + run.length == address => run.length += PAGE_SIZE as u64,
                _ => set.written.push(Run { start: address, length: PAGE_SIZE as u64 }),
            }
        } else if entry.is_present() {
            read += 1;
        }
    }
    // The first write to a huge page's range takes the huge page away again.
    if length == HUGE && written == 0 && read >= WORTH_IT {
        set.hot.push(start);
    }
}

#[cfg(test)]
mod tests {
    use vm_memory::{Bytes as _, GuestAddress};

    use super::*;
    use crate::memory::{Backing, layout, map};

    #[test]
    fn what_was_written_and_what_was_read_is_found() {
        let layout = layout::Layout::new(16 << 20, 16 << 20, layout::ROOT_ALIGNMENT).unwrap();
        let (ram, root) = (tempfile::tempfile().unwrap(), tempfile::tempfile().unwrap());
        for (file, length) in [(&ram, 16 << 20), (&root, layout::ROOT_ALIGNMENT)] {
            file.set_len(length).unwrap();
            file.write_all_at(&vec![7; length as usize], 0).unwrap();
        }
        let memory = map(&layout, Backing::Base(&ram), &root).unwrap();
        let pages = |n: u64| n * PAGE_SIZE as u64;
        for address in [pages(3), pages(4), pages(9), HUGE + pages(1)] {
            memory.write_slice(&[1], GuestAddress(address)).unwrap();
        }
        for page in 0..512 {
            memory.read_obj::<u8>(GuestAddress(2 * HUGE + pages(page))).unwrap();
            memory.read_obj::<u8>(GuestAddress(HUGE + pages(page))).unwrap();
        }
        let set = record(&memory).unwrap();
        assert_eq!(
            set.written,
            [
                Run { start: pages(3), length: pages(2) },
                Run { start: pages(9), length: pages(1) },
                Run { start: HUGE + pages(1), length: pages(1) },
            ]
        );
        assert_eq!(set.hot, [2 * HUGE]);
        set.check(&memory).unwrap();
        assert_eq!(set.written_bytes(), pages(4));

        let again = map(&layout, Backing::Base(&ram), &root).unwrap();
        super::super::populate(&again, &set.written);
        assert_eq!(record(&again).unwrap().written, set.written);
        let beyond = WorkingSet { hot: vec![16 << 20], ..WorkingSet::default() };
        assert!(beyond.check(&memory).is_err());
        let long = Run { start: pages(1), length: 16 << 20 };
        let long = WorkingSet { written: vec![long], ..WorkingSet::default() };
        assert!(long.check(&memory).is_err());
    }
}
