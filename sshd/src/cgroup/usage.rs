//! What a group has used, as the kernel counts it.

use std::{
    fs::File,
    io::Read,
    path::{Path, PathBuf},
};

use serde::Serialize;

/// More than any of these files has.
const MAX_FILE: u64 = 64 * 1024;

/// `None`: there is no such controller, or file.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize)]
pub struct Usage {
    /// Processor time since the machine's start.
    pub cpu_microseconds: Option<u64>,
    /// Time that it stood still because of its cap.
    pub throttled_microseconds: Option<u64>,
    /// Memory that counts for it, cached pages of files included.
    pub memory_bytes: Option<u64>,
    pub memory_max_bytes: Option<u64>,
    pub io_read_bytes: Option<u64>,
    pub io_written_bytes: Option<u64>,
    /// Threads of the machine's process.
    pub threads: Option<u64>,
}

impl Usage {
    /// `None`: there is no such group (any more).
    pub fn of(group: &Path) -> Option<Self> {
        let read = |file: &str| read(group.join(file));
        let number = |file: &str| read(file)?.trim().parse().ok();
        let cpu = read("cpu.stat")?;
        let io = read("io.stat");
        let bytes = |name: &str| io.as_ref().map(|io| sum(io, name));
        Some(Self {
            cpu_microseconds: field(&cpu, "usage_usec"),
            throttled_microseconds: field(&cpu, "throttled_usec"),
            memory_bytes: charged_to(group),
            memory_max_bytes: number("memory.max"),
            io_read_bytes: bytes("rbytes="),
            io_written_bytes: bytes("wbytes="),
            threads: number("pids.current"),
        })
    }
}

/// Microseconds that a group stood still because of its cap.
pub fn held_back(group: &Path) -> Option<u64> {
    field(&read(group.join("cpu.stat"))?, "throttled_usec")
}

/// Memory that counts for a group and can't be given back: not what is cached of files.
pub fn kept_by(group: &Path) -> Option<u64> {
    let stat = read(group.join("memory.stat"))?;
    Some(field(&stat, "anon")?.saturating_add(field(&stat, "shmem").unwrap_or(0)))
}

/// Memory that counts for a group.
pub fn charged_to(group: &Path) -> Option<u64> {
    read(group.join("memory.current"))?.trim().parse().ok()
}

fn read(path: PathBuf) -> Option<String> {
    let mut text = String::new();
    File::open(path).ok()?.take(MAX_FILE).read_to_string(&mut text).ok()?;
    Some(text)
}

/// Flat keyed: a name and a number on each line.
fn field(text: &str, name: &str) -> Option<u64> {
    let line = text.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(' '))?;
    line.trim().parse().ok()
}

/// Nested keyed: `8:0 rbytes=1 wbytes=2 …`, a line for each device.
fn sum(text: &str, name: &str) -> u64 {
    let fields = text.split_ascii_whitespace().filter_map(|field| field.strip_prefix(name));
    fields.filter_map(|number| number.parse::<u64>().ok()).fold(0, u64::saturating_add)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn use_is_read_as_the_kernel_writes_it() {
        let dir = tempfile::tempdir().unwrap();
        assert_eq!(Usage::of(dir.path()), None);
        let write = |file: &str, text: &str| std::fs::write(dir.path().join(file), text).unwrap();
        let cpu =
            "usage_usec 1500\nuser_usec 1000\nsystem_usec 500\nnr_throttled 3\nthrottled_usec 77\n";
        write("cpu.stat", cpu);
        write("memory.current", "4096\n");
        write("memory.max", "max\n");
        write("io.stat", "8:0 rbytes=10 wbytes=20 rios=1\n259:1 rbytes=1 wbytes=2\n");
        let usage = Usage::of(dir.path()).unwrap();
        let wanted = Usage {
            cpu_microseconds: Some(1500),
            throttled_microseconds: Some(77),
            memory_bytes: Some(4096),
            memory_max_bytes: None,
            io_read_bytes: Some(11),
            io_written_bytes: Some(22),
            threads: None,
        };
        assert_eq!(usage, wanted);
        assert_eq!((held_back(dir.path()), charged_to(dir.path())), (Some(77), Some(4096)));
    }
}
