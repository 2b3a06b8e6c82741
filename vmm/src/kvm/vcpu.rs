//! One virtual CPU: state for booting, state out and in.

use kvm_bindings::{
    CpuId, kvm_debugregs, kvm_fpu, kvm_lapic_state, kvm_mp_state, kvm_msr_entry, kvm_regs,
    kvm_sregs, kvm_vcpu_events, kvm_xcrs, kvm_xsave,
};
use kvm_ioctls::{Kvm, VcpuFd};
use serde::{Deserialize, Serialize};

use super::{KvmError, Named as _, create_bare_vm, msrs};
use crate::boot::{self, BootCpu};

#[derive(Serialize, Deserialize)]
pub struct VcpuState {
    pub cpuid: CpuId,
    pub mp_state: kvm_mp_state,
    pub regs: kvm_regs,
    pub sregs: kvm_sregs,
    pub xsave: kvm_xsave,
    pub xcrs: kvm_xcrs,
    pub debug_regs: kvm_debugregs,
    pub lapic: kvm_lapic_state,
    /// In the order of restoring.
    pub msrs: Vec<kvm_msr_entry>,
    pub events: kvm_vcpu_events,
}

impl Clone for VcpuState {
    fn clone(&self) -> Self {
        Self {
            cpuid: self.cpuid.clone(),
            mp_state: self.mp_state,
            regs: self.regs,
            sregs: self.sregs,
            // Its flexible end is empty: see `restore_vcpu`.
            xsave: kvm_xsave { region: self.xsave.region, ..Default::default() },
            xcrs: self.xcrs,
            debug_regs: self.debug_regs,
            lapic: self.lapic,
            msrs: self.msrs.clone(),
            events: self.events,
        }
    }
}

/// Takes a paused vCPU's state. Its pending input or output must have been completed (KVM API 5,
/// `immediate_exit`).
///
/// `fresh` is [`fresh_msrs`] of a vCPU of the same kind: it also says which registers there are.
pub fn save_vcpu(vcpu: &VcpuFd, fresh: &[kvm_msr_entry]) -> Result<VcpuState, KvmError> {
    // mp_state first: reading it delivers a pending INIT or SIPI, which changes the rest.
    let mp_state = vcpu.get_mp_state().named("KVM_GET_MP_STATE")?;
    let cpuid = vcpu.get_cpuid2(kvm_bindings::KVM_MAX_CPUID_ENTRIES).named("KVM_GET_CPUID2")?;
    Ok(VcpuState {
        mp_state,
        regs: vcpu.get_regs().named("KVM_GET_REGS")?,
        sregs: vcpu.get_sregs().named("KVM_GET_SREGS")?,
        xsave: vcpu.get_xsave().named("KVM_GET_XSAVE")?,
        xcrs: vcpu.get_xcrs().named("KVM_GET_XCRS")?,
        debug_regs: vcpu.get_debug_regs().named("KVM_GET_DEBUGREGS")?,
        lapic: vcpu.get_lapic().named("KVM_GET_LAPIC")?,
        msrs: msrs::worth_keeping(msrs::read(vcpu, fresh)?, fresh),
        events: vcpu.get_vcpu_events().named("KVM_GET_VCPU_EVENTS")?,
        cpuid,
    })
}

/// Where a paused vCPU is, for people.
pub fn place(vcpu: &VcpuFd) -> Result<String, KvmError> {
    /// Interrupts are let in (SDM volume 1, 3.4.3).
    const RFLAGS_IF: u64 = 1 << 9;
    let regs = vcpu.get_regs().named("KVM_GET_REGS")?;
    let state = vcpu.get_mp_state().named("KVM_GET_MP_STATE")?.mp_state;
    let doing = match state {
        kvm_bindings::KVM_MP_STATE_HALTED => "halted",
        kvm_bindings::KVM_MP_STATE_RUNNABLE => "running",
        _ => "not started",
    };
    let interrupts = if regs.rflags & RFLAGS_IF == 0 { "off" } else { "on" };
    Ok(format!("{doing} at {:#x} with interrupts {interrupts}", regs.rip))
}

