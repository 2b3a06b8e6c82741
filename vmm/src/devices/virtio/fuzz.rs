//! Guests that write nonsense: every device against random rings, packets, registers and states.
//!
//! Whatever the guest does, a device answers, or gives a [`Fault::Guest`] that ends that machine. It
//! must not panic, not blame the host, not take for ever, and not grow.
//!
//! As a test this runs a fixed set of seeds. `HERMITAGE_FUZZ_SECONDS=600 cargo test --release -p
//! hermitage-vmm fuzz` goes on with fresh ones for that time, each printed when it fails;
//! `HERMITAGE_FUZZ_SEED=N` runs one again.

use std::{
    env,
    fs::File,
    io::{Read, Write},
    os::unix::net::UnixStream,
    panic::{AssertUnwindSafe, catch_unwind, resume_unwind},
    sync::Arc,
    time::{Duration, Instant, SystemTime, UNIX_EPOCH},
};

use hermitage_vmm_proto::stream_pair;
use vm_memory::{Bytes, GuestAddress};

use super::{
    Balloon, Block, Console, Fault, StateError, Transport, TransportState, VirtioDevice, Vsock,
    testing::{Dice, Driver, Line, MEMORY, descriptor},
    transport::register,
};
use crate::poller::{Event, Poller};

const STEPS: u64 = 1500;
const SEEDS: u64 = 24;

/// A step may wait for a disk, but not for long.
const STEP_LIMIT: Duration = Duration::from_secs(10);

/// A device with somebody on its host's side.
trait Subject: VirtioDevice {
    fn fresh(poller: &Arc<Poller>) -> Self;
    /// Host-side calls at random.
    fn host(device: &Transport<Self>, dice: &mut Dice) -> Result<(), Fault>;
    fn event(device: &Transport<Self>, event: &Event) -> Result<(), Fault>;
    /// Something like a request, for a chain's readable part.
    fn request(device: &Transport<Self>, dice: &mut Dice) -> Vec<u8>;
    /// Checks that nothing has grown over its bound.
    fn check(device: &Transport<Self>);
    fn finish(_device: &Transport<Self>) {}
}

impl Subject for Balloon {
    fn fresh(_poller: &Arc<Poller>) -> Self {
        Self::new()
    }

    fn host(device: &Transport<Self>, dice: &mut Dice) -> Result<(), Fault> {
        if dice.one_in(10) {
            device.set_resumed();
        }
        assert!(device.left_of(&[]).is_empty());
        Ok(())
    }

    fn event(_device: &Transport<Self>, _event: &Event) -> Result<(), Fault> {
        Ok(())
    }

    fn request(_device: &Transport<Self>, dice: &mut Dice) -> Vec<u8> {
        dice.bytes(16)
    }

    fn check(_device: &Transport<Self>) {}
}

impl Subject for Console {
    fn fresh(poller: &Arc<Poller>) -> Self {
        Self::new(poller.clone(), 1)
    }

    fn host(device: &Transport<Self>, dice: &mut Dice) -> Result<(), Fault> {
        let terminal = dice.below(8) as u8;
        let (columns, rows) = (dice.below(600) as u16, dice.below(300) as u16);
        match dice.below(6) {
            0 => device.detach(terminal).map(drop),
            1 => device.resize(terminal, columns, rows),
            2 => device.attach(terminal, peer(dice), Some((columns, rows))),
            _ => device.attach(terminal, peer(dice), None),
        }
    }

    fn event(device: &Transport<Self>, event: &Event) -> Result<(), Fault> {
        device.ready(event)
    }

    fn request(_device: &Transport<Self>, dice: &mut Dice) -> Vec<u8> {
        let mut raw = [dice.below(10) as u8, 0, 0, 0, dice.below(9) as u8, 0, 1, 0];
        if dice.one_in(4) {
            raw[dice.below(8) as usize] = dice.next() as u8;
        }
        raw.to_vec()
    }

    fn check(device: &Transport<Self>) {
        device.look(|console| console.check_bounds());
    }
}

impl Subject for Vsock {
    fn fresh(poller: &Arc<Poller>) -> Self {
        Self::new(poller.clone(), 1)
    }

    fn host(device: &Transport<Self>, dice: &mut Dice) -> Result<(), Fault> {
        device.take_outcomes();
        device.connect(dice.next(), 1024 + dice.below(4) as u32, peer(dice))
    }

