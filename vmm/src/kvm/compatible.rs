//! Whether a state taken on one host can go on on another: by what its guest sees of the processor.
//!
//! A guest keeps the CPUID it was booted with ([`super::VcpuState`]), so a host that offers more is as good as
//! the one it was taken on. That is what a newer kernel or microcode mostly does, and it must cost nobody the
//! memory that is saved. A host that offers less would let the guest use what is not there.

use kvm_bindings::{CpuId, kvm_cpuid_entry2};

use super::{
    compatible::Rule::{Any, Bits, BitsBut, Same},
    cpuid,
};

/// How a register of a leaf is compared.
#[derive(Clone, Copy)]
enum Rule {
    /// It tells of the host's topology, caches or clock rates, or is looked at elsewhere.
    Any,
    /// Each bit is a feature: those that are used must be offered.
    Bits,
    /// Likewise, but these come and go as the guest switches things on (CR4.OSXSAVE and the like).
    BitsBut(u32),
    Same,
}

/// What `used`, a guest's leaves, has that `offered` ([`cpuid::supported`]) lacks, in words. Empty: it can go on.
pub fn lacking(used: &CpuId, offered: &CpuId) -> Vec<String> {
    let offered = cpuid::for_vcpu(offered, 0, 1);
    let mut found = Vec::new();
    for leaf in used.as_slice() {
        let same_leaf = |other: &&kvm_cpuid_entry2| {
            (other.function, other.index) == (leaf.function, leaf.index)
        };
        let here = offered.as_slice().iter().find(same_leaf).copied().unwrap_or_default();
        let registers = [
            ("EAX", leaf.eax, here.eax),
            ("EBX", leaf.ebx, here.ebx),
            ("ECX", leaf.ecx, here.ecx),
            ("EDX", leaf.edx, here.edx),
        ];
        for (rule, (register, used, here)) in rules(leaf).into_iter().zip(registers) {
            let name = || format!("{register} of CPUID leaf {:#x}.{}", leaf.function, leaf.index);
            match rule {
                Any => {}
                Bits | BitsBut(_) => {
                    let ignored = if let BitsBut(bits) = rule { bits } else { 0 };
                    let lacks = used & !here & !ignored;
                    if lacks != 0 {
                        found.push(format!("the bits {lacks:#x} in {}", name()));
                    }
                }
                Same if used != here => {
                    found.push(format!("{used:#x} in {} (here it is {here:#x})", name()));
                }
                Same => {}
            }
        }
    }
    found
}