/// Gives all vCPUs the first one's time-stamp counter. The guest's counters are synchronised, but they
/// were read one after another, and the time between would be a skew for ever after.
pub fn align_tscs(vcpus: &mut [VcpuState]) {
    let is_tsc = |msr: &&mut kvm_msr_entry| msr.index == msrs::TSC;
    let mut all = vcpus.iter_mut().filter_map(|state| state.msrs.iter_mut().find(is_tsc));
    let Some(first) = all.next().map(|msr| msr.data) else { return };
    for other in all {
        other.data = first;
    }
}

/// All registers of a vCPU that has never run. Finding out which ones it has takes many calls, and it makes a VM for that, which takes long to go again.
pub fn fresh_msrs(kvm: &Kvm, cpuid: &CpuId) -> Result<Vec<kvm_msr_entry>, KvmError> {
    let vm = create_bare_vm(kvm)?;
    let vcpu = vm.create_vcpu(0).named("KVM_CREATE_VCPU")?;
    vcpu.set_cpuid2(cpuid).named("KVM_SET_CPUID2")?;
    msrs::read_all(kvm, &vcpu)
}

/// Puts a state into a new vCPU. The order matters: CPUID decides what the rest may be; the APIC base
/// is in sregs and comes before the local APIC; that before the TSC deadline; events last, because
/// setting the others may raise some.
pub fn restore_vcpu(vcpu: &VcpuFd, state: &VcpuState) -> Result<(), KvmError> {
    vcpu.set_cpuid2(&state.cpuid).named("KVM_SET_CPUID2")?;
    vcpu.set_mp_state(state.mp_state).named("KVM_SET_MP_STATE")?;
    vcpu.set_regs(&state.regs).named("KVM_SET_REGS")?;
    vcpu.set_sregs(&state.sregs).named("KVM_SET_SREGS")?;
    // SAFETY: kvm_xsave's fixed 4 KiB are all KVM reads: no feature with a larger area (AMX) is
    // ever enabled for a guest, as this process never asks for its permission.
    unsafe { vcpu.set_xsave(&state.xsave) }.named("KVM_SET_XSAVE")?;
    vcpu.set_xcrs(&state.xcrs).named("KVM_SET_XCRS")?;
    vcpu.set_debug_regs(&state.debug_regs).named("KVM_SET_DEBUGREGS")?;
    vcpu.set_lapic(&state.lapic).named("KVM_SET_LAPIC")?;
    msrs::write(vcpu, &state.msrs)?;
    vcpu.set_vcpu_events(&state.events).named("KVM_SET_VCPU_EVENTS")
}

/// Tells the guest through its clock that it has not run for a while (KVM API 4.59): its watchdogs then
/// don't count that time. A guest that has no such clock needs no telling.
pub fn mark_stopped(vcpu: &VcpuFd) -> Result<(), KvmError> {
    match vcpu.kvmclock_ctrl() {
        Err(error) if error.errno() == libc::EINVAL => Ok(()),
        result => result.named("KVM_KVMCLOCK_CTRL"),
    }
}

/// Sets a new vCPU up to enter the kernel (the first one) or to wait for it (the others).
pub fn prepare_for_boot(
    vcpu: &VcpuFd,
    cpuid: &CpuId,
    boot: Option<&BootCpu>,
) -> Result<(), KvmError> {
    vcpu.set_cpuid2(cpuid).named("KVM_SET_CPUID2")?;
    let mut lapic = vcpu.get_lapic().named("KVM_GET_LAPIC")?;
    boot::set_local_interrupts(&mut lapic);
    vcpu.set_lapic(&lapic).named("KVM_SET_LAPIC")?;
    let Some(boot) = boot else {
        return Ok(());
    };
    vcpu.set_regs(&boot.regs).named("KVM_SET_REGS")?;
    let mut sregs = vcpu.get_sregs().named("KVM_GET_SREGS")?;
    boot.set_segments(&mut sregs);
    vcpu.set_sregs(&sregs).named("KVM_SET_SREGS")?;
    // x87 and SSE control words as after FINIT (SDM volume 3, table 10-1).
    let fpu = kvm_fpu { fcw: 0x37f, mxcsr: 0x1f80, ..Default::default() };
    vcpu.set_fpu(&fpu).named("KVM_SET_FPU")
}
