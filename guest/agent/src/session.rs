//! Sessions: what the host has started in this machine and not yet been told the end of.

use std::fs;
use std::path::PathBuf;

use hermitage_guest_proto::{ExitStatus, SessionId};
use nix::sys::signal::{Signal, kill, killpg};
use nix::sys::wait::WaitStatus;
use nix::unistd::{Pid, getpgid};

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

    /// Its client is gone. `processes` are the machine's, as far as they matter.
    pub fn hang_up(&mut self, processes: &[Pid]) {
        match (&mut self.terminal, &self.exit) {
            (Some(terminal), _) => terminal.hang_up(),
            (None, None) => hang_up_command(self.leader, processes),
            (None, Some(_)) => {}
        }
    }
}

/// Sends SIGHUP to whoever in the command's process group still has its streams: a pipeline and what a script
/// waits for have nobody left to work for. Shells without job control start background programs in the same
/// group; one that was given files instead of the streams is meant to stay (the servers of editors are
/// started so, without setsid or nohup).
fn hang_up_command(leader: Pid, processes: &[Pid]) {
    let session = streams(leader);
    let uses = |pid: &Pid| streams(*pid).iter().any(|stream| session.contains(stream));
    let group =
        processes.iter().filter(|pid| **pid != leader && getpgid(Some(**pid)) == Ok(leader));
    for pid in group.filter(|pid| uses(pid)) {
        // It may have ended by now.
        let _ = kill(*pid, Signal::SIGHUP);
    }
    let _ = kill(leader, Signal::SIGHUP);
}

/// The sockets among a process's standard streams.
fn streams(pid: Pid) -> Vec<PathBuf> {
    (0..3)
        .filter_map(|fd| fs::read_link(format!("/proc/{pid}/fd/{fd}")).ok())
        .filter(|name| name.as_os_str().as_encoded_bytes().starts_with(b"socket:"))
        .collect()
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

#[cfg(test)]
mod tests {
    use std::io::{BufRead as _, BufReader};
    use std::os::fd::OwnedFd;
    use std::os::unix::net::UnixStream;
    use std::os::unix::process::CommandExt as _;
    use std::process::{Command, Stdio};
    use std::time::{Duration, Instant};

    use super::*;

    #[test]
    fn a_command_is_hung_up_but_not_what_it_put_into_the_background() {
        let (ours, theirs) = UnixStream::pair().unwrap();
        let stream = || Stdio::from(OwnedFd::from(theirs.try_clone().unwrap()));
        let script = "sleep 100 > /dev/null 2>&1 & echo $!; sleep 100 & echo $!; \
                      sh -c 'echo $$; exec sleep 100'; :";
        let mut leader = Command::new("bash")
            .args(["-c", script])
            .process_group(0)
            .stdin(stream())
            .stdout(stream())
            .stderr(stream())
            .spawn()
            .unwrap();
        ours.set_read_timeout(Some(Duration::from_secs(20))).unwrap();
        let mut lines = BufReader::new(&ours).lines();
        let pids: Vec<Pid> = (0..3)
            .map(|_| Pid::from_raw(lines.next().unwrap().unwrap().parse().unwrap()))
            .collect();
        let alive = |pid: Pid| {
            fs::read_to_string(format!("/proc/{pid}/stat")).is_ok_and(|stat| !stat.contains(") Z"))
        };
        assert!(pids.iter().all(|pid| alive(*pid)));
        hang_up_command(Pid::from_raw(leader.id() as i32), &pids);
        leader.wait().unwrap();
        let end = Instant::now() + Duration::from_secs(20);
        while alive(pids[1]) || alive(pids[2]) {
            assert!(Instant::now() < end, "what has the streams is still there");
            std::thread::sleep(Duration::from_millis(5));
        }
        assert!(alive(pids[0]), "the background server is gone");
        kill(pids[0], Signal::SIGKILL).unwrap();
    }
}
