//! A virtqueue (virtio 1.2 §2.7) as its device sees it: chains in, lengths out.
//!
//! The registers are kept apart from the running queue, which exists only once the driver has said
//! *ready* and everything it gave was found to lie in RAM.

use std::sync::atomic::{Ordering, fence};

use serde::{Deserialize, Serialize};
use virtio_queue::{Error, Queue, QueueOwnedT, QueueT};
use vm_memory::{Bytes, GuestAddress};

use super::{Fault, StateError, chain, chain::Chain};
use crate::memory::GuestMemory;

/// A queue's registers (§4.2.2), as the driver wrote them.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct QueueRegisters {
    pub size: u16,
    pub descriptors: u64,
    pub driver: u64,
    pub device: u64,
}

/// What a saved queue consists of; the rings themselves are guest memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct QueueState {
    pub registers: QueueRegisters,
    pub ready: bool,
    /// Chains taken and given back so far: the same number, as nothing may be under way.
    pub position: u16,
    /// The driver has made chains available that were not taken. For receive queues that is usual, for
    /// others it means work. Kept so that a restore need not touch the rings to find out: in a fork
    /// each first touch is a page fault, and each write a page.
    pub pending: bool,
}

/// Optional ring features, once negotiated (§6).
#[derive(Clone, Copy, Debug, Default)]
pub struct RingFeatures {
    pub indirect: bool,
    pub event_idx: bool,
}

/// Payload that may come back quietly: well below half of a Linux socket's usual send buffer (208 KiB), which
/// is what its packets may hold before a writer that waits for room is not woken for new room.
const QUIET_BYTES: u64 = 32 * 1024;

/// What came back quietly.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
struct Unsaid {
    descriptors: usize,
    bytes: u64,
}

impl Unsaid {
    fn is_much(&self, size: u16) -> bool {
        self.bytes >= QUIET_BYTES || self.descriptors * 4 >= usize::from(size)
    }
}

pub struct VirtQueue {
    device: &'static str,
    index: usize,
    max_size: u16,
    pub(super) registers: QueueRegisters,
    indirect: bool,
    running: Option<Queue>,
    /// Chains were given back since the last `take_signal`, and the driver is to hear of it.
    added: bool,
    /// Chains that were given back and that it need not hear of yet.
    unsaid: Unsaid,
    /// As saved, until asked for.
    pending: bool,
}

impl VirtQueue {
    pub(super) fn new(device: &'static str, index: usize, max_size: u16) -> Self {
        let registers = QueueRegisters { size: max_size, ..QueueRegisters::default() };
        Self {
            device,
            index,
            max_size,
            registers,
            indirect: false,
            running: None,
            added: false,
            unsaid: Unsaid::default(),
            pending: false,
        }
    }

    pub(super) fn reset(&mut self) {
        *self = Self::new(self.device, self.index, self.max_size);
    }

    pub(super) fn stop(&mut self) {
        self.running = None;
        self.added = false;
        self.unsaid = Unsaid::default();
    }

    pub fn is_ready(&self) -> bool {
        self.running.is_some()
    }

    pub fn max_size(&self) -> u16 {
        self.max_size
    }

    /// The driver says that the registers are complete.
    pub(super) fn start(
        &mut self,
        memory: &GuestMemory,
        features: RingFeatures,
    ) -> Result<(), Fault> {
        let queue = self.build(memory, features, 0).map_err(|reason| self.broken(reason))?;
        self.indirect = features.indirect;
        self.running = Some(queue);
        Ok(())
    }

