//! Walks the kernel paths a login takes, before the snapshot: what they allocate and cache is then
//! in the base, shared by every fork, instead of in each. No program of the image runs here, and
//! nothing is drawn from the random generator: what it drew, every fork would know.

use std::fs::{self, File};
use std::path::Path;
use std::process::Command;

use anyhow::{Context, Result};
use hermitage_guest_proto::Window;
use nix::mount::{MntFlags, MsFlags, mount, umount2};

use crate::terminal::Pty;
use crate::{mounts, sys};

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

pub fn warm() -> Result<()> {
    for name in MAPPED {
        touch(&Path::new(mounts::LOWER).join(name)).with_context(|| format!("touching {name}"))?;
    }
    overlay().context("the overlay")?;
    drop(Pty::open(0, Window { columns: 80, rows: 24, ..Window::default() }, &[(53, 1)])?);
    let status = Command::new("/proc/self/exe").arg(CHILD_ARGUMENT).status();
    status.context("running this program")?;
    Ok(())
}

/// Stacks an overlay like the account's over a file system in memory, looks the files up through it,
/// copies one up, and takes it down. The lower layer's entries stay cached.
fn overlay() -> Result<()> {
    let memory = MsFlags::MS_NODEV;
    mount(Some("tmpfs"), mounts::DISK, Some("tmpfs"), memory, None::<&str>).context("tmpfs")?;
    let (upper, work) = (format!("{}/upper", mounts::DISK), format!("{}/work", mounts::DISK));
    mounts::directory(&upper)?;
    mounts::directory(&work)?;
    mounts::mount_overlay(&upper, &work, mounts::NEW_ROOT)?;
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
    // As an account's first attach does: a new file, a changed one, a directory.
    let scratch = root.join("etc/hermitage-warm");
    fs::write(&scratch, b"x").context("a new file")?;
    fs::rename(&scratch, root.join("etc/motd")).context("a changed file")?;
    fs::create_dir(root.join("home/hermitage-warm")).context("a directory")?;
    umount2(mounts::NEW_ROOT, MntFlags::empty()).context("unmounting it")?;
    umount2(mounts::DISK, MntFlags::empty()).context("unmounting its upper layer")
}

/// Maps a file and reads a byte of each page, so that its mapping's entries exist.
fn touch(path: &Path) -> Result<()> {
    let Ok(file) = File::open(path) else { return Ok(()) };
    let length = file.metadata()?.len();
    sys::touch_pages(&file, length)?;
    Ok(())
}
