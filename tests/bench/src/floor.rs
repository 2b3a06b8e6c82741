//! The floor: the KVM calls without which no fork can do, and nothing else.
//!
//! One process, no devices, no threads: a VM is created, given the base's memory file as a private
//! mapping and the base's own state, and is ready to run. Whatever our fork takes beyond that is ours
//! to justify. The calls go straight to kvm-ioctls; of the vmm only the layout of memory and the type
//! of the saved state are used.

use std::{fs::File, num::NonZeroUsize, os::fd::AsFd, ptr::NonNull};

use anyhow::Context as _;
use hermitage_vmm::{
    kvm::VcpuState,
    machine::MachineState,
    memory::layout::{IDENTITY_MAP, Layout, Range, TSS},
};
use kvm_bindings::{
    KVM_MEM_READONLY, Msrs, kvm_clock_data, kvm_irqchip, kvm_userspace_memory_region,
};
use kvm_ioctls::{Kvm, VcpuFd, VmFd};
use nix::sys::mman::{MapFlags, ProtFlags, mmap, munmap};

use crate::{
    base::Base,
    clock,
    stats::{Samples, Stages},
};

pub struct Floor<'a> {
    kvm: Kvm,
    base: &'a Base,
    chips: [kvm_irqchip; 3],
    clock: kvm_clock_data,
    vcpus: Vec<(&'a VcpuState, Msrs)>,
    pub stages: Stages,
    pub sum: Samples,
    pub teardown: Samples,
}

impl<'a> Floor<'a> {
    pub fn new(base: &'a Base) -> anyhow::Result<Self> {
        let MachineState { vm, vcpus, .. } = &base.state;
        let vcpus = vcpus
            .iter()
            .map(|state| Ok((state, Msrs::from_entries(&state.msrs).context("the base's MSRs")?)))
            .collect::<anyhow::Result<_>>()?;
        Ok(Self {
            kvm: Kvm::new().context("open /dev/kvm")?,
            base,
            chips: [vm.pic_master, vm.pic_slave, vm.io_apic],
            // Flags are output of KVM_GET_CLOCK and mean other things as input (KVM API 4.30).
            clock: kvm_clock_data { clock: vm.clock.clock, ..Default::default() },
            vcpus,
            stages: Stages::default(),
            sum: Samples::new(),
            teardown: Samples::new(),
        })
    }

    /// Makes one and takes it down again.
    pub fn sample(&mut self) -> anyhow::Result<()> {
        let mut watch = Watch::start();
        let vm = self.kvm.create_vm().context("KVM_CREATE_VM")?;
        watch.lap("create VM");
        vm.set_identity_map_address(IDENTITY_MAP).context("KVM_SET_IDENTITY_MAP_ADDR")?;
        vm.set_tss_address(TSS as usize).context("KVM_SET_TSS_ADDR")?;
        vm.create_irq_chip().context("KVM_CREATE_IRQCHIP")?;
        watch.lap("create interrupt controllers");
        let mappings = map(&vm, self.base)?;
        watch.lap("map memory");
        let mut fds = Vec::with_capacity(self.vcpus.len());
        for id in 0..self.vcpus.len() as u64 {
            fds.push(vm.create_vcpu(id).context("KVM_CREATE_VCPU")?);
        }
        watch.lap("create vCPUs");
        for chip in &self.chips {
            vm.set_irqchip(chip).context("KVM_SET_IRQCHIP")?;
        }
        vm.set_clock(&self.clock).context("KVM_SET_CLOCK")?;
        for (fd, (state, msrs)) in fds.iter().zip(&self.vcpus) {
            set_state(fd, state, msrs)?;
        }
        watch.lap("set state");

        let sum = watch.sum();
        for (name, nanoseconds) in watch.laps {
            self.stages.push(name, nanoseconds);
        }
        self.sum.push(sum);
        let before = clock::now();
        drop((fds, vm, mappings));
        self.teardown.push(clock::now() - before);
        Ok(())
    }
}

