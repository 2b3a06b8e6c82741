//! Messages between the host and the agent (PID 1) in a machine.
//!
//! They travel over one virtio-vsock stream, the *control connection*, opened by the host to
//! [`CONTROL_PORT`] while the base is built and kept through fork and resume. Each message is a
//! frame: length (`u32`, little endian, of what follows, at most [`MAX_FRAME`]), then the message in
//! postcard. `docs/agent-protocol.md` is the normative text.
//!
//! Everything the agent sends was written by a guest and is hostile: the decoder bounds every length
//! before it allocates, and a frame that does not decode ends the connection.
#![forbid(unsafe_code)]

pub mod forward;
mod frame;

pub use frame::{Decoder, FrameError, encode};

use serde::{Deserialize, Serialize};

/// Version of these messages. A base says which one its agent speaks, so there is no negotiation.
pub const VERSION: u16 = 6;

/// Versions of agents that the host can deal with: what is in machines that were saved before an upgrade.
/// 4 does not know [`HostMessage::Take`], which machines whose base has nothing to take are never sent;
/// before [`KNOWS_PROCESSES`] nothing bounds processes, and below [`ASKING`] nothing is asked, and so nothing answered.
pub const SPOKEN: std::ops::RangeInclusive<u16> = 4..=VERSION;

/// First version that knows [`HostMessage::LimitProcesses`] and [`HostMessage::CountProcesses`]. Others are never sent
/// them.
pub const KNOWS_PROCESSES: u16 = 6;

/// The first version with [`AgentMessage::Ask`] and [`HostMessage::Answer`].
pub const ASKING: u16 = 6;

/// vsock port on which the agent listens for the control connection.
pub const CONTROL_PORT: u32 = 1024;

/// vsock port on which the agent listens for streams (see [`StreamToken`]).
pub const STREAM_PORT: u32 = 1025;

/// Terminals of a machine: ports 0 to 7 of its virtio-console device.
pub const TERMINALS: u8 = 8;

/// Largest frame, in bytes, without its length.
pub const MAX_FRAME: usize = 256 * 1024;

/// Names one terminal session or command for as long as the machine's control connection lives.
/// Chosen by the host, never reused.
pub type SessionId = u64;

/// Names a vsock stream. The host connects to [`STREAM_PORT`] and sends these 8 bytes (little endian)
/// first; the agent reads exactly those and keeps the stream until an [`Exec`] names the token.
/// Whichever of the two arrives first waits for the other (the agent keeps at most 64 unclaimed
/// streams, each for at most 30 s).
pub type StreamToken = u64;

/// Host to agent.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum HostMessage {
    /// First message after a fork. The agent answers [`AgentMessage::Awake`], and then
    /// [`AgentMessage::Attached`] or [`AgentMessage::AttachFailed`]; no user code runs before.
    Attach(Attach),
    /// Start a shell or command on a terminal. Answered by `Started` or `StartFailed`.
    OpenTerminal(OpenTerminal),
    /// Run a command on vsock streams, without a terminal. Answered by `Started` or `StartFailed`.
    Exec(Exec),
    /// Set a terminal's window size (TIOCSWINSZ, hence SIGWINCH).
    Resize { session: SessionId, window: Window },
    /// Deliver a signal to the foreground process group of the session, named as in RFC 4254 §6.9
    /// (`INT`, `TERM`, `KILL`, `HUP`, …).
    Signal { session: SessionId, name: String },
    /// The user's side is gone: hang up the terminal (SIGHUP) or the command's process group.
    Hangup { session: SessionId },
    /// Set the wall clock.
    SetClock(WallClock),
    /// Flush file systems, stop every process in order (SIGTERM, then SIGKILL after `grace_ms`),
    /// unmount, power off. The same happens when the control connection ends.
    PowerOff { grace_ms: u32 },
    /// Answered by `Pong` with the same number.
    Ping(u64),
    /// Get ready for a save: every process is stopped without its noticing, the disk is synced. Answered by
    /// `Frozen`, the agent's last word until `Resume`, or by `FreezeFailed`, after which everything goes on.
    Freeze,
    /// First message after a save: in the resumed machine, or in the same one when the save was called
    /// off. Entropy, clock and processes, in this order. Answered by `Resumed`.
    Resume(Resume),
    /// The host's disk is nearly full, or no longer: while it is scarce no program gets new blocks of
    /// the account disk (ENOSPC).
    DiskRoom { scarce: bool },
    /// What is being worked on? Answered by `Activity` with the same number.
    LookAtWork(LookAtWork),
    /// After `Attach` or `Resume`: this is what the machine may have; take into use what is not in use of it.
    /// Nothing is taken out of use. Answered by `Took`.
    Take(Resources),
    /// From now on so many processes and threads of the user's, at most; `None`: as many as leave the kernel some for
    /// logins. Also before `Resume`, which it counts with: before processes go on. Answered by `Processes`.
    LimitProcesses { question: u64, most: Option<u32> },
    /// How many are there? Answered by `Processes` with the same number.
    CountProcesses { question: u64 },
    /// To [`AgentMessage::Ask`].
    Answer(Answer),
}

