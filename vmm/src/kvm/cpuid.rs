//! What processor a guest sees.

use kvm_bindings::{CpuId, KVM_MAX_CPUID_ENTRIES, kvm_cpuid_entry2};
use kvm_ioctls::Kvm;

use super::{KvmError, Named as _};

/// Everything the host's KVM supports, less what must not or need not be there: nested
/// virtualisation (an attack surface), and the paravirtual features whose state would have to be
/// saved or that dirty memory at every switch (asynchronous page faults, steal time).
pub fn supported(kvm: &Kvm) -> Result<CpuId, KvmError> {
    let mut cpuid =
        kvm.get_supported_cpuid(KVM_MAX_CPUID_ENTRIES).named("KVM_GET_SUPPORTED_CPUID")?;
    for entry in cpuid.as_mut_slice() {
        filter(entry);
    }
    Ok(cpuid)
}

/// The same for CPU number `apic_id` of `count`.
pub fn for_vcpu(supported: &CpuId, apic_id: u32, count: u32) -> CpuId {
    let mut cpuid = supported.clone();
    for entry in cpuid.as_mut_slice() {
        match entry.function {
            // APM volume 3, E.3.2 / SDM volume 2, CPUID leaf 1.
            0x1 => {
                entry.ebx = (entry.ebx & 0x0000_ffff) | (apic_id << 24) | (count.min(255) << 16);
                // Hyper-threading: EBX[23:16] means something.
                entry.edx = if count > 1 { entry.edx | 1 << 28 } else { entry.edx & !(1 << 28) };
            }
            // Cache leaves: sharing is told by the host's topology, which the guest has not.
            0x4 | 0x8000_001d => entry.eax &= !(0xfff << 14),
            0xb | 0x1f => {
                entry.edx = apic_id;
                match entry.index {
                    0 => (entry.eax, entry.ebx, entry.ecx) = (0, 1, 1 << 8),
                    1 => {
                        let bits = count.next_power_of_two().trailing_zeros();
                        (entry.eax, entry.ebx, entry.ecx) = (bits, count, 2 << 8 | 1);
                    }
                    i => (entry.eax, entry.ebx, entry.ecx) = (0, 0, i),
                }
            }
            // AMD: number of cores less one, and the width of their ids.
            0x8000_0008 => entry.ecx = count - 1,
            // AMD: extended APIC id, one thread a core, one node.
            0x8000_001e => (entry.eax, entry.ebx, entry.ecx) = (apic_id, apic_id & 0xff, 0),
            _ => {}
        }
    }
    cpuid
}

/// What a snapshot's CPU state depends on, for the key of a base: the leaves as a guest sees them, so that
/// what is told only of the host (how many CPUs it has, which of them asked) does not count.
pub fn fingerprint(supported: &CpuId) -> String {
    let mut hasher = blake3::Hasher::new();
    for e in for_vcpu(supported, 0, 1).as_slice() {
        // Topology, of which there are as many leaves as the host has levels.
        if matches!(e.function, 0xb | 0x1f | 0x8000_001e) {
            continue;
        }
        for word in [e.function, e.index, e.flags, e.eax, e.ebx, e.ecx, e.edx] {
            hasher.update(&word.to_le_bytes());
        }
    }
    hasher.finalize().to_hex().to_string()
}

fn filter(entry: &mut kvm_cpuid_entry2) {
    const HYPERVISOR: u32 = 1 << 31;
    const TSC_DEADLINE: u32 = 1 << 24;
    const VMX: u32 = 1 << 5;
    const MONITOR: u32 = 1 << 3;
    const SVM: u32 = 1 << 2;
    match entry.function {
        0x1 => entry.ecx = (entry.ecx & !(VMX | MONITOR)) | HYPERVISOR | TSC_DEADLINE,
        // Always running APIC timer: without it the kernel asks for a PIT.
        0x6 => entry.eax |= 1 << 2,
        // No performance counters: they are not saved.
        0xa => (entry.eax, entry.ebx, entry.ecx, entry.edx) = (0, 0, 0, 0),
        0x8000_0001 => entry.ecx &= !SVM,
        0x8000_000a => (entry.eax, entry.ebx, entry.ecx, entry.edx) = (0, 0, 0, 0),
        // KVM's own leaf (Documentation/virt/kvm/x86/cpuid.rst).
        0x4000_0001 => {
            const ASYNC_PF: u32 = 1 << 4;
            const STEAL_TIME: u32 = 1 << 5;
            const ASYNC_PF_VMEXIT: u32 = 1 << 10;
            const ASYNC_PF_INT: u32 = 1 << 14;
            const HC_MAP_GPA_RANGE: u32 = 1 << 16;
            const MIGRATION_CONTROL: u32 = 1 << 17;
            entry.eax &= !(ASYNC_PF
                | STEAL_TIME
                | ASYNC_PF_VMEXIT
                | ASYNC_PF_INT
                | HC_MAP_GPA_RANGE
                | MIGRATION_CONTROL);
        }
        _ => {}
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn leaf(function: u32, index: u32) -> kvm_cpuid_entry2 {
        kvm_cpuid_entry2 { function, index, ..Default::default() }
    }

    #[test]
    fn each_cpu_has_its_own_id_and_all_the_same_count() {
        let all = CpuId::from_entries(&[leaf(1, 0), leaf(0xb, 0), leaf(0xb, 1)]).unwrap();
        let second = for_vcpu(&all, 1, 2);
        assert_eq!(second.as_slice()[0].ebx >> 24, 1);
        assert_eq!((second.as_slice()[0].ebx >> 16) & 0xff, 2);
        assert_eq!((second.as_slice()[2].edx, second.as_slice()[2].ebx), (1, 2));
    }

    #[test]
    fn nested_virtualisation_is_hidden() {
        let mut one = kvm_cpuid_entry2 { function: 1, ecx: 1 << 5, ..Default::default() };
        filter(&mut one);
        assert_eq!(one.ecx & (1 << 5), 0);
        let mut amd = kvm_cpuid_entry2 { function: 0x8000_0001, ecx: 1 << 2, ..Default::default() };
        filter(&mut amd);
        assert_eq!(amd.ecx & (1 << 2), 0);
    }

    #[test]
    fn the_fingerprint_depends_on_what_the_guest_sees_alone() {
        let host = |cpus: u32, asked: u32, features: u32| {
            let mut one = leaf(1, 0);
            one.ebx = asked << 24 | cpus << 16 | 0x0800;
            one.ecx = features;
            one.edx = u32::from(cpus > 1) << 28;
            let mut cache = leaf(0x8000_001d, 0);
            cache.eax = (cpus - 1) << 14 | 0x121;
            let mut size = leaf(0x8000_0008, 0);
            (size.eax, size.ecx) = (0x3030, cpus - 1);
            let mut leaves = vec![one, cache, size];
            leaves.extend((0..cpus.min(2)).map(|level| leaf(0xb, level)));
            fingerprint(&CpuId::from_entries(&leaves).unwrap())
        };
        assert_eq!(host(2, 0, 0), host(2, 1, 0), "which CPU asked");
        assert_eq!(host(2, 0, 0), host(1, 0, 0), "how many there are");
        assert_eq!(host(2, 0, 0), host(64, 63, 0));
        assert_ne!(host(2, 0, 0), host(2, 0, 1), "a feature");
    }
}