/// EAX, EBX, ECX, EDX (SDM volume 2, CPUID; APM volume 3, appendix E; Documentation/virt/kvm/x86/cpuid.rst).
/// What is not known here has to be the same.
fn rules(leaf: &kvm_cpuid_entry2) -> [Rule; 4] {
    const OSXSAVE: u32 = 1 << 27;
    const APIC: u32 = 1 << 9;
    const HTT: u32 = 1 << 28;
    const OSPKE: u32 = 1 << 4;
    match (leaf.function, leaf.index) {
        // How many leaves there are, and the vendor.
        (0x0 | 0x4000_0000, _) => [Any, Same, Same, Same],
        // Family and model are compared with the host's kind; a stepping more or less is the same processor.
        (0x1, _) => [Any, Any, BitsBut(OSXSAVE), BitsBut(APIC | HTT)],
        (0x2 | 0x4 | 0xb | 0x15 | 0x16 | 0x1f, _) => [Any; 4],
        (0x6, _) => [Bits, Any, Any, Any],
        // EAX: how many of these there are.
        (0x7, 0) => [Any, Bits, BitsBut(OSPKE), Bits],
        (0x7, _) => [Bits; 4],
        // Which parts a state has that XSAVE stores; how long what is switched on is comes and goes.
        (0xd, 0) => [Bits, Any, Any, Bits],
        (0xd, 1) => [Bits, Any, Bits, Bits],
        // Performance counters and nested virtualisation: hidden from guests.
        (0xa | 0x8000_000a, _) => [Bits; 4],
        (0x4000_0001, _) => [Bits, Any, Any, Any],
        (0x8000_0000, _) => [Any, Same, Same, Same],
        (0x8000_0001, _) => [Any, Any, Bits, Bits],
        // The processor's name; caches and buffers.
        (0x8000_0002..=0x8000_0006 | 0x8000_0019 | 0x8000_001a, _) => [Any; 4],
        (0x8000_001d | 0x8000_001e | 0x8000_0026, _) => [Any; 4],
        (0x8000_0007, _) => [Any, Bits, Any, Bits],
        // EAX: how wide addresses are, and so which bits of a page table are reserved.
        (0x8000_0008, _) => [Same, Bits, Any, Any],
        (0x8000_001f | 0x8000_0021, _) => [Bits, Any, Any, Any],
        _ => [Same; 4],
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn leaf(function: u32, index: u32, registers: [u32; 4]) -> kvm_cpuid_entry2 {
        let [eax, ebx, ecx, edx] = registers;
        kvm_cpuid_entry2 { function, index, eax, ebx, ecx, edx, ..Default::default() }
    }

    fn all(leaves: &[kvm_cpuid_entry2]) -> CpuId {
        CpuId::from_entries(leaves).unwrap()
    }

    #[test]
    fn a_host_that_offers_more_will_do_and_one_that_offers_less_will_not() {
        let old = [leaf(0x7, 0, [0, 0b0110, 0, 0]), leaf(0xd, 2, [256, 576, 0, 0])];
        let new = [
            leaf(0x7, 0, [1, 0b1110, 1, 0]),
            leaf(0x7, 1, [1 << 4, 0, 0, 0]),
            leaf(0xd, 2, [256, 576, 0, 0]),
            leaf(0x8000_0021, 0, [1, 0, 0, 0]),
        ];
        assert_eq!(lacking(&all(&old), &all(&new)), Vec::<String>::new());
        let found = lacking(&all(&new), &all(&old));
        assert_eq!(found.len(), 4, "{found:?}");
        assert!(found.contains(&"the bits 0x8 in EBX of CPUID leaf 0x7.0".to_owned()), "{found:?}");
    }

    #[test]
    fn what_lies_elsewhere_is_another_processor() {
        let here = [leaf(0xd, 2, [256, 576, 0, 0]), leaf(0x8000_0008, 0, [0x3030, 0, 0, 0])];
        for other in [leaf(0xd, 2, [256, 832, 0, 0]), leaf(0x8000_0008, 0, [0x3034, 0, 0, 0])] {
            assert_eq!(lacking(&all(&[other]), &all(&here)).len(), 1, "{other:?}");
        }
        let unknown = leaf(0x1234_5678, 0, [0, 1, 0, 0]);
        assert_eq!(lacking(&all(&[unknown]), &all(&here)).len(), 1);
    }

    #[test]
    fn what_a_guest_switches_on_and_where_it_runs_are_no_features() {
        let used = [leaf(0x1, 0, [0x830f10, 0x1 << 16, 1 << 27, 1 << 28]), leaf(0xb, 0, [1; 4])];
        assert!(lacking(&all(&used), &all(&[leaf(0x1, 0, [0x830f11, 0, 0, 0])])).is_empty());
    }

    proptest! {
        #[test]
        fn a_host_will_do_for_itself(leaves in leaves()) {
            let here = all(&leaves);
            prop_assert_eq!(lacking(&cpuid::for_vcpu(&here, 0, 2), &here), Vec::<String>::new());
        }

        #[test]
        fn every_bit_of_a_feature_counts(bit in 0u32..32, register in 1usize..4) {
            let mut registers = [0; 4];
            registers[register] = 1 << bit;
            let found = lacking(&all(&[leaf(0x7, 0, registers)]), &all(&[]));
            prop_assert_eq!(found.is_empty(), register == 2 && bit == 4);
        }
    }

    fn leaves() -> impl Strategy<Value = Vec<kvm_cpuid_entry2>> {
        let functions = prop::sample::select(vec![
            0x0u32,
            0x1,
            0x4,
            0x6,
            0x7,
            0xb,
            0xd,
            0x4000_0001,
            0x8000_0001,
            0x8000_0008,
            0x8000_001e,
            0x8000_0021,
            0x99,
        ]);
        let one = (functions, 0u32..3, any::<[u32; 4]>());
        prop::collection::btree_map(any::<u8>(), one, 0..12).prop_map(|map| {
            let mut leaves: Vec<_> =
                map.into_values().map(|(function, index, r)| leaf(function, index, r)).collect();
            leaves.sort_by_key(|leaf| (leaf.function, leaf.index));
            leaves.dedup_by_key(|leaf| (leaf.function, leaf.index));
            leaves
        })
    }
}
