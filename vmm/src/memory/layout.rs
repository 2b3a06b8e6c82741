//! Guest physical addresses.
//!
//! ```text
//! 0                         RAM (its first MiB: boot structures and ACPI tables)
//! 3 GiB (or less)           end of low RAM
//! 0xd000_0000               virtio-mmio windows, one page each
//! 0xfec0_0000, 0xfee0_0000  I/O APIC, local APIC
//! 0xfffb_c000               identity map and TSS that KVM needs on Intel
//! 4 GiB                     RAM beyond 3 GiB
//! next multiple of 1 GiB    root image (persistent memory)
//! ```

/// End of low RAM at most: the rest up to 4 GiB is for devices.
pub const LOW_RAM_END: u64 = 3 << 30;
pub const HIGH_RAM_START: u64 = 4 << 30;

/// First virtio-mmio window; device n has page n.
pub const MMIO_START: u64 = 0xd000_0000;
pub const MMIO_WINDOW: u64 = 0x1000;

pub const IO_APIC: u32 = 0xfec0_0000;
pub const LOCAL_APIC: u32 = 0xfee0_0000;

/// Four pages that KVM on Intel needs, out of the way of everything (KVM_SET_IDENTITY_MAP_ADDR,
/// KVM_SET_TSS_ADDR).
pub const IDENTITY_MAP: u64 = 0xfffb_c000;
pub const TSS: u64 = 0xfffb_d000;

/// ACPI tables lie here, up to 1 MiB; the guest takes this as reserved.
pub const ACPI_START: u64 = 0xe_0000;
pub const ACPI_END: u64 = 0x10_0000;

/// End of conventional memory.
pub const BASE_RAM_END: u64 = 0x9_fc00;

/// The root image's length is a multiple of this (the kernel adds persistent memory to its map in
/// sub-sections of 2 MiB).
pub const ROOT_ALIGNMENT: u64 = 2 << 20;

/// Interrupt lines (inputs of the I/O APIC) of the virtio devices start here, after the ISA ones.
pub const FIRST_GSI: u32 = 16;
pub const SERIAL_GSI: u32 = 4;

/// Interrupt inputs of KVM's I/O APIC.
pub const GSIS: u32 = 24;

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Range {
    pub address: u64,
    pub length: u64,
    /// Where it lies in the memory file.
    pub file_offset: u64,
}

#[derive(Debug, thiserror::Error, PartialEq, Eq)]
pub enum LayoutError {
    #[error("RAM of {0} bytes: must be a multiple of 1 MiB, from 16 MiB to 512 GiB")]
    Ram(u64),
    #[error("root image of {0} bytes: must be a positive multiple of 2 MiB, up to 256 GiB")]
    Root(u64),
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Layout {
    low: Range,
    high: Option<Range>,
    /// The root image.
    pub root: Range,
}

impl Layout {
    pub fn new(ram_bytes: u64, root_bytes: u64) -> Result<Self, LayoutError> {
        if !ram_bytes.is_multiple_of(1 << 20) || !(16 << 20..=512 << 30).contains(&ram_bytes) {
            return Err(LayoutError::Ram(ram_bytes));
        }
        if !root_bytes.is_multiple_of(ROOT_ALIGNMENT) || !(1..=256 << 30).contains(&root_bytes) {
            return Err(LayoutError::Root(root_bytes));
        }
        let low = Range { address: 0, length: ram_bytes.min(LOW_RAM_END), file_offset: 0 };
        let high = (ram_bytes > LOW_RAM_END).then(|| Range {
            address: HIGH_RAM_START,
            length: ram_bytes - LOW_RAM_END,
            file_offset: LOW_RAM_END,
        });
        let end = high.map_or(HIGH_RAM_START, |r| r.address + r.length);
        let root =
            Range { address: end.next_multiple_of(1 << 30), length: root_bytes, file_offset: 0 };
        Ok(Self { low, high, root })
    }

    pub fn ram(&self) -> impl Iterator<Item = Range> + '_ {
        std::iter::once(self.low).chain(self.high)
    }

    pub fn ram_bytes(&self) -> u64 {
        self.ram().map(|r| r.length).sum()
    }

    /// End of RAM below 4 GiB.
    pub fn low_ram_end(&self) -> u64 {
        self.low.length
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ram_leaves_the_hole_below_4_gib_free() {
        let layout = Layout::new(5 << 30, ROOT_ALIGNMENT).unwrap();
        let ram: Vec<_> = layout.ram().collect();
        assert_eq!(ram[0].length, LOW_RAM_END);
        assert_eq!((ram[1].address, ram[1].length), (HIGH_RAM_START, 2 << 30));
        assert_eq!(ram[1].file_offset, LOW_RAM_END);
        assert_eq!(layout.root.address, 6 << 30);
    }

    #[test]
    fn odd_sizes_are_refused() {
        assert_eq!(Layout::new(1000, ROOT_ALIGNMENT), Err(LayoutError::Ram(1000)));
        assert_eq!(Layout::new(512 << 20, 4096), Err(LayoutError::Root(4096)));
    }
}