/// What the host says to a question of the user's. One to a question that nobody waits for is ignored.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Answer {
    /// [`ALL_QUESTIONS`]: of all that were asked before the last `Resume`, which the host knows nothing of.
    pub number: u64,
    pub status: AnswerStatus,
    /// At most [`MAX_ANSWER`] bytes.
    pub text: String,
}

/// No question's number.
pub const ALL_QUESTIONS: u64 = 0;

#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum AnswerStatus {
    /// The text is what was asked for, or says what was done.
    Done,
    /// The text says why not.
    Refused,
    /// Nobody looked at the question.
    Unasked,
}

/// Longest word and longest argument of a question, and longest answer, in bytes.
pub const MAX_WORD: usize = 32;
pub const MAX_ARGUMENT: usize = 256;
pub const MAX_ANSWER: usize = 16 * 1024;

/// Questions of a machine that wait for their answers at once.
pub const MAX_ASKED: usize = 4;

/// Memory and processors of a machine.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Resources {
    /// In whole memory blocks.
    pub memory_bytes: u64,
    pub vcpus: u8,
}

/// The agent looks at the user's processes now and compares with its last look. Where there was none, or
/// `fresh` says that it does not count, or it was less than `window_ms` ago, the answer comes when
/// `window_ms` are over. Of two questions the later one counts.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct LookAtWork {
    pub question: u64,
    pub fresh: bool,
    /// At most [`MAX_WINDOW_MS`].
    pub window_ms: u32,
}

/// Longest [`LookAtWork::window_ms`]; a longer one is taken as this.
pub const MAX_WINDOW_MS: u32 = 60_000;

/// Processes that an [`Activity`] names at most.
pub const MAX_BUSY: usize = 4;

/// What a machine that was saved has to be told before its processes go on.
#[derive(Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Resume {
    /// As in [`Attach`].
    pub entropy: Vec<u8>,
    pub clock: WallClock,
}

impl std::fmt::Debug for Resume {
    /// Leaves the entropy out: this ends up in logs.
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Resume").field("clock", &self.clock).finish_non_exhaustive()
    }
}

/// What makes a fork somebody's machine.
#[derive(Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Attach {
    /// The account's name: login name, home directory.
    pub account: String,
    /// The account's user id in the guest (also its group id).
    pub uid: u32,
    pub hostname: String,
    /// Content of `/etc/machine-id`.
    pub machine_id: [u8; 16],
    /// At least 32 bytes from the host's getrandom(2), credited with RNDADDENTROPY and followed by
    /// RNDRESEEDCRNG before anything else happens.
    pub entropy: Vec<u8>,
    pub clock: WallClock,
    /// Size of the account disk in bytes: the agent waits for the block device to show it.
    pub disk_size: u64,
}

impl std::fmt::Debug for Attach {
    /// Leaves the entropy out: this ends up in logs.
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Attach")
            .field("account", &self.account)
            .field("uid", &self.uid)
            .field("hostname", &self.hostname)
            .field("disk_size", &self.disk_size)
            .finish_non_exhaustive()
    }
}

/// Time since 1970-01-01 00:00 UTC.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct WallClock {
    pub seconds: i64,
    pub nanoseconds: u32,
}

