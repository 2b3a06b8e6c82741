//! The memory-mapped transport (virtio 1.2 §4.2): registers, interrupt, and the device's lock.
//!
//! There is one lock a device. A vCPU's access to a register takes it and does the work there and
//! then; the I/O thread takes it for what sockets bring; block's worker only to give results back. It
//! is never held while a disk works. Order: this lock, then whatever a device has inside.

use std::{
    sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError, Weak},
    time::{Duration, Instant},
};

use serde::{Deserialize, Serialize, de::DeserializeOwned};

use super::{
    Fault, Interrupt, StateError,
    queue::{QueueState, RingFeatures, VirtQueue},
    read_config_bytes,
};
use crate::memory::GuestMemory;

/// Bytes of address space a transport takes: registers, then configuration from 0x100.
pub const WINDOW: u64 = 0x1000;

/// Version of [`TransportState`]; a device's own part changes with it.
const STATE_VERSION: u16 = 1;

/// Device status bits (§2.1).
pub mod status {
    pub const ACKNOWLEDGE: u32 = 1;
    pub const DRIVER: u32 = 2;
    pub const DRIVER_OK: u32 = 4;
    pub const FEATURES_OK: u32 = 8;
    pub const NEEDS_RESET: u32 = 64;
    pub const FAILED: u32 = 128;
    pub(super) const ALL: u32 =
        ACKNOWLEDGE | DRIVER | DRIVER_OK | FEATURES_OK | NEEDS_RESET | FAILED;
}

/// Feature bits every device may have (§6).
pub mod feature {
    pub const INDIRECT_DESC: u64 = 1 << 28;
    pub const EVENT_IDX: u64 = 1 << 29;
    pub const VERSION_1: u64 = 1 << 32;
}

/// Registers (§4.2.2).
pub mod register {
    pub const MAGIC: u64 = 0x00;
    pub const VERSION: u64 = 0x04;
    pub const DEVICE_ID: u64 = 0x08;
    pub const VENDOR_ID: u64 = 0x0c;
    pub const DEVICE_FEATURES: u64 = 0x10;
    pub const DEVICE_FEATURES_SEL: u64 = 0x14;
    pub const DRIVER_FEATURES: u64 = 0x20;
    pub const DRIVER_FEATURES_SEL: u64 = 0x24;
    pub const QUEUE_SEL: u64 = 0x30;
    pub const QUEUE_SIZE_MAX: u64 = 0x34;
    pub const QUEUE_SIZE: u64 = 0x38;
    pub const QUEUE_READY: u64 = 0x44;
    pub const QUEUE_NOTIFY: u64 = 0x50;
    pub const INTERRUPT_STATUS: u64 = 0x60;
    pub const INTERRUPT_ACK: u64 = 0x64;
    pub const STATUS: u64 = 0x70;
    pub const QUEUE_DESC_LOW: u64 = 0x80;
    pub const QUEUE_DESC_HIGH: u64 = 0x84;
    pub const QUEUE_DRIVER_LOW: u64 = 0x90;
    pub const QUEUE_DRIVER_HIGH: u64 = 0x94;
    pub const QUEUE_DEVICE_LOW: u64 = 0xa0;
    pub const QUEUE_DEVICE_HIGH: u64 = 0xa4;
    pub const SHM_LEN_LOW: u64 = 0xb0;
    pub const SHM_BASE_HIGH: u64 = 0xbc;
    pub const CONFIG_GENERATION: u64 = 0xfc;
    pub const CONFIG: u64 = 0x100;
}

const MAGIC: u32 = u32::from_le_bytes(*b"virt");
const VERSION: u32 = 2;
const VENDOR: u32 = u32::from_le_bytes(*b"HRMT");

/// Interrupt status bits (§4.2.2).
const INTERRUPT_QUEUE: u32 = 1;
const INTERRUPT_CONFIG: u32 = 2;

