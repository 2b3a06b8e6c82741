//! Makes a fork somebody's machine. This is on the way of every login: no process is started, and
//! what a former attach of the same disk has done is left alone.

use std::fmt::Write;
use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use hermitage_guest_proto::{Attach, Resume};
use nix::unistd;

use crate::clock::HostClock;
use crate::{account, log, mounts, sys};

/// The account disk's block device.
const DISK_DEVICE: &str = "/dev/vda";

/// How long the disk may take to show its size: an interrupt and a work item, so in fact microseconds.
const DISK_WAIT: Duration = Duration::from_secs(5);

/// The first half of `attach`: what makes this machine like no other. Invariant 7: the random generator
/// first, so that nothing that follows can draw what another fork of this base draws.
pub fn become_somebody(attach: &Attach, clock: &HostClock) -> Result<Stages> {
    let mut stages = Stages::new();
    seed(&attach.entropy)?;
    clock.set(attach.clock)?;
    check_hostname(&attach.hostname)?;
    unistd::sethostname(&attach.hostname).context("setting the host name")?;
    if !account::is_login_name(&attach.account) {
        bail!("{:?} can't be a login name", attach.account);
    }
    if attach.uid == 0 || attach.uid == u32::MAX {
        bail!("{} can't be an account's user id", attach.uid);
    }
    stages.end("identity");
    Ok(stages)
}

/// The second half: the disk, and the account on it.
pub fn take_disk(attach: &Attach, mut stages: Stages) -> Result<()> {
    let disk = File::open(DISK_DEVICE).with_context(|| format!("opening {DISK_DEVICE}"))?;
    let bytes = wait_for_disk(&disk, attach.disk_size)?;
    stages.end("disk");
    let growth = FileSystemSize::read(&disk)?.growth(bytes);
    mounts::mount_disk(DISK_DEVICE, growth.is_some())?;
    stages.end("mount");
    if let Some(blocks) = growth {
        grow_disk(blocks)?;
    }
    drop(disk);
    stages.end("grow");
    mounts::mount_overlay()?;
    switch_root()?;
    stages.end("overlay");

    identify(attach)?;
    account::ensure(Path::new("/"), &attach.account, attach.uid)?;
    let runtime = format!("/run/user/{}", attach.uid);
    mounts::directory_for(&runtime, 0o700, (attach.uid, attach.uid))?;
    stages.end("account");
    log::info(format_args!("attached:{}", stages.text));
    Ok(())
}

/// How long each stage took, for the kernel's log: its lines of this level are not written to the
/// console, so saying it costs next to nothing.
pub struct Stages {
    pub text: String,
    last: Instant,
}

impl Stages {
    pub fn new() -> Self {
        Stages { text: String::new(), last: Instant::now() }
    }

    pub fn end(&mut self, stage: &str) {
        let now = Instant::now();
        let micros = now.duration_since(self.last).as_micros();
        // Writing to a String does not fail.
        let _ = write!(self.text, " {stage} {micros} us");
        self.last = now;
    }
}

/// Credits the host's entropy and has the kernel use it at once (random(4)).
fn seed(entropy: &[u8]) -> Result<()> {
    if entropy.len() < 32 {
        bail!("{} bytes of entropy are not enough, 32 are", entropy.len());
    }
    let random = File::open("/dev/urandom").context("opening /dev/urandom")?;
    sys::add_entropy(&random, entropy).context("RNDADDENTROPY")?;
    sys::reseed(&random).context("RNDRESEEDCRNG")
}

/// Applies what a machine must be told after a save, before its processes go on. Invariant 7: the random
/// generator first.
pub fn refresh(resume: &Resume, clock: &HostClock) -> Result<()> {
    seed(&resume.entropy)?;
    clock.set(resume.clock)
}

/// RFC 1123 §2.1, one label or more; it goes into files and prompts.
fn check_hostname(name: &str) -> Result<()> {
    let good = !name.is_empty()
        && name.len() <= 64
        && name.split('.').all(|label| {
            !label.is_empty()
                && !label.starts_with('-')
                && label.chars().all(|c| c.is_ascii_alphanumeric() || c == '-')
        });
    if !good {
        bail!("{name:?} can't be a host name");
    }
    Ok(())
}

/// Waits for the capacity to arrive (it was 0 in the base) and returns it.
fn wait_for_disk(disk: &File, expected: u64) -> Result<u64> {
    let started = Instant::now();
    let mut pause = Duration::from_micros(20);
    loop {
        let bytes =
            sys::block_device_bytes(disk).with_context(|| format!("the size of {DISK_DEVICE}"))?;
        if bytes != 0 && bytes >= expected {
            return Ok(bytes);
        }
        if started.elapsed() > DISK_WAIT {
            bail!(
                "{DISK_DEVICE} shows {bytes} bytes instead of {expected} after {} s",
                DISK_WAIT.as_secs()
            );
        }
        std::thread::sleep(pause);
        pause = (pause * 2).min(Duration::from_micros(500));
    }
}

/// Grows the mounted disk's file system to this number of blocks.
pub fn grow_disk(blocks: u64) -> Result<()> {
    let root = File::open(mounts::DISK).context("opening the disk's root")?;
    sys::grow_ext4(&root, blocks)
        .with_context(|| format!("growing the disk's file system to {blocks} blocks"))
}

/// What the ext4 superblock says of the file system's size.
#[derive(Debug, PartialEq, Eq)]
struct FileSystemSize {
    blocks: u64,
    block_size: u64,
}

impl FileSystemSize {
    /// Reads it from the device (linux, Documentation/filesystems/ext4/super.rst): asking the kernel
    /// to grow a file system that already fits would flush the journal at every login.
    fn read(disk: &File) -> Result<FileSystemSize> {
        let mut superblock = [0; 1024];
        disk.read_exact_at(&mut superblock, 1024)
            .with_context(|| format!("reading the superblock of {DISK_DEVICE}"))?;
        Self::parse(&superblock)
    }

