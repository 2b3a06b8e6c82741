//! The forwarder: this program once more, as the account's user, for the connections that one SSH
//! client forwards into her machine and out of it (`hermitage_guest_proto::forward`).
//!
//! A process of its own because it must not be PID 1: sockets are opened with her rights, the bytes of
//! hundreds of streams must not delay the terminals, and whatever goes wrong here ends these streams
//! only. It ends with its standard input, and takes its sockets' files along.

mod dial;
mod listen;
mod names;
mod relay;

use std::os::fd::{AsFd, OwnedFd};
use std::time::{Duration, Instant};

use anyhow::{Context, Result};
use hermitage_guest_proto::forward::{
    ACCEPTED, ForwardEvent, ForwardId, ForwardRequest, MAX_ACCEPTED, Place,
};
use nix::sys::resource::{Resource, getrlimit, setrlimit};
use nix::sys::signal::{SigSet, Signal};

use crate::control::Control;
use crate::spawn::set_blocking;
use crate::streams::Streams;
use crate::sys::{self, Poller, Readiness};
use dial::Dial;
use listen::Listener;
use relay::Relay;

/// What it is called, which is also how this program knows that it is one.
pub const NAME: &str = "hermitage-forwarder";

/// Listening sockets, and connections in all. The host asks for fewer: a bound for a broken one.
const LISTENERS_MAX: usize = 256;
const CONNECTIONS_MAX: usize = 1024;

pub fn main() -> i32 {
    match Forwarder::new().and_then(Forwarder::run) {
        Ok(()) => 0,
        Err(error) => {
            eprintln!("{NAME}: {error:#}");
            1
        }
    }
}

struct Forwarder {
    control: Control,
    /// Where the host opens streams.
    port: OwnedFd,
    /// Streams that have come but do not belong to a connection yet.
    streams: Streams,
    dialling: Vec<(ForwardId, Dial)>,
    /// Connections that wait for their stream.
    connected: Vec<(ForwardId, OwnedFd)>,
    relays: Vec<Relay>,
    listeners: Vec<(ForwardId, Listener)>,
    last_accepted: ForwardId,
}

#[derive(Clone, Copy)]
enum Source {
    Control,
    Port,
    /// These by their index.
    Stream(usize),
    Dial(usize),
    Listener(usize),
    Relay(usize),
}

impl Forwarder {
    fn new() -> Result<Self> {
        // The end of the standard input is the end: only then are sockets' files removed.
        let mut ignored = SigSet::empty();
        ignored.add(Signal::SIGHUP);
        ignored.thread_block().context("blocking signals")?;
        let (_, most) = getrlimit(Resource::RLIMIT_NOFILE).context("RLIMIT_NOFILE")?;
        setrlimit(Resource::RLIMIT_NOFILE, most, most).context("raising RLIMIT_NOFILE")?;

        let stdin = std::io::stdin().as_fd().try_clone_to_owned().context("standard input")?;
        set_blocking(&stdin, false).context("standard input")?;
        let (port, number) = sys::listen_anywhere().context("listening for streams")?;
        let mut control = Control::new(stdin);
        control.send(&ForwardEvent::Ready { port: number })?;
        Ok(Self {
            control,
            port,
            streams: Streams::default(),
            dialling: Vec::new(),
            connected: Vec::new(),
            relays: Vec::new(),
            listeners: Vec::new(),
            last_accepted: ACCEPTED,
        })
    }

    fn run(mut self) -> Result<()> {
        let mut poller = Poller::new();
        let mut events = Vec::new();
        loop {
            poller.clear();
            self.watch(&mut poller);
            poller.wait(self.time_left()).context("poll")?;
            events.clear();
            events.extend(poller.ready());
            // Everything keeps its place until all events are done.
            let mut ended = false;
            for (source, readiness) in &events {
                ended |= !self.handle(*source, *readiness)?;
            }
            if ended {
                return Ok(());
            }
            self.finish_dials()?;
            self.join_streams();
            self.relays.retain(|relay| !relay.is_over());
            self.streams.expire(Instant::now());
            self.requests()?;
        }
    }

    fn watch(&self, poller: &mut Poller<Source>) {
        poller.add(&self.control, Source::Control, true, self.control.wants_to_write());
        poller.add(&self.port, Source::Port, true, false);
        for (index, stream) in self.streams.incomplete() {
            poller.add(stream, Source::Stream(index), true, false);
        }
        for (index, (_, dial)) in self.dialling.iter().enumerate() {
            if let Some(socket) = dial.socket() {
                poller.add(socket, Source::Dial(index), false, true);
            }
        }
        if self.may_accept() {
            for (index, (_, listener)) in self.listeners.iter().enumerate() {
                for socket in listener.sockets() {
                    poller.add(socket, Source::Listener(index), true, false);
                }
            }
        }
        for (index, relay) in self.relays.iter().enumerate() {
            for (file, wanted) in relay.interest() {
                poller.add(file, Source::Relay(index), wanted.readable, wanted.writable);
            }
        }
    }

