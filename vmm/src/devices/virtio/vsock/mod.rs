//! Streams between the host and programs in the guest: virtio-vsock (virtio 1.2 §5.10).
//!
//! Connections are made by the host only; what the guest asks for is refused. Each has a Unix stream
//! socket on the host's side, whose other end `serve` holds, and the two half-close and end together.
//!
//! The agent's control connection outlives a snapshot: its two ports and the credit counters are all
//! there is to it, so in a fork a new socket is put behind the same connection, and the guest is not
//! asked anything ([`Transport::adopt`]). What was written to that socket before is delivered at once.
//! All other connections end with a snapshot: the guest is told of a reset when it goes on.

mod connection;
mod credit;
mod lull;
mod packet;
mod traffic;

use std::{
    collections::{BTreeMap, VecDeque},
    io,
    os::fd::OwnedFd,
    sync::Arc,
    time::Duration,
};

use hermitage_guest_proto::CONTROL_PORT;
use hermitage_vmm_proto::Stats;
use serde::{Deserialize, Serialize};

use super::{Context, Fault, StateError, Transport, VirtioDevice};
use crate::poller::{Event, Key, Poller, Source};
use connection::{Connection, State};
use credit::Credit;
use lull::Waiting;
use packet::{Header, STREAM, op};

/// The host (VMADDR_CID_HOST) and the only guest there is.
pub const HOST_CID: u64 = 2;
pub const GUEST_CID: u64 = 3;

const RECEIVE: usize = 0;
const TRANSMIT: usize = 1;

/// Each receive buffer is a page of guest memory that becomes the machine's own when it is used, which
/// is why there are not more of them. Linux wants at least 8 events.
const QUEUES: [u16; 3] = [64, 64, 8];

/// Most connections at a time.
pub const MAX_CONNECTIONS: usize = 256;

/// Most resets waiting for a receive buffer. With so many, the guest's packets wait as well.
const MAX_RESETS: usize = 64;

/// Largest payload taken from a packet (Linux: VIRTIO_VSOCK_MAX_PKT_BUF_SIZE).
const MAX_PAYLOAD: u32 = 64 * 1024;

/// Receive buffers one connection fills before others get their turn.
const FAIR_SHARE: usize = 16;

/// Ports below are privileged by custom.
const FIRST_PORT: u32 = 1024;

/// Posted by this device to itself: go on with the guest's packets. No connection has this port.
const GO_ON: u32 = 0;
/// Posted when there are outcomes to fetch.
const TOLD: u32 = 1;
/// Comes back when something was left for a lull.
const LULL: u32 = 2;

/// How long the guest may not hear that its packets were taken, or one packet of it not be heard of.
const QUIET_TIME: Duration = Duration::from_millis(10);

/// What became of a connection that the host asked for.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum VsockOutcome {
    Connected { stream: u64 },
    Failed { stream: u64, reason: String },
}

pub struct Vsock {
    poller: Arc<Poller>,
    owner: u8,
    /// Not yet fetched: at most one for each call of `connect`.
    outcomes: Vec<VsockOutcome>,
    /// By the host's port, which is also the token of its socket.
    connections: BTreeMap<u32, Connection>,
    next_port: u32,
    /// Answers to packets that belong to no connection.
    resets: VecDeque<Header>,
    /// Ports of connections that owe the guest a packet, each at most once.
    owing: VecDeque<u32>,
    /// The guest has no receive buffers; it was asked to notify when it has.
    starved: bool,
    /// The guest's packets wait until there is room for resets.
    paused: bool,
    waiting: Waiting,
    stats: VsockStats,
}

