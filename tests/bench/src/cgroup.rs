//! A control group around the fork server and its machines: the one place where the kernel adds up
//! all that they cost, its own objects included (cgroup v2, "memory.stat").

use std::{
    fs, io,
    path::{Path, PathBuf},
};

use anyhow::Context as _;

const ROOT: &str = "/sys/fs/cgroup";

pub struct Cgroup {
    path: PathBuf,
}

/// Bytes by kind.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Usage {
    pub anonymous: u64,
    /// Page tables, KVM's tables, stacks, kernel objects.
    pub kernel: u64,
    /// Of these, KVM's tables for guests.
    pub secondary_page_tables: u64,
}

impl Cgroup {
    /// With `pid` inside. An error where there is no cgroup v2 with a memory controller.
    pub fn around(pid: u32) -> anyhow::Result<Self> {
        let controllers = read(Path::new(ROOT), "cgroup.controllers")?;
        anyhow::ensure!(
            controllers.split_ascii_whitespace().any(|name| name == "memory"),
            "{ROOT} has no memory controller (it has: {})",
            controllers.trim()
        );
        // On where something manages cgroups; writing it again changes nothing.
        write(Path::new(ROOT), "cgroup.subtree_control", "+memory")?;
        let path = Path::new(ROOT).join(format!("hermitage-bench-{}", std::process::id()));
        fs::create_dir(&path).with_context(|| format!("make {}", path.display()))?;
        let group = Self { path };
        write(&group.path, "cgroup.procs", &pid.to_string())?;
        Ok(group)
    }

    pub fn usage(&self) -> anyhow::Result<Usage> {
        Ok(parse(&read(&self.path, "memory.stat")?))
    }
}

impl Drop for Cgroup {
    /// Works once the last process in it is gone.
    fn drop(&mut self) {
        match fs::remove_dir(&self.path) {
            Err(e) if e.kind() != io::ErrorKind::NotFound => {
                eprintln!("hermitage-bench: {} stays behind: {e}", self.path.display());
            }
            _ => {}
        }
    }
}

fn parse(stat: &str) -> Usage {
    let field = |name: &str| {
        stat.lines()
            .find_map(|line| line.strip_prefix(name)?.strip_prefix(' ')?.parse().ok())
            .unwrap_or(0)
    };
    Usage {
        anonymous: field("anon"),
        kernel: field("kernel"),
        secondary_page_tables: field("sec_pagetables"),
    }
}

fn read(dir: &Path, name: &str) -> anyhow::Result<String> {
    let path = dir.join(name);
    fs::read_to_string(&path).with_context(|| format!("read {}", path.display()))
}

fn write(dir: &Path, name: &str, value: &str) -> anyhow::Result<()> {
    let path = dir.join(name);
    fs::write(&path, value).with_context(|| format!("write {value} to {}", path.display()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn fields_are_told_apart_from_those_they_begin() {
        let stat = "anon_thp 7\nanon 4096\nkernel_stack 5\nkernel 8192\nsec_pagetables 12\n";
        let expected = Usage { anonymous: 4096, kernel: 8192, secondary_page_tables: 12 };
        assert_eq!(parse(stat), expected);
    }
}