/// What makes a device a console, a socket or a disk. Called with the transport's lock held; must not
/// wait for anything.
pub trait VirtioDevice: Send + Sized + 'static {
    const NAME: &'static str;
    /// Device type (§5).
    const ID: u32;
    /// Largest size of each queue.
    const QUEUES: &'static [u16];
    /// What the device offers besides VERSION_1 and EVENT_IDX.
    const FEATURES: u64;

    /// What outlives the process, apart from the transport's part.
    type State: Serialize + DeserializeOwned;

    /// The configuration space (§2.5).
    fn config(&self) -> Vec<u8>;

    /// The driver is up (DRIVER_OK): queues may be used from here on.
    fn activate(&mut self, context: &mut Context<'_>) -> Result<(), Fault>;

    /// The driver notified a queue.
    fn notify(&mut self, queue: usize, context: &mut Context<'_>) -> Result<(), Fault>;

    /// Forgets everything the driver said. The queues are reset by the transport.
    fn reset(&mut self);

    /// The state for a snapshot. A device in the middle of something refuses with
    /// [`StateError::Busy`].
    fn save(&self) -> Result<Self::State, StateError>;

    /// Becomes what was saved. `self` is as built. Everything in `state` is to be checked as if the
    /// guest had written it.
    fn load(&mut self, state: Self::State) -> Result<(), StateError>;

    /// Last step of a restore: virtual CPUs are about to run.
    fn resume(&mut self, _context: &mut Context<'_>) -> Result<(), Fault> {
        Ok(())
    }

    /// Chains were taken that another thread still works on.
    fn busy(&self) -> bool {
        false
    }

    /// Called once with the way back to the device, for those that have threads.
    fn bind(&mut self, _handle: Handle<Self>) {}
}

/// What a device works with while it has the lock.
pub struct Context<'a> {
    pub memory: &'a GuestMemory,
    pub queues: &'a mut [VirtQueue],
    /// Negotiated features.
    pub features: u64,
    /// DRIVER_OK is set.
    pub active: bool,
    /// To be set when the configuration space changed.
    pub config_changed: bool,
}

/// A saved device.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct TransportState<S> {
    pub version: u16,
    /// The device's name, so that states can't be mixed up.
    pub name: String,
    pub status: u32,
    pub driver_features: u64,
    pub device_features_sel: u32,
    pub driver_features_sel: u32,
    pub queue_sel: u32,
    pub interrupt_status: u32,
    pub config_generation: u32,
    pub queues: Vec<QueueState>,
    pub device: S,
}

/// A virtio device behind its registers. Clones are the same device.
pub struct Transport<D>(Arc<Shared<D>>);

impl<D> Clone for Transport<D> {
    fn clone(&self) -> Self {
        Self(self.0.clone())
    }
}

/// The way back to a device from a thread of its own; does not keep it alive.
pub struct Handle<D>(Weak<Shared<D>>);

impl<D> Clone for Handle<D> {
    fn clone(&self) -> Self {
        Self(self.0.clone())
    }
}

impl<D> Handle<D> {
    /// None once the machine has dropped the device.
    pub fn upgrade(&self) -> Option<Transport<D>> {
        self.0.upgrade().map(Transport)
    }
}

struct Shared<D> {
    core: Mutex<Core<D>>,
    /// Signalled when `busy` may have become false.
    idle: Condvar,
}

struct Core<D> {
    device: D,
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
    /// Level of the interrupt line, as last set.
    line: bool,
    /// Between `restore` and `resume`: the line is left alone.
    held: bool,
    /// A fault met outside of the guest's access, told at its next one.
    fault: Option<Fault>,
}

impl<D: VirtioDevice> Transport<D> {
    /// A device as after power-on.
    pub fn new(device: D, memory: GuestMemory, interrupt: impl Interrupt + 'static) -> Self {
        Self::build(Core::new(device, memory, Box::new(interrupt)))
    }

    /// A device as it was saved. Nothing reaches the guest before [`resume`](Self::resume).
    pub fn restore(
        state: TransportState<D::State>,
        device: D,
        memory: GuestMemory,
        interrupt: impl Interrupt + 'static,
    ) -> Result<Self, StateError> {
        let mut core = Core::new(device, memory, Box::new(interrupt));
        core.load(state)?;
        Ok(Self::build(core))
    }

    fn build(core: Core<D>) -> Self {
        let transport = Self(Arc::new(Shared { core: Mutex::new(core), idle: Condvar::new() }));
        let handle = Handle(Arc::downgrade(&transport.0));
        transport.lock().device.bind(handle);
        transport
    }

    /// To be called once after [`restore`](Self::restore), when KVM's interrupt controllers have
    /// their state and before a virtual CPU runs: what the device has to say is said here.
    pub fn resume(&self) -> Result<(), Fault> {
        let mut core = self.lock();
        core.held = false;
        core.run(|device, context| device.resume(context))
    }

