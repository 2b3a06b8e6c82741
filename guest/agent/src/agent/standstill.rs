//! Standing still for a save, and going on after it.

use std::time::Duration;

use anyhow::{Context, Result, bail};
use hermitage_guest_proto::{AgentMessage, HostMessage, LiveSession, Resume};

use super::Agent;
use crate::freeze::{self, Frozen};
use crate::session::Session;
use crate::sys::Poller;
use crate::{attach, log, poweroff};

impl Agent {
    /// Stands still from the word `Frozen` to `Resume`: what lies between may be a save, and then this
    /// goes on in another process of the host's, on another day. Nothing is said and no file is touched
    /// meanwhile.
    pub(super) fn freeze(&mut self) -> Result<()> {
        let frozen = match self.stand_still() {
            Ok(frozen) => frozen,
            Err(error) => {
                let reason = format!("{error:#}");
                return self.control.send(&AgentMessage::FreezeFailed { reason });
            }
        };
        self.control.send(&AgentMessage::Frozen)?;
        let mut poller = Poller::new();
        let mut wished = None;
        loop {
            poller.clear();
            poller.add(&self.control, (), true, self.control.wants_to_write());
            poller.wait(None).context("poll")?;
            self.control.flush()?;
            if !self.control.receive().unwrap_or(false) {
                log::warn(format_args!("the host has closed the control connection: powering off"));
                self.power_off_frozen(frozen);
            }
            while let Some(message) = self.control.message()? {
                match message {
                    HostMessage::Resume(resume) => {
                        attach::refresh(&resume, &self.booted.clock)?;
                        let limited =
                            wished.map(|(question, most)| (question, self.limit_processes(most)));
                        drop(frozen);
                        self.go_on()?;
                        return match limited {
                            Some((question, fault)) => self.tell_processes(question, fault),
                            None => Ok(()),
                        };
                    }
                    // For when processes go on.
                    HostMessage::LimitProcesses { question, most } => {
                        wished = Some((question, most));
                    }
                    HostMessage::PowerOff { .. } => self.power_off_frozen(frozen),
                    other => log::warn(format_args!("frozen, the host says {other:?}: ignored")),
                }
            }
        }
    }

    fn stand_still(&mut self) -> Result<Frozen> {
        if self.account.is_none() {
            bail!("the machine is nobody's yet");
        }
        let cgroups = self.booted.cgroups.try_clone().context("the cgroups' root")?;
        let disk = freeze::disk_root(&self.booted.initial_root)?;
        Frozen::new(cgroups, &mut self.booted.strays, disk)
    }

    /// For a host that takes back a `Freeze` that had failed.
    pub(super) fn resume(&mut self, resume: &Resume) -> Result<()> {
        attach::refresh(resume, &self.booted.clock)?;
        self.go_on()
    }

    fn go_on(&mut self) -> Result<()> {
        // What the host said of its disk was before the save: it says it again.
        self.room.set(false);
        // Nothing ran meanwhile, for who knows how long.
        self.work.forget();
        self.questions.resumed();
        let live = |session: &Session| LiveSession {
            session: session.id,
            terminal: session.terminal.as_ref().map(|terminal| terminal.number),
            pid: session.leader.as_raw() as u32,
        };
        let sessions = self.sessions.iter().map(live).collect();
        self.control.send(&AgentMessage::Resumed { sessions })
    }

    /// Processes may not run again: in a resumed machine they would share secrets with a former one.
    fn power_off_frozen(&mut self, frozen: Frozen) -> ! {
        poweroff::kill_all();
        drop(frozen);
        self.power_off(Duration::ZERO)
    }
}