    fn event(device: &Transport<Self>, event: &Event) -> Result<(), Fault> {
        device.ready(event)
    }

    fn request(device: &Transport<Self>, dice: &mut Dice) -> Vec<u8> {
        // Mostly for a connection there is.
        let known = device.look(|vsock| vsock.some_ports(dice.next()));
        let strange = (1024 + dice.below(4) as u32, 1024 + dice.below(40) as u32);
        let (guest_port, host_port) = known.filter(|_| !dice.one_in(8)).unwrap_or(strange);
        let length = if dice.one_in(4) { dice.next() as u32 } else { dice.below(3000) as u32 };
        let mut raw = Vec::new();
        raw.extend(3u64.to_le_bytes());
        raw.extend(2u64.to_le_bytes());
        raw.extend(guest_port.to_le_bytes());
        raw.extend(host_port.to_le_bytes());
        raw.extend(length.to_le_bytes());
        raw.extend([1, 0, dice.below(9) as u8, 0]);
        raw.extend((dice.below(4) as u32).to_le_bytes());
        raw.extend((dice.next() as u32).to_le_bytes());
        raw.extend((dice.below(100_000) as u32).to_le_bytes());
        if dice.one_in(8) {
            let at = dice.below(raw.len() as u64) as usize;
            raw[at] = dice.next() as u8;
        }
        raw
    }

    fn check(device: &Transport<Self>) {
        device.look(|vsock| vsock.check_bounds());
    }
}

impl Subject for Block {
    fn fresh(_poller: &Arc<Poller>) -> Self {
        Self::new()
    }

    fn host(device: &Transport<Self>, dice: &mut Dice) -> Result<(), Fault> {
        if !device.drain(STEP_LIMIT) {
            panic!("requests don't come to an end");
        }
        device.attach(disk(dice.below(1 << 20))).map(drop)
    }

    fn event(_device: &Transport<Self>, _event: &Event) -> Result<(), Fault> {
        Ok(())
    }

    fn request(_device: &Transport<Self>, dice: &mut Dice) -> Vec<u8> {
        let kinds = [0, 1, 4, 8, 11, 13, 99];
        let kind: u32 = kinds[dice.below(7) as usize];
        let sector = if dice.one_in(4) { dice.next() } else { dice.below(2048) };
        let mut raw = Vec::new();
        raw.extend(kind.to_le_bytes());
        raw.extend([0; 4]);
        raw.extend(sector.to_le_bytes());
        raw
    }

    fn check(_device: &Transport<Self>) {}

    fn finish(device: &Transport<Self>) {
        assert!(device.drain(STEP_LIMIT), "requests don't come to an end");
    }
}

fn disk(length: u64) -> File {
    let file = tempfile::tempfile().unwrap();
    file.set_len(length.max(1)).unwrap();
    file
}

thread_local! {
    /// The other ends of the sockets that devices got.
    static PEERS: std::cell::RefCell<Vec<UnixStream>> = const { std::cell::RefCell::new(Vec::new()) };
}

fn peer(dice: &mut Dice) -> std::os::fd::OwnedFd {
    let (ours, theirs) = stream_pair(true).unwrap();
    PEERS.with_borrow_mut(|peers| {
        if peers.len() > 40 {
            peers.swap_remove(dice.below(40) as usize);
        }
        peers.push(ours.into());
    });
    theirs
}

/// The people at the other ends read, write, close one direction, and leave.
fn peers_act(dice: &mut Dice) {
    PEERS.with_borrow_mut(|peers| {
        for _ in 0..peers.len().min(4) {
            let at = dice.below(peers.len() as u64) as usize;
            match dice.below(8) {
                0..3 => drop(peers[at].read(&mut [0; 5000])),
                3..6 => drop(peers[at].write(&dice.bytes(700))),
                6 => drop(peers[at].shutdown(std::net::Shutdown::Write)),
                _ => drop(peers.swap_remove(at)),
            }
            if peers.is_empty() {
                return;
            }
        }
    });
}

struct Run<D: Subject> {
    /// Breaks the rules of rings and registers too, which soon ends its machine. Others only send
    /// nonsense in good order, and get further.
    wild: bool,
    driver: Driver<D>,
    poller: Arc<Poller>,
    dice: Dice,
}