    fn build(
        &self,
        memory: &GuestMemory,
        features: RingFeatures,
        position: u16,
    ) -> Result<Queue, String> {
        let QueueRegisters { size, descriptors, driver, device } = self.registers;
        let wrong = |what: &str| format!("{what} ({:?})", self.registers);
        let mut queue = Queue::new(self.max_size).map_err(|e| wrong(&e.to_string()))?;
        queue.try_set_size(size).map_err(|e| wrong(&e.to_string()))?;
        queue
            .try_set_desc_table_address(GuestAddress(descriptors))
            .and_then(|()| queue.try_set_avail_ring_address(GuestAddress(driver)))
            .and_then(|()| queue.try_set_used_ring_address(GuestAddress(device)))
            .map_err(|e| wrong(&e.to_string()))?;
        // The crate takes an available ring at 0 as not set.
        if driver == 0 {
            return Err(wrong("the driver area is at 0"));
        }
        queue.set_event_idx(features.event_idx);
        queue.set_next_avail(position);
        queue.set_next_used(position);
        queue.set_ready(true);
        if !queue.is_valid(memory) {
            return Err(wrong("the rings are not in memory"));
        }
        Ok(queue)
    }

    /// The next chain, which stays next until [`advance`](Self::advance). None when the driver has
    /// made no more available, or the queue is not ready.
    pub fn peek(&mut self, memory: &GuestMemory) -> Result<Option<Chain>, Fault> {
        let Some(queue) = &mut self.running else { return Ok(None) };
        let head = match queue.iter(memory) {
            Ok(mut available) => available.next().map(|chain| chain.head_index()),
            Err(error) => return Err(self.broken(error.to_string())),
        };
        let Some(head) = head else { return Ok(None) };
        queue.go_to_previous_position();
        let table = chain::Table {
            address: GuestAddress(queue.desc_table()),
            size: queue.size(),
            indirect: self.indirect,
        };
        chain::read(memory, table, head).map(Some).map_err(|reason| self.broken(reason))
    }

    /// Steps past the chain that [`peek`](Self::peek) showed.
    pub fn advance(&mut self) {
        if let Some(queue) = &mut self.running {
            queue.set_next_avail(queue.next_avail().wrapping_add(1));
        }
    }

    /// Takes the next chain.
    pub fn pop(&mut self, memory: &GuestMemory) -> Result<Option<Chain>, Fault> {
        let chain = self.peek(memory)?;
        if chain.is_some() {
            self.advance();
        }
        Ok(chain)
    }

    /// Gives a chain back, with the number of bytes written to it.
    pub fn complete(&mut self, memory: &GuestMemory, head: u16, written: u32) -> Result<(), Fault> {
        let Some(queue) = &mut self.running else { return Ok(()) };
        let result = queue.add_used(memory, head, written);
        self.added = true;
        result.map_err(|error| self.broken(error.to_string()))
    }

    /// Gives back a chain that the driver only frees: it hears of it with the next interrupt for whatever else,
    /// or when [`QUIET_BYTES`] or a quarter of the ring have come back so. An interrupt through virtio-mmio is
    /// several exits of the guest, and a stream of small packets would have one for each. It must hear
    /// of the last ones in the end ([`say_all`](Self::say_all)): Linux wakes a writer only once enough of the
    /// memory of its packets is free again (`sock_def_write_space`), even if there is room at the other end.
    pub fn complete_quietly(&mut self, memory: &GuestMemory, chain: &Chain) -> Result<(), Fault> {
        let said = self.added;
        self.complete(memory, chain.head, 0)?;
        self.unsaid.descriptors += chain.readable.len() + chain.writable.len();
        self.unsaid.bytes += chain.readable_bytes();
        // Who has no event indices may want to hear of each.
        let indices = self.running.as_ref().is_some_and(|queue| queue.event_idx_enabled());
        self.added = said || !indices || self.unsaid.is_much(self.registers.size);
        Ok(())
    }

    /// Whether chains came back that the driver has not heard of.
    pub fn is_quiet(&self) -> bool {
        !self.added && self.unsaid != Unsaid::default()
    }

    /// The driver is interrupted for another queue, and looks at all of them (§4.2.2, InterruptStatus).
    pub(super) fn said(&mut self) {
        if !self.added {
            self.unsaid = Unsaid::default();
        }
    }

    /// Lets the driver hear of all that came back.
    pub fn say_all(&mut self) {
        self.added |= self.unsaid != Unsaid::default();
    }

