//! The system calls that no safe wrapper covers. All `unsafe` of this crate is below here, except
//! the fork in [`crate::spawn`].

mod ioctl;
mod poll;
mod vsock;

pub use ioctl::{
    add_entropy, block_device_bytes, foreground_group, grow_ext4, loopback_up, make_controlling,
    pty_number, pty_peer, reseed, set_window, unlock_pty,
};
pub use poll::{Poller, Readiness};
pub use vsock::{accept_from_host, listen};

use std::os::fd::{AsFd, AsRawFd, BorrowedFd};

use nix::errno::Errno;

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

/// In a child: makes these its standard input, output and error. dup2(2) leaves the copies open
/// across exec; the originals are close-on-exec.
pub fn set_standard_streams(streams: [BorrowedFd; 3]) -> nix::Result<()> {
    for (number, stream) in streams.into_iter().enumerate() {
        // SAFETY: both are descriptors' numbers; 0 to 2 belong to the child alone.
        Errno::result(unsafe { libc::dup2(stream.as_raw_fd(), number as libc::c_int) })?;
    }
    Ok(())
}

/// In a child: ends without running what the parent meant to run at its own exit.
pub fn exit_at_once(code: i32) -> ! {
    // SAFETY: _exit(2) has no preconditions.
    unsafe { libc::_exit(code) }
}
