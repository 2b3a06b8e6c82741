//! How often a guest left for its host: the counters KVM keeps in debugfs for every VM.
//!
//! They say where a machine's start goes: each page a fork touches first is a fault taken by KVM.

use std::{fs, path::Path};

const COUNTERS: &str = "/sys/kernel/debug/kvm";

/// Since the VM was made.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Exits {
    pub all: u64,
    pub page_faults: u64,
    /// Reads and writes of devices' registers.
    pub mmio: u64,
}

impl Exits {
    /// Of the machine whose process is `pid`. None where debugfs is not mounted.
    pub fn of(pid: i32) -> Option<Self> {
        Self::read(Path::new(COUNTERS), pid)
    }

    /// A VM's folder is called after the process that made it and its descriptor there.
    fn read(counters: &Path, pid: i32) -> Option<Self> {
        let prefix = format!("{pid}-");
        let dir = fs::read_dir(counters)
            .ok()?
            .filter_map(Result::ok)
            .find(|entry| entry.file_name().to_string_lossy().starts_with(&prefix))?
            .path();
        let counter = |name: &str| fs::read_to_string(dir.join(name)).ok()?.trim().parse().ok();
        Some(Self {
            all: counter("exits")?,
            page_faults: counter("pf_taken")?,
            mmio: counter("mmio_exits")?,
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_vm_is_found_by_its_whole_process_id() {
        let dir = tempfile::tempdir().unwrap();
        for (name, value) in [("12-7", 3), ("123-15", 40)] {
            let vm = dir.path().join(name);
            fs::create_dir(&vm).unwrap();
            for (counter, plus) in [("exits", 2), ("pf_taken", 1), ("mmio_exits", 0)] {
                fs::write(vm.join(counter), format!("{}\n", value + plus)).unwrap();
            }
        }
        let expected = Exits { all: 5, page_faults: 4, mmio: 3 };
        assert_eq!(Exits::read(dir.path(), 12), Some(expected));
        assert_eq!(Exits::read(dir.path(), 1), None);
    }
}