impl<D: Subject> Run<D> {
    fn start(seed: u64) -> Self {
        let poller = Arc::new(Poller::new().unwrap());
        let mut dice = Dice::new(seed);
        let device = D::fresh(&poller);
        let shown = dice.one_in(2);
        let driver = if shown { Driver::start_shown(device) } else { Driver::start(device) };
        Self { wild: dice.one_in(2), driver, poller, dice }
    }

    fn steps(&mut self) {
        for _ in 0..STEPS {
            let before = Instant::now();
            match self.step() {
                Ok(()) => {}
                // The machine is over; here comes the next.
                Err(Fault::Guest { .. }) => *self = Self::start(self.dice.next()),
                Err(fault) => panic!("the host is blamed for what a guest did: {fault}"),
            }
            D::check(&self.driver.device);
            // What a thread of the device's does meanwhile shows a moment later.
            if D::ID != 2 {
                self.driver.check_page();
            }
            assert!(before.elapsed() < STEP_LIMIT, "a step took {:?}", before.elapsed());
        }
        D::finish(&self.driver.device);
    }

    fn step(&mut self) -> Result<(), Fault> {
        match self.dice.below(16) {
            0..5 => self.plausible_chain(),
            5..7 if self.wild => self.random_ring(),
            7 if self.wild => self.register(),
            8..10 => D::host(&self.driver.device, &mut self.dice),
            10 => {
                peers_act(&mut self.dice);
                Ok(())
            }
            11 if self.dice.one_in(8) => self.driver.initialise(),
            12 if self.dice.one_in(4) => self.restore(),
            _ => self.events(),
        }
    }

    fn events(&mut self) -> Result<(), Fault> {
        let mut events = Vec::new();
        self.poller.wait(&mut events, Some(Duration::ZERO)).unwrap();
        for event in &events {
            D::event(&self.driver.device, event)?;
        }
        if self.dice.one_in(4) {
            // Late, for somebody long gone, or made up.
            let key = crate::poller::Key { owner: 1, token: self.dice.next() as u32 >> 20 };
            let [readable, writable, hangup] = [0; 3].map(|_: u8| self.dice.one_in(2));
            D::event(&self.driver.device, &Event { key, readable, writable, hangup })?;
        }
        Ok(())
    }

    fn queue(&mut self) -> usize {
        self.dice.below(self.driver.rings.len() as u64) as usize
    }

    fn address(&mut self) -> u64 {
        match self.dice.below(16) {
            0 => self.dice.next(),
            1 => MEMORY - self.dice.below(5000),
            // Into the rings themselves.
            2 => self.dice.below(2 << 20),
            _ => (8 << 20) + self.dice.below(8 << 20),
        }
    }

    fn length(&mut self) -> u32 {
        match self.dice.below(12) {
            0 if self.wild => self.dice.next() as u32,
            1 if self.wild => 0,
            2..5 => 512 * self.dice.below(16) as u32,
            _ => self.dice.below(5000) as u32,
        }
    }

    /// A chain as a driver would make it, with content that nearly makes sense.
    fn plausible_chain(&mut self) -> Result<(), Fault> {
        let queue = self.queue();
        if self.driver.free_descriptors(queue) < 8 {
            self.driver.forget(queue);
        }
        let request = D::request(&self.driver.device, &mut self.dice);
        let mut chain = Vec::new();
        let address = (8 << 20) + self.dice.below(8 << 20);
        let for_reading = D::ID == 2 || queue % 2 == 1;
        if for_reading != (self.wild && self.dice.one_in(40)) {
            self.driver.put(address, &request);
            chain.push((address, request.len() as u32, false));
            if self.dice.one_in(2) {
                chain.push(((8 << 20) + self.dice.below(8 << 20), self.length(), false));
            }
        }
        if (D::ID == 2 || queue.is_multiple_of(2)) != (self.wild && self.dice.one_in(40)) {
            for _ in 0..self.dice.below(3) {
                chain.push(((8 << 20) + self.dice.below(8 << 20), self.length(), true));
            }
            let least = if D::ID == 2 { 1 } else { 64 };
            chain.push(((8 << 20) + self.dice.below(8 << 20), least + self.length() % 4096, true));
        }
        if chain.is_empty() {
            return Ok(());
        }
        self.driver.submit(queue, &chain).map(drop)
    }

