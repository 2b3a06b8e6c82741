//! What the admin commands and the running service say to each other.
//!
//! The commands change the database themselves, so that they work while the service is down; then they
//! tell the service what it has to look at again. They talk over `RUN_DIR/admin.sock`
//! (`AF_UNIX`/`SOCK_STREAM`, mode 0600): the client sends one [`Request`] as a line of JSON, the service
//! answers one [`Reply`] as a line of JSON and closes. Two go on. After [`Request::Console`] and its
//! [`Reply::Done`], from the byte after that line on, the stream is the machine's serial console, both
//! ways, until either side closes. [`Request::CopyDisk`] is answered by a line a second as long as it takes,
//! and what it made is there for as long as the client keeps the connection.
//!
//! JSON and lines, because an operator with `socat` is a legitimate client.

use std::path::PathBuf;

use hermitage_storage::base::Size;
use serde::{Deserialize, Serialize};

/// The socket's name inside the run directory.
pub const SOCKET_NAME: &str = "admin.sock";

/// Longest request in bytes, its newline included. Longer ones are answered with an error.
pub const MAX_REQUEST: usize = 4 * 1024;

/// Longest reply in bytes, its newline included: some ten thousand accounts of [`Request::Status`].
pub const MAX_REPLY: usize = 16 * 1024 * 1024;

/// Client to service: `{"op":"account-changed","account":"alice"}`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "op", rename_all = "kebab-case", deny_unknown_fields)]
pub enum Request {
    /// The account's row or keys were changed. If it is disabled, removed or unknown by now, its
    /// sessions are ended and its machine is stopped; else its policy, linger and hold count from now on.
    /// Answered by `Done` when that has been started.
    AccountChanged { account: String },
    /// Start the account's machine, or resume it. Answered by `Done` when it runs, or by `Error`.
    StartAccount { account: String },
    /// Drop what there is of its machine's memory, running or saved. Answered by `Done` when that is
    /// gone, or by `Error`.
    ResetAccount { account: String },
    /// End the account's sessions and stop its machine in order, saved if that is its policy. Answered
    /// by `Done` when the machine is gone (at once if it was not running), or by `Error`.
    StopAccount { account: String },
    /// Copy the disk of the account's running machine as it is now, while it goes on. Answered by `Waiting` and `Copying`,
    /// once a second and as often as it takes, then by `Copied`, `NotRunning` or `Error`. A client that closes
    /// the connection gives the copy up.
    CopyDisk { account: String },
    /// Answered by `Status`.
    Status,
    /// Attach to the serial console of the account's running machine. Answered by `Done`, then raw
    /// bytes; by `Error` if no machine is running.
    Console { account: String },
    /// The sessions that are going on, or those of an account. Answered by `Sessions`.
    Sessions { account: Option<String> },
    /// End these sessions, or all of an account and its connections. Their users are told. Answered by
    /// `Counted`: how many were told to end.
    EndSessions { numbers: Vec<u64>, account: Option<String> },
    /// Show a text on the terminals of these sessions, of an account's, or with neither of all. Answered by
    /// `Counted`: on how many it will be shown.
    Message { numbers: Vec<u64>, account: Option<String>, text: String },
    /// How many processes the user of the account's running machine has. Answered by `Processes`, or by `NotRunning`.
    CountProcesses { account: String },
    /// Another base is the current one: make ready to fork from it, and let go of the former as soon as
    /// no machine is on it. Answered by `Done` at once.
    BaseChanged,
}

/// Service to client: `{"reply":"done"}`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "reply", rename_all = "kebab-case")]
pub enum Reply {
    Done,
    Status(Status),
    Sessions {
        sessions: Vec<SessionStatus>,
    },
    Counted {
        count: u32,
    },
    /// The copy has not begun: another one comes first, or the machine is not ready yet.
    Waiting {
        for_another: bool,
    },
    /// Bytes of data so far, and of how many.
    Copying {
        copied: u64,
        of: u64,
    },
    /// The copy, a file that is deleted when the client closes the connection. Who has opened it keeps it.
    Copied {
        path: PathBuf,
    },
    /// As the guest says; `count` is null where it does not. `fault`: why the limit does not count in this machine.
    Processes {
        count: Option<u32>,
        fault: Option<String>,
    },
    /// No machine of the account runs: its disk is free, or will be in a moment.
    NotRunning,
    /// One sentence for the operator: what could not be done, and why.
    Error {
        message: String,
    },
}

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Status {
    pub version: String,
    /// Process id of the service.
    pub pid: u32,
    /// When it started, in seconds since 1970-01-01 UTC.
    pub since: i64,
    /// Addresses it listens on.
    pub listen: Vec<String>,
    /// Base that new machines fork from, if there is one.
    pub base: Option<String>,
    /// SSH connections, authenticated or not.
    pub connections: u32,
    /// Accounts with a machine or a session; the others are stopped.
    pub accounts: Vec<AccountStatus>,
    /// Whether machines' limits are enforced.
    #[serde(default)]
    pub limits: Enforcement,
}

