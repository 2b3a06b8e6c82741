//! What is behind a transport's lock: the registers' values and what accesses do.

use super::{
    Context, TransportState, VirtioDevice,
    registers::{feature, register, status},
};
use crate::{
    devices::virtio::{
        Fault, Interrupt, StateError,
        queue::{RingFeatures, VirtQueue},
        read_config_bytes,
    },
    memory::{GuestMemory, ShownPage},
};

/// Version of [`TransportState`]; a device's own part changes with it.
const STATE_VERSION: u16 = 1;

const MAGIC: u32 = u32::from_le_bytes(*b"virt");
const VERSION: u32 = 2;
const VENDOR: u32 = u32::from_le_bytes(*b"HRMT");

/// Interrupt status bits (§4.2.2).
pub const INTERRUPT_QUEUE: u32 = 1;
const INTERRUPT_CONFIG: u32 = 2;

pub(super) struct Core<D> {
    pub(super) device: D,
    memory: GuestMemory,
    interrupt: Box<dyn Interrupt>,
    queues: Vec<VirtQueue>,
    status: u32,
    driver_features: u64,
    device_features_sel: u32,
    driver_features_sel: u32,
    queue_sel: u32,
    interrupt_status: u32,
    config_generation: u32,
    /// Level of the interrupt line, as last set. Never high where it is edge-triggered.
    line: bool,
    /// Where the guest reads the registers without us; its interrupts are edges then.
    page: Option<ShownPage>,
    /// An edge is due.
    edge: bool,
    /// Between `restore` and `resume`: the line is left alone.
    held: bool,
    /// Threads that wait for the device to be no longer busy.
    pub(super) waiting: u32,
    /// A fault met outside of the guest's access, told at its next one.
    pub(super) fault: Option<Fault>,
}

impl<D: VirtioDevice> Core<D> {
    pub(super) const OFFERED: u64 = D::FEATURES | feature::VERSION_1 | feature::EVENT_IDX;

    pub(super) fn new(device: D, memory: GuestMemory, interrupt: Box<dyn Interrupt>) -> Self {
        let queues =
            D::QUEUES.iter().enumerate().map(|(i, size)| VirtQueue::new(D::NAME, i, *size));
        Self {
            device,
            memory,
            interrupt,
            queues: queues.collect(),
            status: 0,
            driver_features: 0,
            device_features_sel: 0,
            driver_features_sel: 0,
            queue_sel: 0,
            interrupt_status: 0,
            config_generation: 0,
            line: false,
            page: None,
            edge: false,
            held: false,
            waiting: 0,
            fault: None,
        }
    }

    pub(super) fn read(&mut self, offset: u64, data: &mut [u8]) {
        if let Some(offset) = offset.checked_sub(register::CONFIG) {
            return read_config_bytes(&self.device.config(), offset, data);
        }
        // §4.2.2.2: registers are read in aligned words. Anything else has no meaning.
        match <&mut [u8; 4]>::try_from(&mut *data) {
            Ok(word) if offset.is_multiple_of(4) => {
                *word = self.read_register(offset).to_le_bytes();
            }
            _ => data.fill(0),
        }
    }

    fn read_register(&self, offset: u64) -> u32 {
        match offset {
            register::MAGIC => MAGIC,
            register::VERSION => VERSION,
            register::DEVICE_ID => D::ID,
            register::VENDOR_ID => VENDOR,
            register::DEVICE_FEATURES => half(Self::OFFERED, self.device_features_sel),
            register::QUEUE_SIZE_MAX => {
                self.queues.get(self.queue_sel as usize).map_or(0, |q| u32::from(q.max_size()))
            }
            register::QUEUE_READY => {
                self.queues.get(self.queue_sel as usize).is_some_and(|q| q.is_ready()).into()
            }
            register::INTERRUPT_STATUS => self.interrupt_status,
            register::STATUS => self.status,
            // No shared memory regions: length and base are all ones (§4.2.2).
            register::SHM_LEN_LOW..=register::SHM_BASE_HIGH => u32::MAX,
            register::CONFIG_GENERATION => self.config_generation,
            _ => 0,
        }
    }

