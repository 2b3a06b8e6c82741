//! Giving pages back to the host that the guest has no use for.
//!
//! The guest expects nothing of what is in such a page when it takes it again (virtio 1.2 §5.5.6.7, without
//! VIRTIO_BALLOON_F_PAGE_POISON), so a machine's private copy is dropped and the base's page shows again: it
//! takes no memory, and is no difference to be saved.
//!
//! In a resumed machine some pages are its snapshot's, mapped or copied, and the next save takes those along
//! without looking whether they were written. There the base is mapped anew over what is given back, and
//! the pages are noted.

use std::{io, os::fd::AsRawFd as _};

use hermitage_storage::snapshot::{Content, Run};

use super::{GuestMemory, PAGE_SIZE, RamRegion, ram_regions};

pub struct Releaser {
    regions: Vec<RamRegion>,
    /// In a resumed machine: what was given back since.
    noted: Option<PageSet>,
}

impl Releaser {
    pub fn new(memory: &GuestMemory, resumed: bool) -> Self {
        let regions: Vec<_> = ram_regions(memory).collect();
        let pages = regions.iter().map(|r| r.length).sum::<u64>() / PAGE_SIZE as u64;
        Self { regions, noted: resumed.then(|| PageSet::new(pages)) }
    }

    /// Gives back the whole pages of RAM in `guest..guest + length`. An error leaves pages as they are.
    pub fn release(&mut self, guest: u64, length: u64) -> io::Result<()> {
        let page = PAGE_SIZE as u64;
        let start = guest.checked_next_multiple_of(page).unwrap_or(u64::MAX);
        let end = guest.saturating_add(length) / page * page;
        for region in &self.regions {
            let (from, to) = (start.max(region.guest), end.min(region.guest + region.length));
            if from >= to {
                continue;
            }
            let (host, bytes) = (region.host + (from - region.guest), (to - from) as usize);
            let offset = region.file_offset + (from - region.guest);
            match (&mut self.noted, &region.base) {
                (Some(noted), Some(base)) => {
                    map_base(host, bytes, base, offset)?;
                    noted.insert(offset / page, (to - from) / page);
                }
                _ => drop_private(host, bytes)?,
            }
        }
        Ok(())
    }

    /// What is left of a snapshot's runs: the pages that are still the snapshot's, or were written over.
    pub fn left_of(&self, runs: &[Run]) -> Vec<Run> {
        match &self.noted {
            Some(noted) => runs.iter().flat_map(|run| noted.cut_out_of(run)).collect(),
            None => runs.to_vec(),
        }
    }
}

fn drop_private(host: u64, bytes: usize) -> io::Result<()> {
    // SAFETY: whole pages of one region of guest memory, which stays mapped. They lose their content, which
    // the guest that owns them has no use for; nothing of ours refers to it other than by copying.
    match unsafe { libc::madvise(host as *mut libc::c_void, bytes, libc::MADV_DONTNEED) } {
        0 => Ok(()),
        _ => Err(io::Error::last_os_error()),
    }
}

fn map_base(host: u64, bytes: usize, base: &std::fs::File, offset: u64) -> io::Result<()> {
    // SAFETY: whole pages of one region of guest memory, replaced by a mapping of the same kind as the
    // region's first one: private, readable and writable, of the base's memory file, which was found to be
    // as long as RAM and is sealed. Whoever touches them meanwhile waits for the kernel's lock of the
    // address space, and finds the old content or the new.
    let mapped = unsafe {
        libc::mmap(
            host as *mut libc::c_void,
            bytes,
            libc::PROT_READ | libc::PROT_WRITE,
            libc::MAP_PRIVATE | libc::MAP_NORESERVE | libc::MAP_FIXED,
            base.as_raw_fd(),
            offset as libc::off_t,
        )
    };
    match mapped {
        libc::MAP_FAILED => Err(io::Error::last_os_error()),
        _ => Ok(()),
    }
}

/// Pages by their numbers in the base's memory file, a bit each: 16 KiB for 512 MiB of RAM.
struct PageSet(Vec<u64>);

impl PageSet {
    fn new(pages: u64) -> Self {
        Self(vec![0; pages.div_ceil(64) as usize])
    }

    fn insert(&mut self, first: u64, count: u64) {
        for page in first..first + count {
            if let Some(word) = self.0.get_mut((page / 64) as usize) {
                *word |= 1 << (page % 64);
            }
        }
    }

    fn contains(&self, page: u64) -> bool {
        self.0.get((page / 64) as usize).is_some_and(|word| word & 1 << (page % 64) != 0)
    }

    /// The parts of a run that are not in the set.
    fn cut_out_of(&self, run: &Run) -> Vec<Run> {
        let mut parts: Vec<Run> = Vec::new();
        for page in (run.page..run.end()).filter(|&page| !self.contains(page)) {
            match parts.last_mut() {
                Some(part) if part.end() == page => part.pages += 1,
                _ => parts.push(Run { page, pages: 1, content: content_at(run, page) }),
            }
        }
        parts
    }
}

fn content_at(run: &Run, page: u64) -> Content {
    match run.content {
        Content::Zero => Content::Zero,
        Content::Data { at } => Content::Data { at: at + (page - run.page) * PAGE_SIZE as u64 },
    }
}

