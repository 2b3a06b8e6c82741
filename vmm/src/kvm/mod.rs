//! KVM: a virtual machine and its virtual CPUs, their state out and in.
//!
//! References are to the kernel's `Documentation/virt/kvm/api.rst` ("KVM API").

mod boot;
pub mod compatible;
pub mod cpuid;
mod msrs;
mod vcpu;

use std::os::fd::{AsRawFd as _, BorrowedFd};

use kvm_bindings::{
    KVM_IRQCHIP_IOAPIC, KVM_IRQCHIP_PIC_MASTER, KVM_IRQCHIP_PIC_SLAVE, KVM_MEM_READONLY,
    kvm_clock_data, kvm_irqchip, kvm_userspace_memory_region,
};
use kvm_ioctls::{Cap, IoEventAddress, Kvm, VmFd};
use serde::{Deserialize, Serialize};

pub use boot::open_on_boot;
pub use vcpu::{
    VcpuState, align_tscs, fresh_msrs, mark_stopped, place, prepare_for_boot, restore_vcpu,
    save_vcpu,
};

use vmm_sys_util::eventfd::EventFd;

use crate::memory::{GuestMemory, PAGE_SIZE, ShownPage, host_ranges, layout};

#[derive(Debug, thiserror::Error)]
pub enum KvmError {
    #[error("{call}: {source}")]
    Ioctl { call: &'static str, source: kvm_ioctls::Error },
    #[error("this KVM lacks {0}")]
    Missing(&'static str),
    #[error("KVM API version {0}, not 12")]
    ApiVersion(i32),
    #[error("KVM took {set} of {all} model-specific registers; it refused {index:#x}")]
    Msr { set: usize, all: usize, index: u32 },
    #[error("a snapshot's state is malformed: {0}")]
    Malformed(&'static str),
}

/// Names the ioctl that failed.
pub(crate) trait Named<T> {
    fn named(self, call: &'static str) -> Result<T, KvmError>;
}

impl<T> Named<T> for Result<T, kvm_ioctls::Error> {
    fn named(self, call: &'static str) -> Result<T, KvmError> {
        self.map_err(|source| KvmError::Ioctl { call, source })
    }
}

/// Opens `/dev/kvm` and checks for what machines need.
pub fn open() -> Result<Kvm, KvmError> {
    let kvm = Kvm::new().named("open /dev/kvm")?;
    if kvm.get_api_version() != 12 {
        return Err(KvmError::ApiVersion(kvm.get_api_version()));
    }
    for (cap, name) in [
        (Cap::Irqchip, "an in-kernel interrupt controller"),
        (Cap::UserMemory, "user memory regions"),
        (Cap::ReadonlyMem, "read-only memory regions"),
        (Cap::Ioeventfd, "writes that don't exit (KVM_IOEVENTFD)"),
        (Cap::AdjustClock, "KVM_SET_CLOCK"),
        (Cap::VcpuEvents, "KVM_GET_VCPU_EVENTS"),
        (Cap::Xsave, "KVM_GET_XSAVE"),
        (Cap::Xcrs, "KVM_GET_XCRS"),
        (Cap::ImmediateExit, "immediate exit"),
        (Cap::TscDeadlineTimer, "the TSC deadline timer"),
    ] {
        if !kvm.check_extension(cap) {
            return Err(KvmError::Missing(name));
        }
    }
    Ok(kvm)
}

/// Creates a VM with interrupt controller and memory, without virtual CPUs.
///
/// There is no PIT: the guest has the TSC deadline timer and kvm-clock, and never asks for it
/// (creating one starts a kernel thread for each machine).
pub fn create_vm(kvm: &Kvm, memory: &GuestMemory) -> Result<VmFd, KvmError> {
    let vm = create_bare_vm(kvm)?;
    map_memory(&vm, memory)?;
    Ok(vm)
}

/// A VM with its interrupt controller.
pub fn create_bare_vm(kvm: &Kvm) -> Result<VmFd, KvmError> {
    let vm = kvm.create_vm().named("KVM_CREATE_VM")?;
    vm.set_identity_map_address(layout::IDENTITY_MAP).named("KVM_SET_IDENTITY_MAP_ADDR")?;
    vm.set_tss_address(layout::TSS as usize).named("KVM_SET_TSS_ADDR")?;
    vm.create_irq_chip().named("KVM_CREATE_IRQCHIP")?;
    Ok(vm)
}

/// A VM that never runs, kept open beside those that come and go.
///
/// While there is none, KVM switches virtualisation on and off on every CPU with each VM. And a vCPU
/// whose local APIC is still off, as each one's is at first, flips a branch in KVM's code on all CPUs
/// unless another one, like this one's, has it flipped already.
pub struct IdleVm {
    vcpu: kvm_ioctls::VcpuFd,
    vm: VmFd,
}

impl IdleVm {
    pub fn new(kvm: &Kvm) -> Result<Self, KvmError> {
        let vm = create_bare_vm(kvm)?;
        let vcpu = vm.create_vcpu(0).named("KVM_CREATE_VCPU")?;
        Ok(Self { vcpu, vm })
    }

    /// For a fork of the process, to let go of them.
    pub fn descriptors(&self) -> [BorrowedFd<'_>; 2] {
        [self.vcpu.as_raw_fd(), self.vm.as_raw_fd()].map(|fd| {
            // SAFETY: both are open as long as `self` is, which the result borrows.
            unsafe { BorrowedFd::borrow_raw(fd) }
        })
    }
}

/// Tells KVM about RAM and the root image (which is read-only to the guest).
pub fn map_memory(vm: &VmFd, memory: &GuestMemory) -> Result<(), KvmError> {
    let ranges = host_ranges(memory);
    let root = ranges.len() - 1;
    for (slot, (guest, length, host)) in ranges.into_iter().enumerate() {
        let region = kvm_userspace_memory_region {
            slot: slot as u32,
            flags: if slot == root { KVM_MEM_READONLY } else { 0 },
            guest_phys_addr: guest,
            memory_size: length,
            userspace_addr: host,
        };
        // SAFETY: the range is one region of `memory`, mapped for its whole length. Whoever holds
        // the VM holds the memory, and drops the VM (its process ends) first.
        unsafe { vm.set_user_memory_region(region) }.named("KVM_SET_USER_MEMORY_REGION")?;
    }
    Ok(())
}

/// Slot of the first page that is shown; RAM and root image have a handful before it.
const SHOWN_SLOT: u32 = 32;

/// Has the guest read `page` at that address without an exit. What it writes there exits, as it would without.
/// `number` is the page's own, and less than 32.
pub fn show_page(vm: &VmFd, number: u32, guest: u64, page: &ShownPage) -> Result<(), KvmError> {
    let region = kvm_userspace_memory_region {
        slot: SHOWN_SLOT + number,
        flags: KVM_MEM_READONLY,
        guest_phys_addr: guest,
        memory_size: PAGE_SIZE as u64,
        userspace_addr: page.address(),
    };
    // SAFETY: the address is that of a whole page. The device that it is for holds it, and virtual CPUs run no
    // longer than there are devices.
    unsafe { vm.set_user_memory_region(region) }.named("KVM_SET_USER_MEMORY_REGION")
}

/// Has KVM drop the guest's writes of exactly this word at that address: they don't reach us.
pub fn drop_writes(vm: &VmFd, guest: u64, word: u32) -> Result<(), KvmError> {
    // What KVM calls an event nobody waits for. KVM keeps it when it is closed here.
    let event = EventFd::new(0).map_err(|error| KvmError::Ioctl {
        call: "eventfd2",
        source: kvm_ioctls::Error::new(error.raw_os_error().unwrap_or(libc::EIO)),
    })?;
    let address = IoEventAddress::Mmio(guest);
    vm.register_ioevent(&event, &address, word).named("KVM_IOEVENTFD")
}

/// Whether the guest has that input of the I/O APIC in use, as an edge-triggered one.
pub fn is_edge_triggered(io_apic: &kvm_irqchip, gsi: u32) -> bool {
    // SAFETY: both unions' members are integers of the same bytes, for which any value is valid.
    let entry = unsafe { io_apic.chip.ioapic.redirtbl.get(gsi as usize).map(|entry| entry.bits) };
    // Trigger mode and mask (82093AA I/O APIC, 3.2.4).
    entry.is_some_and(|entry| entry & (1 << 15 | 1 << 16) == 0)
}

/// What belongs to the VM rather than to one CPU.
#[derive(Clone, Serialize, Deserialize)]
pub struct VmState {
    pub pic_master: kvm_irqchip,
    pub pic_slave: kvm_irqchip,
    pub io_apic: kvm_irqchip,
    pub clock: kvm_clock_data,
}

pub fn save_vm(vm: &VmFd) -> Result<VmState, KvmError> {
    let irqchip = |chip_id| {
        let mut chip = kvm_irqchip { chip_id, ..Default::default() };
        vm.get_irqchip(&mut chip).named("KVM_GET_IRQCHIP").map(|()| chip)
    };
    Ok(VmState {
        pic_master: irqchip(KVM_IRQCHIP_PIC_MASTER)?,
        pic_slave: irqchip(KVM_IRQCHIP_PIC_SLAVE)?,
        io_apic: irqchip(KVM_IRQCHIP_IOAPIC)?,
        clock: vm.get_clock().named("KVM_GET_CLOCK")?,
    })
}

/// Before the vCPUs run. The clock goes on from the saved value: monotonic time does not jump.
pub fn restore_vm(vm: &VmFd, state: &VmState) -> Result<(), KvmError> {
    for (chip, id) in [
        (&state.pic_master, KVM_IRQCHIP_PIC_MASTER),
        (&state.pic_slave, KVM_IRQCHIP_PIC_SLAVE),
        (&state.io_apic, KVM_IRQCHIP_IOAPIC),
    ] {
        if chip.chip_id != id {
            return Err(KvmError::Malformed("an interrupt controller's id"));
        }
        vm.set_irqchip(chip).named("KVM_SET_IRQCHIP")?;
    }
    // Flags are output of KVM_GET_CLOCK; as input they mean other things (KVM API 4.30).
    let clock = kvm_clock_data { clock: state.clock.clock, ..Default::default() };
    vm.set_clock(&clock).named("KVM_SET_CLOCK")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_input_that_is_edge_triggered_is_one_in_use() {
        let mut io_apic = kvm_irqchip::default();
        let entry = |bits| kvm_bindings::kvm_ioapic_state__bindgen_ty_1 { bits };
        // Delivery to some CPU, fixed, vector 0x24; then the same level-triggered, masked, and as after power-on.
        for (n, bits) in [0x0100_0000_0000_0024, 0x8024, 0x1_0024, 0x1_0000].into_iter().enumerate()
        {
            // SAFETY: an I/O APIC's state is integers.
            unsafe { io_apic.chip.ioapic.redirtbl[n] = entry(bits) };
        }
        let edges = [0, 1, 2, 3, 24, u32::MAX].map(|gsi| is_edge_triggered(&io_apic, gsi));
        assert_eq!(edges, [true, false, false, false, false, false]);
    }
}
