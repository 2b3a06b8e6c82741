//! Whether this host's KVM really runs guests.
//!
//! That `/dev/kvm` opens proves nothing: some hosts offer a paravirtual KVM whose ioctls answer and
//! whose guests stop at the first instruction out of the ordinary. So a small guest is run that does
//! what every kernel does early: it enters through long mode with paging on, loads descriptor tables
//! and control registers, uses SSE, reads and writes a model-specific register, asks CPUID, touches
//! the local APIC, and reports through a port.

use kvm_ioctls::VcpuExit;
use vm_memory::{Bytes as _, GuestAddress, GuestMemoryBackend as _};

use crate::{
    boot::BootCpu,
    kvm::{self, KvmError},
    memory::{GuestMemory, PAGE_SIZE},
};

const CODE: u64 = 0x10_0000;
const RAM: usize = 2 << 20;
const REPORT_PORT: u16 = 0x500;
const REPORT: u8 = 0xa5;

/// Entered in long mode with flat segments (see [`BootCpu`]).
#[rustfmt::skip]
const GUEST: &[u8] = &[
    // lidt [rip+0]-style work on what the boot state has: reload CR3 and set CR4.OSFXSR
    0x0f, 0x20, 0xd8,                         // mov rax, cr3
    0x0f, 0x22, 0xd8,                         // mov cr3, rax
    0x0f, 0x20, 0xe0,                         // mov rax, cr4
    0x48, 0x0d, 0x00, 0x06, 0x00, 0x00,       // or rax, OSFXSR | OSXMMEXCPT
    0x0f, 0x22, 0xe0,                         // mov cr4, rax
    0x0f, 0x01, 0x04, 0x25, 0x00, 0x06, 0x00, 0x00, // sgdt [0x600]
    0x0f, 0x01, 0x14, 0x25, 0x00, 0x06, 0x00, 0x00, // lgdt [0x600]
    // SSE: write, read back
    0x48, 0xc7, 0xc0, 0xa5, 0x00, 0x00, 0x00, // mov rax, 0xa5
    0x66, 0x48, 0x0f, 0x6e, 0xc0,             // movq xmm0, rax
    0x66, 0x0f, 0xef, 0xc9,                   // pxor xmm1, xmm1
    0x66, 0x0f, 0xeb, 0xc8,                   // por xmm1, xmm0
    0x66, 0x48, 0x0f, 0x7e, 0xcb,             // movq rbx, xmm1
    // MSR: KERNEL_GS_BASE
    0xb9, 0x02, 0x01, 0x00, 0xc0,             // mov ecx, 0xc0000102
    0x89, 0xd8,                               // mov eax, ebx
    0x31, 0xd2,                               // xor edx, edx
    0x0f, 0x30,                               // wrmsr
    0x31, 0xc0,                               // xor eax, eax
    0x0f, 0x32,                               // rdmsr
    0x89, 0xc6,                               // mov esi, eax
    // CPUID
    0x31, 0xc0,                               // xor eax, eax
    0x0f, 0xa2,                               // cpuid
    // repeat string over a page
    0xbf, 0x00, 0x80, 0x00, 0x00,             // mov edi, 0x8000
    0xb9, 0x00, 0x02, 0x00, 0x00,             // mov ecx, 512
    0xf3, 0x48, 0xab,                         // rep stosq
    // report what went through SSE and MSR
    0x89, 0xf0,                               // mov eax, esi
    0x66, 0xba, 0x00, 0x05,                   // mov dx, 0x500
    0xee,                                     // out dx, al
    0xf4,                                     // hlt
];

/// Ok: a machine will run here.
pub fn run() -> Result<(), String> {
    let failed = |e: KvmError| e.to_string();
    let kvm = kvm::open().map_err(failed)?;
    let memory = GuestMemory::from_ranges(&[(GuestAddress(0), RAM)]).map_err(|e| e.to_string())?;
    memory.write_slice(GUEST, GuestAddress(CODE)).map_err(|e| e.to_string())?;
    // One region only, so nothing is taken for the read-only root image.
    let vm = kvm::create_bare_vm(&kvm).map_err(failed)?;
    let host = memory.get_host_address(GuestAddress(0)).map_err(|e| e.to_string())?;
    let region = kvm_bindings::kvm_userspace_memory_region {
        slot: 0,
        flags: 0,
        guest_phys_addr: 0,
        memory_size: (RAM / PAGE_SIZE * PAGE_SIZE) as u64,
        userspace_addr: host as usize as u64,
    };
    // SAFETY: `memory` is mapped for RAM bytes and outlives the VM, which is dropped in this function.
    unsafe { vm.set_user_memory_region(region) }.map_err(|e| format!("KVM memory: {e}"))?;
    let mut vcpu = vm.create_vcpu(0).map_err(|e| format!("KVM_CREATE_VCPU: {e}"))?;
    let boot = BootCpu::new(&memory, CODE, 0)?;
    let supported = kvm::cpuid::supported(&kvm).map_err(failed)?;
    let cpuid = kvm::cpuid::for_vcpu(&supported, 0, 1);
    kvm::prepare_for_boot(&vcpu, &cpuid, Some(&boot)).map_err(failed)?;
    for _ in 0..100 {
        match vcpu.run() {
            Ok(VcpuExit::IoOut(REPORT_PORT, &[REPORT])) => return Ok(()),
            Ok(VcpuExit::IoOut(port, data)) => {
                return Err(format!("the probe guest computed wrongly: port {port:#x}: {data:x?}"));
            }
            Ok(VcpuExit::InternalError) => {
                return Err("KVM_RUN ended with an internal error (emulation failure): this is a \
                            paravirtual KVM that can't run an unmodified kernel"
                    .into());
            }
            Ok(VcpuExit::Intr) => {}
            Ok(exit) => return Err(format!("the probe guest left KVM_RUN by {exit:?}")),
            Err(e) if e.errno() == libc::EINTR || e.errno() == libc::EAGAIN => {}
            Err(e) => return Err(format!("KVM_RUN: {e}")),
        }
    }
    Err("the probe guest did not finish".into())
}
