//! What is mounted where. Paths are the initial root's until [`crate::attach`] switches roots.

use std::fs;
use std::path::Path;

use anyhow::{Context, Result};
use nix::errno::Errno;
use nix::mount::{MsFlags, mount};

/// The image's root file system, lower layer of the overlay.
pub const LOWER: &str = "/lower";
/// The account disk.
pub const DISK: &str = "/disk";
pub const CGROUPS: &str = "/sys/fs/cgroup";
/// The overlay, before it becomes the root.
pub const NEW_ROOT: &str = "/new";

/// A file system that has no device.
struct Virtual {
    kind: &'static str,
    target: &'static str,
    flags: MsFlags,
    options: &'static str,
}

const PLAIN: MsFlags = MsFlags::MS_NOSUID.union(MsFlags::MS_NODEV).union(MsFlags::MS_NOEXEC);
const MEMORY: MsFlags = MsFlags::MS_NOSUID.union(MsFlags::MS_NODEV);

const VIRTUAL: [Virtual; 7] = [
    Virtual { kind: "devtmpfs", target: "/dev", flags: MsFlags::MS_NOSUID, options: "mode=0755" },
    Virtual { kind: "proc", target: "/proc", flags: PLAIN, options: "" },
    Virtual { kind: "sysfs", target: "/sys", flags: PLAIN, options: "" },
    Virtual { kind: "tmpfs", target: "/run", flags: MEMORY, options: "mode=0755" },
    Virtual {
        kind: "devpts",
        target: "/dev/pts",
        flags: MsFlags::MS_NOSUID.union(MsFlags::MS_NOEXEC),
        // gid 5: tty, in every Debian (base-passwd)
        options: "gid=5,mode=0620,ptmxmode=0666",
    },
    Virtual { kind: "tmpfs", target: "/dev/shm", flags: MEMORY, options: "mode=1777" },
    // Moving a process costs a grace period of RCU otherwise, and a save moves every process that has come
    // since the last; forks and exits get dearer by some instructions (linux, cgroup-v2.rst).
    Virtual { kind: "cgroup2", target: CGROUPS, flags: PLAIN, options: "favordynmods" },
];

/// Mounts that move along into the new root; what is mounted inside of them comes with them.
pub const MOVED: [&str; 4] = ["/dev", "/proc", "/sys", "/run"];

pub fn mount_virtual() -> Result<()> {
    for file_system in &VIRTUAL {
        let target = file_system.target;
        directory(target)?;
        let options = Some(file_system.options).filter(|options| !options.is_empty());
        mount(Some(file_system.kind), target, Some(file_system.kind), file_system.flags, options)
            .with_context(|| format!("mounting {} on {target}", file_system.kind))?;
    }
    Ok(())
}

/// Mounts the image's root file system from persistent memory. Without DAX every page a program
/// touches would be copied into the guest's memory: possible, but not what machines are sized for.
pub fn mount_lower(device: &str) -> Result<()> {
    directory(LOWER)?;
    let flags = MsFlags::MS_RDONLY | MsFlags::MS_NODEV;
    match mount(Some(device), LOWER, Some("erofs"), flags, Some("dax=always")) {
        Ok(()) => Ok(()),
        Err(error) => {
            crate::log::warn(format_args!("{device}: no DAX ({error}), using the page cache"));
            mount(Some(device), LOWER, Some("erofs"), flags, None::<&str>)
                .with_context(|| format!("mounting erofs from {device}"))
        }
    }
}

/// Mounts the account disk.
///
/// `noatime`: reading must not write. `discard`: the host counts the blocks a disk really has, and
/// no timer in the guest would trim it; freed space goes back with the journal commit that freed it.
/// `noinit_itable` leaves inode tables of unused groups as they are, without a thread that zeroes
/// them in the background of every login: they are holes of the disk's file, which read as zeroes.
/// Where the disk is about to grow it must not be set: new groups' tables would be zeroed on the spot.
pub fn mount_disk(device: &str, will_grow: bool) -> Result<()> {
    let options = match will_grow {
        true => "discard,errors=remount-ro",
        false => "discard,errors=remount-ro,noinit_itable",
    };
    mount(Some(device), DISK, Some("ext4"), MsFlags::MS_NOATIME, Some(options))
        .with_context(|| format!("mounting ext4 from {device}"))
}

/// Stacks the overlay. `redirect_dir`, `index` and `metacopy` stay off: the kernel's rules allow the
/// lower layer to change between mounts (a new base under an old disk) only then. `xino=on` gives all
/// files one device number, which `du -x` and friends rely on; it stores nothing.
pub fn mount_overlay() -> Result<()> {
    let options = format!("lowerdir={LOWER},upperdir={DISK}/upper,workdir={DISK}/work,xino=on");
    mount(Some("overlay"), NEW_ROOT, Some("overlay"), MsFlags::MS_NOATIME, Some(options.as_str()))
        .with_context(|| format!("mounting the overlay ({options})"))
}

pub fn move_mount(from: &str, to: &str) -> Result<()> {
    mount(Some(from), to, None::<&str>, MsFlags::MS_MOVE, None::<&str>)
        .with_context(|| format!("moving the mount {from} to {to}"))
}

/// Makes a directory that may be there already.
pub fn directory(path: &str) -> Result<()> {
    match nix::unistd::mkdir(Path::new(path), nix::sys::stat::Mode::from_bits_truncate(0o755)) {
        Ok(()) | Err(Errno::EEXIST) => Ok(()),
        Err(error) => Err(error).with_context(|| format!("making the directory {path}")),
    }
}

/// Makes a directory with exactly these permissions, owner and group.
pub fn directory_for(path: &str, mode: u32, owner: (u32, u32)) -> Result<()> {
    use std::os::unix::fs::{PermissionsExt, chown};
    directory(path)?;
    chown(path, Some(owner.0), Some(owner.1)).with_context(|| format!("chown {path}"))?;
    fs::set_permissions(path, fs::Permissions::from_mode(mode))
        .with_context(|| format!("chmod {path}"))
}
