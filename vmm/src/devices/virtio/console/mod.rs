//! The terminals: a virtio-console with eight generic ports (virtio 1.2 §5.3), `terminal.0` to
//! `terminal.7`.
//!
//! Why ports and not consoles: `docs/decisions/0001-terminals-are-ptys.md`.

mod control;
mod port;
mod screen;

use std::{io, os::fd::OwnedFd, sync::Arc};

use hermitage_vmm_proto::Stats;
use serde::{Deserialize, Serialize};

use super::{
    Context, Fault, StateError, Transport, VirtioDevice,
    chain::{read_prefix, write_prefix},
};
use crate::poller::{Event, Key, Poller};
use control::{Control, MESSAGE, Message};
use port::{Farewell, Next, Port};
use screen::{Screen, ScreenState};

/// Ports, each a terminal.
pub const TERMINALS: usize = hermitage_guest_proto::TERMINALS as usize;

/// Small, because each entry of a receive queue is a page of guest memory that the driver keeps.
const QUEUE_SIZE: u16 = 16;

/// VIRTIO_CONSOLE_F_MULTIPORT.
const MULTIPORT: u64 = 1 << 1;

/// Queues (§5.3.2): port 0's, the control queues, then those of the other ports.
const CONTROL_RECEIVE: usize = 2;
const CONTROL_TRANSMIT: usize = 3;

/// Most detached sockets that still get something; the oldest is given up for a new one.
const FAREWELLS: usize = 16;

/// Tokens from here on are posted by this device to itself: go on with a terminal's output, or (the
/// last one) with the control queues.
const GO_ON: u32 = u32::MAX - TERMINALS as u32;

pub struct Console {
    poller: Arc<Poller>,
    owner: u8,
    control: Control,
    ports: [Port; TERMINALS],
    farewells: Vec<Farewell>,
    next_token: u32,
}

/// Bytes since the device was made.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct ConsoleStats {
    /// From the guest to sockets.
    pub output: u64,
    /// From sockets to the guest.
    pub input: u64,
}

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ConsoleState {
    control: Control,
    /// For each port: bytes of its next output chain that were delivered already.
    delivered: [u64; TERMINALS],
    screens: [Option<ScreenState>; TERMINALS],
}

impl Console {
    /// A console whose sockets are watched by `poller`, which gives their events to `owner`
    /// ([`Transport::ready`]).
    pub fn new(poller: Arc<Poller>, owner: u8) -> Self {
        Self {
            poller,
            owner,
            control: Control::default(),
            ports: Default::default(),
            farewells: Vec::new(),
            next_token: 0,
        }
    }

    #[cfg(test)]
    pub(super) fn check_bounds(&self) {
        assert!(self.farewells.len() <= FAREWELLS);
    }

    fn key(&self, token: u32) -> Key {
        Key { owner: self.owner, token }
    }

    fn fresh_key(&mut self) -> Key {
        let token = self.next_token;
        self.next_token = if token + 1 < GO_ON { token + 1 } else { 0 };
        self.key(token)
    }

    fn pump_output(&mut self, port: usize, context: &mut Context<'_>) -> Result<(), Fault> {
        let queue = &mut context.queues[transmit_queue(port)];
        let next = self.ports[port].pump_output(queue, context.memory)?;
        self.then(port, next)
    }

    fn pump_input(&mut self, port: usize, context: &mut Context<'_>) -> Result<(), Fault> {
        let queue = &mut context.queues[receive_queue(port)];
        let next = self.ports[port].pump_input(queue, context.memory)?;
        self.then(port, next)
    }

    fn then(&self, port: usize, next: Next) -> Result<(), Fault> {
        match next {
            Next::Wait => Ok(()),
            // Eight ports.
            Next::Again => self.post(GO_ON + port as u32),
        }
    }

    fn post(&self, token: u32) -> Result<(), Fault> {
        let result = self.poller.post(self.key(token));
        result.map_err(|source| Fault::Host { device: Self::NAME, what: "wake a thread", source })
    }

    fn detach(&mut self, port: usize, context: &mut Context<'_>) -> Result<(), Fault> {
        let queue = &mut context.queues[transmit_queue(port)];
        if let Some(farewell) = self.ports[port].detach(queue, context.memory)? {
            if self.farewells.len() == FAREWELLS {
                self.farewells.remove(0);
            }
            self.farewells.push(farewell);
        }
        Ok(())
    }

