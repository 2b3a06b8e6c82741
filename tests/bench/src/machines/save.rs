//! The client's half of a save and a resume.

use std::{
    fs::File,
    io::{Read as _, Write as _},
    os::{fd::AsFd as _, unix::net::UnixStream},
};

use anyhow::{Context as _, bail};
use hermitage_guest_proto::{
    AgentMessage, HostMessage, LiveSession, OpenTerminal, Resume, WallClock, Window, encode,
};
use hermitage_vmm_proto::{End, MachineEvent, MachineRequest, Stage, receive, send, stream_pair};

use super::{Machine, STEP_LIMIT, ended};
use crate::wait::{Deadline, readable, until_readable};

/// What a machine says of its snapshot.
#[derive(Debug)]
pub struct Saved {
    pub bytes: u64,
    pub pages: u64,
    pub stages: Vec<Stage>,
}

/// How resuming began.
pub enum Restored {
    /// It waits for the word to go.
    Whole(Vec<Stage>),
    Refused(String),
}

impl Machine {
    pub fn freeze(&mut self) -> anyhow::Result<()> {
        self.tell_agent(&HostMessage::Freeze)?;
        match self.agent_says("answer to Freeze")? {
            AgentMessage::Frozen => Ok(()),
            AgentMessage::FreezeFailed { reason } => bail!("the agent could not freeze: {reason}"),
            other => bail!("the agent said {other:?} instead of Frozen"),
        }
    }

    /// The inner error is the machine's word that it could not, and runs on.
    pub fn save(
        &mut self,
        file: &File,
        pagemap: &File,
        disk_tag: [u8; 16],
    ) -> anyhow::Result<Result<Saved, String>> {
        let request = MachineRequest::Save { account: [7; 16], disk_tag };
        send(&self.control, &request, &[file.as_fd(), pagemap.as_fd()])
            .context("ask for a save")?;
        match self.event("answer to Save")? {
            MachineEvent::Saved { bytes, pages, stages } => Ok(Ok(Saved { bytes, pages, stages })),
            MachineEvent::SaveFailed { reason } => Ok(Err(reason)),
            MachineEvent::Ended(end) => Err(ended(end)),
            other => bail!("the machine said {other:?} instead of Saved"),
        }
    }

    /// Lets it run on after a save.
    pub fn call_off(&mut self) -> anyhow::Result<()> {
        send(&self.control, &MachineRequest::Continue, &[]).context("call a save off")
    }

    pub fn stop(&mut self) -> anyhow::Result<()> {
        send(&self.control, &MachineRequest::Stop, &[]).context("stop a machine")?;
        match self.event("end of a stopped machine")? {
            MachineEvent::Ended(End::Stopped) => Ok(()),
            MachineEvent::Ended(end) => Err(ended(end)),
            other => bail!("the machine said {other:?} instead of Ended"),
        }
    }

    pub fn restored(&mut self) -> anyhow::Result<Restored> {
        match self.event("word that the machine is restored")? {
            MachineEvent::Restored { stages } => Ok(Restored::Whole(stages)),
            MachineEvent::Ended(End::SnapshotRefused(reason)) => Ok(Restored::Refused(reason)),
            MachineEvent::Ended(end) => Err(ended(end)),
            other => bail!("the machine said {other:?} instead of Restored"),
        }
    }

    pub fn go(&mut self) -> anyhow::Result<()> {
        send(&self.control, &MachineRequest::Go, &[]).context("let a machine go")
    }

    /// What the agent is told first after a save. Returns the sessions there are.
    pub fn resume_agent(&mut self) -> anyhow::Result<Vec<LiveSession>> {
        let mut entropy = vec![0; 64];
        getrandom::fill(&mut entropy).context("get entropy")?;
        let time = rustix::time::clock_gettime(rustix::time::ClockId::Realtime);
        let clock = WallClock { seconds: time.tv_sec, nanoseconds: time.tv_nsec as u32 };
        self.tell_agent(&HostMessage::Resume(Resume { entropy, clock }))?;
        match self.agent_says("answer to Resume")? {
            AgentMessage::Resumed { sessions } => Ok(sessions),
            other => bail!("the agent said {other:?} instead of Resumed"),
        }
    }

    /// Runs a command on terminal 0.
    pub fn run_on_terminal(&mut self, command: Vec<u8>) -> anyhow::Result<u32> {
        self.attach_terminal()?;
        self.tell_agent(&HostMessage::OpenTerminal(OpenTerminal {
            session: 1,
            terminal: 0,
            term: "xterm".into(),
            window: Window { columns: 80, rows: 24, ..Window::default() },
            modes: Vec::new(),
            env: Vec::new(),
            command: Some(command),
            greeting: String::new(),
        }))?;
        match self.agent_says("start of a command")? {
            AgentMessage::Started { pid, .. } => Ok(pid),
            other => bail!("the agent said {other:?} instead of Started"),
        }
    }

    /// Attaches to terminal 0, as after every login.
    pub fn attach_terminal(&mut self) -> anyhow::Result<()> {
        let (ours, theirs) = stream_pair(true).context("make a socket pair")?;
        let attach = MachineRequest::AttachTerminal { terminal: 0, redraw: None };
        send(&self.control, &attach, &[theirs.as_fd()]).context("attach a terminal")?;
        self.terminal = Some(UnixStream::from(ours));
        Ok(())
    }

    /// Types a line on the terminal and returns what comes after it from `mark` to the end of the line.
    pub fn ask(&mut self, line: &str, mark: &str) -> anyhow::Result<String> {
        let terminal = self.terminal.as_mut().context("no terminal is attached")?;
        terminal.write_all(format!("{line}\n").as_bytes()).context("write to the terminal")?;
        let mut seen = Vec::new();
        let deadline = Deadline::after(2 * STEP_LIMIT);
        loop {
            let fds = [terminal.as_fd(), self.control.as_fd()];
            let [shown, told] = readable(fds, deadline, &format!("answer to {line:?}"))
                .with_context(|| format!("it shows {:?}", String::from_utf8_lossy(&seen)))?;
            if shown {
                let mut bytes = [0; 16 * 1024];
                let count = terminal.read(&mut bytes).context("read the terminal")?;
                if count == 0 {
                    bail!("the terminal ended; it showed {:?}", String::from_utf8_lossy(&seen));
                }
                seen.extend_from_slice(&bytes[..count]);
                let text = String::from_utf8_lossy(&seen);
                let whole = text.rsplit_once('\n').map_or("", |(whole, _)| whole);
                // A shell puts control sequences before what a program writes.
                if let Some((_, answer)) = whole.split_once(mark) {
                    let rest = answer.lines().next().unwrap_or_default();
                    return Ok(format!("{mark}{}", rest.trim_end()));
                }
            } else if told {
                return self.told().map(|()| String::new());
            }
        }
    }

    fn tell_agent(&mut self, message: &HostMessage) -> anyhow::Result<()> {
        self.agent.write_all(&encode(message)?).context("write to the agent")
    }

    fn agent_says(&mut self, what: &str) -> anyhow::Result<AgentMessage> {
        loop {
            if let Some(message) = self.decoder.message().context("the agent's message")? {
                return Ok(message);
            }
            self.hear(what)?;
        }
    }

    fn event(&self, what: &str) -> anyhow::Result<MachineEvent> {
        until_readable(&self.control, Deadline::after(3 * STEP_LIMIT), what)?;
        Ok(receive(&self.control).context("the machine's process went away")?.message)
    }
}
