//! An emulated machine's own kernel, initrd and root disk: stock Debian, put together by `mmdebstrap`.

use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use anyhow::{Context, Result, bail};

use super::recipe::Recipe;
use crate::layout::Layout;
use crate::process::{is_root, privileged, run_captured, run_logged};
use crate::tools::tool;

const SUITE: &str = "trixie";
const INITRD_INIT: &str = include_str!("../../machine/initrd-init");

/// Modules the initrd needs before the root disk is there, and what they depend on.
const EARLY_MODULES: &[&str] = &["virtio_pci", "virtio_blk"];

/// A machine image on disk; its folder's name is the digest of what it was made from.
#[derive(Clone, Debug)]
pub struct MachineImage {
    dir: PathBuf,
    recipe: &'static Recipe,
}

impl MachineImage {
    pub fn kernel(&self) -> PathBuf {
        self.dir.join("vmlinuz")
    }

    pub fn initrd(&self) -> PathBuf {
        self.dir.join("initrd.img")
    }

    pub fn root_disk(&self) -> PathBuf {
        self.dir.join("root.ext4")
    }

    /// Public host key of the machine's sshd, as `known_hosts` wants it after the name.
    pub fn host_key(&self) -> Result<String> {
        let path = self.dir.join("host-key.pub");
        Ok(fs::read_to_string(&path)
            .with_context(|| format!("read {}", path.display()))?
            .trim()
            .to_owned())
    }

    /// It comes up again after a reboot.
    pub fn reboots(&self) -> bool {
        self.recipe.reboots
    }

    /// What the kernel is told besides what every machine of the lab is.
    pub fn arguments(&self) -> &'static str {
        self.recipe.arguments
    }

    /// The image for this checkout; whether it is there already is `exists`.
    pub fn current(layout: &Layout, recipe: &'static Recipe) -> Self {
        let mut hasher = blake3::Hasher::new();
        let mut part = |text: &str| {
            hasher.update(&(text.len() as u64).to_le_bytes());
            hasher.update(text.as_bytes());
        };
        [SUITE, recipe.packages, INITRD_INIT].into_iter().for_each(&mut part);
        for (path, mode, text) in recipe.files {
            [*path, mode.to_string().as_str(), *text].into_iter().for_each(&mut part);
        }
        for (path, target) in recipe.links {
            [*path, *target].into_iter().for_each(&mut part);
        }
        recipe.left_out.iter().copied().for_each(&mut part);
        part(&recipe.disk_mib.to_string());
        let key = hasher.finalize().to_hex();
        Self { dir: layout.shared().join("machine").join(&key[..16]), recipe }
    }

    pub fn exists(&self) -> bool {
        self.dir.exists()
    }

    /// Builds it, as root: the lab calls itself through sudo when it is not.
    pub fn build(&self, layout: &Layout) -> Result<()> {
        let log = layout.step_log();
        if !is_root() {
            let me = std::env::current_exe().context("find this program")?;
            return run_logged(privileged(me).args(["make-machine", self.recipe.name]), &log);
        }
        let parent = self.dir.parent().context("the machine folder has a parent")?;
        fs::create_dir_all(parent).with_context(|| format!("make {}", parent.display()))?;
        let part = self.dir.with_extension("part");
        remove_tree(&part)?;
        fs::create_dir(&part).with_context(|| format!("make {}", part.display()))?;
        make(self.recipe, &part, &log)?;
        fs::rename(&part, &self.dir).with_context(|| format!("rename {}", part.display()))
    }
}

fn make(recipe: &Recipe, dir: &Path, log: &Path) -> Result<()> {
    let packages: Vec<&str> = recipe.package_names().collect();
    let archive = dir.join("root.tar");
    run_logged(
        tool("mmdebstrap")
            // Debian would make an initrd that the lab does not use.
            .env("INITRD", "No")
            .args(["--quiet", "--variant=minbase"])
            .arg(format!("--include={}", packages.join(",")))
            .args(
                recipe
                    .left_out
                    .iter()
                    .map(|dir| format!("--dpkgopt=path-exclude=/usr/share/{dir}/*")),
            )
            .arg(SUITE)
            .arg(&archive),
        log,
    )?;
    let root = dir.join("root");
    fs::create_dir(&root)?;
    run_logged(tool("tar").arg("-xpf").arg(&archive).arg("-C").arg(&root), log)?;
    fs::remove_file(&archive)?;

    for (path, mode, content) in recipe.files {
        let path = root.join(path);
        make_way(&path)?;
        fs::write(&path, content).with_context(|| format!("write {}", path.display()))?;
        fs::set_permissions(&path, fs::Permissions::from_mode(*mode))?;
    }
    for (path, target) in recipe.links {
        let path = root.join(path);
        make_way(&path)?;
        std::os::unix::fs::symlink(target, &path)
            .with_context(|| format!("link {}", path.display()))?;
    }
    fs::copy(root.join("etc/ssh/ssh_host_ed25519_key.pub"), dir.join("host-key.pub"))
        .context("the machine image has no ssh host key")?;
    let kernel = only_entry(&root.join("boot"), "vmlinuz-")?;
    fs::rename(kernel, dir.join("vmlinuz"))?;
    make_initrd(&root, dir, log)?;
    for unused in ["boot", "var/cache/apt", "var/lib/apt/lists", "var/cache/debconf"] {
        remove_tree(&root.join(unused))?;
        fs::create_dir_all(root.join(unused))?;
    }

    let disk = dir.join("root.ext4");
    fs::File::create(&disk)?.set_len(recipe.disk_mib << 20)?;
    run_logged(
        tool("mke2fs")
            .args([
                "-q",
                "-t",
                "ext4",
                "-L",
                "lab-root",
                "-m",
                "0",
                "-E",
                "lazy_itable_init=0",
                "-d",
            ])
            .arg(&root)
            .arg(&disk),
        log,
    )?;
    remove_tree(&root)
}

