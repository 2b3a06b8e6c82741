//! The hot parts of a base's memory, in huge pages.
//!
//! A file system's page cache has small pages only (Linux 6.12), so the hot parts are copied to memory
//! files once for each fork server and mapped over the base's own files. Machines inherit the mappings;
//! their contents are the base's, so nothing else changes: a write still makes a private copy of 4 KiB.

use std::{
    fs::File,
    io,
    num::NonZeroUsize,
    os::{fd::AsFd as _, unix::fs::FileExt as _},
    ptr::NonNull,
};

use nix::sys::{
    memfd::{MFdFlags, memfd_create},
    mman::{MapFlags, ProtFlags, mmap, munmap},
};
use vm_memory::{Bytes as _, GuestAddress, GuestMemoryBackend as _};

use super::{HUGE, WorkingSet};
use crate::memory::{GuestMemory, layout::Layout};

/// MADV_COLLAPSE of Linux 6.1: make it a huge page now, whatever the settings say of later.
const COLLAPSE: i32 = 25;

/// Puts the hot parts of `memory`, which is checked, into huge pages. Returns how many it could; the
/// others stay as they are. To be called before any machine is forked.
pub fn share(memory: &GuestMemory, layout: &Layout, set: &WorkingSet) -> io::Result<usize> {
    let (ram, root): (Vec<u64>, Vec<u64>) =
        set.hot.iter().partition(|&&start| start < layout.root.address);
    Ok(share_part(memory, "memory.img", &ram)? + share_part(memory, "root.erofs", &root)?)
}

fn share_part(memory: &GuestMemory, name: &str, starts: &[u64]) -> io::Result<usize> {
    if starts.is_empty() {
        return Ok(0);
    }
    let name = std::ffi::CString::new(name).map_err(io::Error::other)?;
    let file = File::from(memfd_create(&*name, MFdFlags::MFD_CLOEXEC)?);
    file.set_len(HUGE * starts.len() as u64)?;
    let mut bytes = vec![0; HUGE as usize];
    let mut shared = 0;
    for &start in starts {
        let offset = shared as u64 * HUGE;
        memory.read_slice(&mut bytes, GuestAddress(start)).map_err(io::Error::other)?;
        file.write_all_at(&bytes, offset)?;
        if !collapse(&file, offset)? {
            break;
        }
        map_over(memory, start, &file, offset)?;
        shared += 1;
    }
    Ok(shared)
}

/// Makes a huge page of `HUGE` bytes of a memory file. False: the kernel can't or has none to give.
pub fn collapse(file: &File, offset: u64) -> io::Result<bool> {
    // Where it is mapped must be aligned as well: the part is mapped at a border inside of a range that
    // is twice as long.
    let length = NonZeroUsize::new(2 * HUGE as usize).ok_or(io::ErrorKind::InvalidInput)?;
    let none = MapFlags::MAP_PRIVATE | MapFlags::MAP_ANONYMOUS | MapFlags::MAP_NORESERVE;
    // SAFETY: a new mapping that cannot be accessed, which reserves addresses.
    let reserved =
        unsafe { nix::sys::mman::mmap_anonymous(None, length, ProtFlags::PROT_NONE, none)? };
    let aligned = (reserved.as_ptr() as usize).next_multiple_of(HUGE as usize);
    let result = (|| {
        let huge = NonZeroUsize::new(HUGE as usize).ok_or(io::ErrorKind::InvalidInput)?;
        let flags = MapFlags::MAP_SHARED | MapFlags::MAP_FIXED;
        let offset = i64::try_from(offset).map_err(io::Error::other)?;
        // SAFETY: inside of the range that was reserved above.
        let part = unsafe {
            mmap(
                NonZeroUsize::new(aligned),
                huge,
                ProtFlags::PROT_READ,
                flags,
                file.as_fd(),
                offset,
            )?
        };
        // SAFETY: the mapping just made; collapsing changes no byte of it.
        Ok(unsafe { libc::madvise(part.as_ptr(), HUGE as usize, COLLAPSE) } == 0)
    })();
    // SAFETY: the whole of the range reserved above, of which nothing is referred to any more.
    unsafe { munmap(reserved, 2 * HUGE as usize)? };
    result
}

/// Maps the part of `file` privately where `memory` has `HUGE` bytes from `start` on.
fn map_over(memory: &GuestMemory, start: u64, file: &File, offset: u64) -> io::Result<()> {
    let slice = memory.get_slice(GuestAddress(start), HUGE as usize).map_err(io::Error::other)?;
    let host = slice.ptr_guard_mut().as_ptr();
    let address = NonNull::new(host).ok_or(io::ErrorKind::InvalidInput)?.addr();
    let huge = NonZeroUsize::new(HUGE as usize).ok_or(io::ErrorKind::InvalidInput)?;
    let flags = MapFlags::MAP_PRIVATE | MapFlags::MAP_FIXED | MapFlags::MAP_NORESERVE;
    let protection = ProtFlags::PROT_READ | ProtFlags::PROT_WRITE;
    let offset = i64::try_from(offset).map_err(io::Error::other)?;
    // SAFETY: the range is part of `memory`, which owns it for as long as it lives, and holds the same
    // bytes before and after: nobody who refers to it sees a change.
    unsafe { mmap(Some(address), huge, protection, flags, file.as_fd(), offset)? };
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::memory::{Backing, map};

    #[test]
    fn the_bytes_stay_the_same_and_writes_stay_private() {
        let layout = Layout::new(16 << 20, 16 << 20, HUGE).unwrap();
        let (ram, root) = (tempfile::tempfile().unwrap(), tempfile::tempfile().unwrap());
        for (file, length) in [(&ram, 16 << 20), (&root, HUGE)] {
            file.set_len(length).unwrap();
            let bytes: Vec<u8> = (0..length).map(|n| (n / 4096 % 251) as u8).collect();
            file.write_all_at(&bytes, 0).unwrap();
        }
        let memory = map(&layout, Backing::Base(&ram), &root).unwrap();
        let all = |memory: &GuestMemory| {
            let mut bytes = vec![0; 16 << 20];
            memory.read_slice(&mut bytes, GuestAddress(0)).unwrap();
            let mut rest = vec![0; HUGE as usize];
            memory.read_slice(&mut rest, GuestAddress(layout.root.address)).unwrap();
            bytes.extend(rest);
            bytes
        };
        let before = all(&memory);
        let hot = vec![HUGE, 4 * HUGE, layout.root.address];
        let shared = share(&memory, &layout, &WorkingSet { hot, ..WorkingSet::default() }).unwrap();
        assert!(all(&memory) == before);
        memory.write_slice(b"mine", GuestAddress(HUGE)).unwrap();
        let other = map(&layout, Backing::Base(&ram), &root).unwrap();
        assert!(all(&other) == before);
        println!("{shared} of 3 in huge pages");
    }
}
