//! Machines forked for measuring: asked for, spoken to and ended the way `hermitage serve` does it.

pub mod save;
pub mod server;
pub mod terminal;

use std::{
    io::{self, Read as _, Write as _},
    os::{
        fd::{AsFd as _, OwnedFd},
        unix::net::UnixStream,
    },
    time::Duration,
};

use anyhow::{Context as _, bail};
use hermitage_guest_proto::{
    AgentMessage, Attach, Decoder, HostMessage, OpenTerminal, Resources, WallClock, Window, encode,
};
use hermitage_vmm_proto::{
    End, MachineEvent, MachineId, MachineRequest, Stage, receive, send, stream_pair,
};

use crate::{
    clock,
    prompt::Prompt,
    wait::{Deadline, readable, until_readable},
};

/// For one step of a machine's life, under emulation and with others beside it.
pub const STEP_LIMIT: Duration = Duration::from_secs(60);

/// A machine ended that was not told to. In the emulated lab one in a few hundred does.
#[derive(Debug, thiserror::Error)]
#[error("a machine died: {0}")]
pub struct Died(pub String);

pub struct Machine {
    id: MachineId,
    /// When the fork was asked for.
    pub asked_at: u64,
    control: OwnedFd,
    agent: UnixStream,
    decoder: Decoder,
    terminal: Option<UnixStream>,
}

/// When a terminal showed something.
pub struct TerminalTimes {
    pub first_byte: u64,
    pub prompt: u64,
}

impl Machine {
    fn new(id: MachineId, asked_at: u64, control: OwnedFd, agent: OwnedFd) -> Self {
        let agent = UnixStream::from(agent);
        Self { id, asked_at, control, agent, decoder: Decoder::default(), terminal: None }
    }

    /// Waits for the word that it runs: since when, and how long each stage took.
    pub fn running(&mut self) -> anyhow::Result<(u64, Vec<Stage>)> {
        until_readable(&self.control, Deadline::after(STEP_LIMIT), "word that the machine runs")?;
        let event = receive::<MachineEvent>(&self.control);
        match event.context("the machine's process went away")?.message {
            MachineEvent::Running { at, stages } => Ok((at, stages)),
            MachineEvent::Ended(end) => Err(ended(end)),
            other => bail!("the machine said {other:?} instead of Running"),
        }
    }

    /// Waits for the answers to `Attach`: when the first byte came, and when the account was attached.
    pub fn attached(&mut self) -> anyhow::Result<(u64, u64)> {
        let mut first = None;
        loop {
            let at = self.hear("answer from the agent")?;
            let first = *first.get_or_insert(at);
            while let Some(message) = self.decoder.message().context("the agent's message")? {
                match message {
                    AgentMessage::Awake => {}
                    AgentMessage::Attached => return Ok((first, at)),
                    AgentMessage::AttachFailed { reason } => {
                        bail!("the agent could not attach the account: {reason}")
                    }
                    other => bail!("the agent said {other:?} instead of Attached"),
                }
            }
        }
    }

    /// Waits for the answer to [`take`], which is to have given it all of that.
    pub fn took(&mut self, wanted: Resources) -> anyhow::Result<()> {
        loop {
            if let Some(message) = self.decoder.message().context("the agent's message")? {
                match message {
                    AgentMessage::Took { in_use, fault: None } if in_use == wanted => return Ok(()),
                    other => bail!("the agent said {other:?} instead of Took, with {wanted:?}"),
                }
            }
            self.hear("answer from the agent")?;
        }
    }

    /// Opens terminal 0 with the login shell and waits for its prompt.
    pub fn open_terminal(&mut self) -> anyhow::Result<TerminalTimes> {
        let (ours, theirs) = stream_pair(true).context("make a socket pair")?;
        let attach = MachineRequest::AttachTerminal { terminal: 0, redraw: None };
        send(&self.control, &attach, &[theirs.as_fd()]).context("attach a terminal")?;
        drop(theirs);
        let open = HostMessage::OpenTerminal(OpenTerminal {
            session: 1,
            terminal: 0,
            term: "xterm".into(),
            window: Window { columns: 80, rows: 24, ..Window::default() },
            modes: Vec::new(),
            env: Vec::new(),
            command: None,
            greeting: String::new(),
        });
        self.agent.write_all(&encode(&open)?).context("write to the agent")?;
        let mut terminal = UnixStream::from(ours);
        let times = self.prompt(&mut terminal);
        self.terminal = Some(terminal);
        times
    }

