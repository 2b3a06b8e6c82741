//! The machine's side of its control socket (`hermitage-vmm-proto`), and the loop of its main thread.

mod copying;
mod saving;

use std::{
    collections::VecDeque,
    io,
    os::fd::{AsFd as _, OwnedFd},
    sync::atomic::{AtomicBool, Ordering},
    time::{Duration, Instant},
};

use hermitage_vmm_proto::{
    End, MachineEvent, MachineRequest, Packet, SocketError, Stats, receive, send,
};
use rustix::event::{PollFd, PollFlags, poll};

use super::{Machine, devices::end_of, owner, vcpus::lock};
use copying::Copies;
use saving::Saving;

use crate::{
    devices::virtio::{VsockOutcome, WhichCopy},
    memory::PAGE_SIZE,
    poller::{Event, Interest, Key},
    snapshot::Origin,
    working_set::{self, Run},
};

/// How long a machine whose `serve` is gone may take to power itself off.
const ORPHAN_LIMIT: Duration = Duration::from_secs(20);

/// How long the other side may leave our messages unread.
const SEND_LIMIT: Duration = Duration::from_secs(10);

const CONTROL: Key = Key { owner: owner::CONTROL, token: 0 };

/// Serves host and guest until the machine ends. What is in `written` is populated in between, while there
/// is nothing else to do.
pub fn serve(machine: &Machine, origin: &Origin<'_>, control: OwnedFd, written: &[Run]) -> End {
    let mut server = Server {
        machine,
        origin,
        control: Some(control),
        orphaned: None,
        populate: pieces(written),
        saving: Saving::No,
        copies: Copies::default(),
    };
    let end = server.run().unwrap_or_else(|e| End::HostError(e.to_string()));
    server.tell(&MachineEvent::Ended(end.clone()));
    end
}

/// Serves the devices' host side alone, until `stop` (while a base is built).
pub fn pump(machine: &Machine, stop: &AtomicBool) {
    let mut events = Vec::new();
    while !stop.load(Ordering::SeqCst) {
        if let Err(e) = machine.poller.wait(&mut events, None) {
            return machine.end(End::HostError(format!("epoll: {e}")));
        }
        for event in &events {
            dispatch(machine, event);
        }
    }
}

/// Cuts runs into pieces that a keystroke can wait for.
fn pieces(written: &[Run]) -> VecDeque<Run> {
    const PIECE: u64 = 64 * PAGE_SIZE as u64;
    let cut = |run: &Run| {
        let (start, end) = (run.start, run.start + run.length);
        (start..end)
            .step_by(PIECE as usize)
            .map(move |at| Run { start: at, length: PIECE.min(end - at) })
    };
    written.iter().flat_map(cut).collect()
}

/// Gives an event to the device it is for.
fn dispatch(machine: &Machine, event: &Event) {
    let devices = &machine.devices;
    let result = match event.key.owner {
        owner::CONSOLE => devices.console.ready(event),
        owner::VSOCK => devices.vsock.ready(event),
        owner::SERIAL => {
            lock(&devices.serial).ready(event);
            Ok(())
        }
        // `owner::END` is there to end the wait.
        _ => Ok(()),
    };
    if let Err(fault) = result {
        machine.end(end_of(fault));
    }
}

struct Server<'a> {
    machine: &'a Machine,
    origin: &'a Origin<'a>,
    control: Option<OwnedFd>,
    /// Since when there is no `serve`.
    orphaned: Option<Instant>,
    /// What is left to do.
    populate: VecDeque<Run>,
    saving: Saving,
    copies: Copies,
}

