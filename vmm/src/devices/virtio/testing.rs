//! A driver for tests: what Linux does with a device, and anything else one asks of it.
//!
//! It notifies and is interrupted only as the rings say (VIRTIO_F_EVENT_IDX), so that a device that
//! forgets to ask for a notification, or to interrupt, leaves a test waiting.

use std::{
    collections::HashMap,
    io,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
};

use vm_memory::{Bytes, GuestAddress};

use super::{
    Fault, Interrupt, Transport, VirtioDevice, acknowledge,
    transport::{register, status},
};
use crate::memory::{GuestMemory, ShownPage};

pub const MEMORY: u64 = 32 << 20;
/// Queues' rings come first, each in a window of its own; buffers from here on.
const BUFFERS: u64 = 4 << 20;
const QUEUE_WINDOW: u64 = 64 << 10;

/// An interrupt line that remembers its level, or, edge-triggered, that it has risen.
#[derive(Clone, Default)]
pub struct Line {
    high: Arc<AtomicBool>,
    risen: Arc<AtomicBool>,
    edge: bool,
}

impl Line {
    fn triggered(edge: bool) -> Self {
        Self { edge, ..Self::default() }
    }

    /// Whether the guest is interrupted.
    pub fn is_high(&self) -> bool {
        let state = if self.edge { &self.risen } else { &self.high };
        state.load(Ordering::SeqCst)
    }

    /// The guest takes the interrupt. A level stays.
    fn take(&self) -> bool {
        if self.edge { self.risen.swap(false, Ordering::SeqCst) } else { self.is_high() }
    }
}

impl Interrupt for Line {
    fn set_level(&self, high: bool) -> io::Result<()> {
        if high && !self.high.swap(high, Ordering::SeqCst) {
            self.risen.store(true, Ordering::SeqCst);
        }
        self.high.store(high, Ordering::SeqCst);
        Ok(())
    }
}

pub fn memory() -> GuestMemory {
    GuestMemory::from_ranges(&[(GuestAddress(0), MEMORY as usize)]).unwrap()
}

/// A buffer: address, length, and whether the device may write to it.
pub type Buffer = (u64, u32, bool);

pub struct Ring {
    base: u64,
    size: u16,
    free: Vec<u16>,
    chains: HashMap<u16, Vec<u16>>,
    available: u16,
    notified: u16,
    seen: u16,
}

/// A driver and its device.
pub struct Driver<D> {
    pub device: Transport<D>,
    pub memory: GuestMemory,
    pub line: Line,
    /// Where it reads registers, if not by asking the device.
    page: Option<ShownPage>,
    pub rings: Vec<Ring>,
    /// How often it notified.
    pub notifications: u32,
    next_buffer: u64,
    turns: u32,
}

/// Far more than any test needs.
const MOST_TURNS: u32 = 3_000_000;

impl<D: VirtioDevice> Driver<D> {
    /// Called wherever tests wait for something to happen: what never does is to fail, not to hang.
    pub fn turn(&mut self) {
        self.turns += 1;
        assert!(self.turns < MOST_TURNS, "the test waits for something that does not happen");
    }

    /// Goes through initialisation (virtio 1.2 §3.1.1) with all features offered.
    pub fn start(device: D) -> Self {
        Self::start_in(device, memory())
    }

    /// The same with a memory that begins as [`memory`]'s.
    pub fn start_in(device: D, memory: GuestMemory) -> Self {
        Self::start_with(device, memory, None)
    }

    /// With its registers on a page, and interrupted by edges.
    pub fn start_shown(device: D) -> Self {
        Self::start_with(device, memory(), Some(ShownPage::new().unwrap()))
    }

    fn start_with(device: D, memory: GuestMemory, page: Option<ShownPage>) -> Self {
        let line = Line::triggered(page.is_some());
        let transport = Transport::new(device, memory.clone(), line.clone());
        let mut driver = Self {
            device: shown(transport, &page),
            memory,
            line,
            page,
            rings: Vec::new(),
            notifications: 0,
            next_buffer: BUFFERS,
            turns: 0,
        };
        driver.initialise().unwrap();
        driver
    }