    fn time_left(&self) -> Option<Duration> {
        Some(self.streams.deadline()?.saturating_duration_since(Instant::now()))
    }

    /// False: the host has gone.
    fn handle(&mut self, source: Source, readiness: Readiness) -> Result<bool> {
        match source {
            Source::Control => {
                if readiness.writable {
                    self.control.flush()?;
                }
                if readiness.readable || readiness.hung_up {
                    return Ok(self.control.receive().unwrap_or(false));
                }
            }
            Source::Port => {
                while let Some(socket) = sys::accept_from_host(&self.port).context("streams")? {
                    self.streams.arrived(socket, Instant::now());
                }
            }
            Source::Stream(index) => self.streams.readable(index),
            Source::Dial(index) => {
                if let Some((_, dial)) = self.dialling.get_mut(index) {
                    dial.go_on();
                }
            }
            Source::Listener(index) => self.accept(index)?,
            Source::Relay(index) => {
                if let Some(relay) = self.relays.get_mut(index) {
                    relay.go_on();
                }
            }
        }
        Ok(true)
    }

    fn requests(&mut self) -> Result<()> {
        while let Some(request) = self.control.message()? {
            match request {
                ForwardRequest::Dial { id, to } => {
                    if self.connections() >= CONNECTIONS_MAX {
                        self.failed(id, format!("{CONNECTIONS_MAX} connections are open"))?;
                        continue;
                    }
                    match Dial::start(&to) {
                        Ok(dial) => self.dialling.push((id, dial)),
                        Err(reason) => self.failed(id, reason)?,
                    }
                }
                ForwardRequest::Listen { id, at } => self.listen(id, at)?,
                ForwardRequest::Close { id } => self.close(id),
            }
        }
        self.finish_dials()
    }

    fn listen(&mut self, id: ForwardId, at: Place) -> Result<()> {
        if self.listeners.len() >= LISTENERS_MAX {
            return self.failed(id, format!("{LISTENERS_MAX} sockets are listened on"));
        }
        match Listener::open(at) {
            Ok(listener) => {
                let at = listener.place().clone();
                self.listeners.push((id, listener));
                self.control.send(&ForwardEvent::Listening { id, at })
            }
            Err(reason) => self.failed(id, reason),
        }
    }

    fn close(&mut self, id: ForwardId) {
        self.listeners.retain(|(known, _)| *known != id);
        self.dialling.retain(|(known, _)| *known != id);
        self.connected.retain(|(known, _)| *known != id);
        if let Some(relay) = self.relays.iter_mut().find(|relay| relay.id == id) {
            relay.abandon();
        }
    }

    fn finish_dials(&mut self) -> Result<()> {
        let mut index = 0;
        while let Some((_, dial)) = self.dialling.get_mut(index) {
            let Some(outcome) = dial.outcome() else {
                index += 1;
                continue;
            };
            let (id, _) = self.dialling.remove(index);
            match outcome {
                Ok(socket) => {
                    self.connected.push((id, socket));
                    self.control.send(&ForwardEvent::Dialed { id })?;
                }
                Err(reason) => self.failed(id, reason)?,
            }
        }
        Ok(())
    }

    fn accept(&mut self, index: usize) -> Result<()> {
        while self.may_accept() {
            let Some((listener, open)) = self.listeners.get(index) else { return Ok(()) };
            let Some((socket, host, port)) = open.accept() else { return Ok(()) };
            self.last_accepted += 1;
            let (listener, id) = (*listener, self.last_accepted);
            self.connected.push((id, socket));
            self.control.send(&ForwardEvent::Accepted { listener, id, host, port })?;
        }
        Ok(())
    }

    /// Whoever connects waits in the kernel meanwhile.
    fn may_accept(&self) -> bool {
        let waiting = self.connected.iter().filter(|(id, _)| *id >= ACCEPTED).count();
        waiting < MAX_ACCEPTED && self.connections() < CONNECTIONS_MAX
    }

    fn connections(&self) -> usize {
        self.dialling.len() + self.connected.len() + self.relays.len()
    }

    /// Brings connections and their streams together.
    fn join_streams(&mut self) {
        let mut index = 0;
        while let Some((id, _)) = self.connected.get(index) {
            let Some(stream) = self.streams.claim(*id) else {
                index += 1;
                continue;
            };
            let (id, socket) = self.connected.remove(index);
            let mut relay = Relay::new(id, stream, socket);
            relay.go_on();
            self.relays.push(relay);
        }
    }

    fn failed(&mut self, id: ForwardId, reason: String) -> Result<()> {
        self.control.send(&ForwardEvent::Failed { id, reason })
    }
}
