//! Sessions: what the host has started in this machine and not yet been told the end of.

use hermitage_guest_proto::{ExitStatus, SessionId};
use nix::sys::signal::{Signal, killpg};
use nix::sys::wait::WaitStatus;
use nix::unistd::Pid;

use crate::signals;
use crate::terminal::Terminal;

pub struct Session {
    pub id: SessionId,
    /// Its first process, leader of a session and process group of its own.
    pub leader: Pid,
    /// Set when the leader has been reaped. Its id may be another's from then on.
    pub exit: Option<ExitStatus>,
    /// None: the program has its streams itself.
    pub terminal: Option<Terminal>,
}

impl Session {
    /// Signals the foreground process group.
    pub fn signal(&self, signal: Signal) -> nix::Result<()> {
        match (&self.terminal, &self.exit) {
            (_, Some(_)) => Ok(()),
            (Some(terminal), None) => terminal.signal(signal, self.leader),
            (None, None) => killpg(self.leader, signal),
        }
    }

    pub fn hang_up(&mut self) {
        match (&mut self.terminal, &self.exit) {
            (Some(terminal), _) => terminal.hang_up(),
            (None, None) => drop(killpg(self.leader, Signal::SIGHUP)),
            (None, Some(_)) => {}
        }
    }
}

/// The exit status of a process that has ended; None for stops and the like.
pub fn exit_status(status: &WaitStatus) -> Option<(Pid, ExitStatus)> {
    match *status {
        WaitStatus::Exited(pid, code) => Some((pid, ExitStatus::Code(code as u8))),
        WaitStatus::Signaled(pid, signal, core_dumped) => {
            Some((pid, ExitStatus::Signal { name: signals::name(signal as i32), core_dumped }))
        }
        _ => None,
    }
}
