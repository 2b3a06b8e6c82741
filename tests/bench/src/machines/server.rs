//! A fork server of our own: what `hermitage serve` does with it, and nothing else around.

use std::{
    os::fd::{AsFd as _, BorrowedFd, OwnedFd},
    path::Path,
    process::{Child, Command, Stdio},
    time::Duration,
};

use anyhow::{Context as _, bail};
use command_fds::{CommandFdExt as _, FdMapping};
use hermitage_vmm_proto::{
    ForkEvent, ForkRequest, MachineId, Shape, VERSION, message_pair, receive, send, stream_pair,
};

use super::{Died, Machine};
use crate::{
    clock,
    wait::{Deadline, until_readable},
};

/// It reads and checks the whole base first.
const READY_LIMIT: Duration = Duration::from_secs(300);
const EXIT_LIMIT: Duration = Duration::from_secs(60);

pub struct ForkServer {
    child: Child,
    /// None: told to end.
    socket: Option<OwnedFd>,
    last: MachineId,
    /// What its machines are to have, if not the base's least.
    pub shape: Option<Shape>,
}

/// What a fork is made with.
pub struct Parts {
    /// Open for reading and writing, locked.
    pub disk: OwnedFd,
    /// Frames for the agent that wait for it before it is forked.
    pub for_agent: Vec<u8>,
}

impl ForkServer {
    pub fn start(vmm: &Path, base: &Path) -> anyhow::Result<Self> {
        let (ours, theirs) = message_pair(false).context("make a socket pair")?;
        let child = Command::new(vmm)
            .arg("fork-server")
            .arg("--base")
            .arg(base)
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .fd_mappings(vec![FdMapping { parent_fd: theirs, child_fd: 3 }])
            .context("pass the socket as descriptor 3")?
            .spawn()
            .with_context(|| format!("start {}", vmm.display()))?;
        let server = Self { child, socket: Some(ours), last: 0, shape: None };
        match server.event(Deadline::after(READY_LIMIT), "Ready from the fork server")? {
            ForkEvent::Ready { version: VERSION, .. } => Ok(server),
            ForkEvent::Ready { version, .. } => bail!(
                "{} speaks version {version} of the protocol, this program {VERSION}: build both \
                 from the same source",
                vmm.display()
            ),
            ForkEvent::Refused { reason } => {
                bail!("the base {} can't be used: {reason}", base.display())
            }
            other => bail!("the fork server's first word was {other:?}"),
        }
    }

    pub fn pid(&self) -> u32 {
        self.child.id()
    }

    /// Asks for a machine. The time starts with the request; what comes before it is not measured.
    pub fn fork(&mut self, parts: Parts) -> anyhow::Result<Machine> {
        self.last += 1;
        let (control, their_control) = message_pair(false).context("make a socket pair")?;
        let (agent, their_agent) = stream_pair(true).context("make a socket pair")?;
        rustix::io::write(&agent, &parts.for_agent)
            .ok()
            .filter(|&written| written == parts.for_agent.len())
            .context("a socket pair took only a part of the agent's first frame")?;
        let request = ForkRequest::Fork {
            machine: self.last,
            label: format!("b{}", self.last),
            shape: self.shape,
            cgroup: false,
        };
        let descriptors = [their_control.as_fd(), their_agent.as_fd(), parts.disk.as_fd()];
        let asked_at = clock::now();
        send(self.socket()?, &request, &descriptors).context("ask for a fork")?;
        Ok(Machine::new(self.last, asked_at, control, agent))
    }

    /// Asks for a machine made of a snapshot.
    pub fn resume(&mut self, disk: BorrowedFd, snapshot: BorrowedFd) -> anyhow::Result<Machine> {
        self.last += 1;
        let (control, their_control) = message_pair(false).context("make a socket pair")?;
        let (agent, their_agent) = stream_pair(true).context("make a socket pair")?;
        let request = ForkRequest::Resume {
            machine: self.last,
            label: format!("b{}", self.last),
            shape: self.shape,
            cgroup: false,
        };
        let descriptors = [their_control.as_fd(), their_agent.as_fd(), disk, snapshot];
        let asked_at = clock::now();
        send(self.socket()?, &request, &descriptors).context("ask for a resume")?;
        Ok(Machine::new(self.last, asked_at, control, agent))
    }

    /// The process of a machine that was just asked for.
    pub fn forked(&self, machine: &Machine, deadline: Deadline) -> anyhow::Result<i32> {
        match self.event(deadline, "word of the fork")? {
            ForkEvent::Forked { machine: id, pid } if id == machine.id => Ok(pid),
            ForkEvent::ForkFailed { reason, .. } => bail!("the fork failed: {reason}"),
            ForkEvent::Exited { exit, .. } => bail!("a machine's process ended: {exit:?}"),
            other => bail!("the fork server said {other:?} instead of Forked"),
        }
    }

    /// Ends a machine; returns when its process is gone. One that died by itself was reaped already.
    pub fn end(&self, machine: Machine) -> anyhow::Result<()> {
        send(self.socket()?, &ForkRequest::Kill { machine: machine.id }, &[])
            .context("ask for a machine's end")?;
        let deadline = Deadline::after(EXIT_LIMIT);
        loop {
            match self.event(deadline, "end of a machine's process")? {
                ForkEvent::Exited { machine: id, .. } if id == machine.id => return Ok(()),
                ForkEvent::Exited { machine: id, exit } => {
                    return Err(Died(format!("process of machine {id}: {exit:?}")).into());
                }
                // Its word of the fork, when nobody asked for that.
                ForkEvent::Forked { .. } => continue,
                other => bail!("the fork server said {other:?} instead of Exited"),
            }
        }
    }

    fn event(&self, deadline: Deadline, what: &str) -> anyhow::Result<ForkEvent> {
        let socket = self.socket()?;
        until_readable(socket, deadline, what)?;
        let packet = receive(socket).with_context(|| {
            format!("{what}: the fork server is gone (its reason is on standard error)")
        })?;
        Ok(packet.message)
    }

    fn socket(&self) -> anyhow::Result<&OwnedFd> {
        self.socket.as_ref().context("the fork server was told to end")
    }
}

impl Drop for ForkServer {
    /// It ends when its socket does.
    fn drop(&mut self) {
        self.socket = None;
        let deadline = Deadline::after(EXIT_LIMIT);
        while let Ok(None) = self.child.try_wait() {
            if deadline.left("end of the fork server").is_err() {
                let _ = self.child.kill();
                let _ = self.child.wait();
                return;
            }
            std::thread::sleep(Duration::from_millis(5));
        }
    }
}
