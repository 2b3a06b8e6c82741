//! The first CPU as the 64-bit boot protocol wants it: long mode, paging on, the first GiB mapped
//! one to one, flat segments, RSI at the boot parameters.

use kvm_bindings::{kvm_lapic_state, kvm_regs, kvm_segment, kvm_sregs};
use vm_memory::{Bytes as _, GuestAddress};

use crate::memory::GuestMemory;

const GDT: u64 = 0x500;
const IDT: u64 = 0x520;
const PML4: u64 = 0x9000;
const PDPT: u64 = 0xa000;
const PD: u64 = 0xb000;
const STACK: u64 = 0x8ff0;

/// Segment descriptors: null, unused, 64-bit code, data (boot.rst: `__BOOT_CS` 0x10, `__BOOT_DS` 0x18).
const DESCRIPTORS: [u64; 4] = [0, 0, 0x00af_9b00_0000_ffff, 0x00cf_9300_0000_ffff];

pub struct BootCpu {
    pub regs: kvm_regs,
}

impl BootCpu {
    /// Writes page tables and descriptors.
    pub fn new(memory: &GuestMemory, entry: u64, boot_params: u64) -> Result<Self, String> {
        let write = |value: u64, address: u64| {
            memory.write_obj(value.to_le(), GuestAddress(address)).map_err(|e| e.to_string())
        };
        for (i, descriptor) in DESCRIPTORS.into_iter().enumerate() {
            write(descriptor, GDT + 8 * i as u64)?;
        }
        write(0, IDT)?;
        const PRESENT_WRITABLE: u64 = 3;
        const LARGE: u64 = 1 << 7;
        write(PDPT | PRESENT_WRITABLE, PML4)?;
        write(PD | PRESENT_WRITABLE, PDPT)?;
        for i in 0..512 {
            write(i << 21 | LARGE | PRESENT_WRITABLE, PD + 8 * i)?;
        }
        let regs = kvm_regs {
            rip: entry,
            rsi: boot_params,
            rsp: STACK,
            rbp: STACK,
            rflags: 2,
            ..Default::default()
        };
        Ok(Self { regs })
    }

    /// Segments, control registers and long mode.
    pub fn set_segments(&self, sregs: &mut kvm_sregs) {
        let code = segment(2, 0xb, 1, 0);
        let data = segment(3, 0x3, 0, 1);
        sregs.cs = code;
        (sregs.ds, sregs.es, sregs.fs, sregs.gs, sregs.ss) = (data, data, data, data, data);
        // A busy 64-bit TSS, which must be there though nothing uses it.
        sregs.tr = kvm_segment { type_: 0xb, present: 1, limit: 0xffff, ..Default::default() };
        sregs.gdt.base = GDT;
        sregs.gdt.limit = (8 * DESCRIPTORS.len() - 1) as u16;
        sregs.idt.base = IDT;
        sregs.idt.limit = 7;
        sregs.cr3 = PML4;
        sregs.cr4 |= 1 << 5; // PAE
        sregs.cr0 |= 1 << 31 | 1; // paging, protection
        sregs.efer |= 1 << 10 | 1 << 8; // long mode active, enabled
    }
}

fn segment(index: u16, type_: u8, long: u8, big: u8) -> kvm_segment {
    kvm_segment {
        base: 0,
        limit: 0xffff_ffff,
        selector: index * 8,
        type_,
        present: 1,
        dpl: 0,
        db: big,
        s: 1,
        l: long,
        g: 1,
        avl: 0,
        unusable: 0,
        padding: 0,
    }
}

/// LINT0 takes the legacy interrupt controller, LINT1 is NMI (as firmware leaves them: MP
/// specification 3.6.2.2, "virtual wire mode").
pub fn set_local_interrupts(lapic: &mut kvm_lapic_state) {
    const LINT0: usize = 0x350;
    const LINT1: usize = 0x360;
    const EXTINT: u32 = 0x7;
    const NMI: u32 = 0x4;
    for (register, mode) in [(LINT0, EXTINT), (LINT1, NMI)] {
        let bytes: Vec<u8> = lapic.regs[register..register + 4].iter().map(|&b| b as u8).collect();
        let old = u32::from_le_bytes([bytes[0], bytes[1], bytes[2], bytes[3]]);
        let new = (old & !0x700) | mode << 8;
        for (i, b) in new.to_le_bytes().into_iter().enumerate() {
            lapic.regs[register + i] = b as _;
        }
    }
}
