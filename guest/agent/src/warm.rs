//! Walks the kernel paths a login takes, before the snapshot: what they allocate and cache is then
//! in the base, shared by every fork, instead of in each. No program of the image runs here, and
//! nothing is drawn from the random generator: what it drew, every fork would know.

use std::fs::{self, File};
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::process::Command;

use anyhow::{Context, Result};
use hermitage_guest_proto::Window;
use nix::mount::{MntFlags, umount2};

use crate::terminal::Pty;
use crate::{account, attach, mounts, sys};

/// Tells this program that it is only run to have been run.
pub const CHILD_ARGUMENT: &str = "--warm";

/// Programs and libraries that a login shell maps, by their names in the image; those that aren't
/// there (another list of packages) are passed over.
const MAPPED: [&str; 7] = [
    "usr/bin/bash",
    "usr/lib/x86_64-linux-gnu/ld-linux-x86-64.so.2",
    "usr/lib/x86_64-linux-gnu/libc.so.6",
    "usr/lib/x86_64-linux-gnu/libtinfo.so.6",
    "usr/lib/locale/C.utf8/LC_CTYPE",
    "usr/lib/x86_64-linux-gnu/gconv/gconv-modules.cache",
    "usr/lib/openssh/sftp-server",
];

/// What it looks up or reads besides.
const LOOKED_UP: [&str; 26] = [
    "bin/sh",
    "bin/bash",
    "lib64/ld-linux-x86-64.so.2",
    "etc/bash.bashrc",
    "etc/dircolors.sh",
    "etc/group",
    "etc/gshadow",
    "etc/hosts",
    "etc/inputrc",
    "etc/ld.so.cache",
    "etc/motd",
    "etc/nsswitch.conf",
    "etc/passwd",
    "etc/profile",
    "etc/profile.d/bash_completion.sh",
    "etc/profile.d/gawk.sh",
    "etc/shadow",
    "etc/skel/.bashrc",
    "etc/skel/.bash_logout",
    "etc/skel/.profile",
    "etc/terminfo",
    "usr/share/bash-completion/bash_completion",
    "usr/share/terminfo/x/xterm-256color",
    "usr/lib/locale/C.utf8/LC_MESSAGES/SYS_LC_MESSAGES",
    "var/mail",
    "tmp",
];

/// An account disk to practise on, from the initrd (`guest/image/src/initrd.rs` writes it).
const PACKED_DISK: &str = "/warm-disk";
const PRACTICE_DISK: &str = "/run/warm-disk";

/// A size that accounts' disks have, in blocks of 4 KiB: 10 GiB.
const USUAL_BLOCKS: u64 = (10 << 30) / 4096;

pub fn warm() -> Result<()> {
    for name in MAPPED {
        touch(&Path::new(mounts::LOWER).join(name)).with_context(|| format!("touching {name}"))?;
    }
    unpack_disk().context("the practice disk")?;
    // Twice: new, it grows and the account is made; known, it is as at most logins.
    for will_grow in [true, false] {
        attach_disk(will_grow).context("attaching the practice disk")?;
    }
    fs::remove_file(PRACTICE_DISK).context("removing the practice disk")?;
    drop(Pty::open(0, Window { columns: 80, rows: 24, ..Window::default() }, &[(53, 1)])?);
    let status = Command::new("/proc/self/exe").arg(CHILD_ARGUMENT).status();
    status.context("running this program")?;
    Ok(())
}

/// Writes the practice disk out into a sparse file in memory.
fn unpack_disk() -> Result<()> {
    const BLOCK: usize = 4096;
    let packed = fs::read(PACKED_DISK).with_context(|| format!("reading {PACKED_DISK}"))?;
    fs::remove_file(PACKED_DISK)?;
    let (_, blocks) = packed.split_first_chunk::<8>().context("it is empty")?;
    let file = File::create(PRACTICE_DISK)?;
    for record in blocks.chunks_exact(8 + BLOCK) {
        let (offset, block) = record.split_first_chunk::<8>().context("a short record")?;
        file.write_all_at(block, u64::from_le_bytes(*offset))?;
    }
    Ok(file.set_len(USUAL_BLOCKS * BLOCK as u64)?)
}

/// What [`crate::attach`] does with an account's disk, but for becoming the root.
fn attach_disk(will_grow: bool) -> Result<()> {
    let file = File::options().read(true).write(true).open(PRACTICE_DISK)?;
    let device = sys::LoopDevice::attach(&file).context("a loop device")?;
    mounts::mount_disk(device.path(), will_grow)?;
    if will_grow {
        attach::grow_disk(USUAL_BLOCKS)?;
    }
    mounts::mount_overlay()?;
    let root = Path::new(mounts::NEW_ROOT);
    for name in LOOKED_UP.iter().chain(&MAPPED) {
        let path = root.join(name);
        if let Ok(metadata) = fs::metadata(&path)
            && metadata.is_file()
            && metadata.len() < 64 * 1024
        {
            drop(fs::read(&path));
        }
    }
    account::ensure(root, "practice", 59_999)?;
    umount2(mounts::NEW_ROOT, MntFlags::empty()).context("unmounting the overlay")?;
    umount2(mounts::DISK, MntFlags::empty()).context("unmounting the disk")
}

/// Maps a file and reads a byte of each page, so that its mapping's entries exist.
fn touch(path: &Path) -> Result<()> {
    let Ok(file) = File::open(path) else { return Ok(()) };
    let length = file.metadata()?.len();
    sys::touch_pages(&file, length)?;
    Ok(())
}
