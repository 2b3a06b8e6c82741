//! ACPI tables (ACPI 6.5): CPUs and I/O APIC (MADT, §5.2.12), a hardware-reduced platform with sleep
//! and reset registers (FADT, §5.2.9), and the devices (DSDT).
//!
//! CPUs beyond those that a machine boots with are in the MADT as the others are: the kernel is told how many to
//! start (`maxcpus=`). Memory beyond what it boots with is not in the memory map but in memory devices (§9.11,
//! `PNP0C80`), which the kernel adds and leaves out of use (`memhp_default_state=offline`).
//!
//! Debian's kernel takes virtio-mmio devices from nowhere else: a device object with the id
//! `LNRO0005`, its window and its interrupt.

use acpi_tables::{
    Aml,
    aml::{
        AddressSpace as Space, AddressSpaceCacheable, Device, EISAName, IO, Interrupt,
        Memory32Fixed, Name, Package, Path, ResourceTemplate,
    },
    fadt::{FADTBuilder, Flags},
    gas::{AccessSize, AddressSpace, GAS},
    madt::{EnabledStatus, IoApic, LocalInterruptController, MADT, ProcessorLocalApic},
    rsdp::Rsdp,
    sdt::Sdt,
    xsdt::XSDT,
};
use vm_memory::{Bytes as _, GuestAddress};

use crate::{
    devices::bus::{
        RESET_PORT, RESET_VALUE, SLEEP_CONTROL_PORT, SLEEP_STATUS_PORT, VIRTIO_DEVICES, VSOCK,
    },
    memory::{
        GuestMemory,
        layout::{self, Layout, Range},
    },
};

const OEM_ID: [u8; 6] = *b"HERMIT";
const OEM_TABLE_ID: [u8; 8] = *b"HERMITVM";

/// Value of SLP_TYP that means soft off, told to the guest in `\_S5`.
pub const S5: u8 = 5;

/// Writes the tables at [`layout::ACPI_START`] and returns the address of the root pointer.
pub fn write(memory: &GuestMemory, layout: &Layout, vcpus: u32) -> Result<u64, String> {
    let mut at = layout::ACPI_START + 64;
    let mut put = |table: &dyn Aml| -> Result<u64, String> {
        let mut bytes = Vec::new();
        table.to_aml_bytes(&mut bytes);
        let address = at;
        at = (at + bytes.len() as u64).next_multiple_of(16);
        if at > layout::ACPI_END {
            return Err(format!("ACPI tables are {} bytes too long", at - layout::ACPI_END));
        }
        memory.write_slice(&bytes, GuestAddress(address)).map_err(|e| e.to_string())?;
        Ok(address)
    };
    let dsdt = put(&dsdt(layout.growth()))?;
    let fadt = put(&fadt(dsdt).finalize())?;
    let madt = put(&madt(vcpus))?;
    let mut xsdt = XSDT::new(OEM_ID, OEM_TABLE_ID, 1);
    xsdt.add_entry(fadt);
    xsdt.add_entry(madt);
    let xsdt = put(&xsdt)?;
    let mut root = Vec::new();
    Rsdp::new(OEM_ID, xsdt).to_aml_bytes(&mut root);
    memory.write_slice(&root, GuestAddress(layout::ACPI_START)).map_err(|e| e.to_string())?;
    Ok(layout::ACPI_START)
}

fn fadt(dsdt: u64) -> FADTBuilder {
    let port = |address: u16| {
        GAS::new(AddressSpace::SystemIo, 8, 0, AccessSize::ByteAccess, address.into())
    };
    let mut fadt = FADTBuilder::new(OEM_ID, OEM_TABLE_ID, 1)
        .dsdt_64(dsdt)
        .flag(Flags::HwReducedAcpi)
        .flag(Flags::ResetRegSup)
        .flag(Flags::PwrButton)
        .flag(Flags::SlpButton);
    fadt.reset_reg = port(RESET_PORT);
    fadt.reset_value = RESET_VALUE;
    fadt.sleep_control_reg = port(SLEEP_CONTROL_PORT);
    fadt.sleep_status_reg = port(SLEEP_STATUS_PORT);
    // IAPC_BOOT_ARCH (§5.2.9.3): no VGA, no CMOS clock.
    fadt.iapc_boot_arch = (1 << 2 | 1 << 5).into();
    fadt
}