    fn parse(superblock: &[u8; 1024]) -> Result<FileSystemSize> {
        const INCOMPAT_64BIT: u32 = 0x80;
        let word = |at: usize| {
            superblock[at..at + 4].iter().rev().fold(0, |n, byte| n << 8 | u32::from(*byte))
        };
        if superblock[0x38..0x3a] != [0x53, 0xef] {
            bail!("{DISK_DEVICE} holds no ext4 file system");
        }
        let high = if word(0x60) & INCOMPAT_64BIT != 0 { word(0x150) } else { 0 };
        let shift = word(0x18);
        if shift > 6 {
            bail!("{DISK_DEVICE}: an ext4 block size of 2^{} bytes", u64::from(shift) + 10);
        }
        Ok(FileSystemSize {
            blocks: u64::from(high) << 32 | u64::from(word(0x04)),
            block_size: 1024 << shift,
        })
    }

    /// How many blocks it should have on a device of `bytes`; None: as many as it has. A rest too
    /// small for a block group's own tables stays unused, so a small difference is no reason.
    fn growth(&self, bytes: u64) -> Option<u64> {
        const WORTH_IT: u64 = 16 << 20;
        let target = bytes / self.block_size;
        (target.saturating_sub(self.blocks) * self.block_size >= WORTH_IT).then_some(target)
    }
}

/// Makes the overlay the root (what switch_root(8) does, without deleting the old one: what is left
/// of the initrd is this program).
fn switch_root() -> Result<()> {
    for path in mounts::MOVED {
        mounts::move_mount(path, &format!("{}{path}", mounts::NEW_ROOT))?;
    }
    unistd::chdir(mounts::NEW_ROOT).with_context(|| format!("entering {}", mounts::NEW_ROOT))?;
    mounts::move_mount(".", "/")?;
    unistd::chroot(".").context("chroot into the new root")?;
    unistd::chdir("/").context("entering the new root")
}

/// The files that say who this machine is.
fn identify(attach: &Attach) -> Result<()> {
    let name = &attach.hostname;
    let machine_id: String = attach.machine_id.iter().map(|byte| format!("{byte:02x}")).collect();
    let hosts = format!(
        "127.0.0.1\tlocalhost\n127.0.1.1\t{name}\n::1\tlocalhost ip6-localhost ip6-loopback\n"
    );
    let etc = Path::new("/etc");
    account::write_if_changed(
        &etc.join("machine-id"),
        format!("{machine_id}\n").as_bytes(),
        0o444,
    )?;
    let renamed =
        account::write_if_changed(&etc.join("hostname"), format!("{name}\n").as_bytes(), 0o644)?;
    // She may have lines of her own in it: only a new name is a reason to touch it.
    if renamed || !etc.join("hosts").exists() {
        account::write_if_changed(&etc.join("hosts"), hosts.as_bytes(), 0o644)?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn superblock(blocks: u64) -> [u8; 1024] {
        let mut bytes = [0; 1024];
        bytes[4..8].copy_from_slice(&(blocks as u32).to_le_bytes());
        bytes[0x18..0x1c].copy_from_slice(&2u32.to_le_bytes());
        bytes[0x38..0x3a].copy_from_slice(&[0x53, 0xef]);
        bytes[0x60..0x64].copy_from_slice(&0x80u32.to_le_bytes());
        bytes[0x150..0x154].copy_from_slice(&((blocks >> 32) as u32).to_le_bytes());
        bytes
    }

    #[test]
    fn a_file_system_grows_when_its_disk_is_larger() {
        let template = FileSystemSize::parse(&superblock(16 * 1024)).unwrap();
        assert_eq!(template, FileSystemSize { blocks: 16 * 1024, block_size: 4096 });
        assert_eq!(template.growth(64 << 20), None);
        assert_eq!(template.growth(70 << 20), None, "not worth it");
        assert_eq!(template.growth(10 << 30), Some((10 << 30) / 4096));
        assert_eq!(template.growth(1 << 20), None, "never smaller");
        let large = FileSystemSize::parse(&superblock(5 << 32)).unwrap();
        assert_eq!(large.blocks, 5 << 32);
    }

    #[test]
    fn what_is_no_ext4_is_refused() {
        assert!(FileSystemSize::parse(&[0; 1024]).is_err());
        let mut odd = superblock(1);
        odd[0x18] = 60;
        assert!(FileSystemSize::parse(&odd).is_err());
    }

    #[test]
    fn the_superblock_of_a_real_file_system() {
        let path =
            std::env::temp_dir().join(format!("hermitage-agent-ext4-{}", std::process::id()));
        let made = std::process::Command::new("mke2fs")
            .args(["-q", "-F", "-t", "ext4", "-b", "4096"])
            .arg(&path)
            .arg("20M")
            .status();
        if !made.is_ok_and(|status| status.success()) {
            eprintln!("skipped: mke2fs is not installed");
            return;
        }
        let size = FileSystemSize::read(&File::open(&path).unwrap()).unwrap();
        std::fs::remove_file(&path).unwrap();
        assert_eq!(size, FileSystemSize { blocks: 5120, block_size: 4096 });
    }

    #[test]
    fn host_names() {
        for good in ["alice", "a-1.example.org", "X"] {
            assert!(check_hostname(good).is_ok(), "{good}");
        }
        for bad in ["", "a b", "-a", "a..b", "a\nb", "ä", &"a".repeat(65)] {
            assert!(check_hostname(bad).is_err(), "{bad:?}");
        }
    }
}
