//! The one table of devices, for boot and for restore, and the address decoding in front of it.

use std::{
    fs::File,
    io,
    os::fd::OwnedFd,
    sync::{
        Arc, Mutex,
        atomic::{AtomicU32, Ordering},
    },
    time::Duration,
};

use hermitage_guest_proto::CONTROL_PORT;
use hermitage_vmm_proto::End;
use kvm_bindings::kvm_irqchip;
use kvm_ioctls::VmFd;
use serde::{Deserialize, Serialize};

use super::{EndCell, Exits, MachineError, owner, vcpus::lock};
use crate::{
    boot::acpi::S5,
    devices::{
        bus::{
            I8042_COMMAND_PORT, I8042_RESET, PCI_ADDRESS_PORT, RESET_PORT, RESET_VALUE,
            SLEEP_CONTROL_PORT, VIRTIO_DEVICES, VSOCK,
        },
        serial::{BASE_PORT, SerialConsole, SerialConsoleState},
        virtio::{
            Balloon, Block, Console, Fault, Interrupt, StateError, Transport, TransportState,
            VirtioDevice, Vsock, acknowledge,
        },
    },
    kvm::{self, KvmError},
    memory::{
        GuestMemory, ShownPage,
        layout::{FIRST_GSI, MMIO_START, MMIO_WINDOW, SERIAL_GSI},
    },
    poller::{Key, Poller},
};

pub struct Devices {
    pub console: Transport<Console>,
    pub vsock: Transport<Vsock>,
    pub block: Transport<Block>,
    pub balloon: Transport<Balloon>,
    pub serial: Mutex<SerialConsole>,
    /// Used while booting only: not part of the state.
    pci_address: AtomicU32,
    end: Arc<EndCell>,
    /// To be shown with the first stream: a fork is not to wait for it, and a shell needs none.
    hidden: Mutex<Option<StreamRegisters>>,
}

#[derive(Clone, Serialize, Deserialize)]
pub struct DeviceStates {
    pub console: TransportState<<Console as VirtioDevice>::State>,
    pub vsock: TransportState<<Vsock as VirtioDevice>::State>,
    pub block: TransportState<<Block as VirtioDevice>::State>,
    pub balloon: TransportState<<Balloon as VirtioDevice>::State>,
    pub serial: SerialConsoleState,
}

/// Position in the table: memory window and interrupt line.
const CONSOLE: u32 = 0;
const BLOCK: u32 = 2;
const BALLOON: u32 = 3;
const SERIAL: Key = Key { owner: owner::SERIAL, token: 0 };
const _: () = assert!(BALLOON + 1 == VIRTIO_DEVICES);

/// An input of the I/O APIC.
struct Line {
    vm: Arc<VmFd>,
    gsi: u32,
}

impl Interrupt for Line {
    fn set_level(&self, high: bool) -> io::Result<()> {
        self.vm.set_irq_line(self.gsi, high).map_err(|e| io::Error::from_raw_os_error(e.errno()))
    }
}

fn line_of(vm: &Arc<VmFd>, gsi: u32) -> Line {
    Line { vm: vm.clone(), gsi }
}

/// The streams' registers, which the guest is to read, and to acknowledge used buffers, without bothering us. Only for
/// a guest that takes their interrupts for edge-triggered.
struct StreamRegisters {
    vm: Arc<VmFd>,
    page: ShownPage,
}

impl StreamRegisters {
    fn new(vm: &Arc<VmFd>) -> Result<Self, MachineError> {
        Ok(Self { vm: vm.clone(), page: ShownPage::new().map_err(MachineError::Page)? })
    }

    /// From here on the guest need not ask. KVM waits for its own threads at each of these calls.
    fn show(&self) -> Result<(), KvmError> {
        let window = MMIO_START + u64::from(VSOCK) * MMIO_WINDOW;
        kvm::show_page(&self.vm, VSOCK, window, &self.page)?;
        let (register, word) = acknowledge::USED_BUFFERS;
        kvm::drop_writes(&self.vm, window + register, word)
    }
}

/// What devices are restored with.
pub struct RestoreDevices<'a> {
    pub state: &'a DeviceStates,
    pub io_apic: &'a kvm_irqchip,
    pub memory: &'a GuestMemory,
    pub vm: &'a Arc<VmFd>,
    pub poller: &'a Arc<Poller>,
    pub end: Arc<EndCell>,
    pub disk: File,
}

