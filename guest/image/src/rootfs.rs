//! The root file system, and the disk its changes go to.

use std::fs;
use std::io::ErrorKind;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result};

use crate::{kernel, tool};

/// Debian's meta package of the kernel for virtual machines.
const KERNEL_PACKAGE: &str = "linux-image-cloud-amd64";

/// What dpkg leaves out, now and when the account's owner installs something: documentation beside
/// the manual pages, and translations (their names are two or three letters, so `man1` stays).
const EXCLUDED: [&str; 6] = [
    "path-exclude=/usr/share/doc/*",
    "path-include=/usr/share/doc/*/copyright",
    "path-exclude=/usr/share/locale/*/LC_MESSAGES/*",
    "path-exclude=/usr/share/man/[a-z][a-z]/*",
    "path-exclude=/usr/share/man/[a-z][a-z][_.@]*/*",
    "path-exclude=/usr/share/info/*",
];

/// Path in the tree, permissions, content.
const FILES: [(&str, u32, &str); 12] = [
    ("etc/profile", 0o644, include_str!("../files/profile")),
    ("etc/skel/.bashrc", 0o644, include_str!("../files/bashrc")),
    ("etc/profile.d/bash_completion.sh", 0o644, include_str!("../files/bash_completion.sh")),
    ("etc/motd", 0o644, include_str!("../files/motd")),
    ("etc/sudoers.d/hermitage", 0o440, include_str!("../files/sudoers")),
    ("usr/local/share/doc/hermitage/README", 0o644, include_str!("../files/account-readme")),
    ("usr/local/sbin/poweroff", 0o755, include_str!("../files/poweroff")),
    ("usr/local/sbin/reboot", 0o755, include_str!("../files/poweroff")),
    ("usr/local/sbin/halt", 0o755, include_str!("../files/poweroff")),
    (
        "etc/fstab",
        0o644,
        "# hermitage-agent has mounted everything before the first program runs.\n",
    ),
    // The building host's own were copied in by mmdebstrap.
    ("etc/resolv.conf", 0o644, "# No network in this machine.\n"),
    ("etc/locale.gen", 0o644, "C.UTF-8 UTF-8\nen_US.UTF-8 UTF-8\n"),
];

/// The agent under the name by which it asks the host (`guest/agent/src/ask`).
const ASK: &str = "usr/bin/hermitage";

/// What must differ between machines, or is left over from the installation.
const REMOVED: [&str; 9] = [
    "etc/hostname",
    "etc/machine-id",
    "var/lib/dbus/machine-id",
    "etc/passwd-",
    "etc/shadow-",
    "etc/group-",
    "etc/gshadow-",
    "var/log/dpkg.log",
    "var/log/apt",
];

/// Installs the packages into `tree` and returns the kernel's package, downloaded beside it.
pub fn bootstrap(tree: &Path, beside: &Path, suite: &str, include: &[String]) -> Result<PathBuf> {
    let downloads = beside.join("download");
    fs::create_dir(&downloads)?;
    // apt runs here with the new tree's sources and keys; which version the meta package stands for
    // is in its Depends. $0 is the directory, $1 the tree.
    let fetch = format!(
        "cd {} && export APT_CONFIG=\"$MMDEBSTRAP_APT_CONFIG\" && \
         apt-get -qq -o APT::Sandbox::User=root download \
         \"$(apt-cache depends {KERNEL_PACKAGE} | sed -n 's/^ *Depends: \\(linux-image-[^ ]*\\)$/\\1/p' | head -n 1)\"",
        quoted(&downloads)
    );
    let mut args = vec![
        "--quiet".to_owned(),
        "--mode=root".to_owned(),
        "--variant=minbase".to_owned(),
        "--format=directory".to_owned(),
        // depmod, for the kernel that is unpacked later; and modprobe, which users expect
        "--include=kmod".to_owned(),
    ];
    args.extend(include.iter().map(|name| format!("--include={name}")));
    args.extend(EXCLUDED.iter().map(|rule| format!("--dpkgopt={rule}")));
    args.push(format!("--customize-hook={fetch}"));
    args.push(suite.to_owned());
    let mut args: Vec<_> = args.into_iter().map(std::ffi::OsString::from).collect();
    args.push(tree.into());
    tool::run("mmdebstrap", args)?;
    kernel::single(&downloads, |name| name.starts_with("linux-image-") && name.ends_with(".deb"))
}

/// For a shell: in single quotes, with those inside closed, escaped and opened again.
fn quoted(path: &Path) -> String {
    format!("'{}'", path.to_string_lossy().replace('\'', "'\\''"))
}

/// Makes the installed tree a machine's root. The agent is in it as well, as what asks the host.
pub fn tailor(tree: &Path, agent: &Path, extra: Option<&Path>) -> Result<()> {
    for path in REMOVED {
        remove(&tree.join(path))?;
    }
    empty_directory(&tree.join("boot"))?;
    for (path, mode, content) in FILES {
        let path = tree.join(path);
        if let Some(parent) = path.parent() {
            fs::create_dir_all(parent)?;
        }
        fs::write(&path, content).with_context(|| format!("writing {}", path.display()))?;
        fs::set_permissions(&path, fs::Permissions::from_mode(mode))?;
    }
    let ask = tree.join(ASK);
    fs::copy(agent, &ask).with_context(|| format!("writing {}", ask.display()))?;
    fs::set_permissions(&ask, fs::Permissions::from_mode(0o755))?;
    // Debian leaves it to systemd.
    remove(&tree.join("etc/mtab"))?;
    std::os::unix::fs::symlink("../proc/self/mounts", tree.join("etc/mtab"))?;
    let colours =
        tool::output("chroot", [tree.as_os_str(), "/usr/bin/dircolors".as_ref(), "-b".as_ref()])?;
    fs::write(tree.join("etc/dircolors.sh"), colours)?;
    if tree.join("usr/sbin/locale-gen").exists() {
        tool::run("chroot", [tree.as_os_str(), "/usr/sbin/locale-gen".as_ref()])?;
    }
    if let Some(extra) = extra {
        let from = extra.join(".");
        let options = ["-R", "-P", "--preserve=mode,timestamps,xattr", "-T"].map(AsRef::as_ref);
        tool::run("cp", options.into_iter().chain([from.as_os_str(), tree.as_os_str()]))?;
    }
    Ok(())
}