    pub(super) fn show_on(&mut self, page: ShownPage) {
        self.page = Some(page);
        self.edge = self.interrupt_status != 0;
        self.show();
    }

    /// What was restored may be told from here on.
    pub(super) fn release(&mut self) {
        self.held = false;
    }

    /// Brings the page to what reads of registers and configuration would give.
    fn show(&self) {
        let Some(page) = &self.page else { return };
        for offset in (0..register::CONFIG).step_by(4) {
            page.put(offset, self.read_register(offset));
        }
        for (offset, bytes) in (register::CONFIG..).step_by(4).zip(self.device.config().chunks(4)) {
            let mut word = [0; 4];
            word[..bytes.len()].copy_from_slice(bytes);
            page.put(offset, u32::from_le_bytes(word));
        }
    }

    pub(super) fn write(&mut self, offset: u64, data: &[u8]) -> Result<(), Fault> {
        let result = self.take_write(offset, data);
        // A notification changes the interrupt status at most, which `tell` shows.
        if offset != register::QUEUE_NOTIFY {
            self.show();
        }
        result
    }

    fn take_write(&mut self, offset: u64, data: &[u8]) -> Result<(), Fault> {
        // No device has configuration that a driver may write.
        let Ok(value) = <[u8; 4]>::try_from(data).map(u32::from_le_bytes) else { return Ok(()) };
        match offset {
            register::DEVICE_FEATURES_SEL => self.device_features_sel = value,
            register::DRIVER_FEATURES_SEL => self.driver_features_sel = value,
            register::DRIVER_FEATURES => self.write_features(value),
            register::QUEUE_SEL => self.queue_sel = value,
            register::QUEUE_NOTIFY => return self.notify(value),
            register::INTERRUPT_ACK => {
                self.interrupt_status &= !value;
                return self.tell(0);
            }
            register::STATUS => return self.write_status(value),
            register::QUEUE_SIZE..=register::QUEUE_DEVICE_HIGH => {
                return self.write_queue(offset, value);
            }
            _ => {}
        }
        Ok(())
    }

    fn write_features(&mut self, value: u32) {
        // §3.1.1: features are settled by FEATURES_OK.
        if self.status & status::FEATURES_OK != 0 {
            return;
        }
        let (mask, shift) = match self.driver_features_sel {
            0 => (u64::from(u32::MAX), 0),
            1 => (u64::from(u32::MAX) << 32, 32),
            _ => return,
        };
        self.driver_features = self.driver_features & !mask | u64::from(value) << shift;
    }

    fn write_queue(&mut self, offset: u64, value: u32) -> Result<(), Fault> {
        let features = self.ring_features();
        let settled = self.status & status::FEATURES_OK != 0;
        let Some(queue) = self.queues.get_mut(self.queue_sel as usize) else { return Ok(()) };
        if offset == register::QUEUE_READY {
            return match value & 1 {
                0 => {
                    queue.stop();
                    Ok(())
                }
                _ if queue.is_ready() => Ok(()),
                _ if !settled => Err(queue.broken("made ready before features were settled")),
                _ => queue.start(&self.memory, features),
            };
        }
        // §4.2.2.2: the driver must not write these while the queue is ready.
        if queue.is_ready() {
            return Err(queue.broken(format!("register {offset:#x} written while ready")));
        }
        let registers = &mut queue.registers;
        match offset {
            // A size that does not fit 16 bits is as wrong as 0, which `start` refuses.
            register::QUEUE_SIZE => registers.size = u16::try_from(value).unwrap_or(0),
            register::QUEUE_DESC_LOW => set_low(&mut registers.descriptors, value),
            register::QUEUE_DESC_HIGH => set_high(&mut registers.descriptors, value),
            register::QUEUE_DRIVER_LOW => set_low(&mut registers.driver, value),
            register::QUEUE_DRIVER_HIGH => set_high(&mut registers.driver, value),
            register::QUEUE_DEVICE_LOW => set_low(&mut registers.device, value),
            register::QUEUE_DEVICE_HIGH => set_high(&mut registers.device, value),
            _ => {}
        }
        Ok(())
    }

