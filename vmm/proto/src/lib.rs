//! Messages between `hermitage serve` and `hermitage-vmm`.
//!
//! There are two kinds of socket, both `AF_UNIX`/`SOCK_SEQPACKET`, one postcard message a packet,
//! file descriptors by `SCM_RIGHTS`:
//!
//! - the *fork server's*: one per base. `serve` starts `hermitage-vmm fork-server --base DIR` with the
//!   socket as descriptor 3; each [`ForkRequest`] makes a machine, a process of its own.
//! - a *machine's*: handed over with the fork request, lives as long as the machine. Its end tells
//!   either side that the other is gone.
//!
//! Bytes of terminals, streams and consoles never travel in messages: `serve` makes a pair of
//! `AF_UNIX`/`SOCK_STREAM` sockets and passes one end. Half-close is `shutdown(SHUT_WR)` on either
//! end; back-pressure is the socket's own.
#![forbid(unsafe_code)]

mod socket;

pub use socket::{Packet, SocketError, message_pair, receive, send, stream_pair};

use serde::{Deserialize, Serialize};

/// Version of these messages; `serve` and `hermitage-vmm` must have the same.
pub const VERSION: u16 = 5;

/// Largest message in bytes.
pub const MAX_MESSAGE: usize = 16 * 1024;

/// Most descriptors a message carries.
pub const MAX_DESCRIPTORS: usize = 5;

/// How long a resumed machine waits for [`MachineRequest::Go`].
pub const GO_LIMIT: std::time::Duration = std::time::Duration::from_secs(30);

/// Chosen by `serve`, never reused by it.
pub type MachineId = u64;

/// What a machine is to have, between its base's least and its most.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Shape {
    /// Of RAM: what the base's machines boot with, or whole memory blocks more.
    pub memory_bytes: u64,
    pub vcpus: u8,
}

/// `serve` to fork server.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum ForkRequest {
    /// Descriptors, in this order: the machine's control socket, the agent stream (the host's end of
    /// the agent's control connection; what was written to it before the fork is delivered), the
    /// account disk, open for reading and writing and locked; with `cgroup`, last, the `cgroup.procs` of
    /// the control group that the machine's process is to be in, open for writing.
    /// Without a shape the machine has the base's least.
    Fork { machine: MachineId, label: String, shape: Option<Shape>, cgroup: bool },
    /// End a machine without ceremony (SIGKILL).
    Kill { machine: MachineId },
    /// Make a machine of this base and a snapshot of it. Descriptors, in this order: as with `Fork`,
    /// then the snapshot, open for reading, then, with `cgroup`, that of `Fork`. Answered as `Fork` is. The machine checks the whole
    /// snapshot, says [`MachineEvent::Restored`] and waits for [`MachineRequest::Go`] before its first
    /// instruction and before anything is written to the disk. A snapshot that can't be used ends it
    /// with [`End::SnapshotRefused`]. It gets what the snapshot's machine had, and what `shape` has beyond that.
    Resume { machine: MachineId, label: String, shape: Option<Shape>, cgroup: bool },
}

/// Fork server to `serve`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum ForkEvent {
    /// Sent once: the base was checked and mapped.
    Ready {
        version: u16,
        base: String,
    },
    /// Sent once, instead: the base can't be used; the fork server ends.
    Refused {
        reason: String,
    },
    Forked {
        machine: MachineId,
        pid: i32,
    },
    ForkFailed {
        machine: MachineId,
        reason: String,
    },
    /// The process is gone and reaped.
    Exited {
        machine: MachineId,
        exit: ProcessExit,
    },
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum ProcessExit {
    Code(i32),
    Signal(i32),
}

