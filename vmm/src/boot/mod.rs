//! Booting a Linux bzImage by the 64-bit protocol (`Documentation/arch/x86/boot.rst`, "64-bit Boot
//! Protocol"). Only base machines boot; every other one is a fork.

pub mod acpi;
mod cpu;

use std::{
    fs::File,
    io::{self, Seek as _, SeekFrom},
};

use linux_loader::{
    configurator::{BootConfigurator as _, BootParams, linux::LinuxBootConfigurator},
    loader::{
        BzImage, Cmdline, KernelLoader as _,
        bootparam::{boot_e820_entry, boot_params},
        load_cmdline,
    },
};
use vm_memory::{Bytes as _, GuestAddress};

pub use cpu::{BootCpu, set_local_interrupts};

use crate::memory::{
    GuestMemory,
    layout::{self, Layout},
};

const ZERO_PAGE: u64 = 0x7000;
const CMDLINE: u64 = 0x2_0000;
/// Largest command line in bytes (the kernel's own limit is 2048).
const CMDLINE_MAX: usize = 2048;
const KERNEL: u64 = 0x10_0000;

const E820_RAM: u32 = 1;
const E820_RESERVED: u32 = 2;
/// Persistent memory as firmware of old reported it; the kernel's `nd_e820` takes it.
const E820_PMEM: u32 = 12;

#[derive(Debug, thiserror::Error)]
pub enum BootError {
    #[error("load the kernel: {0}")]
    Kernel(linux_loader::loader::Error),
    #[error("the kernel has no 64-bit entry point (xloadflags {0:#x})")]
    No64BitEntry(u16),
    #[error("kernel command line: {0}")]
    Cmdline(linux_loader::cmdline::Error),
    #[error("load the command line: {0}")]
    LoadCmdline(linux_loader::loader::Error),
    #[error("read the initrd: {0}")]
    Initrd(#[source] io::Error),
    #[error(
        "an initrd of {initrd} bytes does not fit below {end:#x}: give the machine more memory"
    )]
    InitrdSpace { initrd: u64, end: u64 },
    #[error("write boot structures to guest memory: {0}")]
    Write(String),
}

/// Puts kernel, initrd, command line, ACPI tables and boot parameters into memory and returns the
/// first CPU's state.
pub fn load(
    memory: &GuestMemory,
    layout: &Layout,
    vcpus: u32,
    kernel: &mut File,
    initrd: &mut File,
    cmdline: &str,
) -> Result<BootCpu, BootError> {
    let loaded = BzImage::load(memory, Some(GuestAddress(KERNEL)), kernel, None)
        .map_err(BootError::Kernel)?;
    let header = loaded.setup_header.unwrap_or_default();
    let xloadflags = header.xloadflags;
    if xloadflags & 1 == 0 {
        return Err(BootError::No64BitEntry(xloadflags));
    }

    let initrd_bytes = initrd.seek(SeekFrom::End(0)).map_err(BootError::Initrd)?;
    initrd.rewind().map_err(BootError::Initrd)?;
    let end = layout.low_ram_end().min(u64::from(header.initrd_addr_max) + 1);
    // The kernel unpacks itself at its preferred address; leave it that room.
    let kernel_end = header.pref_address + u64::from(header.init_size);
    let no_space = BootError::InitrdSpace { initrd: initrd_bytes, end };
    let Some(initrd_address) =
        end.checked_sub(initrd_bytes).map(|a| a & !0xfff).filter(|&a| a >= kernel_end)
    else {
        return Err(no_space);
    };
    memory
        .read_exact_volatile_from(GuestAddress(initrd_address), initrd, initrd_bytes as usize)
        .map_err(|e| BootError::Initrd(io::Error::other(e)))?;

    let mut line = Cmdline::new(CMDLINE_MAX).map_err(BootError::Cmdline)?;
    line.insert_str(cmdline).map_err(BootError::Cmdline)?;
    load_cmdline(memory, GuestAddress(CMDLINE), &line).map_err(BootError::LoadCmdline)?;

    let mut params = boot_params { hdr: header, ..Default::default() };
    params.hdr.type_of_loader = 0xff;
    params.hdr.cmd_line_ptr = CMDLINE as u32;
    params.hdr.cmdline_size = cmdline.len() as u32 + 1;
    params.hdr.ramdisk_image = initrd_address as u32;
    params.hdr.ramdisk_size = initrd_bytes as u32;
    params.acpi_rsdp_addr = acpi::write(memory, layout, vcpus).map_err(BootError::Write)?;
    let map = e820(layout);
    params.e820_entries = map.len() as u8;
    let mut table = params.e820_table;
    table[..map.len()].copy_from_slice(&map);
    params.e820_table = table;
    LinuxBootConfigurator::write_bootparams(
        &BootParams::new(&params, GuestAddress(ZERO_PAGE)),
        memory,
    )
    .map_err(|e| BootError::Write(e.to_string()))?;

    let entry = loaded.kernel_load.0 + 0x200;
    BootCpu::new(memory, entry, ZERO_PAGE).map_err(BootError::Write)
}

fn e820(layout: &Layout) -> Vec<boot_e820_entry> {
    let entry = |addr, size, r#type| boot_e820_entry { addr, size, r#type };
    let mut map = vec![
        entry(0, layout::BASE_RAM_END, E820_RAM),
        entry(layout::ACPI_START, layout::ACPI_END - layout::ACPI_START, E820_RESERVED),
    ];
    for range in layout.ram() {
        let start = range.address.max(layout::ACPI_END);
        map.push(entry(start, range.address + range.length - start, E820_RAM));
    }
    map.push(entry(layout.root.address, layout.root.length, E820_PMEM));
    map
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_memory_map_has_ram_around_the_hole_and_the_root_image() {
        let layout = Layout::new(4 << 30, 4 << 30, 64 << 20).unwrap();
        let map: Vec<_> = e820(&layout).iter().map(|e| (e.addr, e.size, e.r#type)).collect();
        assert_eq!(
            map,
            [
                (0, 0x9_fc00, 1),
                (0xe_0000, 0x2_0000, 2),
                (0x10_0000, (3 << 30) - 0x10_0000, 1),
                (4 << 30, 1 << 30, 1),
                (5 << 30, 64 << 20, 12),
            ]
        );
    }

    #[test]
    fn what_ram_can_grow_by_is_not_in_the_memory_map() {
        let layout = Layout::new(512 << 20, 4 << 30, 64 << 20).unwrap();
        let map: Vec<_> = e820(&layout).iter().map(|e| (e.addr, e.size, e.r#type)).collect();
        assert_eq!(map[2..], [(0x10_0000, (511 << 20), 1), (5 << 30, 64 << 20, 12)]);
    }
}