#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct VsockStats {
    /// Bytes from the guest and to it.
    pub from_guest: u64,
    pub to_guest: u64,
    pub open: u32,
}

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct VsockState {
    next_port: u32,
    connections: Vec<ConnectionState>,
    /// Host's and guest's port of connections that a state can't hold: they are broken off.
    broken: Vec<(u32, u32)>,
    /// The same, and the kind of socket, of packets that belonged to no connection.
    resets: Vec<(u32, u32, u16)>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
struct ConnectionState {
    host_port: u32,
    guest_port: u32,
    credit: Credit,
}

impl Vsock {
    /// A vsock device whose sockets are watched by `poller`, which gives their events to `owner`
    /// ([`Transport::ready`]).
    pub fn new(poller: Arc<Poller>, owner: u8) -> Self {
        Self {
            poller,
            owner,
            outcomes: Vec::new(),
            connections: BTreeMap::new(),
            next_port: FIRST_PORT,
            resets: VecDeque::new(),
            owing: VecDeque::new(),
            starved: false,
            paused: false,
            waiting: Waiting::default(),
            stats: VsockStats::default(),
        }
    }

    #[cfg(test)]
    pub(super) fn check_bounds(&self) {
        assert!(self.connections.len() <= MAX_CONNECTIONS);
        assert!(self.resets.len() <= MAX_RESETS);
        assert!(self.owing.len() <= MAX_CONNECTIONS, "{} owing", self.owing.len());
        self.connections.values().for_each(Connection::check_bounds);
    }

    /// The guest's and the host's port of some connection.
    #[cfg(test)]
    pub(super) fn some_ports(&self, which: u64) -> Option<(u32, u32)> {
        let at = which.checked_rem(self.connections.len() as u64)?;
        self.connections.values().nth(at as usize).map(|c| (c.guest_port, c.host_port))
    }

    fn source(&self, socket: OwnedFd, token: u32) -> Source {
        Source::new(self.poller.clone(), socket, Key { owner: self.owner, token })
    }

    /// Leaves an outcome to be fetched and wakes the thread that does so.
    fn tell(&mut self, outcome: VsockOutcome) {
        self.outcomes.push(outcome);
        let _ = self.poller.post(Key { owner: self.owner, token: TOLD });
    }

    fn fresh_port(&mut self) -> u32 {
        loop {
            let port = self.next_port;
            // The highest value means *any port* (VMADDR_PORT_ANY).
            self.next_port = if port < u32::MAX - 1 { port + 1 } else { FIRST_PORT };
            if !self.connections.contains_key(&port) {
                return port;
            }
        }
    }

    fn connect(&mut self, stream: u64, guest_port: u32, socket: OwnedFd) {
        if self.connections.len() >= MAX_CONNECTIONS && !self.evict() {
            let reason = format!("the machine has {MAX_CONNECTIONS} streams already");
            return self.tell(VsockOutcome::Failed { stream, reason });
        }
        let port = self.fresh_port();
        let source = self.source(socket, port);
        self.connections.insert(port, Connection::requested(stream, port, guest_port, source));
        self.settle(port);
    }

    /// Makes room by breaking off a connection that only the guest still knows of.
    fn evict(&mut self) -> bool {
        let lingering = self.connections.iter().find(|(_, c)| c.is_lingering());
        let Some(port) = lingering.map(|(port, _)| *port) else { return false };
        if let Some(connection) = self.connections.remove(&port)
            && self.resets.len() < MAX_RESETS
        {
            self.resets.push_back(reset_of(&connection));
        }
        true
    }

    /// After anything happened to a connection: watches its socket for what can be served now, lines
    /// it up if it owes the guest something, forgets it if it is over.
    fn settle(&mut self, port: u32) {
        let Some(connection) = self.connections.get_mut(&port) else { return };
        if connection.watch(!self.starved).is_err() {
            connection.break_off();
        }
        if connection.is_over() {
            self.connections.remove(&port);
        } else if connection.owes() && !self.owing.contains(&port) {
            self.owing.push_back(port);
        }
    }

    fn ready(&mut self, event: &Event, context: &mut Context<'_>) -> Result<(), Fault> {
        let port = match event.key.token {
            GO_ON => {
                self.take_packets(context)?;
                return self.pay(context);
            }
            LULL => {
                self.lull(context)?;
                return self.pay(context);
            }
            port => port,
        };
        let Some(connection) = self.connections.get_mut(&port) else { return Ok(()) };
        if event.hangup && connection.state == State::Connecting {
            // Whoever asked has lost interest.
            connection.break_off();
        }
        connection.hear(event);
        self.pump_input(port, context)
    }

    fn adopt(
        &mut self,
        guest_port: u32,
        socket: OwnedFd,
        context: &mut Context<'_>,
    ) -> Result<(), Fault> {
        let found =
            self.connections.values().find(|c| c.guest_port == guest_port && c.is_adoptable());
        let Some(port) = found.map(|connection| connection.host_port) else {
            return Err(Fault::Host {
                device: Self::NAME,
                what: "adopt a saved connection",
                source: io::Error::other(format!("there is none to port {guest_port}")),
            });
        };
        let source = self.source(socket, port);
        if let Some(connection) = self.connections.get_mut(&port) {
            connection.adopt(source);
        }
        self.pump_input(port, context)
    }
}

fn reset_of(connection: &Connection) -> Header {
    Header {
        src_cid: HOST_CID,
        dst_cid: GUEST_CID,
        src_port: connection.host_port,
        dst_port: connection.guest_port,
        kind: STREAM,
        op: op::RST,
        ..Header::default()
    }
}

impl VirtioDevice for Vsock {
    const NAME: &'static str = "vsock";
    const ID: u32 = 19;
    const QUEUES: &'static [u16] = &QUEUES;
    const FEATURES: u64 = 0;
    type State = VsockState;

    /// §5.10.4: the guest's CID.
    fn config(&self) -> Vec<u8> {
        GUEST_CID.to_le_bytes().to_vec()
    }

    fn activate(&mut self, context: &mut Context<'_>) -> Result<(), Fault> {
        self.take_packets(context)?;
        self.starved = true;
        self.fed(context)
    }

    fn notify(&mut self, queue: usize, context: &mut Context<'_>) -> Result<(), Fault> {
        match queue {
            RECEIVE => self.fed(context),
            TRANSMIT => {
                self.take_packets(context)?;
                self.pay(context)
            }
            // Nothing is ever to be told on the event queue; its buffers stay with us.
            _ => Ok(()),
        }
    }

    fn reset(&mut self) {
        for connection in std::mem::take(&mut self.connections).into_values() {
            if connection.state == State::Connecting {
                let reason = "the machine reset its vsock device".into();
                self.tell(VsockOutcome::Failed { stream: connection.stream, reason });
            }
        }
        self.resets.clear();
        self.owing.clear();
        (self.starved, self.paused) = (false, false);
        self.waiting = Waiting::default();
    }

    fn save(&self) -> Result<VsockState, StateError> {
        let (mut connections, mut broken) = (Vec::new(), Vec::new());
        for connection in self.connections.values() {
            let &Connection { host_port, guest_port, credit, state, .. } = connection;
            if connection.is_settled() && !connection.has_input() {
                connections.push(ConnectionState { host_port, guest_port, credit });
            } else if connection.is_whole() && guest_port == CONTROL_PORT {
                let reason = format!("a stream to port {guest_port} is under way ({state:?})");
                return Err(StateError::busy(Self::NAME, reason));
            } else {
                broken.push((host_port, guest_port));
            }
        }
        let resets = self.resets.iter().map(|h| (h.src_port, h.dst_port, h.kind)).collect();
        Ok(VsockState { next_port: self.next_port, connections, broken, resets })
    }

    fn load(&mut self, state: VsockState) -> Result<(), StateError> {
        let invalid = |reason: String| Err(StateError::invalid(Self::NAME, reason));
        let count = state.connections.len().saturating_add(state.broken.len());
        if count > MAX_CONNECTIONS {
            return invalid(format!("{count} connections"));
        }
        if state.resets.len() > MAX_RESETS {
            return invalid(format!("{} resets", state.resets.len()));
        }
        let is_port = |port| (FIRST_PORT..u32::MAX).contains(&port);
        if !is_port(state.next_port) {
            return invalid(format!("next port {}", state.next_port));
        }
        self.next_port = state.next_port;
        for ConnectionState { host_port, guest_port, credit } in state.connections {
            let connection = Connection::restored(host_port, guest_port, credit);
            let settled = is_port(host_port) && credit.is_settled();
            if !settled || self.connections.insert(host_port, connection).is_some() {
                return invalid(format!("a connection from {host_port} to {guest_port}"));
            }
        }
        for (host_port, guest_port) in state.broken {
            let mut connection = Connection::restored(host_port, guest_port, Credit::default());
            connection.break_off();
            if !is_port(host_port) || self.connections.insert(host_port, connection).is_some() {
                return invalid(format!("a broken connection from {host_port} to {guest_port}"));
            }
        }
        let reset = |(src_port, dst_port, kind)| Header {
            src_cid: HOST_CID,
            dst_cid: GUEST_CID,
            src_port,
            dst_port,
            kind,
            op: op::RST,
            ..Header::default()
        };
        self.resets = state.resets.into_iter().map(reset).collect();
        Ok(())
    }

    /// A state has no place for what was left for a lull.
    fn quiesce(&mut self, context: &mut Context<'_>) -> Result<(), Fault> {
        self.listen(context)
    }

    /// Connections nobody adopted end here.
    fn resume(&mut self, context: &mut Context<'_>) -> Result<(), Fault> {
        let ports: Vec<u32> = self.connections.keys().copied().collect();
        for port in ports {
            if let Some(connection) = self.connections.get_mut(&port)
                && connection.is_adoptable()
            {
                connection.break_off();
            }
            self.settle(port);
        }
        if context.queues[TRANSMIT].take_pending() {
            self.take_packets(context)?;
        }
        self.pay(context)
    }
}

/// For the I/O and control threads.
impl Transport<Vsock> {
    /// Connects a non-blocking stream socket to a port of the guest. What comes of it is told by
    /// [`take_outcomes`](Self::take_outcomes); `stream` is the caller's name for it.
    pub fn connect(&self, stream: u64, port: u32, socket: OwnedFd) -> Result<(), Fault> {
        self.with(|vsock, context| {
            vsock.connect(stream, port, socket);
            if !context.active {
                return Ok(());
            }
            // Somebody waits for the answer.
            vsock.listen(context)?;
            vsock.pay(context)
        })
    }

    /// Outcomes since the last call. The poller brings an event of this device's when there are new
    /// ones.
    pub fn take_outcomes(&self) -> Vec<VsockOutcome> {
        self.look(|vsock| std::mem::take(&mut vsock.outcomes))
    }

    /// Puts a non-blocking stream socket behind a restored connection to this port of the guest.
    /// Between `restore` and `resume`.
    pub fn adopt(&self, port: u32, socket: OwnedFd) -> Result<(), Fault> {
        self.with(|vsock, context| vsock.adopt(port, socket, context))
    }

    /// An event for one of this device's sockets.
    pub fn ready(&self, event: &Event) -> Result<(), Fault> {
        self.with(|vsock, context| vsock.ready(event, context))
    }

    pub fn stats(&self) -> VsockStats {
        self.look(|vsock| {
            // At most MAX_CONNECTIONS.
            VsockStats { open: vsock.connections.len() as u32, ..vsock.stats }
        })
    }

    pub fn add_stats(&self, stats: &mut Stats) {
        let VsockStats { from_guest, to_guest, open } = self.stats();
        stats.stream_bytes += from_guest + to_guest;
        stats.open_streams += open;
    }
}

#[cfg(test)]
mod tests;