    fn ready(&mut self, event: &Event, context: &mut Context<'_>) -> Result<(), Fault> {
        let token = event.key.token;
        if let Some(port) = token.checked_sub(GO_ON) {
            return match port as usize {
                port @ 0..TERMINALS => self.pump_output(port, context),
                _ => self.converse(context),
            };
        }
        if let Some(port) = self.ports.iter().position(|port| port.has_token(token)) {
            self.ports[port].hear(event);
            self.pump_output(port, context)?;
            return self.pump_input(port, context);
        }
        if let Some(at) = self.farewells.iter().position(|farewell| farewell.has_token(token)) {
            // `remove` keeps the order, in which the oldest comes first.
            let farewell = self.farewells.remove(at);
            if let Some(farewell) = farewell.serve() {
                self.farewells.insert(at, farewell);
            }
        }
        Ok(())
    }

    /// Hears and says what there is on the control queues.
    fn converse(&mut self, context: &mut Context<'_>) -> Result<(), Fault> {
        let memory = context.memory;
        let [receive, transmit] = &mut context.queues[CONTROL_RECEIVE..=CONTROL_TRANSMIT] else {
            return Ok(());
        };
        for _ in 0..transmit.max_size() {
            let Some(chain) = transmit.pop(memory)? else { break };
            let mut raw = [0; MESSAGE];
            if !read_prefix(memory, &chain.readable, &mut raw) {
                let length = chain.readable_bytes();
                return Err(transmit.broken(format!("a control message of {length} bytes")));
            }
            self.control.hear(Message::decode(raw));
            transmit.complete(memory, chain.head, 0)?;
        }
        let more = transmit.arm(memory)?;
        for _ in 0..receive.max_size() {
            let Some(message) = self.control.next() else { break };
            let Some(chain) = receive.pop(memory)? else { break };
            if !write_prefix(memory, &chain.writable, &message) {
                let length = chain.writable_bytes();
                return Err(receive.broken(format!("a control buffer of {length} bytes")));
            }
            self.control.said();
            // At most a few dozen bytes.
            receive.complete(memory, chain.head, message.len() as u32)?;
        }
        receive.arm(memory)?;
        if more { self.post(GO_ON + TERMINALS as u32) } else { Ok(()) }
    }
}

impl VirtioDevice for Console {
    const NAME: &'static str = "console";
    const ID: u32 = 3;
    const QUEUES: &'static [u16] = &[QUEUE_SIZE; 2 * (TERMINALS + 1)];
    const FEATURES: u64 = MULTIPORT;
    type State = ConsoleState;

    /// §5.3.4: columns, rows, ports, emergency write.
    fn config(&self) -> Vec<u8> {
        let mut config = vec![0; 12];
        config[4..8].copy_from_slice(&(TERMINALS as u32).to_le_bytes());
        config
    }

    fn activate(&mut self, context: &mut Context<'_>) -> Result<(), Fault> {
        if context.features & MULTIPORT == 0 {
            return Err(Fault::guest(Self::NAME, "the driver does without multiport"));
        }
        self.converse(context)?;
        for port in 0..TERMINALS {
            self.pump_output(port, context)?;
            self.pump_input(port, context)?;
        }
        Ok(())
    }

    fn notify(&mut self, queue: usize, context: &mut Context<'_>) -> Result<(), Fault> {
        match queue_port(queue) {
            None => self.converse(context),
            Some((port, Direction::Transmit)) => self.pump_output(port, context),
            Some((port, Direction::Receive)) => {
                let next = self.ports[port].want_input();
                self.then(port, next)
            }
        }
    }

    fn reset(&mut self) {
        self.control = Control::default();
        for port in &mut self.ports {
            port.delivered = 0;
            port.screen = None;
        }
    }

    fn save(&self) -> Result<ConsoleState, StateError> {
        // Who is attached is not part of it: a saved terminal is one that was left.
        let delivered = std::array::from_fn(|port| self.ports[port].delivered);
        let screens =
            std::array::from_fn(|port| self.ports[port].screen.as_ref().map(|s| s.save()));
        Ok(ConsoleState { control: self.control.clone(), delivered, screens })
    }