/// In the order in which `hermitage_vmm::kvm::restore_vcpu` does it, for its reasons.
fn set_state(vcpu: &VcpuFd, state: &VcpuState, msrs: &Msrs) -> anyhow::Result<()> {
    vcpu.set_cpuid2(&state.cpuid).context("KVM_SET_CPUID2")?;
    vcpu.set_mp_state(state.mp_state).context("KVM_SET_MP_STATE")?;
    vcpu.set_regs(&state.regs).context("KVM_SET_REGS")?;
    vcpu.set_sregs(&state.sregs).context("KVM_SET_SREGS")?;
    // SAFETY: KVM reads no more than kvm_xsave's fixed 4 KiB, because this process never asks for
    // permission to a feature that has more (AMX).
    unsafe { vcpu.set_xsave(&state.xsave) }.context("KVM_SET_XSAVE")?;
    vcpu.set_xcrs(&state.xcrs).context("KVM_SET_XCRS")?;
    vcpu.set_debug_regs(&state.debug_regs).context("KVM_SET_DEBUGREGS")?;
    vcpu.set_lapic(&state.lapic).context("KVM_SET_LAPIC")?;
    let set = vcpu.set_msrs(msrs).context("KVM_SET_MSRS")?;
    anyhow::ensure!(set == state.msrs.len(), "KVM took {set} of {} MSRs", state.msrs.len());
    vcpu.set_vcpu_events(&state.events).context("KVM_SET_VCPU_EVENTS")
}

/// Memory mapped for one VM; must outlive it.
struct Mapping {
    address: NonNull<std::ffi::c_void>,
    length: usize,
}

impl Mapping {
    fn new(file: &File, range: Range) -> anyhow::Result<Self> {
        let length = usize::try_from(range.length).context("length of a memory region")?;
        let offset = i64::try_from(range.file_offset).context("offset in a memory file")?;
        // SAFETY: a new private mapping where the kernel likes, which nothing here looks into.
        let address = unsafe {
            mmap(
                None,
                NonZeroUsize::new(length).context("an empty memory region")?,
                ProtFlags::PROT_READ | ProtFlags::PROT_WRITE,
                MapFlags::MAP_PRIVATE | MapFlags::MAP_NORESERVE,
                file.as_fd(),
                offset,
            )
        }
        .with_context(|| format!("map {length} bytes of guest memory"))?;
        Ok(Self { address, length })
    }
}

impl Drop for Mapping {
    fn drop(&mut self) {
        // SAFETY: our own mapping, of which there is no other pointer; its VM never runs.
        let _ = unsafe { munmap(self.address, self.length) };
    }
}

fn map(vm: &VmFd, base: &Base) -> anyhow::Result<Vec<Mapping>> {
    let layout: &Layout = &base.layout;
    let ram = layout.ram().map(|range| (&base.memory, range, 0));
    let root = (&base.root, layout.root, KVM_MEM_READONLY);
    let mut mappings = Vec::with_capacity(3);
    for (slot, (file, range, flags)) in ram.chain([root]).enumerate() {
        let mapping = Mapping::new(file, range)?;
        let region = kvm_userspace_memory_region {
            slot: slot as u32,
            flags,
            guest_phys_addr: range.address,
            memory_size: range.length,
            userspace_addr: mapping.address.as_ptr() as u64,
        };
        // SAFETY: the region is mapped for its whole length and unmapped after the VM is closed.
        unsafe { vm.set_user_memory_region(region) }.context("KVM_SET_USER_MEMORY_REGION")?;
        mappings.push(mapping);
    }
    Ok(mappings)
}

/// Times of consecutive steps.
struct Watch {
    start: u64,
    last: u64,
    laps: Vec<(&'static str, u64)>,
}

impl Watch {
    fn start() -> Self {
        let laps = Vec::with_capacity(8);
        let now = clock::now();
        Self { start: now, last: now, laps }
    }

    fn lap(&mut self, name: &'static str) {
        let now = clock::now();
        self.laps.push((name, now - self.last));
        self.last = now;
    }

    fn sum(&self) -> u64 {
        self.last - self.start
    }
}