#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Enforcement {
    /// The folder of machines' control groups.
    pub path: Option<String>,
    /// Why there is none.
    pub reason: Option<String>,
}

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct AccountStatus {
    pub account: String,
    /// The lifecycle's state in lower case: `starting`, `running`, `lingering`, `saving`, `saved`,
    /// `resuming`, `stopping`, `failed`.
    pub state: String,
    /// When that state was entered, in seconds since 1970-01-01 UTC.
    pub since: i64,
    /// Why the machine is in that state: `2 sessions`, `until 12:03:10`, what failed.
    pub why: String,
    /// The machine's process.
    pub machine_pid: Option<i32>,
    /// Base the machine was forked from.
    pub base: Option<String>,
    pub sessions: u32,
    /// What keeps the machine awake though nobody is logged in and its linger is over: `make (pid 812),
    /// 97 % CPU`, `held until 2026-11-21 14:05 UTC`, `its policy is keep`.
    #[serde(default)]
    pub awake: Option<String>,
    /// The folder of the machine's control group, whose files say what it has used.
    #[serde(default)]
    pub cgroup: Option<String>,
    /// What the machine has.
    #[serde(default)]
    pub size: Option<Size>,
    /// Why its guest does not use all of that.
    #[serde(default)]
    pub unused: Option<String>,
}

/// A session that is going on.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct SessionStatus {
    /// Its number since the service started.
    pub number: u64,
    pub account: String,
    /// Address and port of the client.
    pub source: String,
    /// `shell`, `exec`, `sftp`, `forward`.
    pub kind: String,
    /// It is on a terminal.
    pub terminal: bool,
    /// What the login was by: `key SHA256:…`, `password`, `certificate …`.
    pub login: String,
    /// When it began, in seconds since 1970-01-01 UTC.
    pub since: i64,
    /// Seconds since its client last sent something.
    pub idle: u64,
    /// How it found its machine: `running`, `forked`, `resumed`, `cold`. None: it still waits for it.
    pub machine: Option<String>,
    /// Bytes of its channels, from its client and to it.
    #[serde(default)]
    pub received: u64,
    #[serde(default)]
    pub sent: u64,
}

/// Longest text of a [`Request::Message`], in bytes.
pub const MAX_MESSAGE: usize = 2 * 1024;

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn requests_look_as_documented() {
        let request = Request::AccountChanged { account: "alice".into() };
        assert_eq!(
            serde_json::to_string(&request).unwrap(),
            r#"{"op":"account-changed","account":"alice"}"#
        );
        let parsed: Request = serde_json::from_str(r#"{"op":"status"}"#).unwrap();
        assert_eq!(parsed, Request::Status);
        assert!(serde_json::from_str::<Request>(r#"{"op":"reboot"}"#).is_err());
    }

    #[test]
    fn replies_survive_the_wire() {
        let replies = [
            Reply::Done,
            Reply::Sessions { sessions: vec![] },
            Reply::Counted { count: 3 },
            Reply::Waiting { for_another: true },
            Reply::Copying { copied: 1, of: 2 },
            Reply::Copied { path: "/x/y".into() },
            Reply::Processes { count: Some(37), fault: None },
            Reply::NotRunning,
            Reply::Error { message: "no machine of alice is running".into() },
            Reply::Status(Status {
                version: "0.1.0".into(),
                pid: 7,
                since: 1,
                listen: vec!["127.0.0.1:2222".into()],
                base: None,
                connections: 0,
                accounts: vec![],
                limits: Enforcement::default(),
            }),
        ];
        for reply in replies {
            let line = serde_json::to_string(&reply).unwrap();
            assert!(!line.contains('\n'));
            assert_eq!(serde_json::from_str::<Reply>(&line).unwrap(), reply);
        }
    }
}
