//! ioctls, each with the types the kernel's header gives it.

use std::os::fd::{AsFd, AsRawFd, FromRawFd, OwnedFd, RawFd};

use hermitage_guest_proto::Window;
use nix::unistd::Pid;

/// `struct rand_pool_info` of linux/random.h with room for [`ENTROPY_MAX`] bytes.
#[repr(C)]
struct RandPoolInfo {
    entropy_bits: libc::c_int,
    bytes: libc::c_int,
    buffer: [u8; ENTROPY_MAX],
}

const ENTROPY_MAX: usize = 256;

mod raw {
    // linux/random.h; the size encoded in RNDADDENTROPY is that of `int [2]`.
    nix::ioctl_write_ptr!(rnd_add_entropy, b'R', 0x03, [libc::c_int; 2]);
    nix::ioctl_none!(rnd_reseed_crng, b'R', 0x07);
    // linux/fs.h: `BLKGETSIZE64 _IOR(0x12, 114, size_t)`, filled with a u64
    nix::ioctl_read!(blk_get_size64, 0x12, 114, u64);
    // fs/ext4: `EXT4_IOC_RESIZE_FS _IOW('f', 16, __u64)`
    nix::ioctl_write_ptr!(ext4_resize_fs, b'f', 16, u64);
    nix::ioctl_write_ptr_bad!(set_window_size, libc::TIOCSWINSZ, libc::winsize);
    nix::ioctl_write_int_bad!(set_controlling_terminal, libc::TIOCSCTTY);
    nix::ioctl_read_bad!(get_foreground_group, libc::TIOCGPGRP, libc::pid_t);
    // asm-generic/ioctls.h
    nix::ioctl_read!(get_pty_number, b'T', 0x30, libc::c_uint);
    nix::ioctl_write_ptr!(set_pty_lock, b'T', 0x31, libc::c_int);
    nix::ioctl_write_int_bad!(get_pty_peer, libc::TIOCGPTPEER);
    nix::ioctl_readwrite_bad!(get_interface_flags, libc::SIOCGIFFLAGS, libc::ifreq);
    nix::ioctl_write_ptr_bad!(set_interface_flags, libc::SIOCSIFFLAGS, libc::ifreq);
}

fn fd(file: &impl AsFd) -> RawFd {
    file.as_fd().as_raw_fd()
}

/// Mixes `seed` into the kernel's pool and credits all of its bits.
pub fn add_entropy(random: impl AsFd, seed: &[u8]) -> nix::Result<()> {
    for part in seed.chunks(ENTROPY_MAX) {
        let mut info = RandPoolInfo {
            entropy_bits: part.len() as libc::c_int * 8,
            bytes: part.len() as libc::c_int,
            buffer: [0; ENTROPY_MAX],
        };
        info.buffer[..part.len()].copy_from_slice(part);
        // SAFETY: the kernel reads the two ints and `bytes` bytes after them, all inside `info`.
        unsafe { raw::rnd_add_entropy(fd(&random), std::ptr::from_ref(&info).cast()) }?;
    }
    Ok(())
}

/// Makes the kernel's generator take its key from the pool now instead of in up to a minute.
pub fn reseed(random: impl AsFd) -> nix::Result<()> {
    // SAFETY: takes no argument.
    unsafe { raw::rnd_reseed_crng(fd(&random)) }.map(drop)
}

pub fn block_device_bytes(device: impl AsFd) -> nix::Result<u64> {
    let mut bytes = 0;
    // SAFETY: the kernel writes one u64.
    unsafe { raw::blk_get_size64(fd(&device), &mut bytes) }?;
    Ok(bytes)
}

/// Grows the mounted ext4 that `inside` is a file of to `blocks` blocks.
pub fn grow_ext4(inside: impl AsFd, blocks: u64) -> nix::Result<()> {
    // SAFETY: the kernel reads one u64.
    unsafe { raw::ext4_resize_fs(fd(&inside), &blocks) }.map(drop)
}

pub fn set_window(terminal: impl AsFd, window: Window) -> nix::Result<()> {
    let size = libc::winsize {
        ws_row: window.rows,
        ws_col: window.columns,
        ws_xpixel: window.width_px,
        ws_ypixel: window.height_px,
    };
    // SAFETY: the kernel reads one winsize.
    unsafe { raw::set_window_size(fd(&terminal), &size) }.map(drop)
}

/// Makes the terminal the calling session's own.
pub fn make_controlling(terminal: impl AsFd) -> nix::Result<()> {
    // SAFETY: takes an int; 0: do not steal it.
    unsafe { raw::set_controlling_terminal(fd(&terminal), 0) }.map(drop)
}

/// The foreground process group of the terminal whose master this is; None when there is none.
pub fn foreground_group(master: impl AsFd) -> Option<Pid> {
    let mut group = 0;
    // SAFETY: the kernel writes one pid_t.
    unsafe { raw::get_foreground_group(fd(&master), &mut group) }.ok()?;
    // 0: no group; 1 would be this process's.
    (group > 1).then(|| Pid::from_raw(group))
}

/// N of /dev/pts/N.
pub fn pty_number(master: impl AsFd) -> nix::Result<u32> {
    let mut number = 0;
    // SAFETY: the kernel writes one unsigned int.
    unsafe { raw::get_pty_number(fd(&master), &mut number) }?;
    Ok(number)
}

pub fn unlock_pty(master: impl AsFd) -> nix::Result<()> {
    // SAFETY: the kernel reads one int.
    unsafe { raw::set_pty_lock(fd(&master), &0) }.map(drop)
}

/// Opens the slave side without a path: whatever is mounted on /dev/pts by now, it is this one.
pub fn pty_peer(master: impl AsFd) -> nix::Result<OwnedFd> {
    // SAFETY: takes open flags and returns a new descriptor, or -1.
    let peer =
        unsafe { raw::get_pty_peer(fd(&master), libc::O_RDWR | libc::O_NOCTTY | libc::O_CLOEXEC) }?;
    // SAFETY: the kernel just made it, nobody else owns it.
    Ok(unsafe { OwnedFd::from_raw_fd(peer) })
}

/// Brings the loopback interface up; the kernel gives it its addresses.
pub fn loopback_up(socket: impl AsFd) -> nix::Result<()> {
    // SAFETY: all zeroes is a valid ifreq.
    let mut request: libc::ifreq = unsafe { std::mem::zeroed() };
    request.ifr_name[0] = b'l' as libc::c_char;
    request.ifr_name[1] = b'o' as libc::c_char;
    // SAFETY: the kernel reads the name and fills in the flags.
    unsafe { raw::get_interface_flags(fd(&socket), &mut request) }?;
    // SAFETY: SIOCGIFFLAGS has made the flags the union's active field.
    let flags = unsafe { request.ifr_ifru.ifru_flags };
    request.ifr_ifru.ifru_flags = flags | libc::IFF_UP as libc::c_short;
    // SAFETY: the kernel reads the ifreq.
    unsafe { raw::set_interface_flags(fd(&socket), &request) }.map(drop)
}
