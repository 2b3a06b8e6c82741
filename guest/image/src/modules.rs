//! Which kernel modules the agent loads before there is a root file system, and in which order.
//! The order is resolved here, from depmod's `modules.dep`, so that PID 1 only walks a list.

use std::collections::HashMap;

use anyhow::{Context, Result, bail};

/// What a machine needs to be one. Those that Debian builds in are not here; those missing from
/// `modules.dep` but named in `modules.builtin` are passed over.
pub const WANTED: [&str; 11] = [
    "virtio_mmio",
    "virtio_console",
    "virtio_blk",
    "virtio_balloon",
    "vmw_vsock_virtio_transport",
    "nd_e820",
    "nd_pmem",
    "erofs",
    "overlay",
    // for the agent's practice disk
    "loop",
    // the host's time of day
    "ptp_kvm",
];

/// `modules.dep` (modprobe.d's companion, written by depmod): `path: dependency-path …`, the
/// dependencies listed so that the last is to be loaded first.
pub struct Dependencies {
    by_name: HashMap<String, (String, Vec<String>)>,
    builtin: Vec<String>,
}

impl Dependencies {
    pub fn parse(modules_dep: &str, modules_builtin: &str) -> Result<Dependencies> {
        let mut by_name = HashMap::new();
        for line in modules_dep.lines() {
            let (path, needs) = line
                .split_once(':')
                .with_context(|| format!("modules.dep: {line:?} has no colon"))?;
            let needs = needs.split_whitespace().map(str::to_owned).collect();
            by_name.insert(name_of(path), (path.to_owned(), needs));
        }
        Ok(Dependencies { by_name, builtin: modules_builtin.lines().map(name_of).collect() })
    }

    /// Paths, relative to the modules' directory, of `wanted` and all they need, each after what it
    /// needs.
    pub fn load_order(&self, wanted: &[&str]) -> Result<Vec<String>> {
        let mut order = Vec::new();
        for name in wanted {
            if self.by_name.contains_key(*name) {
                self.visit(name, &mut order, &mut Vec::new())?;
            } else if !self.builtin.iter().any(|builtin| builtin == name) {
                bail!("this kernel has no module {name}, loadable or built in");
            }
        }
        Ok(order)
    }

    fn visit(
        &self,
        name: &str,
        order: &mut Vec<String>,
        path_here: &mut Vec<String>,
    ) -> Result<()> {
        let Some((path, needs)) = self.by_name.get(name) else {
            bail!("modules.dep does not list {name}, which {path_here:?} needs");
        };
        if order.contains(path) {
            return Ok(());
        }
        if path_here.iter().any(|above| above == name) {
            bail!("modules.dep: {name} needs itself ({path_here:?})");
        }
        path_here.push(name.to_owned());
        for need in needs.iter().rev() {
            self.visit(&name_of(need), order, path_here)?;
        }
        path_here.pop();
        order.push(path.clone());
        Ok(())
    }
}

/// `kernel/fs/erofs/erofs.ko.xz` → `erofs`; the kernel takes `-` and `_` for the same.
pub fn name_of(path: &str) -> String {
    let file = path.rsplit('/').next().unwrap_or(path);
    file.split(".ko").next().unwrap_or(file).replace('-', "_")
}

#[cfg(test)]
mod tests {
    use super::*;

    const DEP: &str = "\
kernel/a/nd_pmem.ko.xz: kernel/a/nd_btt.ko.xz kernel/a/libnvdimm.ko.xz
kernel/a/nd_btt.ko.xz: kernel/a/libnvdimm.ko.xz
kernel/a/libnvdimm.ko.xz:
kernel/f/virtio-mmio.ko.xz:
";

    fn order(dep: &str, wanted: &[&str]) -> Result<Vec<String>> {
        Dependencies::parse(dep, "kernel/d/virtio_console.ko\n")?.load_order(wanted)
    }

    #[test]
    fn a_module_comes_after_what_it_needs_and_once() {
        let paths = order(DEP, &["nd_pmem", "virtio_mmio", "libnvdimm"]).unwrap();
        let names: Vec<String> = paths.iter().map(|path| name_of(path)).collect();
        assert_eq!(names, ["libnvdimm", "nd_btt", "nd_pmem", "virtio_mmio"]);
    }

    #[test]
    fn built_in_is_passed_over_and_missing_is_named() {
        assert!(order(DEP, &["virtio_console"]).unwrap().is_empty());
        let error = order(DEP, &["erofs"]).unwrap_err().to_string();
        assert!(error.contains("no module erofs"), "{error}");
    }

    #[test]
    fn a_broken_list_ends_instead_of_recursing() {
        let error = order("a.ko: b.ko\nb.ko: a.ko\n", &["a"]).unwrap_err().to_string();
        assert!(error.contains("needs itself"), "{error}");
        assert!(order("a.ko: gone.ko\n", &["a"]).is_err());
        assert!(order("no colon\n", &["a"]).is_err());
    }
}
