//! What is worth telling. The field names are a format that programs read: docs/watching.md has them all.
//!
//! No event has a field for a secret, or for what a user typed or ran.

use serde::Serialize;
use serde_json::Value;
use uuid::Uuid;

#[derive(Clone, Debug, Serialize)]
#[serde(tag = "event", rename_all = "kebab-case")]
pub enum Event {
    ServiceStarted {
        version: &'static str,
        pid: u32,
        listen: Vec<String>,
    },
    ServiceStopping,
    ServiceStopped {
        /// Machines that did not end in time.
        machines_left: usize,
    },
    /// The configuration was read again and holds.
    ConfigReloaded {
        changed: Vec<String>,
        needs_restart: Vec<String>,
    },
    /// It was read again, and the former one stays.
    ConfigRefused {
        reason: String,
    },
    /// Somebody has authenticated.
    Login {
        account: String,
        id: Uuid,
        source: String,
        method: Method,
        /// The key's or the certificate's fingerprint.
        by: String,
        /// The key or certificate may not do everything.
        restricted: bool,
    },
    LoginRefused {
        /// As the client said it, made printable.
        user: String,
        source: String,
        method: Method,
        #[serde(skip_serializing_if = "Option::is_none")]
        by: Option<String>,
        reason: String,
    },
    /// Connections of a source are refused for a time.
    Penalty {
        source: String,
        seconds: u64,
        after: &'static str,
    },
    /// A connection was not taken. Only counted: a flood must not fill the log.
    #[serde(skip)]
    ConnectionRefused {
        reason: &'static str,
    },
    SessionStarted {
        session: u64,
        account: String,
        id: Uuid,
        source: String,
        kind: &'static str,
        terminal: bool,
        login: String,
    },
    SessionEnded {
        session: u64,
        account: String,
        id: Uuid,
        source: String,
        kind: &'static str,
        login: String,
        /// How it found its machine, if it got one.
        machine: Option<&'static str>,
        seconds: u64,
        /// Bytes from its client, and to it.
        received: u64,
        sent: u64,
        outcome: String,
    },
    MachineStarted {
        account: String,
        id: Uuid,
        pid: i32,
        base: String,
        how: &'static str,
        /// From the word to start until the account has its machine.
        milliseconds: u64,
        #[serde(skip_serializing_if = "Option::is_none")]
        detail: Option<String>,
        /// Names and nanoseconds.
        #[serde(skip)]
        stages: Vec<(String, u64)>,
    },
    /// A fork that was lost before the account had it; another follows.
    MachineRetried {
        id: Uuid,
        reason: String,
    },
    MachineFailed {
        id: Uuid,
        reason: String,
    },
    MachineSaved {
        id: Uuid,
        bytes: u64,
        milliseconds: u64,
        because: String,
        #[serde(skip)]
        stages: Vec<(String, u64)>,
    },
    SaveFailed {
        id: Uuid,
        reason: String,
    },
    /// Somebody came back while the machine was being saved.
    SaveCalledOff {
        id: Uuid,
    },
    MachineEnded {
        id: Uuid,
        reason: String,
    },
    /// An account's machine gets no more space, or gets some again.
    QuotaReached {
        id: Uuid,
        /// Bytes.
        used: u64,
        quota: u64,
    },
    QuotaFree {
        id: Uuid,
        used: u64,
        /// None: it has none any more.
        #[serde(skip_serializing_if = "Option::is_none")]
        quota: Option<u64>,
    },
    /// Something was asked over the admin socket that changes something or looks into a machine.
    AdminRequest {
        #[serde(flatten)]
        who: Who,
        request: Value,
    },
    /// What an account has was taken out, put back, kept or gone back to; written by whoever did it.
    Copy {
        /// None: the account's user.
        #[serde(flatten)]
        who: Option<Who>,
        what: Copied,
        account: String,
        /// None: it came to nothing, and there is no such account.
        #[serde(skip_serializing_if = "Option::is_none")]
        id: Option<Uuid>,
        /// Where to or where from: a file, a backup's run, a checkpoint.
        #[serde(skip_serializing_if = "Option::is_none")]
        place: Option<String>,
        #[serde(skip_serializing_if = "Option::is_none")]
        bytes: Option<u64>,
        milliseconds: u64,
        #[serde(skip_serializing_if = "Option::is_none")]
        error: Option<String>,
    },
    /// A command of `hermitage` that changes something; written by the command itself.
    Command {
        #[serde(flatten)]
        who: Who,
        command: Vec<String>,
        /// What it changed, beyond its words: fingerprints of keys.
        #[serde(skip_serializing_if = "Vec::is_empty")]
        details: Vec<String>,
        milliseconds: u64,
        #[serde(skip_serializing_if = "Option::is_none")]
        error: Option<String>,
    },
}

/// What was done with an account's files.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum Copied {
    Export,
    Backup,
    /// Of an archive, or of a backup's run.
    Restore,
    Checkpoint,
    GoBack,
    DropCheckpoint,
    /// The disk of a running machine, for a command.
    Disk,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Method {
    Password,
    Publickey,
    Certificate,
}

impl Method {
    pub fn as_str(self) -> &'static str {
        match self {
            Method::Password => "password",
            Method::Publickey => "publickey",
            Method::Certificate => "certificate",
        }
    }
}

/// An operator.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize)]
pub struct Who {
    pub uid: u32,
    pub pid: i32,
    /// Who logged in to this host, whatever became of her since: `/proc/PID/loginuid`.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub login_uid: Option<u32>,
}

impl Who {
    /// The kernel does not say for processes that no login started: their uid is the largest.
    pub fn of(uid: u32, pid: i32) -> Self {
        let path = format!("/proc/{pid}/loginuid");
        let login_uid = std::fs::read_to_string(path).ok();
        let login_uid = login_uid.and_then(|text| text.trim().parse().ok());
        Self { uid, pid, login_uid: login_uid.filter(|uid| *uid != u32::MAX) }
    }
}
