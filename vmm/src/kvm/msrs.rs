//! Model-specific registers: which ones make a CPU's state.
//!
//! KVM lists over a hundred; in a booted guest all but some thirty have the value they have in a new
//! vCPU. Only those that differ are kept: each costs time at every fork.

use kvm_bindings::{Msrs, kvm_msr_entry};
use kvm_ioctls::{Kvm, VcpuFd};

use super::{KvmError, Named as _};

pub const TSC: u32 = 0x10;
pub const TSC_DEADLINE: u32 = 0x6e0;

/// Writing these makes KVM write the wall clock to guest memory; they are not state (KVM API,
/// x86/msr.rst).
const KVM_WALL_CLOCK: [u32; 2] = [0x11, 0x4b56_4d00];

/// Every register KVM lets us read on this vCPU.
pub fn read_all(kvm: &Kvm, vcpu: &VcpuFd) -> Result<Vec<kvm_msr_entry>, KvmError> {
    let list = kvm.get_msr_index_list().named("KVM_GET_MSR_INDEX_LIST")?;
    let wanted: Vec<_> = list
        .as_slice()
        .iter()
        .filter(|index| !KVM_WALL_CLOCK.contains(index))
        .map(|&index| kvm_msr_entry { index, ..Default::default() })
        .collect();
    read(vcpu, &wanted)
}

/// Reads those of the registers that this vCPU has.
pub fn read(vcpu: &VcpuFd, wanted: &[kvm_msr_entry]) -> Result<Vec<kvm_msr_entry>, KvmError> {
    let mut found = Vec::with_capacity(wanted.len());
    let mut rest = wanted;
    while !rest.is_empty() {
        let mut batch = Msrs::from_entries(rest)
            .map_err(|_| KvmError::Malformed("a list of model-specific registers"))?;
        // KVM lists some that this vCPU's CPUID doesn't have: reading stops before the first of those.
        let read = vcpu.get_msrs(&mut batch).named("KVM_GET_MSRS")?.min(rest.len());
        found.extend_from_slice(&batch.as_slice()[..read]);
        rest = rest.get(read + 1..).unwrap_or_default();
    }
    Ok(found)
}

/// Leaves out what a new vCPU (`fresh`) has anyway, and puts the rest in the order of restoring: the
/// TSC before the deadline that is measured in it, which also needs the local APIC to be there.
pub fn worth_keeping(all: Vec<kvm_msr_entry>, fresh: &[kvm_msr_entry]) -> Vec<kvm_msr_entry> {
    let mut kept: Vec<_> = all
        .into_iter()
        .filter(|e| e.index == TSC || !fresh.iter().any(|f| f.index == e.index && f.data == e.data))
        .collect();
    kept.sort_by_key(|e| match e.index {
        TSC => 0,
        TSC_DEADLINE => 2,
        _ => 1,
    });
    kept
}

pub fn write(vcpu: &VcpuFd, entries: &[kvm_msr_entry]) -> Result<(), KvmError> {
    let msrs = Msrs::from_entries(entries)
        .map_err(|_| KvmError::Malformed("a list of model-specific registers"))?;
    let set = vcpu.set_msrs(&msrs).named("KVM_SET_MSRS")?;
    match entries.get(set) {
        None => Ok(()),
        Some(refused) => Err(KvmError::Msr { set, all: entries.len(), index: refused.index }),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn msr(index: u32, data: u64) -> kvm_msr_entry {
        kvm_msr_entry { index, data, ..Default::default() }
    }

    #[test]
    fn what_differs_is_kept_in_the_order_of_restoring() {
        let all = vec![msr(TSC_DEADLINE, 9), msr(0x174, 1), msr(0x175, 0), msr(TSC, 5)];
        let fresh = [msr(TSC_DEADLINE, 0), msr(0x174, 0), msr(0x175, 0), msr(TSC, 5)];
        let kept: Vec<_> = worth_keeping(all, &fresh).iter().map(|e| e.index).collect();
        assert_eq!(kept, [TSC, 0x174, TSC_DEADLINE]);
    }
}