fn madt(vcpus: u32) -> MADT {
    let mut madt =
        MADT::new(OEM_ID, OEM_TABLE_ID, 1, LocalInterruptController::Address(layout::LOCAL_APIC));
    for id in 0..vcpus {
        madt.add_structure(ProcessorLocalApic::new(id as u8, id as u8, EnabledStatus::Enabled));
    }
    madt.add_structure(IoApic::new(0, layout::IO_APIC, 0));
    madt
}

fn dsdt(growth: impl Iterator<Item = Range>) -> Sdt {
    let mut dsdt = Sdt::new(*b"DSDT", 36, 6, OEM_ID, OEM_TABLE_ID, 1);
    Name::new("_S5_".into(), &Package::new(vec![&S5])).to_aml_bytes(&mut dsdt);
    Device::new(
        "_SB_.COM1".into(),
        vec![
            &Name::new("_HID".into(), &EISAName::new("PNP0501")),
            &Name::new("_UID".into(), &0u32),
            &Name::new(
                "_CRS".into(),
                &ResourceTemplate::new(vec![
                    &Interrupt::new(true, true, false, false, layout::SERIAL_GSI),
                    &IO::new(0x3f8, 0x3f8, 0, 8),
                ]),
            ),
        ],
    )
    .to_aml_bytes(&mut dsdt);
    for n in 0..VIRTIO_DEVICES {
        let window = layout::MMIO_START + u64::from(n) * layout::MMIO_WINDOW;
        Device::new(
            Path::new(&format!("_SB_.VR{n:02}")),
            vec![
                &Name::new("_HID".into(), &"LNRO0005"),
                &Name::new("_UID".into(), &n),
                &Name::new("_CCA".into(), &1u32),
                &Name::new(
                    "_CRS".into(),
                    &ResourceTemplate::new(vec![
                        &Memory32Fixed::new(true, window as u32, layout::MMIO_WINDOW as u32),
                        // Active high. Level-triggered is high while the device's interrupt status is
                        // not zero.
                        &Interrupt::new(true, n == VSOCK, false, false, layout::FIRST_GSI + n),
                    ]),
                ),
            ],
        )
        .to_aml_bytes(&mut dsdt);
    }
    for (n, range) in growth.enumerate() {
        let last = range.address + range.length - 1;
        let space =
            Space::new_memory(AddressSpaceCacheable::Cacheable, true, range.address, last, None);
        Device::new(
            Path::new(&format!("_SB_.MEM{n}")),
            vec![
                &Name::new("_HID".into(), &EISAName::new("PNP0C80")),
                &Name::new("_UID".into(), &(n as u32)),
                // Present, enabled, shown, functioning: Linux does without many a `_STA`, not without this.
                &Name::new("_STA".into(), &0xfu32),
                &Name::new("_CRS".into(), &ResourceTemplate::new(vec![&space])),
            ],
        )
        .to_aml_bytes(&mut dsdt);
    }
    dsdt.update_checksum();
    dsdt
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn tables_add_up_to_zero() {
        let memory = GuestMemory::from_ranges(&[(GuestAddress(0), 1 << 20)]).unwrap();
        let layout = Layout::new(512 << 20, 62 << 30, layout::ROOT_ALIGNMENT).unwrap();
        let root = write(&memory, &layout, 32).unwrap();
        let mut bytes = [0u8; 36];
        memory.read_slice(&mut bytes, GuestAddress(root)).unwrap();
        assert_eq!(&bytes[..8], b"RSD PTR ");
        assert_eq!(bytes.iter().fold(0u8, |sum, b| sum.wrapping_add(*b)), 0);
        for table in [&dsdt(layout.growth()) as &dyn Aml, &madt(3), &fadt(0).finalize()] {
            let mut bytes = Vec::new();
            table.to_aml_bytes(&mut bytes);
            assert_eq!(bytes.len(), u32::from_le_bytes(bytes[4..8].try_into().unwrap()) as usize);
            assert_eq!(bytes.iter().fold(0u8, |sum, b| sum.wrapping_add(*b)), 0);
        }
    }
}