impl Devices {
    pub fn new(
        memory: &GuestMemory,
        vm: &Arc<VmFd>,
        poller: &Arc<Poller>,
        end: Arc<EndCell>,
        serial_log: Option<File>,
    ) -> Result<Self, MachineError> {
        let line = |n| line_of(vm, FIRST_GSI + n);
        let registers = StreamRegisters::new(vm)?;
        Ok(Self {
            console: Transport::new(
                Console::new(poller.clone(), owner::CONSOLE),
                memory.clone(),
                line(CONSOLE),
            ),
            vsock: Transport::new(
                Vsock::new(poller.clone(), owner::VSOCK),
                memory.clone(),
                line(VSOCK),
            )
            .shown_on(registers.page.clone()),
            block: Transport::new(Block::new(), memory.clone(), line(BLOCK)),
            balloon: Transport::new(Balloon::new(), memory.clone(), line(BALLOON)),
            serial: Mutex::new(SerialConsole::new(
                Arc::new(line_of(vm, SERIAL_GSI)),
                poller.clone(),
                SERIAL,
                serial_log,
            )),
            pci_address: AtomicU32::new(0),
            end,
            hidden: Mutex::new(Some(registers)),
        })
    }

    /// After the interrupt controllers' state is in place. Nothing reaches guest or disk before
    /// [`resume`](Self::resume).
    pub fn restore(with: RestoreDevices<'_>) -> Result<Self, MachineError> {
        let RestoreDevices { state, io_apic, memory, vm, poller, end, disk } = with;
        let line = |n| line_of(vm, FIRST_GSI + n);
        let mut vsock = Transport::restore(
            state.vsock.clone(),
            Vsock::new(poller.clone(), owner::VSOCK),
            memory.clone(),
            line(VSOCK),
        )?;
        // A base that was made before knows a level-triggered interrupt, which has to see acknowledgements.
        let mut hidden = None;
        if kvm::is_edge_triggered(io_apic, FIRST_GSI + VSOCK) {
            let registers = hidden.insert(StreamRegisters::new(vm)?);
            vsock = vsock.shown_on(registers.page.clone());
        }
        let devices = Self {
            console: Transport::restore(
                state.console.clone(),
                Console::new(poller.clone(), owner::CONSOLE),
                memory.clone(),
                line(CONSOLE),
            )?,
            vsock,
            block: Transport::restore(
                state.block.clone(),
                Block::new(),
                memory.clone(),
                line(BLOCK),
            )?,
            balloon: Transport::restore(
                state.balloon.clone(),
                Balloon::new(),
                memory.clone(),
                line(BALLOON),
            )?,
            serial: Mutex::new(SerialConsole::restore(
                &state.serial,
                Arc::new(line_of(vm, SERIAL_GSI)),
                poller.clone(),
                SERIAL,
            )?),
            pci_address: AtomicU32::new(0),
            end,
            hidden: Mutex::new(hidden),
        };
        let (saved, found) = (state.block.device.bytes(), disk.metadata().map_or(0, |m| m.len()));
        if found < saved {
            let reason = format!("the disk had {saved} bytes, now it has {found}");
            return Err(StateError::Invalid { device: "block", reason }.into());
        }
        devices.block.attach(disk)?;
        Ok(devices)
    }

    /// Last thing before the vCPUs run: what was under way goes on, also to the disk.
    pub fn resume(&self, agent: OwnedFd) -> Result<(), MachineError> {
        self.vsock.adopt(CONTROL_PORT, agent)?;
        self.console.resume()?;
        self.vsock.resume()?;
        self.block.resume()?;
        self.balloon.resume()?;
        Ok(())
    }

    /// Connects a stream ([`Transport::connect`]).
    pub fn connect(&self, stream: u64, port: u32, socket: OwnedFd) -> Result<(), Fault> {
        if let Some(registers) = lock(&self.hidden).take()
            && let Err(error) = registers.show()
        {
            tracing::warn!(%error, "streams cost more exits than they need");
        }
        self.vsock.connect(stream, port, socket)
    }