/// Its folder is there, and nothing in its place: what is there may be a link to somewhere outside.
fn make_way(path: &Path) -> Result<()> {
    if let Some(parent) = path.parent() {
        fs::create_dir_all(parent).with_context(|| format!("make {}", parent.display()))?;
    }
    if path.symlink_metadata().is_ok() {
        fs::remove_file(path).with_context(|| format!("remove {}", path.display()))?;
    }
    Ok(())
}

/// busybox, the few modules and one script, as a newc archive.
fn make_initrd(root: &Path, dir: &Path, log: &Path) -> Result<()> {
    let tree = dir.join("initrd");
    fs::create_dir_all(tree.join("bin"))?;
    fs::create_dir_all(tree.join("modules"))?;
    fs::create_dir_all(tree.join("dev"))?;
    fs::copy(root.join("usr/bin/busybox"), tree.join("bin/busybox")).context("copy busybox")?;
    let init = tree.join("init");
    fs::write(&init, INITRD_INIT)?;
    fs::set_permissions(&init, fs::Permissions::from_mode(0o755))?;

    let modules = only_entry(&root.join("usr/lib/modules"), "")?;
    let depends = fs::read_to_string(modules.join("modules.dep")).context("read modules.dep")?;
    let mut order = String::new();
    for path in load_order(&depends, EARLY_MODULES)? {
        let packed = modules.join(&path);
        let name = path.rsplit('/').next().unwrap_or(&path).trim_end_matches(".xz");
        let content = match path.ends_with(".xz") {
            true => run_captured(tool("xz").arg("-dc").arg(&packed))?.stdout,
            false => fs::read(&packed)?,
        };
        fs::write(tree.join("modules").join(name), content)?;
        order.push_str(name);
        order.push('\n');
    }
    fs::write(tree.join("modules/order"), order)?;

    let image = fs::File::create(dir.join("initrd.img"))?;
    let mut names = Vec::new();
    list(&tree, &tree, &mut names)?;
    let mut cpio = Command::new("cpio")
        .args(["--quiet", "-o", "-H", "newc", "-R", "0:0"])
        .current_dir(&tree)
        .stdin(Stdio::piped())
        .stdout(image)
        .stderr(fs::OpenOptions::new().create(true).append(true).open(log)?)
        .spawn()
        .context("start cpio")?;
    let mut stdin = cpio.stdin.take().context("cpio's standard input")?;
    std::io::Write::write_all(&mut stdin, names.join("\n").as_bytes())
        .context("give cpio its list")?;
    drop(stdin);
    let status = cpio.wait()?;
    if !status.success() {
        bail!("cpio ended with {status}; see {}", log.display());
    }
    remove_tree(&tree)
}

/// Module files in an order in which each comes after what it needs. A module that `modules.dep` does
/// not name is built into the kernel.
fn load_order(depends: &str, wanted: &[&str]) -> Result<Vec<String>> {
    let mut order: Vec<String> = Vec::new();
    for name in wanted {
        let is_it = |path: &str| {
            let file = path.rsplit('/').next().unwrap_or(path);
            file.split(".ko").next().is_some_and(|stem| stem.replace('-', "_") == *name)
        };
        let Some((path, needs)) =
            depends.lines().filter_map(|l| l.split_once(':')).find(|(p, _)| is_it(p))
        else {
            continue;
        };
        // modules.dep lists the nearest need first; loading starts with the farthest.
        for file in needs.split_ascii_whitespace().rev().chain([path]) {
            if !order.iter().any(|known| known == file) {
                order.push(file.to_owned());
            }
        }
    }
    Ok(order)
}

fn only_entry(dir: &Path, prefix: &str) -> Result<PathBuf> {
    let mut found: Vec<PathBuf> = fs::read_dir(dir)
        .with_context(|| format!("list {}", dir.display()))?
        .filter_map(|entry| entry.ok().map(|e| e.path()))
        .filter(|path| path.file_name().is_some_and(|n| n.to_string_lossy().starts_with(prefix)))
        .collect();
    match (found.pop(), found.is_empty()) {
        (Some(one), true) => Ok(one),
        (None, _) => bail!("{}: nothing named {prefix}… in it", dir.display()),
        (Some(_), false) => bail!("{}: more than one {prefix}… in it", dir.display()),
    }
}

fn list(dir: &Path, base: &Path, names: &mut Vec<String>) -> Result<()> {
    for entry in fs::read_dir(dir)? {
        let path = entry?.path();
        names.push(path.strip_prefix(base)?.to_string_lossy().into_owned());
        if path.is_dir() {
            list(&path, base, names)?;
        }
    }
    names.sort();
    Ok(())
}

fn remove_tree(dir: &Path) -> Result<()> {
    match fs::remove_dir_all(dir) {
        Err(error) if error.kind() != std::io::ErrorKind::NotFound => {
            Err(error).with_context(|| format!("remove {}", dir.display()))
        }
        _ => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn modules_load_after_what_they_need() {
        let depends = "kernel/virtio-net.ko.xz: kernel/net_failover.ko.xz kernel/failover.ko.xz\n\
                       kernel/virtio_blk.ko.xz:\n";
        let order = load_order(depends, &["virtio_net", "virtio_blk", "built_in"]).unwrap();
        let expected = [
            "kernel/failover.ko.xz",
            "kernel/net_failover.ko.xz",
            "kernel/virtio-net.ko.xz",
            "kernel/virtio_blk.ko.xz",
        ];
        assert_eq!(order, expected);
    }
}