    fn write_status(&mut self, value: u32) -> Result<(), Fault> {
        if value == 0 {
            self.reset();
            return self.tell(0);
        }
        // §2.1.1: the driver must not clear a bit.
        if self.status & !value != 0 {
            let (old, new) = (self.status, value);
            return Err(Fault::guest(D::NAME, format!("status goes back: {old:#x} to {new:#x}")));
        }
        let fresh = value & !self.status & status::ALL;
        self.status |= fresh;
        if fresh & status::FEATURES_OK != 0 && !self.features_acceptable() {
            // §3.1.1: the driver reads the bit back and gives up.
            self.status &= !status::FEATURES_OK;
        }
        if fresh & status::DRIVER_OK == 0 {
            return Ok(());
        }
        if self.status & status::FEATURES_OK == 0 {
            return Err(Fault::guest(D::NAME, "driver started without settling features"));
        }
        self.run(|device, context| device.activate(context))
    }

    fn reset(&mut self) {
        self.device.reset();
        self.queues.iter_mut().for_each(VirtQueue::reset);
        self.status = 0;
        self.driver_features = 0;
        self.device_features_sel = 0;
        self.driver_features_sel = 0;
        self.queue_sel = 0;
        self.interrupt_status = 0;
        self.edge = false;
    }

    fn notify(&mut self, queue: u32) -> Result<(), Fault> {
        let queue = queue as usize;
        // Before DRIVER_OK a driver may not notify (§3.1.1); activation looks at every queue anyway.
        if !self.active() || !self.queues.get(queue).is_some_and(VirtQueue::is_ready) {
            return Ok(());
        }
        self.run(|device, context| device.notify(queue, context))
    }

