//! What the figures were measured on.

use std::{arch::x86_64::__cpuid, fmt, fs};

use anyhow::Context as _;
use serde::Serialize;

#[derive(Debug, Serialize)]
pub struct Host {
    pub cpu: String,
    pub cpus: usize,
    /// The CPU is software (QEMU's TCG): times are only good for ratios within one run.
    pub emulated: bool,
    pub kernel: String,
    pub memory_bytes: u64,
}

impl Host {
    pub fn look() -> Self {
        let cpuinfo = fs::read_to_string("/proc/cpuinfo").unwrap_or_default();
        let cpu = cpuinfo
            .lines()
            .find_map(|line| line.strip_prefix("model name")?.split_once(':'))
            .map_or_else(|| "unknown CPU".to_owned(), |(_, name)| name.trim().to_owned());
        let kernel = fs::read_to_string("/proc/sys/kernel/osrelease").unwrap_or_default();
        Self {
            cpu,
            cpus: std::thread::available_parallelism().map_or(1, Into::into),
            emulated: hypervisor().as_deref() == Some("TCGTCGTCGTCG"),
            kernel: kernel.trim().to_owned(),
            memory_bytes: meminfo("MemTotal").unwrap_or(0),
        }
    }
}

impl fmt::Display for Host {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { cpu, cpus, kernel, .. } = self;
        write!(f, "{cpu}, {cpus} CPU(s), {} MiB, Linux {kernel}", self.memory_bytes >> 20)?;
        if self.emulated {
            write!(f, "\nEMULATED CPU: times are inflated, only the ratios mean something")?;
        }
        Ok(())
    }
}

/// Who is under us, by the leaf hypervisors identify themselves with.
fn hypervisor() -> Option<String> {
    const HYPERVISOR_PRESENT: u32 = 1 << 31;
    if __cpuid(1).ecx & HYPERVISOR_PRESENT == 0 {
        return None;
    }
    let leaf = __cpuid(0x4000_0000);
    let bytes: Vec<u8> =
        [leaf.ebx, leaf.ecx, leaf.edx].into_iter().flat_map(u32::to_le_bytes).collect();
    Some(String::from_utf8_lossy(&bytes).trim_end_matches('\0').to_owned())
}

/// A field of /proc/meminfo in bytes.
pub fn meminfo(field: &str) -> anyhow::Result<u64> {
    kib_field("/proc/meminfo", field)
}

/// A field `Name:   123 kB` of a file under /proc, in bytes.
pub fn kib_field(path: &str, field: &str) -> anyhow::Result<u64> {
    let text = fs::read_to_string(path).with_context(|| format!("read {path}"))?;
    parse_kib(&text, field).with_context(|| format!("{path} has no field {field}"))
}

/// A line `Name:   123 kB` of `text`, in bytes.
pub fn parse_kib(text: &str, field: &str) -> Option<u64> {
    let rest = text.lines().find_map(|line| line.strip_prefix(field)?.strip_prefix(':'))?;
    rest.trim().strip_suffix("kB")?.trim().parse::<u64>().ok()?.checked_mul(1024)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn fields_are_found_by_their_whole_name() {
        let text = "AnonHugePages:  7 kB\nAnonymous:      12 kB\nVmPTE:\t   52 kB\n";
        assert_eq!(parse_kib(text, "Anonymous"), Some(12 * 1024));
        assert_eq!(parse_kib(text, "VmPTE"), Some(52 * 1024));
        assert_eq!(parse_kib(text, "Anon"), None);
    }

    #[test]
    fn this_machine_has_memory() {
        assert!(meminfo("MemTotal").unwrap() > 0);
        assert!(meminfo("MemBogus").unwrap_err().to_string().contains("MemBogus"));
    }
}