fn remove(path: &Path) -> Result<()> {
    let result = match fs::symlink_metadata(path) {
        Ok(metadata) if metadata.is_dir() => fs::remove_dir_all(path),
        Ok(_) => fs::remove_file(path),
        Err(error) if error.kind() == ErrorKind::NotFound => Ok(()),
        Err(error) => Err(error),
    };
    result.with_context(|| format!("removing {}", path.display()))
}

fn empty_directory(path: &Path) -> Result<()> {
    for entry in fs::read_dir(path).with_context(|| format!("reading {}", path.display()))? {
        remove(&entry?.path())?;
    }
    Ok(())
}

/// `noinline_data`: a file's tail in the inode's block could not be mapped (DAX needs whole pages).
/// The size is a multiple of 2 MiB because a persistent-memory region is.
pub fn write_erofs(tree: &Path, out: &Path) -> Result<()> {
    const REGION: u64 = 2 << 20;
    let args = ["-E", "noinline_data", "--quiet"].map(AsRef::as_ref);
    tool::run("mkfs.erofs", args.into_iter().chain([out.as_os_str(), tree.as_os_str()]))?;
    let file = fs::OpenOptions::new().write(true).open(out)?;
    let bytes = file.metadata()?.len();
    file.set_len(bytes.next_multiple_of(REGION))
        .with_context(|| format!("extending {}", out.display()))
}

/// An account's disk before its first use: small, with the two directories overlayfs wants, and
/// ready to grow while mounted.
pub fn write_disk_template(scratch: &Path, out: &Path) -> Result<()> {
    // overlayfs's upper directory is the root directory of the machine: its mode is /'s.
    for (name, mode) in [("upper", 0o755), ("work", 0o700)] {
        let path = scratch.join(name);
        fs::create_dir_all(&path)?;
        fs::set_permissions(&path, fs::Permissions::from_mode(mode))?;
    }
    let options = [
        "-q", "-F", "-t", "ext4", "-L", "account", "-b", "4096", "-I", "256",
        // nothing is kept for root: she is root
        "-m", "0",
        // Inodes a group come from the small size and stay when it grows: 8192 are one for 16 KiB.
        "-N", "8192",
        "-J", "size=8",
        // Descriptor blocks for growing to 128 GiB (in 4 KiB blocks): the kernel reads each of them
        // when it grows. Past that it goes on with meta_bg. Nothing is left to initialise in the
        // background of the first mount.
        "-E", "resize=33554432,lazy_itable_init=0,lazy_journal_init=0,nodiscard",
        "-O", "has_journal,extent,flex_bg,64bit,metadata_csum,resize_inode,dir_index,sparse_super,large_file,huge_file,extra_isize,ext_attr,filetype",
        "-d",
    ]
    .map(AsRef::as_ref);
    tool::run(
        "mke2fs",
        options.into_iter().chain([scratch.as_os_str(), out.as_os_str(), "64M".as_ref()]),
    )?;
    make_sparse(out).with_context(|| format!("making {} sparse", out.display()))
}

/// Gives back the blocks that hold nothing but zeroes (journal, inode table): every account's disk
/// starts as a copy of this file.
fn make_sparse(path: &Path) -> std::io::Result<()> {
    use rustix::fs::{FallocateFlags, fallocate};
    use std::os::unix::fs::FileExt;
    let file = fs::OpenOptions::new().read(true).write(true).open(path)?;
    let punch = FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE;
    let mut block = [0; 4096];
    for at in (0..file.metadata()?.len()).step_by(block.len()) {
        file.read_exact_at(&mut block, at)?;
        if block.iter().all(|byte| *byte == 0) {
            fallocate(&file, punch, at, block.len() as u64)?;
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_path_in_a_shell_command_stays_one_word() {
        assert_eq!(quoted(Path::new("/a b/it's")), r"'/a b/it'\''s'");
    }

    #[test]
    fn zeroes_take_no_space_and_the_rest_stays() {
        use std::os::unix::fs::MetadataExt;
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("file");
        let mut bytes = vec![0; 1 << 20];
        bytes[5000] = 7;
        fs::write(&path, &bytes).unwrap();
        make_sparse(&path).unwrap();
        assert_eq!(fs::read(&path).unwrap(), bytes);
        assert!(fs::metadata(&path).unwrap().blocks() <= 64, "still allocated");
    }

    #[test]
    fn the_shells_start_up_files_start_no_program() {
        for (path, _, text) in FILES.iter().filter(|(path, ..)| path.contains("profile")) {
            for line in text.lines().filter(|line| line.contains("$(")) {
                assert!(line.contains("${EUID:-$(id -u)}"), "{path}: {line}");
            }
        }
    }
}
