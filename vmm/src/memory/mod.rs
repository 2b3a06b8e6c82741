//! Guest physical memory: where things lie ([`layout`]) and how they are mapped.
//!
//! RAM is mapped privately in every machine, over the base's sealed memory file in a fork and over
//! nothing while a base is built. The root image follows RAM as persistent memory: the guest sees the
//! file's own pages, the same ones for every machine.

pub mod layout;
pub mod release;
mod shown;

use std::{fs::File, io, os::fd::AsRawFd as _, sync::Arc};

use vm_memory::{
    FileOffset, GuestAddress, GuestMemoryBackend as _, GuestMemoryMmap, GuestMemoryRegion as _,
    GuestRegionMmap, MmapRegion, mmap::MmapRegionBuilder,
};

use layout::Layout;
pub use shown::ShownPage;

/// RAM and the root image, as the guest addresses them.
pub type GuestMemory = GuestMemoryMmap<()>;

pub const PAGE_SIZE: usize = 4096;
pub const HUGE_PAGE: usize = 2 << 20;

#[derive(Debug, thiserror::Error)]
pub enum MemoryError {
    #[error("map {what} ({bytes} bytes): {source}")]
    Map { what: &'static str, bytes: u64, source: io::Error },
    #[error("guest memory regions overlap or are empty: {0}")]
    Regions(String),
    #[error("write page at {offset:#x} of the memory file: {source}")]
    Save { offset: u64, source: io::Error },
    #[error("read guest memory at {0:#x}")]
    Read(u64),
}

/// What lies behind RAM.
pub enum Backing<'a> {
    /// Fresh zero pages (a machine that boots), and the base's memory file that is being made behind what
    /// RAM can grow by: the guest hardly touches that, and reading gigabytes of zeroes to find out takes long.
    New(&'a File),
    /// A base's memory file, one byte per byte of RAM, mapped copy-on-write (a fork).
    Base(&'a File),
}

/// Maps RAM and the root image.
///
/// The root image is mapped writable but private: the guest's own writes are stopped by its read-only
/// KVM slot, and a device told by a hostile guest to write there changes this process's copy only.
pub fn map(layout: &Layout, ram: Backing<'_>, root: &File) -> Result<GuestMemory, MemoryError> {
    let mut regions = Vec::with_capacity(4);
    match ram {
        Backing::New(file) => {
            for range in layout.ram() {
                regions.push(region("RAM", None, range.address, range.length)?);
            }
            for range in layout.growth() {
                let part = part_of(file, range.file_offset, range.length)?;
                let flags = libc::MAP_SHARED;
                regions.push(mapped("RAM", Some(part), flags, range.address, range.length)?);
            }
        }
        Backing::Base(file) => {
            for range in layout.all_ram() {
                let part = part_of(file, range.file_offset, range.length)?;
                regions.push(region("RAM", Some(part), range.address, range.length)?);
            }
        }
    }
    let part = Some(part_of(root, 0, layout.root.length)?);
    regions.push(region("the root image", part, layout.root.address, layout.root.length)?);
    GuestMemory::from_arc_regions(regions).map_err(|e| MemoryError::Regions(e.to_string()))
}

/// The same mappings with only the first `ram_bytes` of RAM, for a machine that has less than the most.
pub fn limited(memory: &GuestMemory, ram_bytes: u64) -> Result<GuestMemory, MemoryError> {
    let mut left = ram_bytes;
    let mut regions = Vec::with_capacity(3);
    let root = memory.num_regions().saturating_sub(1);
    for (n, region) in memory.iter().enumerate() {
        let length = if n == root { region.len() } else { region.len().min(left) };
        if length == 0 {
            continue;
        }
        if n != root {
            left -= length;
        }
        let mapping = Mapping {
            host: region.as_ptr(),
            length,
            part: region.file_offset().cloned(),
            flags: region.flags(),
        };
        regions.push(mapping.at("RAM", region.start_addr().0)?);
    }
    if left > 0 {
        return Err(MemoryError::Regions(format!("there are {left} bytes of RAM too few")));
    }
    GuestMemory::from_arc_regions(regions).map_err(|e| MemoryError::Regions(e.to_string()))
}

/// The part of `file` to map. A file that ends before it would be a SIGBUS at the first access.
fn part_of(file: &File, offset: u64, length: u64) -> Result<FileOffset, MemoryError> {
    let failed = |source| MemoryError::Map { what: "a file", bytes: length, source };
    let size = file.metadata().map_err(failed)?.len();
    if size < offset + length {
        let end = offset + length;
        return Err(failed(io::Error::other(format!("the file has {size} bytes, not {end}"))));
    }
    Ok(FileOffset::new(file.try_clone().map_err(failed)?, offset))
}

/// A private mapping of part of a file, or of nothing.
fn region(
    what: &'static str,
    part: Option<FileOffset>,
    address: u64,
    bytes: u64,
) -> Result<Arc<GuestRegionMmap<()>>, MemoryError> {
    mapped(what, part, libc::MAP_PRIVATE, address, bytes)
}

/// A mapping which stays until the process ends: a machine's memory lives as long as its process.
fn mapped(
    what: &'static str,
    part: Option<FileOffset>,
    flags: libc::c_int,
    address: u64,
    bytes: u64,
) -> Result<Arc<GuestRegionMmap<()>>, MemoryError> {
    mapping(what, part, flags, bytes)?.at(what, address)
}

fn mapping(
    what: &'static str,
    part: Option<FileOffset>,
    flags: libc::c_int,
    bytes: u64,
) -> Result<Mapping, MemoryError> {
    let flags = flags | libc::MAP_NORESERVE;
    let (flags, fd, offset) = match &part {
        Some(part) => (flags, part.file().as_raw_fd(), part.start() as i64),
        None => (flags | libc::MAP_ANONYMOUS, -1, 0),
    };
    let length = bytes as usize;
    let failed = || MemoryError::Map { what, bytes, source: io::Error::last_os_error() };
    let host = reserve(length).ok_or_else(failed)?;
    // SAFETY: replaces the range that was reserved just now, which nobody else knows of.
    let mapped =
        unsafe { libc::mmap(host, length, PROTECTION, flags | libc::MAP_FIXED, fd, offset) };
    if mapped == libc::MAP_FAILED {
        return Err(failed());
    }
    Ok(Mapping { host: mapped.cast(), length: bytes, part, flags })
}

/// A file's memory at addresses of its own from 0 on, of which a write would be this process's own. The file is not
/// kept: machines inherit what is mapped, and by a descriptor one could write what all of them see.
pub fn map_beside(file: &File, bytes: u64) -> Result<GuestMemory, MemoryError> {
    let what = "what is kept of the base";
    let mapping = mapping(what, Some(part_of(file, 0, bytes)?), libc::MAP_PRIVATE, bytes)?;
    let region = Mapping { part: None, ..mapping }.at(what, 0)?;
    GuestMemory::from_arc_regions(vec![region]).map_err(|e| MemoryError::Regions(e.to_string()))
}

const PROTECTION: libc::c_int = libc::PROT_READ | libc::PROT_WRITE;

/// Made by [`mapping`], all of it or its beginning; never taken away.
struct Mapping {
    host: *mut u8,
    length: u64,
    /// A save compares with the file.
    part: Option<FileOffset>,
    flags: libc::c_int,
}

impl Mapping {
    fn at(self, what: &'static str, address: u64) -> Result<Arc<GuestRegionMmap<()>>, MemoryError> {
        let builder = MmapRegionBuilder::new(self.length as usize)
            .with_mmap_prot(PROTECTION)
            .with_mmap_flags(self.flags);
        let builder = match self.part {
            Some(part) => builder.with_file_offset(part),
            None => builder,
        };
        // SAFETY: a mapping of at least this length, with this protection and flags, that is never taken away.
        let builder = unsafe { builder.with_raw_mmap_pointer(self.host) };
        let mapping: MmapRegion<()> = builder.build().map_err(|e| MemoryError::Map {
            what,
            bytes: self.length,
            source: io::Error::other(e.to_string()),
        })?;
        GuestRegionMmap::new(mapping, GuestAddress(address))
            .map(Arc::new)
            .ok_or_else(|| MemoryError::Regions(format!("{what} at {address:#x} wraps around")))
    }
}

/// Addresses for `length` bytes that start, as every region of guest memory does, where a huge page could:
/// KVM maps huge pages only where host and guest address have the same offset in one.
fn reserve(length: usize) -> Option<*mut libc::c_void> {
    let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_NORESERVE;
    let longer = length.checked_add(HUGE_PAGE)?;
    // SAFETY: a new mapping that cannot be accessed.
    let start = unsafe { libc::mmap(std::ptr::null_mut(), longer, libc::PROT_NONE, flags, -1, 0) };
    if start == libc::MAP_FAILED {
        return None;
    }
    let before = start.align_offset(HUGE_PAGE);
    let aligned = start.wrapping_byte_add(before);
    // SAFETY: head and tail of the mapping made above, which nobody refers to. A failure leaves addresses
    // taken that nobody misses.
    unsafe {
        if before > 0 {
            libc::munmap(start, before);
        }
        libc::munmap(aligned.wrapping_byte_add(length), HUGE_PAGE - before);
    }
    Some(aligned)
}

/// Writes RAM that a machine booted with to `file` as the base's memory: byte n of RAM at offset n, zero pages as
/// holes. What it can grow by is in the file already ([`Backing::New`]). Returns the number of bytes written.
pub fn save_ram(memory: &GuestMemory, layout: &Layout, file: &File) -> Result<u64, MemoryError> {
    use std::os::unix::fs::FileExt as _;

    use vm_memory::Bytes as _;

    let save = |offset: u64, source: io::Error| MemoryError::Save { offset, source };
    file.set_len(layout.max_ram_bytes()).map_err(|e| save(0, e))?;
    // Read in larger pieces than a page: one page at a time doubles the time under emulation.
    let mut chunk = vec![0; 64 * PAGE_SIZE];
    let mut written = 0;
    for range in layout.ram() {
        let mut done = 0;
        while done < range.length {
            let length = (range.length - done).min(chunk.len() as u64) as usize;
            let address = range.address + done;
            memory
                .read_slice(&mut chunk[..length], GuestAddress(address))
                .map_err(|_| MemoryError::Read(address))?;
            for (i, page) in chunk[..length].chunks(PAGE_SIZE).enumerate() {
                if page.iter().any(|&b| b != 0) {
                    let offset = range.file_offset + done + (i * PAGE_SIZE) as u64;
                    file.write_all_at(page, offset).map_err(|e| save(offset, e))?;
                    written += page.len() as u64;
                }
            }
            done += length as u64;
        }
    }
    Ok(written)
}

/// A region of RAM: where it is in this process, in the guest and in the base's memory file.
pub struct RamRegion {
    pub host: u64,
    pub guest: u64,
    pub length: u64,
    pub file_offset: u64,
    /// The memory file; none for a machine that was booted.
    pub base: Option<Arc<File>>,
}

impl RamRegion {
    /// The part of the memory file.
    pub fn file(&self) -> std::ops::Range<u64> {
        self.file_offset..self.file_offset + self.length
    }
}

/// RAM, without the root image, in the order of the memory file.
pub fn ram_regions(memory: &GuestMemory) -> impl Iterator<Item = RamRegion> {
    let regions = memory.num_regions().saturating_sub(1);
    let mut next = 0;
    memory.iter().take(regions).map(move |region| {
        let file_offset = next;
        next += region.len();
        RamRegion {
            host: region.as_ptr() as usize as u64,
            guest: region.start_addr().0,
            length: region.len(),
            file_offset,
            base: region.file_offset().map(|part| part.arc().clone()),
        }
    })
}

/// Whole pages of RAM from a guest address on, where they lie. None: there are not as many.
///
/// # Safety
///
/// Nothing may write to them as long as the slice lives: no vCPU, no device, no other thread.
pub unsafe fn pages(
    memory: &GuestMemory,
    address: u64,
    count: usize,
) -> Option<&[[u8; PAGE_SIZE]]> {
    let length = count.checked_mul(PAGE_SIZE)?;
    let slice = memory.get_slice(GuestAddress(address), length).ok()?;
    let start = slice.ptr_guard().as_ptr().cast();
    // SAFETY: a mapping has these bytes, and stays as long as `memory` is borrowed; that nothing writes to them is
    // the caller's promise. An array of bytes needs no alignment.
    Some(unsafe { std::slice::from_raw_parts(start, count) })
}

/// Host address at which each region lies, for KVM: (guest address, length, host address).
pub fn host_ranges(memory: &GuestMemory) -> Vec<(u64, u64, u64)> {
    memory
        .iter()
        .map(|region| (region.start_addr().0, region.len(), region.as_ptr() as usize as u64))
        .collect()
}

#[cfg(test)]
mod tests {
    use vm_memory::Bytes as _;

    use super::*;

    fn root() -> File {
        let file = tempfile::tempfile().unwrap();
        file.set_len(layout::ROOT_ALIGNMENT).unwrap();
        file
    }

    #[test]
    fn a_fork_of_saved_memory_equals_it_and_writes_stay_private() {
        let layout = Layout::new(16 << 20, 16 << 20, layout::ROOT_ALIGNMENT).unwrap();
        let file = tempfile::tempfile().unwrap();
        let booted = map(&layout, Backing::New(&file), &root()).unwrap();
        booted.write_slice(b"hello", GuestAddress(0x5000)).unwrap();
        booted.write_slice(&[7], GuestAddress((16 << 20) - 1)).unwrap();
        assert_eq!(save_ram(&booted, &layout, &file).unwrap(), 2 * PAGE_SIZE as u64);

        let fork = map(&layout, Backing::Base(&file), &root()).unwrap();
        let mut all = vec![0; 16 << 20];
        let mut again = all.clone();
        booted.read_slice(&mut all, GuestAddress(0)).unwrap();
        fork.read_slice(&mut again, GuestAddress(0)).unwrap();
        assert!(all == again);

        fork.write_slice(b"other", GuestAddress(0x5000)).unwrap();
        let sibling = map(&layout, Backing::Base(&file), &root()).unwrap();
        let mut bytes = [0; 5];
        sibling.read_slice(&mut bytes, GuestAddress(0x5000)).unwrap();
        assert_eq!(&bytes, b"hello");
    }

    #[test]
    fn regions_of_ram_know_their_part_of_the_file() {
        let layout = Layout::new(4 << 30, 4 << 30, layout::ROOT_ALIGNMENT).unwrap();
        let file = tempfile::tempfile().unwrap();
        file.set_len(layout.ram_bytes()).unwrap();
        let fork = map(&layout, Backing::Base(&file), &root()).unwrap();
        let parts: Vec<_> = ram_regions(&fork).map(|r| (r.guest, r.file(), r.base)).collect();
        assert!(parts.iter().all(|(_, _, base)| base.is_some()));
        assert_eq!((parts[0].0, parts[0].1.clone()), (0, 0..3 << 30));
        assert_eq!((parts[1].0, parts[1].1.clone()), (4 << 30, 3 << 30..4 << 30));
        assert_eq!(parts.len(), 2, "the root image is not RAM");
    }

    #[test]
    fn pages_are_seen_where_they_lie_and_no_further() {
        let layout = Layout::new(16 << 20, 16 << 20, layout::ROOT_ALIGNMENT).unwrap();
        let file = tempfile::tempfile().unwrap();
        let booted = map(&layout, Backing::New(&file), &root()).unwrap();
        booted.write_slice(&[7; 3], GuestAddress((16 << 20) - 3)).unwrap();
        let page = PAGE_SIZE as u64;
        // SAFETY: nothing writes any more.
        let seen = |address, count| unsafe { pages(&booted, address, count) };
        let last = seen((16 << 20) - 2 * page, 2).unwrap();
        assert_eq!((last.len(), last[0]), (2, [0; PAGE_SIZE]));
        assert_eq!(last[1][PAGE_SIZE - 4..], [0, 7, 7, 7]);
        assert!(seen((16 << 20) - page, 2).is_none(), "a page behind the end");
        assert!(seen(0, usize::MAX / 2).is_none());
    }

    #[test]
    fn ram_beyond_3_gib_continues_above_4_gib() {
        let layout = Layout::new(4 << 30, 4 << 30, layout::ROOT_ALIGNMENT).unwrap();
        let file = tempfile::tempfile().unwrap();
        file.set_len(layout.ram_bytes()).unwrap();
        let booted = map(&layout, Backing::New(&file), &root()).unwrap();
        booted.write_slice(b"high", GuestAddress((4 << 30) + 0x1000)).unwrap();
        // Saved by hand: reading 4 GiB of zeroes takes seconds.
        use std::os::unix::fs::FileExt as _;
        file.write_all_at(b"high", (3 << 30) + 0x1000).unwrap();
        let fork = map(&layout, Backing::Base(&file), &root()).unwrap();
        let mut bytes = [0; 4];
        fork.read_slice(&mut bytes, GuestAddress((4 << 30) + 0x1000)).unwrap();
        assert_eq!(&bytes, b"high");
    }

    #[test]
    fn ram_can_grow_and_what_was_there_before_the_base_was_sealed_stays() {
        use layout::MEMORY_BLOCK;

        let most = 4 << 30;
        let layout = Layout::new(MEMORY_BLOCK, most, layout::ROOT_ALIGNMENT).unwrap();
        let file = tempfile::tempfile().unwrap();
        file.set_len(most).unwrap();
        let booted = map(&layout, Backing::New(&file), &root()).unwrap();
        let (low, high) = (GuestAddress(MEMORY_BLOCK), GuestAddress((4 << 30) + 0x1000));
        booted.write_slice(b"boot", GuestAddress(0x5000)).unwrap();
        booted.write_slice(b"grown", low).unwrap();
        booted.write_slice(b"more", high).unwrap();
        assert_eq!(save_ram(&booted, &layout, &file).unwrap(), PAGE_SIZE as u64);

        let all = map(&layout, Backing::Base(&file), &root()).unwrap();
        let read = |memory: &GuestMemory, at: GuestAddress| {
            let mut bytes = [0; 4];
            memory.read_slice(&mut bytes, at).map(|()| bytes).ok()
        };
        let fork = |bytes| limited(&all, bytes).unwrap();
        assert_eq!(read(&fork(most), high), Some(*b"more"));
        assert_eq!(read(&fork(MEMORY_BLOCK * 2), low), Some(*b"grow"));
        let least = fork(MEMORY_BLOCK);
        assert_eq!(read(&least, GuestAddress(0x5000)), Some(*b"boot"));
        assert_eq!(read(&least, low), None, "it has no such memory");
        let length = |memory| ram_regions(memory).map(|region| region.length).sum::<u64>();
        assert_eq!(length(&least), MEMORY_BLOCK);
        assert_eq!(length(&fork(most)), most);
        assert!(read(&least, GuestAddress(layout.root.address)).is_some(), "the root image stays");
        assert!(limited(&all, most + 1).is_err());
    }

    #[test]
    fn a_memory_file_that_is_too_short_is_refused() {
        let layout = Layout::new(16 << 20, 16 << 20, layout::ROOT_ALIGNMENT).unwrap();
        let file = tempfile::tempfile().unwrap();
        file.set_len((16 << 20) - 1).unwrap();
        assert!(map(&layout, Backing::Base(&file), &root()).is_err());
    }
}
