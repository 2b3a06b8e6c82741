//! Where devices lie: ports and memory windows.

/// virtio devices described to the guest: terminals, streams, account disk.
pub const VIRTIO_DEVICES: u32 = 4;

/// Which of them streams are. Its interrupt is edge-triggered (docs/devices.md, "Transport"), the others' are not.
pub const VSOCK: u32 = 1;

/// Writing SLP_EN with [`crate::boot::acpi::S5`] here powers the machine off (ACPI 6.5 §4.8.3.7).
pub const SLEEP_CONTROL_PORT: u16 = 0x600;
pub const SLEEP_STATUS_PORT: u16 = 0x601;

/// Writing [`RESET_VALUE`] here resets the machine (ACPI 6.5 §4.8.3.6).
pub const RESET_PORT: u16 = 0x602;
pub const RESET_VALUE: u8 = 1;

/// The address register of PCI configuration mechanism 1, for an empty bus.
///
/// Without any PCI, Linux 6.12 never enters what the firmware's memory map has beyond RAM into its
/// resources (`e820__reserve_resources_late` is called from the PCI code only), and so finds no
/// persistent memory. With `pci=conf1` a register that keeps its value is all it asks for.
pub const PCI_ADDRESS_PORT: u16 = 0xcf8;

/// The keyboard controller's command port and its reset command, which `reboot=k` uses.
pub const I8042_COMMAND_PORT: u16 = 0x64;
pub const I8042_RESET: u8 = 0xfe;