    /// Asks the driver to notify when it makes the next chain available. True if there is one already:
    /// the notification for it may never come.
    pub fn arm(&mut self, memory: &GuestMemory) -> Result<bool, Fault> {
        self.arm_after(0, memory)
    }

    /// The same for the chain after the next one: of one alone it does not notify. A driver without event indices
    /// notifies of each.
    pub fn arm_for_second(&mut self, memory: &GuestMemory) -> Result<bool, Fault> {
        self.arm_after(1, memory)
    }

    fn arm_after(&mut self, skipped: u16, memory: &GuestMemory) -> Result<bool, Fault> {
        let Some(queue) = &self.running else { return Ok(false) };
        ask_for_notification(queue, skipped, memory)
            .and_then(|()| queue.avail_idx(memory, Ordering::Acquire))
            .map(|available| available.0 != queue.next_avail())
            .map_err(|error| self.broken(error.to_string()))
    }

    /// Whether the saved queue had chains that its device had not looked at. True once after a restore.
    pub fn take_pending(&mut self) -> bool {
        std::mem::take(&mut self.pending)
    }

    /// Whether the driver wants an interrupt for what was given back since the last call.
    pub(super) fn take_signal(&mut self, memory: &GuestMemory) -> Result<bool, Fault> {
        if !std::mem::take(&mut self.added) {
            return Ok(false);
        }
        self.unsaid = Unsaid::default();
        let Some(queue) = &mut self.running else { return Ok(false) };
        queue.needs_notification(memory).map_err(|error| self.broken(error.to_string()))
    }

    pub(super) fn save(&self, memory: &GuestMemory) -> Result<QueueState, StateError> {
        let position = match &self.running {
            None => 0,
            Some(queue) if queue.next_avail() == queue.next_used() => queue.next_used(),
            Some(queue) => {
                let open = queue.next_avail().wrapping_sub(queue.next_used());
                let reason = format!("{open} requests of queue {} are open", self.index);
                return Err(StateError::busy(self.device, reason));
            }
        };
        let available = self.running.as_ref().map(|q| q.avail_idx(memory, Ordering::Acquire));
        let pending = match available {
            Some(Ok(available)) => available.0 != position,
            // What is wrong with it will be found where it is used.
            Some(Err(_)) => true,
            None => false,
        };
        let ready = self.is_ready();
        Ok(QueueState { registers: self.registers, ready, position, pending })
    }

    pub(super) fn restore(
        &mut self,
        state: &QueueState,
        memory: &GuestMemory,
        features: RingFeatures,
    ) -> Result<(), StateError> {
        self.stop();
        self.registers = state.registers;
        self.indirect = features.indirect;
        self.pending = state.ready && state.pending;
        if state.ready {
            let queue = self.build(memory, features, state.position).map_err(|reason| {
                StateError::invalid(self.device, format!("queue {}: {reason}", self.index))
            })?;
            self.running = Some(queue);
        }
        Ok(())
    }

    pub(super) fn broken(&self, reason: impl AsRef<str>) -> Fault {
        Fault::guest(self.device, format!("queue {}: {}", self.index, reason.as_ref()))
    }
}

/// Sets `avail_event` to the next chain or so many later (§2.7.10), unless it is that already: in a fork the write would
/// cost a page. Without event indices nothing is to be done, as notifications are never switched off.
fn ask_for_notification(queue: &Queue, skipped: u16, memory: &GuestMemory) -> Result<(), Error> {
    if !queue.event_idx_enabled() {
        return Ok(());
    }
    // The rings were found to lie in memory, so this can't overflow.
    let address = GuestAddress(queue.used_ring() + 4 + 8 * u64::from(queue.size()));
    let wanted = queue.next_avail().wrapping_add(skipped);
    let current = memory.load::<u16>(address, Ordering::Relaxed).map_err(Error::GuestMemory)?;
    if current != wanted.to_le() {
        let stored = memory.store(wanted.to_le(), address, Ordering::Relaxed);
        stored.map_err(Error::GuestMemory)?;
    }
    // The driver writes its index and then reads ours; we write ours and then read its.
    fence(Ordering::SeqCst);
    Ok(())
}