    fn load(&mut self, state: ConsoleState) -> Result<(), StateError> {
        // Any value will do: a position behind the end of a chain counts as its end.
        for (port, delivered) in self.ports.iter_mut().zip(state.delivered) {
            port.delivered = delivered;
        }
        for (port, screen) in self.ports.iter_mut().zip(&state.screens) {
            port.screen = screen.as_ref().map(Screen::load).transpose()?.map(Box::new);
        }
        self.control = state.control;
        Ok(())
    }

    fn resume(&mut self, context: &mut Context<'_>) -> Result<(), Fault> {
        // Nobody is attached yet, so only what the guest had sent and was not looked at is work.
        let control = context.queues[CONTROL_TRANSMIT].take_pending();
        if control || self.control.next().is_some() {
            self.converse(context)?;
        }
        for port in 0..TERMINALS {
            if context.queues[transmit_queue(port)].take_pending() {
                self.pump_output(port, context)?;
            }
        }
        Ok(())
    }
}

/// For the I/O and control threads.
impl Transport<Console> {
    /// Makes a non-blocking stream socket the host's side of a terminal (0 to 7). If there is one
    /// already, that is detached first. With `redraw` (columns and rows) the terminal's screen takes
    /// that size and goes to the socket first; without, it is for a new program and has no screen until
    /// [`resize`](Self::resize).
    pub fn attach(
        &self,
        terminal: u8,
        socket: OwnedFd,
        redraw: Option<(u16, u16)>,
    ) -> Result<(), Fault> {
        let port = number(terminal)?;
        self.with(|console, context| {
            console.detach(port, context)?;
            let key = console.fresh_key();
            let terminal = &mut console.ports[port];
            let first = match redraw {
                Some((columns, rows)) => {
                    let screen =
                        terminal.screen.get_or_insert_with(|| Box::new(Screen::new(columns, rows)));
                    screen.resize(columns, rows);
                    screen.redraw()
                }
                None => {
                    terminal.screen = None;
                    Vec::new()
                }
            };
            terminal.attach(console.poller.clone(), socket, key, first);
            console.pump_output(port, context)?;
            console.pump_input(port, context)
        })
    }

    /// The terminal's window has changed: its screen follows, and is kept from now on.
    pub fn resize(&self, terminal: u8, columns: u16, rows: u16) -> Result<(), Fault> {
        let port = number(terminal)?;
        self.with(|console, _| {
            match &mut console.ports[port].screen {
                Some(screen) => screen.resize(columns, rows),
                none => *none = Some(Box::new(Screen::new(columns, rows))),
            }
            Ok(())
        })
    }

    /// Delivers what the terminal has written so far, also what is still in the virtqueue, then closes
    /// the socket; returns at once. False if nothing was attached.
    pub fn detach(&self, terminal: u8) -> Result<bool, Fault> {
        let port = usize::from(terminal);
        self.with(|console, context| {
            let attached = console.ports.get(port).is_some_and(Port::is_attached);
            if attached {
                console.detach(port, context)?;
            }
            Ok(attached)
        })
    }

    /// An event for one of this device's sockets.
    pub fn ready(&self, event: &Event) -> Result<(), Fault> {
        self.with(|console, context| console.ready(event, context))
    }

    pub fn add_stats(&self, stats: &mut Stats) {
        let ConsoleStats { output, input } = self.stats();
        stats.terminal_bytes += output + input;
    }

    pub fn stats(&self) -> ConsoleStats {
        self.look(|console| ConsoleStats {
            output: console.ports.iter().map(|port| port.bytes_out).sum(),
            input: console.ports.iter().map(|port| port.bytes_in).sum(),
        })
    }
}

fn number(terminal: u8) -> Result<usize, Fault> {
    let port = usize::from(terminal);
    if port < TERMINALS {
        return Ok(port);
    }
    let source = io::Error::other(format!("there is no terminal {terminal}"));
    Err(Fault::Host { device: Console::NAME, what: "attach a terminal", source })
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Direction {
    Receive,
    Transmit,
}

fn receive_queue(port: usize) -> usize {
    if port == 0 { 0 } else { 2 * port + 2 }
}

fn transmit_queue(port: usize) -> usize {
    receive_queue(port) + 1
}

/// None for the control queues.
fn queue_port(queue: usize) -> Option<(usize, Direction)> {
    let direction = if queue.is_multiple_of(2) { Direction::Receive } else { Direction::Transmit };
    match queue / 2 {
        0 => Some((0, direction)),
        1 => None,
        pair => Some((pair - 1, direction)),
    }
}

#[cfg(test)]
mod tests;