    /// Powers it off in order: what it wrote is on its disk then.
    pub fn power_off(&mut self) -> anyhow::Result<()> {
        let frame = encode(&HostMessage::PowerOff { grace_ms: 1000 })?;
        self.agent.write_all(&frame).context("write to the agent")?;
        let deadline = Deadline::after(STEP_LIMIT);
        loop {
            until_readable(&self.control, deadline, "power-off of the machine")?;
            match receive::<MachineEvent>(&self.control).context("power off")?.message {
                MachineEvent::Ended(End::PowerOff) => return Ok(()),
                MachineEvent::Ended(end) => return Err(ended(end)),
                _ => continue,
            }
        }
    }

    fn prompt(&mut self, terminal: &mut UnixStream) -> anyhow::Result<TerminalTimes> {
        let mut prompt = Prompt::default();
        let mut first_byte = None;
        let mut bytes = [0; 16 * 1024];
        loop {
            let fds = [terminal.as_fd(), self.agent.as_fd(), self.control.as_fd()];
            let [shown, said, told] =
                readable(fds, Deadline::after(STEP_LIMIT), "prompt on the terminal")
                    .with_context(|| format!("the terminal shows {:?}", prompt.seen()))?;
            if shown {
                let n = terminal.read(&mut bytes).context("read the terminal")?;
                let now = clock::now();
                if n == 0 {
                    bail!("the terminal ended before a prompt; it showed {:?}", prompt.seen());
                }
                let first_byte = *first_byte.get_or_insert(now);
                if prompt.feed(&bytes[..n]) {
                    return Ok(TerminalTimes { first_byte, prompt: now });
                }
            }
            if told {
                self.told()?;
            }
            if said {
                self.hear("word from the agent")?;
                while let Some(message) = self.decoder.message().context("the agent's message")? {
                    match message {
                        AgentMessage::Started { .. } => {}
                        other => bail!("the agent said {other:?} while a prompt was awaited"),
                    }
                }
            }
        }
    }

    /// Feeds the decoder with what the agent says next; returns when that came.
    fn hear(&mut self, what: &str) -> anyhow::Result<u64> {
        let mut bytes = [0; 4096];
        loop {
            let fds = [self.agent.as_fd(), self.control.as_fd()];
            let [said, told] = readable(fds, Deadline::after(STEP_LIMIT), what)?;
            if said {
                let at = clock::now();
                match self.agent.read(&mut bytes) {
                    Ok(0) => {}
                    Ok(n) => {
                        self.decoder.feed(&bytes[..n]);
                        return Ok(at);
                    }
                    Err(e) if e.kind() == io::ErrorKind::WouldBlock => continue,
                    Err(e) => return Err(e).context("read from the agent"),
                }
            }
            if told || said {
                self.told()?;
            }
        }
    }

    /// The machine's process has something to say, or its agent's stream has ended. Nothing good.
    fn told(&mut self) -> anyhow::Result<()> {
        until_readable(&self.control, Deadline::after(STEP_LIMIT), "word from the machine")?;
        match receive::<MachineEvent>(&self.control) {
            Ok(packet) => match packet.message {
                MachineEvent::Ended(end) => Err(ended(end)),
                MachineEvent::Running { .. } => Ok(()),
                other => bail!("the machine said {other:?} unasked"),
            },
            Err(e) => Err(Died(e.to_string()).into()),
        }
    }
}

fn ended(end: End) -> anyhow::Error {
    match end {
        End::HostError(reason) => anyhow::anyhow!("the host could not run the machine: {reason}"),
        end => Died(end.to_string()).into(),
    }
}

/// An identity for machine number `n`: fresh entropy, the present time.
pub fn attach(n: u64, disk_size: u64) -> anyhow::Result<Vec<u8>> {
    let mut entropy = vec![0; 64];
    getrandom::fill(&mut entropy).context("get entropy")?;
    let mut machine_id = [0; 16];
    machine_id[..8].copy_from_slice(&n.to_le_bytes());
    let time = rustix::time::clock_gettime(rustix::time::ClockId::Realtime);
    let clock = WallClock { seconds: time.tv_sec, nanoseconds: time.tv_nsec as u32 };
    let attach = HostMessage::Attach(Attach {
        account: "bench".into(),
        uid: 1000,
        hostname: format!("bench-{n}"),
        machine_id,
        entropy,
        clock,
        disk_size,
    });
    Ok(encode(&attach)?)
}

/// For an agent whose machine has more than its base's least.
pub fn take(resources: Resources) -> anyhow::Result<Vec<u8>> {
    Ok(encode(&HostMessage::Take(resources))?)
}

#[cfg(test)]
mod tests;