    /// Descriptors and ring entries with no thought at all.
    fn random_ring(&mut self) -> Result<(), Fault> {
        let queue = self.queue();
        let size = u64::from(D::QUEUES[queue]);
        let (table, available) =
            (self.driver.rings[queue].descriptors(), self.driver.rings[queue].driver());
        for _ in 0..self.dice.below(8) {
            let (address, length) = (self.address(), self.length());
            let flags = self.dice.next() as u16 & if self.dice.one_in(8) { u16::MAX } else { 3 };
            let next = self.dice.below(size + 1) as u16;
            let at = table + 16 * self.dice.below(size);
            self.driver.put(at, &descriptor(address, length, flags, next));
        }
        for _ in 0..self.dice.below(4) {
            let head = self.dice.below(size + 1) as u16;
            self.driver.put(available + 4 + 2 * self.dice.below(size), &head.to_le_bytes());
        }
        let index: u16 = self.driver.memory.read_obj(GuestAddress(available + 2)).unwrap();
        let step = if self.dice.one_in(8) { self.dice.next() } else { self.dice.below(3) } as u16;
        self.driver.put(available + 2, &index.wrapping_add(step).to_le_bytes());
        self.driver.forget(queue);
        self.driver.set(register::QUEUE_NOTIFY, queue as u32)
    }

    fn register(&mut self) -> Result<(), Fault> {
        let offset = self.dice.below(0x140);
        let mut data = [0; 8];
        let width = 1 << self.dice.below(4);
        self.driver.device.read(offset, &mut data[..width]);
        let value = match self.dice.below(3) {
            0 => self.dice.next(),
            _ => self.dice.below(20),
        };
        let aligned = if self.dice.one_in(3) { offset } else { offset & !3 };
        self.driver.device.write(aligned, &value.to_le_bytes()[..width.max(4)])
    }

    /// A snapshot in the middle of it, whole or damaged.
    fn restore(&mut self) -> Result<(), Fault> {
        let state = match self.driver.device.save() {
            Ok(state) => state,
            Err(StateError::Busy { .. }) => return Ok(()),
            Err(error) => panic!("{error}"),
        };
        let mut raw = postcard::to_stdvec(&state).unwrap();
        let whole = self.dice.one_in(2);
        if !whole {
            for _ in 0..=self.dice.below(3) {
                let at = self.dice.below(raw.len() as u64) as usize;
                raw[at] = self.dice.next() as u8;
            }
        }
        let Ok(state) = postcard::from_bytes::<TransportState<D::State>>(&raw) else {
            return Ok(());
        };
        let line = Line::default();
        let memory = self.driver.memory.clone();
        match Transport::restore(state, D::fresh(&self.poller), memory, line.clone()) {
            Ok(device) => {
                self.driver.put_on(device, line);
                self.driver.device.resume()
            }
            Err(error) if whole => panic!("what was saved is refused: {error}"),
            Err(_) => Ok(()),
        }
    }
}

fn fuzz<D: Subject>() {
    let one = env::var("HERMITAGE_FUZZ_SEED").ok().and_then(|seed| seed.parse().ok());
    let seconds = env::var("HERMITAGE_FUZZ_SECONDS").ok().and_then(|s| s.parse().ok());
    if let Some(seed) = one {
        return Run::<D>::start(seed).steps();
    }
    let run = |seed| {
        let result = catch_unwind(AssertUnwindSafe(|| Run::<D>::start(seed).steps()));
        if let Err(panic) = result {
            eprintln!("{}: HERMITAGE_FUZZ_SEED={seed} shows it again", D::NAME);
            resume_unwind(panic);
        }
    };
    (0..SEEDS).for_each(run);
    if let Some(seconds) = seconds {
        let end = Instant::now() + Duration::from_secs(seconds);
        let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap();
        (now.as_nanos() as u64..).take_while(|_| Instant::now() < end).for_each(run);
    }
}

#[test]
fn fuzz_console() {
    fuzz::<Console>();
}

#[test]
fn fuzz_vsock() {
    fuzz::<Vsock>();
}

#[test]
fn fuzz_block() {
    fuzz::<Block>();
}

#[test]
fn fuzz_balloon() {
    fuzz::<Balloon>();
}
