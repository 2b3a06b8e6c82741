//! A terminal whose client goes away and comes back, as the service does it.

use std::{
    io::{Read as _, Write as _},
    os::{fd::AsFd as _, unix::net::UnixStream},
};

use anyhow::{Context as _, bail};
use hermitage_vmm_proto::{MachineEvent, MachineRequest, receive, send, stream_pair};

use super::{Machine, STEP_LIMIT};
use crate::{
    clock,
    prompt::Prompt,
    wait::{Deadline, readable, until_readable},
};

/// The window that terminals are opened with.
pub const WINDOW: (u16, u16) = (80, 24);

/// When a machine that was resumed showed something.
pub struct Back {
    /// Of the screen that was kept.
    pub first_byte: u64,
    /// The shell's answer to the return key.
    pub prompt: u64,
}

impl Machine {
    /// From here on the machine keeps the screen of terminal 0.
    pub fn keep_screen(&mut self) -> anyhow::Result<()> {
        let (columns, rows) = WINDOW;
        let resize = MachineRequest::ResizeTerminal { terminal: 0, columns, rows };
        send(&self.control, &resize, &[]).context("tell a terminal's size")
    }

    /// The client of terminal 0 goes away.
    pub fn leave_terminal(&mut self) -> anyhow::Result<()> {
        send(&self.control, &MachineRequest::DetachTerminal { terminal: 0 }, &[])
            .context("detach a terminal")?;
        until_readable(&self.control, Deadline::after(STEP_LIMIT), "word of a detached terminal")?;
        match receive::<MachineEvent>(&self.control).context("detach a terminal")?.message {
            MachineEvent::TerminalDetached { terminal: 0 } => {}
            MachineEvent::Ended(end) => return Err(super::ended(end)),
            other => bail!("the machine said {other:?} instead of TerminalDetached"),
        }
        self.terminal = None;
        Ok(())
    }

    /// Somebody comes back to terminal 0 and presses return once the screen is there.
    pub fn come_back(&mut self) -> anyhow::Result<Back> {
        let (ours, theirs) = stream_pair(true).context("make a socket pair")?;
        let attach = MachineRequest::AttachTerminal { terminal: 0, redraw: Some(WINDOW) };
        send(&self.control, &attach, &[theirs.as_fd()]).context("attach a terminal")?;
        drop(theirs);
        let mut terminal = UnixStream::from(ours);
        let mut bytes = [0; 64 * 1024];
        let fds = [terminal.as_fd(), self.control.as_fd()];
        let [shown, _] = readable(fds, Deadline::after(STEP_LIMIT), "screen of a terminal")?;
        let first_byte = clock::now();
        if !shown {
            self.told()?;
            bail!("the machine had something to say before it showed a screen");
        }
        // The screen comes in one piece; what is left of it would be taken for the answer.
        while terminal.read(&mut bytes).is_ok_and(|count| count == bytes.len()) {}
        terminal.write_all(b"\n").context("write to the terminal")?;
        let mut prompt = Prompt::default();
        let answer = loop {
            let fds = [terminal.as_fd(), self.control.as_fd()];
            let [shown, told] =
                readable(fds, Deadline::after(STEP_LIMIT), "answer of the shell")
                    .with_context(|| format!("the terminal shows {:?}", prompt.seen()))?;
            if shown {
                let count = terminal.read(&mut bytes).context("read the terminal")?;
                let now = clock::now();
                if count == 0 {
                    bail!("the terminal ended; it showed {:?}", prompt.seen());
                }
                if prompt.feed(&bytes[..count]) {
                    break now;
                }
            }
            if told {
                self.told()?;
            }
        };
        self.terminal = Some(terminal);
        Ok(Back { first_byte, prompt: answer })
    }
}