    /// Lets the device work, then raises the interrupts that come of it.
    pub(super) fn run<R>(
        &mut self,
        work: impl FnOnce(&mut D, &mut Context<'_>) -> Result<R, Fault>,
    ) -> Result<R, Fault> {
        let active = self.active();
        let mut context = Context {
            memory: &self.memory,
            queues: &mut self.queues,
            features: self.driver_features,
            active,
            config_changed: false,
        };
        let result = work(&mut self.device, &mut context)?;
        let mut news = 0;
        if context.config_changed {
            self.config_generation = self.config_generation.wrapping_add(1);
            if active {
                news |= INTERRUPT_CONFIG;
            }
            self.show();
        }
        for queue in &mut self.queues {
            if queue.take_signal(&self.memory)? {
                news |= INTERRUPT_QUEUE;
            }
        }
        if news & INTERRUPT_QUEUE != 0 {
            self.queues.iter_mut().for_each(VirtQueue::said);
        }
        self.tell(news)?;
        Ok(result)
    }

    /// Interrupts the guest if there is news, or brings the line to where the status says it is.
    fn tell(&mut self, news: u32) -> Result<(), Fault> {
        self.interrupt_status |= news;
        let result = if let Some(page) = &self.page {
            // Before the edge: the guest looks at it when it is interrupted.
            page.put(register::INTERRUPT_STATUS, self.interrupt_status);
            self.edge |= news != 0;
            if self.held || !std::mem::take(&mut self.edge) {
                return Ok(());
            }
            self.interrupt.pulse()
        } else {
            let high = self.interrupt_status != 0;
            if self.held || high == self.line {
                return Ok(());
            }
            self.line = high;
            self.interrupt.set_level(high)
        };
        let what = "set the interrupt line";
        result.map_err(|source| Fault::Host { device: D::NAME, what, source })
    }

    fn active(&self) -> bool {
        self.status & status::DRIVER_OK != 0
    }

    fn features_acceptable(&self) -> bool {
        self.driver_features & !Self::OFFERED == 0 && self.driver_features & feature::VERSION_1 != 0
    }

    fn ring_features(&self) -> RingFeatures {
        RingFeatures {
            indirect: self.driver_features & feature::INDIRECT_DESC != 0,
            event_idx: self.driver_features & feature::EVENT_IDX != 0,
        }
    }

    pub(super) fn save(&mut self) -> Result<TransportState<D::State>, StateError> {
        if self.active() {
            self.run(|device, context| device.quiesce(context)).map_err(|fault| {
                StateError::invalid(D::NAME, format!("it can't come to rest: {fault}"))
            })?;
        }
        if self.device.busy() {
            return Err(StateError::busy(D::NAME, "requests are under way"));
        }
        // A restored queue knows of nothing unsaid: the driver is to look for it when it goes on.
        let quiet = self.queues.iter().any(VirtQueue::is_quiet);
        let unsaid = if quiet { INTERRUPT_QUEUE } else { 0 };
        let queues = self.queues.iter().map(|queue| queue.save(&self.memory));
        Ok(TransportState {
            version: STATE_VERSION,
            name: D::NAME.into(),
            status: self.status,
            driver_features: self.driver_features,
            device_features_sel: self.device_features_sel,
            driver_features_sel: self.driver_features_sel,
            queue_sel: self.queue_sel,
            interrupt_status: self.interrupt_status | unsaid,
            config_generation: self.config_generation,
            queues: queues.collect::<Result<_, _>>()?,
            device: self.device.save()?,
        })
    }

    pub(super) fn load(&mut self, state: TransportState<D::State>) -> Result<(), StateError> {
        let invalid = |reason: String| Err(StateError::invalid(D::NAME, reason));
        let (found, expected) = (state.version, STATE_VERSION);
        if found != expected {
            return Err(StateError::Version { device: D::NAME, found, expected });
        }
        if state.name != D::NAME {
            return invalid(format!("it is that of {:?}", state.name));
        }
        self.status = state.status;
        self.driver_features = state.driver_features;
        let settled = self.status & status::FEATURES_OK != 0;
        let unknown = self.status & !status::ALL != 0;
        if unknown || self.active() && !settled || settled && !self.features_acceptable() {
            let (status, features) = (self.status, self.driver_features);
            return invalid(format!("status {status:#x} with features {features:#x}"));
        }
        if state.queues.len() != self.queues.len() {
            return invalid(format!("it has {} queues", state.queues.len()));
        }
        if !settled && state.queues.iter().any(|queue| queue.ready) {
            return invalid("a queue is ready before features are settled".into());
        }
        if state.interrupt_status & !(INTERRUPT_QUEUE | INTERRUPT_CONFIG) != 0 {
            return invalid(format!("interrupt status {:#x}", state.interrupt_status));
        }
        let features = self.ring_features();
        for (queue, state) in self.queues.iter_mut().zip(&state.queues) {
            queue.restore(state, &self.memory, features)?;
        }
        self.device_features_sel = state.device_features_sel;
        self.driver_features_sel = state.driver_features_sel;
        self.queue_sel = state.queue_sel;
        self.interrupt_status = state.interrupt_status;
        self.config_generation = state.config_generation;
        self.held = true;
        self.device.load(state.device)
    }
}

fn half(value: u64, select: u32) -> u32 {
    match select {
        // The casts take the half that is asked for.
        0 => value as u32,
        1 => (value >> 32) as u32,
        _ => 0,
    }
}

fn set_low(register: &mut u64, value: u32) {
    *register = *register & !u64::from(u32::MAX) | u64::from(value);
}

fn set_high(register: &mut u64, value: u32) {
    *register = *register & u64::from(u32::MAX) | u64::from(value) << 32;
}