    pub fn initialise(&mut self) -> Result<(), Fault> {
        assert_eq!(self.get(register::MAGIC), 0x7472_6976);
        assert_eq!(self.get(register::VERSION), 2);
        assert_eq!(self.get(register::DEVICE_ID), D::ID);
        self.set(register::STATUS, 0)?;
        self.set(register::STATUS, status::ACKNOWLEDGE)?;
        self.set(register::STATUS, status::ACKNOWLEDGE | status::DRIVER)?;
        for half in 0..2 {
            self.set(register::DEVICE_FEATURES_SEL, half)?;
            let offered = self.get(register::DEVICE_FEATURES);
            self.set(register::DRIVER_FEATURES_SEL, half)?;
            self.set(register::DRIVER_FEATURES, offered)?;
        }
        let settled = status::ACKNOWLEDGE | status::DRIVER | status::FEATURES_OK;
        self.set(register::STATUS, settled)?;
        assert_eq!(self.get(register::STATUS), settled);
        self.rings.clear();
        for (index, size) in D::QUEUES.iter().enumerate() {
            let base = QUEUE_WINDOW * (index as u64 + 1);
            self.memory.write_slice(&vec![0; QUEUE_WINDOW as usize], GuestAddress(base)).unwrap();
            self.set(register::QUEUE_SEL, index as u32)?;
            assert_eq!(self.get(register::QUEUE_SIZE_MAX), u32::from(*size));
            self.set(register::QUEUE_SIZE, u32::from(*size))?;
            let ring = Ring::new(base, *size);
            self.set(register::QUEUE_DESC_LOW, ring.descriptors() as u32)?;
            self.set(register::QUEUE_DRIVER_LOW, ring.driver() as u32)?;
            self.set(register::QUEUE_DEVICE_LOW, ring.device() as u32)?;
            self.set(register::QUEUE_READY, 1)?;
            assert_eq!(self.get(register::QUEUE_READY), 1);
            self.rings.push(ring);
        }
        self.set(register::STATUS, settled | status::DRIVER_OK)
    }

    pub fn get(&self, register: u64) -> u32 {
        if let Some(page) = &self.page {
            return page.get(register);
        }
        let mut raw = [0; 4];
        self.device.read(register, &mut raw);
        u32::from_le_bytes(raw)
    }

    pub fn set(&self, register: u64, value: u32) -> Result<(), Fault> {
        if self.page.is_some() && (register, value) == acknowledge::USED_BUFFERS {
            // KVM drops it.
            return Ok(());
        }
        self.device.write(register, &value.to_le_bytes())
    }

    pub fn config<const N: usize>(&self, offset: u64) -> [u8; N] {
        let mut raw = [0; N];
        self.device.read(register::CONFIG + offset, &mut raw);
        raw
    }

    /// Fresh guest memory.
    pub fn allocate(&mut self, length: u32) -> u64 {
        let address = self.next_buffer;
        self.next_buffer += u64::from(length).next_multiple_of(64);
        if self.next_buffer > MEMORY {
            // Tests that run on keep to what they allocated before.
            panic!("the test's guest memory is used up");
        }
        address
    }

    pub fn put(&self, address: u64, bytes: &[u8]) {
        self.memory.write_slice(bytes, GuestAddress(address)).unwrap();
    }

    pub fn bytes(&self, address: u64, length: usize) -> Vec<u8> {
        let mut bytes = vec![0; length];
        self.memory.read_slice(&mut bytes, GuestAddress(address)).unwrap();
        bytes
    }

    pub fn free_descriptors(&self, queue: usize) -> usize {
        self.rings[queue].free.len()
    }

    /// The descriptor that the next chain starts with.
    pub fn next_descriptor(&self, queue: usize) -> u16 {
        *self.rings[queue].free.last().expect("a free one")
    }

    /// Makes a chain available without notifying.
    pub fn add(&mut self, queue: usize, buffers: &[Buffer]) -> u16 {
        self.rings[queue].add(&self.memory, buffers)
    }

