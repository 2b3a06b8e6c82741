//! Guest physical addresses.
//!
//! ```text
//! 0                         RAM (its first MiB: boot structures and ACPI tables)
//! where that ends           RAM that machines may have more, up to the most of any (memory devices)
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

pub use hermitage_storage::base::{MAX_MEMORY, MEMORY_BLOCK};

#[derive(Debug, thiserror::Error, PartialEq, Eq)]
pub enum LayoutError {
    #[error("RAM of {0} bytes: must be a multiple of 1 MiB, from 16 MiB to 512 GiB")]
    Ram(u64),
    #[error(
        "RAM of {ram} bytes that can grow to {most}: both must be multiples of 128 MiB, the second not \
         less than the first and at most 62 GiB"
    )]
    Growth { ram: u64, most: u64 },
    #[error("root image of {0} bytes: must be a positive multiple of 2 MiB, up to 256 GiB")]
    Root(u64),
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Layout {
    ram_bytes: u64,
    max_ram_bytes: u64,
    /// The root image.
    pub root: Range,
}

impl Layout {
    /// `ram_bytes` is what a machine boots with, `max_ram_bytes` what it can have at most.
    pub fn new(ram_bytes: u64, max_ram_bytes: u64, root_bytes: u64) -> Result<Self, LayoutError> {
        if !ram_bytes.is_multiple_of(1 << 20) || !(16 << 20..=512 << 30).contains(&ram_bytes) {
            return Err(LayoutError::Ram(ram_bytes));
        }
        let in_blocks = |bytes: u64| bytes.is_multiple_of(MEMORY_BLOCK);
        let grows = in_blocks(ram_bytes)
            && in_blocks(max_ram_bytes)
            && (ram_bytes..=MAX_MEMORY).contains(&max_ram_bytes);
        if max_ram_bytes != ram_bytes && !grows {
            return Err(LayoutError::Growth { ram: ram_bytes, most: max_ram_bytes });
        }
        if !root_bytes.is_multiple_of(ROOT_ALIGNMENT) || !(1..=256 << 30).contains(&root_bytes) {
            return Err(LayoutError::Root(root_bytes));
        }
        let end = ranges(0, max_ram_bytes).last().map_or(0, |r| r.address + r.length);
        let address = end.max(HIGH_RAM_START).next_multiple_of(1 << 30);
        let root = Range { address, length: root_bytes, file_offset: 0 };
        Ok(Self { ram_bytes, max_ram_bytes, root })
    }

    /// What every machine has and boots with.
    pub fn ram(&self) -> impl Iterator<Item = Range> + use<> {
        ranges(0, self.ram_bytes)
    }

    /// What machines may have beyond it.
    pub fn growth(&self) -> impl Iterator<Item = Range> + use<> {
        ranges(self.ram_bytes, self.max_ram_bytes)
    }

    /// Both.
    pub fn all_ram(&self) -> impl Iterator<Item = Range> + use<> {
        ranges(0, self.max_ram_bytes)
    }

    pub fn ram_bytes(&self) -> u64 {
        self.ram_bytes
    }

    pub fn max_ram_bytes(&self) -> u64 {
        self.max_ram_bytes
    }

    /// End of the RAM below 4 GiB that is there from the start.
    pub fn low_ram_end(&self) -> u64 {
        self.ram_bytes.min(LOW_RAM_END)
    }
}

/// Where the bytes `from` to `to` of RAM, as they lie in the memory file, are in the guest.
fn ranges(from: u64, to: u64) -> impl Iterator<Item = Range> {
    let part = move |start: u64, end: u64, address: u64| {
        let (first, last) = (from.max(start), to.min(end));
        (first < last).then(|| Range {
            address: address + (first - start),
            length: last - first,
            file_offset: first,
        })
    };
    let low = part(0, LOW_RAM_END, 0);
    let high = part(LOW_RAM_END, u64::MAX, HIGH_RAM_START);
    low.into_iter().chain(high)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ram_leaves_the_hole_below_4_gib_free() {
        let layout = Layout::new(5 << 30, 5 << 30, ROOT_ALIGNMENT).unwrap();
        assert_eq!(layout.growth().count(), 0);
        let ram: Vec<_> = layout.ram().collect();
        assert_eq!(ram[0].length, LOW_RAM_END);
        assert_eq!((ram[1].address, ram[1].length), (HIGH_RAM_START, 2 << 30));
        assert_eq!(ram[1].file_offset, LOW_RAM_END);
        assert_eq!(layout.root.address, 6 << 30);
    }

    #[test]
    fn odd_sizes_are_refused() {
        let new = |ram, root| Layout::new(ram, ram, root);
        assert_eq!(new(1000, ROOT_ALIGNMENT), Err(LayoutError::Ram(1000)));
        assert_eq!(new(512 << 20, 4096), Err(LayoutError::Root(4096)));
        for (ram, most) in [(512 << 20, 256 << 20), (100 << 20, 1 << 30), (512 << 20, 64 << 30)] {
            let refused = Layout::new(ram, most, ROOT_ALIGNMENT);
            assert_eq!(refused, Err(LayoutError::Growth { ram, most }));
        }
    }

    #[test]
    fn what_may_come_goes_on_where_ram_ends_in_the_guest_and_in_the_file() {
        let layout = Layout::new(512 << 20, 4 << 30, ROOT_ALIGNMENT).unwrap();
        let low = Range { address: 0, length: 512 << 20, file_offset: 0 };
        assert_eq!(layout.ram().collect::<Vec<_>>(), [low]);
        let growth: Vec<_> = layout.growth().collect();
        let low = (3 << 30) - (512 << 20);
        assert_eq!(
            growth,
            [
                Range { address: 512 << 20, length: low, file_offset: 512 << 20 },
                Range { address: HIGH_RAM_START, length: 1 << 30, file_offset: 3 << 30 },
            ]
        );
        assert_eq!(layout.root.address, 5 << 30);
        assert_eq!(layout.low_ram_end(), 512 << 20);
        assert_eq!(layout.all_ram().map(|r| r.length).sum::<u64>(), 4 << 30);
    }
}
