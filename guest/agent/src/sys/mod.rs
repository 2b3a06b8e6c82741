//! The system calls that no safe wrapper covers. All `unsafe` of this crate is below here.

mod child;
mod ioctl;
mod loop_device;
mod poll;
mod vsock;

pub use child::{default_sigpipe, set_standard_streams, start};
pub use ioctl::{
    add_entropy, block_device_bytes, foreground_group, grow_ext4, loopback_up, make_controlling,
    pty_number, pty_peer, reseed, set_window, unlock_pty,
};
pub use loop_device::LoopDevice;
pub use poll::{Poller, Readiness};
pub use vsock::{accept, accept_from_host, listen, listen_anywhere};

use std::num::NonZeroUsize;
use std::os::fd::{AsFd, AsRawFd};

use nix::errno::Errno;
use nix::sys::mman::{self, MapFlags, ProtFlags};

/// finit_module(2), with no parameters.
pub fn load_module(module: impl AsFd) -> nix::Result<()> {
    // SAFETY: the descriptor is open for the call, the string is static and ends in NUL.
    let result = unsafe {
        libc::syscall(libc::SYS_finit_module, module.as_fd().as_raw_fd(), c"".as_ptr(), 0)
    };
    Errno::result(result).map(drop)
}

/// syncfs(2) of the file system `file` is on.
pub fn sync_file_system(file: impl AsFd) -> nix::Result<()> {
    // SAFETY: the descriptor is open for the call.
    Errno::result(unsafe { libc::syncfs(file.as_fd().as_raw_fd()) }).map(drop)
}

/// Kernel messages of this level or above (less important) stay off the console: every character on
/// a UART is an exit of the virtual CPU.
pub fn set_console_log_level(level: i32) -> nix::Result<()> {
    const SYSLOG_ACTION_CONSOLE_LEVEL: i32 = 8;
    // SAFETY: this action takes the level as its length and no buffer.
    let result = unsafe { libc::klogctl(SYSLOG_ACTION_CONSOLE_LEVEL, std::ptr::null_mut(), level) };
    Errno::result(result).map(drop)
}

/// Maps the first `length` bytes of a file and reads a byte of every page. Nobody may truncate the
/// file meanwhile; it is on a read-only file system.
pub fn touch_pages(file: impl AsFd, length: u64) -> nix::Result<()> {
    const PAGE: usize = 4096;
    let length = usize::try_from(length).map_err(|_| Errno::EFBIG)?;
    let Some(size) = NonZeroUsize::new(length) else { return Ok(()) };
    // SAFETY: a new mapping at an address of the kernel's choice.
    let start =
        unsafe { mman::mmap(None, size, ProtFlags::PROT_READ, MapFlags::MAP_SHARED, file, 0) }?;
    for offset in (0..length).step_by(PAGE) {
        // SAFETY: inside the mapping, which is readable and not yet unmapped.
        unsafe { start.cast::<u8>().add(offset).read_volatile() };
    }
    // SAFETY: exactly the mapping made above; nothing refers to it any more.
    unsafe { mman::munmap(start, length) }
}