    /// Notifies, if the device asked for it.
    pub fn kick(&mut self, queue: usize) -> Result<(), Fault> {
        let ring = &mut self.rings[queue];
        let event = read_u16(&self.memory, ring.device() + 4 + 8 * u64::from(ring.size));
        let (old, new) = (ring.notified, ring.available);
        ring.notified = new;
        if new.wrapping_sub(event).wrapping_sub(1) < new.wrapping_sub(old) {
            self.notifications += 1;
            return self.set(register::QUEUE_NOTIFY, queue as u32);
        }
        Ok(())
    }

    /// Makes a chain available and notifies if asked to.
    pub fn submit(&mut self, queue: usize, buffers: &[Buffer]) -> Result<u16, Fault> {
        let head = self.add(queue, buffers);
        self.kick(queue)?;
        Ok(head)
    }

    /// Chains that came back since the last call: head and length. The device must have raised its
    /// interrupt for them.
    pub fn used(&mut self, queue: usize) -> Vec<(u16, u32)> {
        let interrupted = self.line.take();
        let used = self.used_quietly(queue);
        assert!(
            used.is_empty() || interrupted,
            "chains came back on queue {queue} without an interrupt"
        );
        used
    }

    /// The same where the interrupt was acknowledged before.
    pub fn used_quietly(&mut self, queue: usize) -> Vec<(u16, u32)> {
        self.turn();
        let (ring, memory) = (&mut self.rings[queue], &self.memory);
        let index = read_u16(memory, ring.device() + 2);
        let mut out = Vec::new();
        while ring.seen != index {
            let at = ring.device() + 4 + 8 * u64::from(ring.seen % ring.size);
            let head = memory.read_obj::<u32>(GuestAddress(at)).unwrap() as u16;
            let length = memory.read_obj::<u32>(GuestAddress(at + 4)).unwrap();
            let chain = ring.chains.remove(&head).expect("a chain came back that was not given");
            ring.free.extend(chain);
            out.push((head, length));
            ring.seen = ring.seen.wrapping_add(1);
        }
        // As Linux: interrupt me at the next one.
        memory.write_obj(ring.seen, GuestAddress(ring.used_event())).unwrap();
        out
    }

    /// Takes every descriptor as free again and the available ring's index as it stands, for drivers
    /// that broke their rings.
    pub fn forget(&mut self, queue: usize) {
        let ring = &mut self.rings[queue];
        ring.free = (0..ring.size).rev().collect();
        ring.chains.clear();
        ring.available = read_u16(&self.memory, ring.driver() + 2);
        ring.seen = read_u16(&self.memory, ring.device() + 2);
    }

    /// What an interrupt handler does first.
    pub fn acknowledge(&self) -> u32 {
        let interrupted = self.line.take();
        let status = self.get(register::INTERRUPT_STATUS);
        if self.page.is_some() {
            // Used buffers may stay noted there. That looks like an interrupt for nothing at worst.
            assert!(!interrupted || status != 0);
        } else {
            assert_eq!(interrupted, status != 0);
        }
        self.set(register::INTERRUPT_ACK, status).unwrap();
        assert!(!self.line.is_high());
        status
    }

    /// On another device, restored from this one's state with this one's memory.
    pub fn put_on(&mut self, device: Transport<D>, line: Line) {
        self.page = self.page.as_ref().map(|_| ShownPage::new().unwrap());
        self.device = shown(device, &self.page);
        self.line = Line { edge: self.page.is_some(), ..line };
    }

    /// What the page shows is what the device would answer.
    pub fn check_page(&self) {
        let Some(page) = &self.page else { return };
        for offset in (0..register::CONFIG + 64).step_by(4) {
            let mut raw = [0; 4];
            self.device.read(offset, &mut raw);
            assert_eq!(page.get(offset), u32::from_le_bytes(raw), "register {offset:#x}");
        }
    }

