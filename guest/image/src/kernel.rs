//! The kernel package is unpacked, not installed: its maintainer scripts would pull in an initramfs
//! generator and a boot loader's hooks, and a machine has no use for /boot.

use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail};

use crate::tool;

pub struct Kernel {
    pub version: String,
    pub vmlinuz: PathBuf,
}

/// Unpacks the .deb into `scratch`, moves its modules into `tree` (users want overlay, fuse, tun …
/// and the initrd takes its own from there), and returns what else is of use.
pub fn unpack(package: &Path, scratch: &Path, tree: &Path) -> Result<Kernel> {
    tool::run("dpkg-deb", [Path::new("-x"), package, scratch])?;
    let boot = scratch.join("boot");
    let vmlinuz = single(&boot, |name| name.starts_with("vmlinuz-"))?;
    let version = file_name(&vmlinuz)["vmlinuz-".len()..].to_owned();

    let modules = ["usr/lib/modules", "lib/modules"]
        .iter()
        .map(|dir| scratch.join(dir).join(&version))
        .find(|dir| dir.is_dir())
        .with_context(|| format!("{} holds no modules for {version}", package.display()))?;
    let target = tree.join("usr/lib/modules");
    fs::create_dir_all(&target)?;
    fs::rename(&modules, target.join(&version)).context("moving the modules into the tree")?;
    tool::run("chroot", [tree.as_os_str(), "depmod".as_ref(), version.as_ref()])?;
    Ok(Kernel { version, vmlinuz })
}

/// The one entry of `dir` that `wanted` accepts.
pub fn single(dir: &Path, wanted: impl Fn(&str) -> bool) -> Result<PathBuf> {
    let mut found = Vec::new();
    for entry in fs::read_dir(dir).with_context(|| format!("reading {}", dir.display()))? {
        let path = entry?.path();
        if wanted(&file_name(&path)) {
            found.push(path);
        }
    }
    match found.pop() {
        Some(path) if found.is_empty() => Ok(path),
        Some(_) => bail!("{} holds more than one kernel", dir.display()),
        None => bail!("{} holds no kernel", dir.display()),
    }
}

fn file_name(path: &Path) -> String {
    path.file_name().unwrap_or_default().to_string_lossy().into_owned()
}