    /// The vCPUs are paused. Waits for requests under way.
    pub fn save(&self) -> Result<DeviceStates, MachineError> {
        const LIMIT: Duration = Duration::from_secs(10);
        if !self.block.drain(LIMIT) {
            return Err(match self.block.held_writes() {
                0 => MachineError::Drain(LIMIT),
                writes => MachineError::NoRoom { writes, limit: LIMIT },
            });
        }
        Ok(DeviceStates {
            console: self.console.save()?,
            vsock: self.vsock.save()?,
            block: self.block.save()?,
            balloon: self.balloon.save()?,
            serial: lock(&self.serial).save(),
        })
    }
}

/// A fault as the end of the machine.
pub fn end_of(fault: Fault) -> End {
    match fault {
        Fault::Guest { .. } => End::GuestFault(fault.to_string()),
        Fault::Host { .. } => End::HostError(fault.to_string()),
    }
}

/// Device and offset of an address in the virtio windows.
fn window(address: u64) -> Option<(u32, u64)> {
    let offset = address.checked_sub(MMIO_START)?;
    let device = u32::try_from(offset / MMIO_WINDOW).ok()?;
    (device < VIRTIO_DEVICES).then_some((device, offset % MMIO_WINDOW))
}

impl Exits for Devices {
    fn mmio_read(&self, address: u64, data: &mut [u8]) {
        match window(address) {
            Some((CONSOLE, offset)) => self.console.read(offset, data),
            Some((VSOCK, offset)) => self.vsock.read(offset, data),
            Some((BLOCK, offset)) => self.block.read(offset, data),
            Some((BALLOON, offset)) => self.balloon.read(offset, data),
            // Nobody answers: all ones, as on a real bus.
            _ => data.fill(0xff),
        }
    }

    fn mmio_write(&self, address: u64, data: &[u8]) -> Option<End> {
        let result = match window(address) {
            Some((CONSOLE, offset)) => self.console.write(offset, data),
            Some((VSOCK, offset)) => self.vsock.write(offset, data),
            Some((BLOCK, offset)) => self.block.write(offset, data),
            Some((BALLOON, offset)) => self.balloon.write(offset, data),
            // Nobody listens; writes to the read-only root image end here too.
            _ => Ok(()),
        };
        result.err().map(end_of)
    }

    fn port_read(&self, port: u16, data: &mut [u8]) {
        data.fill(0xff);
        if port == PCI_ADDRESS_PORT
            && let Ok(word) = <&mut [u8; 4]>::try_from(&mut *data)
        {
            *word = self.pci_address.load(Ordering::Relaxed).to_le_bytes();
        } else if let (Some(offset @ 0..8), [byte]) = (port.checked_sub(BASE_PORT), data) {
            *byte = lock(&self.serial).read(offset as u8);
        }
    }

    fn port_write(&self, port: u16, data: &[u8]) -> Option<End> {
        let &[value] = data else {
            if let (PCI_ADDRESS_PORT, Ok(word)) = (port, data.try_into()) {
                self.pci_address.store(u32::from_le_bytes(word), Ordering::Relaxed);
            }
            return None;
        };
        match port {
            SLEEP_CONTROL_PORT => {
                // Sleep control register (ACPI 6.5 table 4.19): SLP_TYP is bits 2 to 4, SLP_EN bit 5.
                (value & 1 << 5 != 0 && (value >> 2) & 7 == S5).then_some(End::PowerOff)
            }
            RESET_PORT => (value == RESET_VALUE).then_some(End::Reset),
            I8042_COMMAND_PORT => (value == I8042_RESET).then_some(End::Reset),
            _ => {
                if let Some(offset @ 0..8) = port.checked_sub(BASE_PORT) {
                    lock(&self.serial).write(offset as u8, value);
                }
                None
            }
        }
    }

    fn end(&self, end: End) {
        self.end.set(end);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn windows_are_one_page_each_and_end_after_the_last_device() {
        assert_eq!(window(MMIO_START), Some((CONSOLE, 0)));
        assert_eq!(window(MMIO_START + 0x1050), Some((VSOCK, 0x50)));
        assert_eq!(window(MMIO_START + 0x2fff), Some((BLOCK, 0xfff)));
        assert_eq!(window(MMIO_START + 0x3000), Some((BALLOON, 0)));
        assert_eq!(window(MMIO_START + 0x4000), None);
        assert_eq!(window(MMIO_START - 1), None);
    }
}