/// `serve` to a machine.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum MachineRequest {
    /// Descriptor: a stream socket that becomes the host's side of the terminal. What the terminal
    /// writes while nothing is attached is dropped, but drawn on the terminal's screen. With `redraw`
    /// (columns, rows) the screen takes that size and is what the socket gets first; without, the
    /// terminal is for a new program and has no screen until [`ResizeTerminal`](Self::ResizeTerminal).
    AttachTerminal { terminal: u8, redraw: Option<(u16, u16)> },
    /// The window's size: the terminal's screen follows, and is kept from now on.
    ResizeTerminal { terminal: u8, columns: u16, rows: u16 },
    /// Deliver what the terminal has written so far, then close the socket. Answered by
    /// [`MachineEvent::TerminalDetached`] at once; the bytes follow on the socket up to its end.
    DetachTerminal { terminal: u8 },
    /// Descriptor: a stream socket. Connect it to a vsock port of the guest.
    Connect { stream: u64, port: u32 },
    /// Descriptor: a stream socket. The serial console (ttyS0): first the log so far (at most 64 KiB),
    /// then as it comes; input goes to the guest. A former one is closed.
    AttachConsole,
    /// Answered by [`MachineEvent::Stats`].
    Stats,
    /// End now, without the guest's help.
    Stop,
    /// Descriptors: an empty file, open for reading and writing, that becomes the snapshot
    /// (`docs/formats/diff.md`), and `/proc/PID/pagemap` of the machine's process, open for reading.
    /// The agent must have said `Frozen` and been sent nothing since. The machine pauses and answers
    /// [`MachineEvent::Saved`], after which it stays paused until `Stop` or `Continue`, or
    /// [`MachineEvent::SaveFailed`], after which it runs on.
    Save { account: [u8; 16], disk_tag: [u8; 16] },
    /// The save was called off: run on. No answer; the agent is still frozen.
    Continue,
    /// The snapshot is marked as consumed: run. Answered by [`MachineEvent::Running`].
    Go,
    /// Descriptor: an empty file, open for reading and writing. It becomes a copy of the account's disk as
    /// it is when this is taken up, holes included, while the machine goes on; it gets at most `room` bytes.
    /// Answered by [`MachineEvent::CopyBegun`] when nothing that the guest writes from then on is in it, then
    /// by [`MachineEvent::CopyDone`]; or, whenever it comes to nothing, by [`MachineEvent::CopyFailed`], once.
    /// A save gives it up. `copy` is a number that was not used before in this machine; each of the answers has it,
    /// since those of a copy that nobody waits for any more come when they come.
    CopyDisk { copy: u64, room: u64 },
    /// Give that copy up. If it is over, or was never asked for, this is nothing.
    CancelCopy { copy: u64 },
}

/// A machine to `serve`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum MachineEvent {
    /// The virtual CPUs are running. How long each stage of the fork took.
    Running {
        /// When the last of them was about to enter the guest, in nanoseconds of CLOCK_MONOTONIC: on a
        /// busy host this message comes later than what it tells.
        at: u64,
        stages: Vec<Stage>,
    },
    TerminalDetached {
        terminal: u8,
    },
    Connected {
        stream: u64,
    },
    ConnectFailed {
        stream: u64,
        reason: String,
    },
    Stats(Stats),
    /// Last message: the machine has ended or is about to.
    Ended(End),
    /// A machine made from a snapshot is whole and waits for [`MachineRequest::Go`], at most
    /// [`GO_LIMIT`]. How long each stage took.
    Restored {
        stages: Vec<Stage>,
    },
    /// The snapshot is on the medium and so is all the guest wrote to its disk.
    Saved {
        /// Of the file.
        bytes: u64,
        /// Pages with data in it.
        pages: u64,
        stages: Vec<Stage>,
    },
    SaveFailed {
        reason: String,
    },
    /// So many bytes of data are to be copied; 0: the file system shares them.
    CopyBegun {
        copy: u64,
        bytes: u64,
    },
    /// So many were up to now.
    CopyProgress {
        copy: u64,
        bytes: u64,
    },
    /// The file is the disk as it was. It was not synced.
    CopyDone {
        copy: u64,
        bytes: u64,
    },
    CopyFailed {
        copy: u64,
        reason: String,
    },
}

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Stage {
    pub name: String,
    pub nanoseconds: u64,
}

#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Stats {
    /// Bytes of guest memory that this machine has privately (not shared with its base).
    pub private_bytes: u64,
    pub disk_read_bytes: u64,
    pub disk_written_bytes: u64,
    pub disk_flushes: u64,
    pub terminal_bytes: u64,
    pub stream_bytes: u64,
    pub open_streams: u32,
}

/// Why a machine ended.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum End {
    /// The guest powered itself off.
    PowerOff,
    /// The guest reset or triple-faulted.
    Reset,
    /// `MachineRequest::Stop`, or `serve` went away and the guest did not power off in time.
    Stopped,
    /// The guest broke a device's rules.
    GuestFault(String),
    /// The host could not go on (KVM, i/o).
    HostError(String),
    /// The snapshot can't be used; nothing of it ran.
    SnapshotRefused(String),
}

impl std::fmt::Display for End {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            End::PowerOff => write!(f, "the machine was powered off"),
            End::Reset => write!(f, "the machine reset itself"),
            End::Stopped => write!(f, "the machine was stopped"),
            End::GuestFault(why) => write!(f, "the machine broke a device's rules: {why}"),
            End::HostError(why) => write!(f, "the host could not run the machine: {why}"),
            End::SnapshotRefused(why) => write!(f, "the snapshot can't be used: {why}"),
        }
    }
}