/// Terminal size. Pixels are 0 where the client did not say.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Window {
    pub columns: u16,
    pub rows: u16,
    pub width_px: u16,
    pub height_px: u16,
}

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct OpenTerminal {
    pub session: SessionId,
    /// 0 to [`TERMINALS`] - 1; must be free.
    pub terminal: u8,
    /// TERM for the program.
    pub term: String,
    pub window: Window,
    /// Encoded terminal modes, opcode and argument, as in RFC 4254 §8 (unknown ones are ignored).
    pub modes: Vec<(u8, u32)>,
    pub env: Vec<(String, String)>,
    /// None: the account's login shell. Some: given to the login shell with `-c`.
    pub command: Option<Vec<u8>>,
    /// A line for before the message of the day; none if empty.
    pub greeting: String,
}

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Exec {
    pub session: SessionId,
    pub program: Program,
    pub env: Vec<(String, String)>,
    /// Standard input and output: one full-duplex stream.
    pub stdio: StreamToken,
    /// Standard error: the guest only writes.
    pub stderr: StreamToken,
}

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Program {
    /// The login shell reading commands from standard input.
    Shell,
    /// Given to the login shell with `-c`.
    Command(Vec<u8>),
    /// `sftp-server` of the image.
    Sftp,
    /// What forwards connections; its standard input and output speak [`forward`].
    Forwarder,
}

/// Agent to host.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum AgentMessage {
    /// Sent once, by the machine the base snapshot is taken of, when everything is loaded and warm.
    Ready {
        version: u16,
        kernel: String,
    },
    /// Sent once, in answer to `Attach`: entropy, clock and host name are in place, so this machine is like
    /// no other; the disk comes next, and `Attached` or `AttachFailed` follows.
    Awake,
    /// Identity, entropy, clock and disk are in place.
    Attached,
    AttachFailed {
        reason: String,
    },
    Started {
        session: SessionId,
        pid: u32,
    },
    StartFailed {
        session: SessionId,
        reason: String,
    },
    /// The session's first process has ended. For a terminal: all its output is in the virtqueue.
    Exited {
        session: SessionId,
        status: ExitStatus,
    },
    Pong(u64),
    /// Said last before a save; nothing follows it until [`HostMessage::Resume`].
    Frozen,
    FreezeFailed {
        reason: String,
    },
    /// Everything goes on. The sessions there are, among them any whose end is about to be told.
    Resumed {
        sessions: Vec<LiveSession>,
    },
    /// What the user's processes did between two looks.
    Activity(Activity),
    /// What is in use now, and what went wrong with the rest.
    Took {
        in_use: Resources,
        fault: Option<String>,
    },
    /// How many processes there are, and what bounds them.
    Processes(Processes),
    /// A question of the user's, which the host answers for the account that the machine is of. Answered by
    /// [`HostMessage::Answer`] with the same number.
    Ask(Ask),
}

/// Both are the user's words.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Ask {
    /// Never given twice in a machine's life, and not [`ALL_QUESTIONS`].
    pub number: u64,
    /// At most [`MAX_WORD`] bytes.
    pub word: String,
    /// At most [`MAX_ARGUMENT`] bytes; empty if there is none.
    pub argument: String,
}

/// The user's processes, as the kernel counts them: threads, too.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Processes {
    pub question: u64,
    pub count: u32,
    /// How many there may be; `None`: nothing bounds them.
    pub most: Option<u32>,
    /// Why that is not what was asked for.
    pub fault: Option<String>,
}

/// The user's processes between two looks, `over_ms` apart.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Activity {
    pub question: u64,
    pub over_ms: u32,
    /// Processor time of all of them, those that have ended meanwhile among them, in thousandths of one
    /// processor.
    pub cpu_permille: u32,
    /// Those that used most of it or waited to go on at both looks, the busiest first; at most
    /// [`MAX_BUSY`].
    pub busy: Vec<Busy>,
    /// TCP connections to other machines that are established.
    pub connections: u32,
    /// The other side of one of them, as `address:port`.
    pub peer: Option<String>,
}

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Busy {
    pub pid: u32,
    /// Its name as the kernel has it (15 bytes at most).
    pub name: String,
    /// Its own and its ended children's.
    pub cpu_permille: u32,
    pub waits_for: WaitsFor,
}

/// What a process waited for at both looks.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum WaitsFor {
    /// Nothing, or something that may never come: a key, a timer, a message.
    Nothing,
    Processor,
    Disk,
}

/// A session that lived through a save.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct LiveSession {
    pub session: SessionId,
    /// None: a command on streams, which were broken off.
    pub terminal: Option<u8>,
    /// Its first process.
    pub pid: u32,
}

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum ExitStatus {
    Code(u8),
    /// Signal name without `SIG`, as in RFC 4254 §6.10.
    Signal {
        name: String,
        core_dumped: bool,
    },
}
