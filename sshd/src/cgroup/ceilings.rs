//! What is written into which file of a group (cgroup-v2.rst, "Controllers").

use hermitage_storage::base::Size as Shape;

use crate::limits::Share;

const MIB: u64 = 1 << 20;

/// What a machine's process needs beside the guest's memory: itself, buffers of streams and disk, page tables of
/// host and guest (1/256 of what is mapped, the base's image included), and room for the pages of its files that
/// are being written. What is cached of files is given back before this is over.
const OVERHEAD: u64 = 128 * MIB;
const OVERHEAD_PART: u64 = 16;

/// Threads beside those of virtual processors: four today.
const THREADS: u64 = 16;

/// The period that processor time is measured by, in microseconds. Half the kernel's own: who is over the cap
/// stands still for less long, which is what somebody at a terminal notices.
const PERIOD: u64 = 50_000;

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Ceilings {
    /// The machine's; `None`: its base does not say, and then neither memory nor threads are limited.
    pub shape: Option<Shape>,
    pub share: Share,
}

/// A value for a file.
#[derive(Debug, PartialEq, Eq)]
pub struct Setting {
    pub controller: &'static str,
    pub file: &'static str,
    pub value: String,
    /// Kernels without it do without.
    pub optional: bool,
    /// It limits something, so that it matters if it can't be written.
    pub limits: bool,
}

impl Ceilings {
    /// All but the disk's.
    pub fn settings(&self) -> Vec<Setting> {
        let set = |controller, file, value, limits| {
            let optional = file == "memory.swap.max";
            Setting { controller, file, value, optional, limits }
        };
        let memory = self.shape.map(|shape| {
            let bytes = shape.memory_bytes;
            bytes.saturating_add(OVERHEAD).saturating_add(bytes / OVERHEAD_PART)
        });
        let threads = self.shape.map(|shape| THREADS + u64::from(shape.vcpus));
        let share = &self.share;
        let quota = share.cpu_percent.map(|percent| u64::from(percent) * PERIOD / 100);
        vec![
            set("memory", "memory.max", or_max(memory), memory.is_some()),
            // What the host swaps out is for its operator to say, not for the busiest guest.
            set("memory", "memory.swap.max", "0".into(), false),
            set("memory", "memory.oom.group", "1".into(), false),
            set("pids", "pids.max", or_max(threads), threads.is_some()),
            set(
                "cpu",
                "cpu.weight",
                share.cpu_weight.to_string(),
                share.cpu_weight != Share::WEIGHT,
            ),
            set("cpu", "cpu.max", format!("{} {PERIOD}", or_max(quota)), quota.is_some()),
        ]
    }

    /// For `io.max`, after the device; `None`: nothing is limited.
    pub fn io(&self) -> Option<String> {
        let Share { io_rate, io_operations, .. } = self.share;
        let (rate, operations) = (or_max(io_rate), or_max(io_operations));
        let limited = io_rate.is_some() || io_operations.is_some();
        limited.then(|| format!("rbps={rate} wbps={rate} riops={operations} wiops={operations}"))
    }

    /// The same, to take limits away.
    pub const NO_IO: &str = "rbps=max wbps=max riops=max wiops=max";
}

fn or_max(value: Option<impl ToString>) -> String {
    value.map_or("max".into(), |value| value.to_string())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn values(ceilings: &Ceilings) -> Vec<(&'static str, String)> {
        ceilings.settings().into_iter().map(|setting| (setting.file, setting.value)).collect()
    }

    #[test]
    fn limits_are_written_as_the_kernel_wants_them() {
        let shape = Some(Shape { memory_bytes: 512 * MIB, vcpus: 2 });
        let share = Share {
            cpu_weight: 50,
            cpu_percent: Some(20),
            io_rate: Some(20 * MIB),
            io_operations: None,
        };
        let ceilings = Ceilings { shape, share };
        let wanted = [
            ("memory.max", (672 * MIB).to_string()),
            ("memory.swap.max", "0".into()),
            ("memory.oom.group", "1".into()),
            ("pids.max", "18".into()),
            ("cpu.weight", "50".into()),
            ("cpu.max", "10000 50000".into()),
        ];
        assert_eq!(values(&ceilings), wanted);
        let io = ceilings.io().unwrap();
        assert_eq!(io, "rbps=20971520 wbps=20971520 riops=max wiops=max");
    }

    #[test]
    fn what_is_not_limited_is_max() {
        let ceilings = Ceilings { shape: None, share: Share::default() };
        let values = values(&ceilings);
        assert!(values.contains(&("cpu.max", "max 50000".into())), "{values:?}");
        assert!(values.contains(&("memory.max", "max".into())), "{values:?}");
        assert!(values.contains(&("cpu.weight", "100".into())), "{values:?}");
        assert_eq!(ceilings.io(), None);
        assert!(ceilings.settings().iter().all(|setting| !setting.limits));
    }
}