impl Server<'_> {
    fn run(&mut self) -> io::Result<End> {
        let poller = &self.machine.poller;
        if let Some(control) = &self.control {
            rustix::io::ioctl_fionbio(control, true)?;
            poller.add(control, CONTROL, Interest::READ)?;
        }
        let mut events = Vec::new();
        loop {
            if let Some(end) = self.machine.ended() {
                return Ok(end);
            }
            let timeout = match self.orphaned {
                None => None,
                Some(since) => match ORPHAN_LIMIT.checked_sub(since.elapsed()) {
                    Some(left) => Some(left),
                    None => return Ok(End::Stopped),
                },
            };
            let timeout = match self.saving {
                Saving::Wanted(_) => Some(saving::PAUSE),
                _ => timeout,
            };
            let timeout = if self.populate.is_empty() { timeout } else { Some(Duration::ZERO) };
            poller.wait(&mut events, timeout)?;
            if events.is_empty()
                && let Some(piece) = self.populate.pop_front()
            {
                working_set::populate(&self.machine.memory, &[piece]);
            }
            for event in &events {
                if event.key.owner != owner::CONTROL {
                    dispatch(self.machine, event);
                } else if let Some(end) = self.requests() {
                    return Ok(end);
                }
            }
            self.save_again();
            self.report_streams();
            self.report_copy();
        }
    }

    /// Handles what `serve` asked for. Some: it asked for the end.
    fn requests(&mut self) -> Option<End> {
        // Bounded, so that a flood of requests does not starve the devices.
        for _ in 0..16 {
            let control = self.control.as_ref()?;
            match receive::<MachineRequest>(control) {
                Ok(packet) => {
                    if let Some(end) = self.request(packet) {
                        return Some(end);
                    }
                }
                Err(SocketError::WouldBlock) => return None,
                Err(SocketError::Closed) => {
                    self.orphan();
                    return None;
                }
                Err(e) => return Some(End::HostError(format!("control socket: {e}"))),
            }
        }
        None
    }

    fn request(&mut self, packet: Packet<MachineRequest>) -> Option<End> {
        if let MachineRequest::Save { account, disk_tag } = packet.message {
            self.save(packet.descriptors, account, disk_tag);
            return None;
        }
        let mut descriptors = packet.descriptors.into_iter();
        let devices = &self.machine.devices;
        match packet.message {
            MachineRequest::AttachTerminal { terminal, redraw } => {
                let socket = descriptors.next()?;
                if let Err(fault) = devices.console.attach(terminal, socket, redraw) {
                    self.machine.end(end_of(fault));
                }
            }
            MachineRequest::ResizeTerminal { terminal, columns, rows } => {
                if let Err(fault) = devices.console.resize(terminal, columns, rows) {
                    self.machine.end(end_of(fault));
                }
            }
            MachineRequest::DetachTerminal { terminal } => {
                if let Err(fault) = devices.console.detach(terminal) {
                    self.machine.end(end_of(fault));
                }
                self.tell(&MachineEvent::TerminalDetached { terminal });
            }
            MachineRequest::Connect { stream, port } => {
                let result = match descriptors.next() {
                    Some(socket) => {
                        devices.connect(stream, port, socket).map_err(|e| e.to_string())
                    }
                    None => Err("the request came without a descriptor".into()),
                };
                if let Err(reason) = result {
                    self.tell(&MachineEvent::ConnectFailed { stream, reason });
                }
            }
            MachineRequest::AttachConsole => {
                if let Some(socket) = descriptors.next()
                    && let Err(e) = lock(&devices.serial).attach(socket)
                {
                    tracing::warn!(error = %e, "attach the serial console");
                }
            }
            MachineRequest::Stats => {
                let stats = self.stats();
                self.tell(&MachineEvent::Stats(stats));
            }
            MachineRequest::Stop => return Some(End::Stopped),
            MachineRequest::Continue => self.go_on(),
            MachineRequest::CopyDisk { copy, room } => {
                self.copy_disk(copy, descriptors.next(), room);
            }
            MachineRequest::CancelCopy { copy } => {
                devices.block.no_copy(WhichCopy::Number(copy), "it was called off");
            }
            // Saved above; it runs already.
            MachineRequest::Save { .. } | MachineRequest::Go => {}
        }
        None
    }

    /// `serve` is gone. Its end of the agent's control connection went with it, so the agent is about
    /// to power off; this only bounds the wait.
    fn orphan(&mut self) {
        if let Some(control) = self.control.take() {
            let _ = self.machine.poller.remove(&control);
        }
        if let Saving::Saved = self.saving {
            // There may be a published snapshot that matches the disk as it is now: not a byte may be
            // written to that any more. It was synced and frozen; nothing of it is lost.
            self.machine.end(End::Stopped);
        }
        self.saving = Saving::No;
        self.machine.devices.block.no_copy(WhichCopy::Any, "the service is gone");
        self.orphaned = Some(Instant::now());
    }

    fn report_streams(&mut self) {
        let outcomes = self.machine.devices.vsock.take_outcomes();
        for outcome in outcomes {
            self.tell(&match outcome {
                VsockOutcome::Connected { stream } => MachineEvent::Connected { stream },
                VsockOutcome::Failed { stream, reason } => {
                    MachineEvent::ConnectFailed { stream, reason }
                }
            });
        }
    }

    fn stats(&self) -> Stats {
        let devices = &self.machine.devices;
        let mut stats = Stats { private_bytes: private_bytes().unwrap_or(0), ..Default::default() };
        devices.block.add_stats(&mut stats);
        devices.console.add_stats(&mut stats);
        devices.vsock.add_stats(&mut stats);
        stats
    }

    /// Sends an event; waits for a slow reader, but not for ever.
    fn tell(&mut self, event: &MachineEvent) {
        let Some(control) = &self.control else {
            return;
        };
        let deadline = Instant::now() + SEND_LIMIT;
        loop {
            match send(control, event, &[]) {
                Ok(()) => return,
                Err(SocketError::WouldBlock) if Instant::now() < deadline => {
                    let mut fds = [PollFd::from_borrowed_fd(control.as_fd(), PollFlags::OUT)];
                    let second = rustix::time::Timespec { tv_sec: 1, tv_nsec: 0 };
                    let _ = poll(&mut fds, Some(&second));
                }
                Err(e) => {
                    tracing::warn!(error = %e, "tell serve");
                    return self.orphan();
                }
            }
        }
    }
}

/// Anonymous memory of this process: guest pages of its own, and ours.
fn private_bytes() -> Option<u64> {
    let rollup = std::fs::read_to_string("/proc/self/smaps_rollup").ok()?;
    let line = rollup.lines().find(|l| l.starts_with("Anonymous:"))?;
    let kib: u64 = line.split_ascii_whitespace().nth(1)?.parse().ok()?;
    Some(kib * 1024)
}
