//! Which pages of a private mapping are this process's own (linux,
//! Documentation/admin-guide/mm/pagemap.rst).
//!
//! The file `/proc/PID/pagemap` comes from outside: there is no `/proc` in the sandbox. That it is this
//! process's and no other's is proved before it is believed, because a wrong one would name wrong pages
//! and nothing else would ever notice.

use std::{fs::File, io, num::NonZeroUsize, ops::Range, os::fd::AsRawFd as _, ptr::NonNull};

use nix::sys::mman::{MapFlags, MmapAdvise, ProtFlags, madvise, mmap_anonymous, munmap};

use crate::memory::PAGE_SIZE;

#[derive(Debug, thiserror::Error)]
pub enum PagemapError {
    #[error("read the page map: {0}")]
    Read(#[source] io::Error),
    #[error("the page map that came with the request is another process's")]
    Foreign,
    #[error("probe the page map: {0}")]
    Probe(#[source] io::Error),
}

/// This process's page map.
pub struct Pagemap {
    file: File,
    /// The kernel finds the pages itself (PAGEMAP_SCAN, Linux 6.7).
    scans: bool,
}

impl Pagemap {
    pub fn new(file: File) -> Result<Self, PagemapError> {
        let mut map = Self { file, scans: true };
        let probe = Probe::new().map_err(PagemapError::Probe)?;
        let found = match map.scan(probe.range()) {
            Err(error) if matches!(error.raw_os_error(), Some(libc::ENOTTY | libc::EINVAL)) => {
                map.scans = false;
                map.read(probe.range())
            }
            found => found,
        };
        if probe.matches(&found.map_err(PagemapError::Read)?) {
            Ok(map)
        } else {
            Err(PagemapError::Foreign)
        }
    }

    /// The pages in a range of addresses that are not the mapped file's: present and not the file's, or
    /// swapped out. As ranges of addresses, in order.
    pub fn own_pages(&self, addresses: Range<u64>) -> Result<Vec<Range<u64>>, PagemapError> {
        let found = if self.scans { self.scan(addresses) } else { self.read(addresses) };
        found.map_err(PagemapError::Read)
    }

    fn scan(&self, addresses: Range<u64>) -> io::Result<Vec<Range<u64>>> {
        const REGIONS: usize = 512;
        let mut regions = [PageRegion::default(); REGIONS];
        let mut found = Vec::new();
        let mut start = addresses.start;
        while start < addresses.end {
            let mut scan = PmScanArg {
                size: size_of::<PmScanArg>() as u64,
                start,
                end: addresses.end,
                vec: regions.as_mut_ptr() as u64,
                vec_len: REGIONS as u64,
                category_inverted: PAGE_IS_FILE,
                category_mask: PAGE_IS_FILE,
                category_anyof_mask: PAGE_IS_PRESENT | PAGE_IS_SWAPPED,
                return_mask: PAGE_IS_PRESENT | PAGE_IS_SWAPPED,
                ..PmScanArg::default()
            };
            // SAFETY: `scan` is the structure the request is for, and the vector it names lies in
            // `regions` with as many entries as it says.
            let count = unsafe { libc::ioctl(self.file.as_raw_fd(), PAGEMAP_SCAN, &mut scan) };
            let count = usize::try_from(count).map_err(|_| io::Error::last_os_error())?;
            for region in regions.iter().take(count) {
                add(&mut found, region.start..region.end);
            }
            // Without progress the loop would never end.
            if scan.walk_end <= start {
                return Err(io::Error::other("PAGEMAP_SCAN does not get on"));
            }
            start = scan.walk_end;
        }
        Ok(found)
    }

    fn read(&self, addresses: Range<u64>) -> io::Result<Vec<Range<u64>>> {
        use std::os::unix::fs::FileExt as _;
        const ENTRIES: u64 = 8192;
        let page = PAGE_SIZE as u64;
        let mut entries = vec![0; ENTRIES as usize * 8];
        let mut found = Vec::new();
        let mut start = addresses.start;
        while start < addresses.end {
            let count = ((addresses.end - start) / page).min(ENTRIES);
            let bytes = &mut entries[..count as usize * 8];
            self.file.read_exact_at(bytes, start / page * 8)?;
            let (entries, _) = bytes.as_chunks::<8>();
            for (address, entry) in (start..).step_by(PAGE_SIZE).zip(entries) {
                if Entry(u64::from_le_bytes(*entry)).is_own() {
                    add(&mut found, address..address + page);
                }
            }
            start += count * page;
        }
        Ok(found)
    }
}

/// What `/proc/PID/pagemap` says of one page.
#[derive(Clone, Copy)]
pub struct Entry(pub u64);

impl Entry {
    const FILE: u64 = 1 << 61;
    const SWAPPED: u64 = 1 << 62;
    const PRESENT: u64 = 1 << 63;

    /// Mapped, be it the file's or the process's own.
    pub fn is_present(self) -> bool {
        self.0 & Self::PRESENT != 0
    }

    /// Not the mapped file's: present and not the file's, or swapped out.
    pub fn is_own(self) -> bool {
        self.0 & Self::SWAPPED != 0 || self.is_present() && self.0 & Self::FILE == 0
    }
}

/// Adds a range behind the others, or to the last one where they touch.
fn add(found: &mut Vec<Range<u64>>, range: Range<u64>) {
    match found.last_mut() {
        Some(last) if last.end == range.start => last.end = range.end,
        _ => found.push(range),
    }
}

const PAGE_IS_FILE: u64 = 1 << 2;
const PAGE_IS_PRESENT: u64 = 1 << 3;
const PAGE_IS_SWAPPED: u64 = 1 << 4;

/// linux/fs.h: `_IOWR('f', 16, struct pm_scan_arg)`.
const PAGEMAP_SCAN: libc::Ioctl =
    (3 << 30 | (size_of::<PmScanArg>() as u64) << 16 | (b'f' as u64) << 8 | 16) as libc::Ioctl;

/// linux/fs.h: `struct pm_scan_arg`.
#[repr(C)]
#[derive(Default)]
struct PmScanArg {
    size: u64,
    flags: u64,
    start: u64,
    end: u64,
    walk_end: u64,
    vec: u64,
    vec_len: u64,
    max_pages: u64,
    category_inverted: u64,
    category_mask: u64,
    category_anyof_mask: u64,
    return_mask: u64,
}

/// linux/fs.h: `struct page_region`.
#[repr(C)]
#[derive(Clone, Copy, Default)]
struct PageRegion {
    start: u64,
    end: u64,
    categories: u64,
}

/// Pages of which some, chosen at random, were written.
struct Probe {
    pages: NonNull<libc::c_void>,
    pattern: u32,
}

impl Probe {
    const PAGES: usize = u32::BITS as usize;
    const BYTES: usize = Self::PAGES * PAGE_SIZE;

    fn new() -> io::Result<Self> {
        let mut pattern = [0u8; 4];
        // The system call itself: the crate wants to open /dev/urandom first, which is not there.
        // SAFETY: the kernel writes at most as many bytes as there are.
        let filled = unsafe { libc::getrandom(pattern.as_mut_ptr().cast(), pattern.len(), 0) };
        if filled != pattern.len() as isize {
            return Err(io::Error::last_os_error());
        }
        let length = NonZeroUsize::new(Self::BYTES).unwrap_or(NonZeroUsize::MIN);
        let access = ProtFlags::PROT_READ | ProtFlags::PROT_WRITE;
        // SAFETY: a new mapping at an address of the kernel's choice.
        let pages = unsafe { mmap_anonymous(None, length, access, MapFlags::MAP_PRIVATE) }?;
        let probe = Self { pages, pattern: u32::from_le_bytes(pattern) };
        // A huge page would be present as a whole. Kernels without huge pages refuse the advice.
        // SAFETY: exactly the mapping made above.
        let _ = unsafe { madvise(pages, Self::BYTES, MmapAdvise::MADV_NOHUGEPAGE) };
        for page in probe.written() {
            // SAFETY: within the mapping, which is writable.
            unsafe { pages.cast::<u8>().add(page * PAGE_SIZE).write_volatile(1) };
        }
        Ok(probe)
    }

    fn written(&self) -> impl Iterator<Item = usize> {
        let pattern = self.pattern;
        (0..Self::PAGES).filter(move |page| pattern >> page & 1 == 1)
    }

    fn range(&self) -> Range<u64> {
        let start = self.pages.as_ptr() as u64;
        start..start + Self::BYTES as u64
    }

    fn matches(&self, found: &[Range<u64>]) -> bool {
        let start = self.range().start;
        let mut expected = Vec::new();
        for page in self.written() {
            let address = start + (page * PAGE_SIZE) as u64;
            add(&mut expected, address..address + PAGE_SIZE as u64);
        }
        found == expected
    }
}

impl Drop for Probe {
    fn drop(&mut self) {
        // SAFETY: exactly the mapping made in `new`; nothing refers to it any more.
        let _ = unsafe { munmap(self.pages, Self::BYTES) };
    }
}

#[cfg(test)]
mod tests {
    use std::{os::unix::fs::FileExt as _, process::Command};

    use super::*;

    fn mine() -> Pagemap {
        Pagemap::new(File::open("/proc/self/pagemap").unwrap()).unwrap()
    }

    #[test]
    fn another_process_is_found_out() {
        let mut other = Command::new("sleep").arg("60").spawn().unwrap();
        let file = File::open(format!("/proc/{}/pagemap", other.id())).unwrap();
        let result = Pagemap::new(file);
        other.kill().unwrap();
        other.wait().unwrap();
        assert!(matches!(result, Err(PagemapError::Foreign)));
        assert!(Pagemap::new(File::open("/dev/null").unwrap()).is_err());
    }

    #[test]
    fn written_pages_are_own_and_read_ones_are_not() {
        let file = tempfile::tempfile().unwrap();
        let bytes = vec![7; 64 * PAGE_SIZE];
        file.write_all_at(&bytes, 0).unwrap();
        let length = NonZeroUsize::new(bytes.len()).unwrap();
        let access = ProtFlags::PROT_READ | ProtFlags::PROT_WRITE;
        // SAFETY: a new mapping at an address of the kernel's choice.
        let pages =
            unsafe { nix::sys::mman::mmap(None, length, access, MapFlags::MAP_PRIVATE, &file, 0) }
                .unwrap();
        let start = pages.as_ptr() as u64;
        for page in 0..64 {
            // SAFETY: within the mapping.
            unsafe {
                let at = pages.cast::<u8>().add(page * PAGE_SIZE);
                match page {
                    3 | 4 | 63 => at.write_volatile(1),
                    0..30 => drop(at.read_volatile()),
                    _ => {}
                }
            }
        }
        let range = start..start + bytes.len() as u64;
        let at = |page: u64| start + page * PAGE_SIZE as u64;
        let expected = [at(3)..at(5), at(63)..at(64)];
        let mut map = mine();
        assert_eq!(map.own_pages(range.clone()).unwrap(), expected);
        map.scans = false;
        assert_eq!(map.own_pages(range).unwrap(), expected);
        // SAFETY: exactly the mapping made above.
        unsafe { munmap(pages, bytes.len()) }.unwrap();
    }
}