    /// Saves the device and goes on with a restored one, with a copy of the memory, as a fork does.
    /// `resume` is the caller's.
    pub fn fork(&self, fresh: D) -> Self
    where
        D::State: Clone,
    {
        let state = self.device.save().unwrap();
        let bytes = postcard::to_stdvec(&state).unwrap();
        let memory = memory();
        memory.write_slice(&self.bytes(0, MEMORY as usize), GuestAddress(0)).unwrap();
        let line = Line::triggered(self.page.is_some());
        let state = postcard::from_bytes(&bytes).unwrap();
        let device = Transport::restore(state, fresh, memory.clone(), line.clone()).unwrap();
        let page = self.page.as_ref().map(|_| ShownPage::new().unwrap());
        let device = shown(device, &page);
        let rings = self.rings.iter().map(Ring::copy).collect();
        Self {
            device,
            memory,
            line,
            page,
            rings,
            notifications: 0,
            next_buffer: self.next_buffer,
            turns: 0,
        }
    }
}

fn shown<D: VirtioDevice>(device: Transport<D>, page: &Option<ShownPage>) -> Transport<D> {
    match page {
        Some(page) => device.shown_on(page.clone()),
        None => device,
    }
}

impl Ring {
    fn new(base: u64, size: u16) -> Self {
        let free = (0..size).rev().collect();
        Self { base, size, free, chains: HashMap::new(), available: 0, notified: 0, seen: 0 }
    }

    fn copy(&self) -> Self {
        Self { free: self.free.clone(), chains: self.chains.clone(), ..*self }
    }

    pub fn descriptors(&self) -> u64 {
        self.base
    }

    pub fn driver(&self) -> u64 {
        self.base + 0x4000
    }

    pub fn device(&self) -> u64 {
        self.base + 0x8000
    }

    fn used_event(&self) -> u64 {
        self.driver() + 4 + 2 * u64::from(self.size)
    }

    fn add(&mut self, memory: &GuestMemory, buffers: &[Buffer]) -> u16 {
        let chain: Vec<u16> =
            buffers.iter().map(|_| self.free.pop().expect("a free one")).collect();
        for (i, (&index, &(address, length, write))) in chain.iter().zip(buffers).enumerate() {
            let next = chain.get(i + 1).copied();
            let flags = u16::from(next.is_some()) | if write { 2 } else { 0 };
            let raw = descriptor(address, length, flags, next.unwrap_or(0));
            let at = self.descriptors() + 16 * u64::from(index);
            memory.write_slice(&raw, GuestAddress(at)).unwrap();
        }
        let head = chain[0];
        self.chains.insert(head, chain);
        let slot = self.driver() + 4 + 2 * u64::from(self.available % self.size);
        memory.write_obj(head, GuestAddress(slot)).unwrap();
        self.available = self.available.wrapping_add(1);
        memory.write_obj(self.available, GuestAddress(self.driver() + 2)).unwrap();
        head
    }
}

pub fn descriptor(address: u64, length: u32, flags: u16, next: u16) -> [u8; 16] {
    let mut raw = [0; 16];
    raw[..8].copy_from_slice(&address.to_le_bytes());
    raw[8..12].copy_from_slice(&length.to_le_bytes());
    raw[12..14].copy_from_slice(&flags.to_le_bytes());
    raw[14..].copy_from_slice(&next.to_le_bytes());
    raw
}

fn read_u16(memory: &GuestMemory, address: u64) -> u16 {
    memory.read_obj(GuestAddress(address)).unwrap()
}

/// Numbers that look random and are the same in each run of a seed (xorshift64*).
#[derive(Clone)]
pub struct Dice(u64);

impl Dice {
    pub fn new(seed: u64) -> Self {
        Self(seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1)
    }

    pub fn next(&mut self) -> u64 {
        self.0 ^= self.0 >> 12;
        self.0 ^= self.0 << 25;
        self.0 ^= self.0 >> 27;
        self.0.wrapping_mul(0x2545_f491_4f6c_dd1d)
    }

    pub fn below(&mut self, limit: u64) -> u64 {
        (self.next() >> 16) % limit
    }

    pub fn one_in(&mut self, n: u64) -> bool {
        self.below(n) == 0
    }

    pub fn bytes(&mut self, count: usize) -> Vec<u8> {
        (0..count).map(|_| self.next() as u8).collect()
    }
}