#[cfg(test)]
mod tests {
    use std::{fs::File, os::unix::fs::FileExt as _};

    use proptest::prelude::*;
    use vm_memory::{Bytes as _, GuestAddress};

    use super::*;
    use crate::memory::{Backing, layout, layout::Layout, map};

    const RAM: u64 = 16 << 20;
    const PAGE: u64 = PAGE_SIZE as u64;

    /// Memory over a base in which every page begins with 0xbb.
    fn fork() -> GuestMemory {
        let layout = Layout::new(RAM, RAM, layout::ROOT_ALIGNMENT).unwrap();
        let (base, root): (File, File) =
            (tempfile::tempfile().unwrap(), tempfile::tempfile().unwrap());
        base.set_len(RAM).unwrap();
        root.set_len(layout::ROOT_ALIGNMENT).unwrap();
        for page in 0..RAM / PAGE {
            base.write_all_at(&[0xbb], page * PAGE).unwrap();
        }
        map(&layout, Backing::Base(&base), &root).unwrap()
    }

    fn first_byte(memory: &GuestMemory, page: u64) -> u8 {
        memory.read_obj(GuestAddress(page * PAGE)).unwrap()
    }

    fn resident(memory: &GuestMemory, first: u64, count: u64) -> u64 {
        let pagemap = File::open("/proc/self/pagemap").unwrap();
        let pagemap = crate::snapshot::pagemap::Pagemap::new(pagemap).unwrap();
        let region = ram_regions(memory).next().unwrap();
        let start = region.host + first * PAGE;
        let own = pagemap.own_pages(start..start + count * PAGE).unwrap();
        own.into_iter().map(|range| (range.end - range.start) / PAGE).sum()
    }

    #[test]
    fn what_is_given_back_is_the_base_s_again_and_takes_nothing() {
        for resumed in [false, true] {
            let memory = fork();
            for page in 10..20 {
                memory.write_obj(1u8, GuestAddress(page * PAGE)).unwrap();
            }
            assert_eq!(resident(&memory, 0, 40), 10);
            let mut releaser = Releaser::new(&memory, resumed);
            // Halves of pages at both ends stay.
            releaser.release(11 * PAGE + 1, 4 * PAGE).unwrap();
            let bytes: Vec<u8> = (10..20).map(|page| first_byte(&memory, page)).collect();
            assert_eq!(bytes, [1, 1, 0xbb, 0xbb, 0xbb, 1, 1, 1, 1, 1]);
            assert_eq!(resident(&memory, 0, 40), 7);
            memory.write_obj(2u8, GuestAddress(12 * PAGE)).unwrap();
            assert_eq!((first_byte(&memory, 12), resident(&memory, 0, 40)), (2, 8));
        }
    }

    #[test]
    fn the_root_image_and_what_is_no_memory_are_left_alone() {
        let memory = fork();
        let root = ram_regions(&memory).last().unwrap();
        assert_eq!(root.guest, 0, "one region of RAM");
        let image = crate::memory::host_ranges(&memory)[1];
        memory.write_obj(5u8, GuestAddress(image.0)).unwrap();
        let mut releaser = Releaser::new(&memory, true);
        releaser.release(image.0, image.1).unwrap();
        releaser.release(u64::MAX - 10, 10).unwrap();
        releaser.release(RAM - PAGE, u64::MAX).unwrap();
        assert_eq!(memory.read_obj::<u8>(GuestAddress(image.0)).unwrap(), 5);
    }

    #[test]
    fn in_a_resumed_machine_the_snapshot_s_pages_go_too() {
        let memory = fork();
        let mut releaser = Releaser::new(&memory, true);
        let runs = [
            Run { page: 4, pages: 10, content: Content::Data { at: PAGE } },
            Run { page: 100, pages: 4, content: Content::Zero },
        ];
        releaser.release(6 * PAGE, 2 * PAGE).unwrap();
        releaser.release(98 * PAGE, 3 * PAGE).unwrap();
        let left = releaser.left_of(&runs);
        assert_eq!(
            left,
            [
                Run { page: 4, pages: 2, content: Content::Data { at: PAGE } },
                Run { page: 8, pages: 6, content: Content::Data { at: 5 * PAGE } },
                Run { page: 101, pages: 3, content: Content::Zero },
            ]
        );
        assert_eq!(Releaser::new(&memory, false).left_of(&runs), runs);
    }

    proptest! {
        #[test]
        fn cutting_leaves_exactly_what_is_not_in_the_set(
            set in proptest::collection::btree_set(0u64..200, 0..100),
            page in 0u64..100, pages in 1u64..100,
        ) {
            let mut released = PageSet::new(200);
            set.iter().for_each(|&page| released.insert(page, 1));
            let run = Run { page, pages, content: Content::Data { at: page * PAGE } };
            let mut left = Vec::new();
            for part in released.cut_out_of(&run) {
                prop_assert_eq!(part.content, Content::Data { at: part.page * PAGE });
                left.extend(part.page..part.end());
            }
            let expected: Vec<u64> = (page..page + pages).filter(|p| !set.contains(p)).collect();
            prop_assert_eq!(left, expected);
        }
    }
}