    /// Waits until no request is under way, so that [`save`](Self::save) can't be refused for one.
    /// The vCPUs must be paused. False when `limit` is over.
    pub fn drain(&self, limit: Duration) -> bool {
        let deadline = Instant::now() + limit;
        let mut core = self.lock();
        while core.device.busy() {
            let Some(left) = deadline.checked_duration_since(Instant::now()) else { return false };
            core = self.wait_idle(core, left);
        }
        true
    }

    pub fn save(&self) -> Result<TransportState<D::State>, StateError> {
        self.lock().save()
    }

    /// The guest reads a register, or configuration (any width).
    pub fn read(&self, offset: u64, data: &mut [u8]) {
        self.lock().read(offset, data);
    }

    /// The guest writes a register, or configuration. A fault ends the machine.
    pub fn write(&self, offset: u64, data: &[u8]) -> Result<(), Fault> {
        let mut core = self.lock();
        if let Some(fault) = core.fault.take() {
            return Err(fault);
        }
        if offset == register::STATUS && data == [0; 4] {
            // A reset is complete only when no thread touches the guest's buffers any more (§2.4).
            while core.device.busy() {
                core = self.wait_idle(core, Duration::from_secs(1));
            }
        }
        core.write(offset, data)
    }

    /// Works on the device from outside of the guest's accesses, under the lock; interrupts that come
    /// of it are raised at the end.
    pub(super) fn with<R>(
        &self,
        work: impl FnOnce(&mut D, &mut Context<'_>) -> Result<R, Fault>,
    ) -> Result<R, Fault> {
        let result = self.lock().run(work);
        self.0.idle.notify_all();
        result
    }

    /// Looks at the device.
    pub(super) fn look<R>(&self, look: impl FnOnce(&mut D) -> R) -> R {
        look(&mut self.lock().device)
    }

    /// Leaves a fault to be told at the guest's next access, for threads that nobody listens to.
    pub(super) fn leave_fault(&self, fault: Fault) {
        tracing::error!(%fault, "device thread");
        self.lock().fault.get_or_insert(fault);
    }

    fn lock(&self) -> MutexGuard<'_, Core<D>> {
        self.0.core.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn wait_idle<'a>(
        &'a self,
        core: MutexGuard<'a, Core<D>>,
        limit: Duration,
    ) -> MutexGuard<'a, Core<D>> {
        let result = self.0.idle.wait_timeout(core, limit);
        result.unwrap_or_else(PoisonError::into_inner).0
    }
}

impl<D: VirtioDevice> Core<D> {
    const OFFERED: u64 = D::FEATURES | feature::VERSION_1 | feature::EVENT_IDX;

    fn new(device: D, memory: GuestMemory, interrupt: Box<dyn Interrupt>) -> Self {
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
            held: false,
            fault: None,
        }
    }

    fn read(&mut self, offset: u64, data: &mut [u8]) {
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

    fn write(&mut self, offset: u64, data: &[u8]) -> Result<(), Fault> {
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
                return self.drive_line();
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
            return self.drive_line();
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
    fn run<R>(
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
        if context.config_changed {
            self.config_generation = self.config_generation.wrapping_add(1);
            if active {
                self.interrupt_status |= INTERRUPT_CONFIG;
            }
        }
        for queue in &mut self.queues {
            if queue.take_signal(&self.memory)? {
                self.interrupt_status |= INTERRUPT_QUEUE;
            }
        }
        self.drive_line()?;
        Ok(result)
    }

    /// Brings the line to where the status says it is.
    fn drive_line(&mut self) -> Result<(), Fault> {
        let high = self.interrupt_status != 0;
        if self.held || high == self.line {
            return Ok(());
        }
        self.interrupt.set_level(high).map_err(|source| Fault::Host {
            device: D::NAME,
            what: "set the interrupt line",
            source,
        })?;
        self.line = high;
        Ok(())
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

    fn save(&self) -> Result<TransportState<D::State>, StateError> {
        if self.device.busy() {
            return Err(StateError::busy(D::NAME, "requests are under way"));
        }
        Ok(TransportState {
            version: STATE_VERSION,
            name: D::NAME.into(),
            status: self.status,
            driver_features: self.driver_features,
            device_features_sel: self.device_features_sel,
            driver_features_sel: self.driver_features_sel,
            queue_sel: self.queue_sel,
            interrupt_status: self.interrupt_status,
            config_generation: self.config_generation,
            queues: self.queues.iter().map(VirtQueue::save).collect::<Result<_, _>>()?,
            device: self.device.save()?,
        })
    }

    fn load(&mut self, state: TransportState<D::State>) -> Result<(), StateError> {
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

#[cfg(test)]
mod tests;
