//! The memory-mapped transport (virtio 1.2 §4.2): registers, interrupt, and the device's lock.
//!
//! There is one lock a device. A vCPU's access to a register takes it and does the work there and
//! then; the I/O thread takes it for what sockets bring; block's worker only to give results back. It
//! is never held while a disk works. Order: this lock, then whatever a device has inside.

mod core;
mod registers;

use std::{
    sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError, Weak},
    time::{Duration, Instant},
};

use serde::{Deserialize, Serialize, de::DeserializeOwned};

use super::{
    Fault, Interrupt, StateError,
    queue::{QueueState, VirtQueue},
};
use crate::memory::{GuestMemory, ShownPage};
use core::Core;
pub use registers::{feature, register, status};

/// Writes by which a driver says that it has seen why it was interrupted.
pub mod acknowledge {
    /// Register and value where the reason was used buffers alone.
    pub const USED_BUFFERS: (u64, u32) =
        (super::register::INTERRUPT_ACK, super::core::INTERRUPT_QUEUE);
}

/// Bytes of address space a transport takes: registers, then configuration from 0x100.
pub const WINDOW: u64 = 0x1000;

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

    /// A reset is about to wait until the device is no longer [`busy`](Self::busy): what could keep it
    /// so for long is to be given up.
    fn give_up(&mut self) {}

    /// Forgets everything the driver said. The queues are reset by the transport.
    fn reset(&mut self);

    /// A state is about to be taken, or the machine goes on after all: nothing may be left for later that the
    /// state does not hold. The virtual CPUs stand still.
    fn quiesce(&mut self, _context: &mut Context<'_>) -> Result<(), Fault> {
        Ok(())
    }

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

    /// The guest reads the registers from `page` instead of by exits, its interrupt line is edge-triggered, and
    /// acknowledgements of used buffers alone need not arrive (docs/devices.md, "Transport").
    pub fn shown_on(self, page: ShownPage) -> Self {
        self.lock().show_on(page);
        self
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
        core.release();
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
            core.device.give_up();
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
        let mut core = self.lock();
        let result = core.run(work);
        // A system call, and mostly for nobody.
        if core.waiting > 0 {
            self.0.idle.notify_all();
        }
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
        mut core: MutexGuard<'a, Core<D>>,
        limit: Duration,
    ) -> MutexGuard<'a, Core<D>> {
        core.waiting += 1;
        let result = self.0.idle.wait_timeout(core, limit);
        let mut core = result.unwrap_or_else(PoisonError::into_inner).0;
        core.waiting -= 1;
        core
    }
}

#[cfg(test)]
mod tests;
