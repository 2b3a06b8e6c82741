//! An account's lifecycle as a pure function: what happens next is decided here, and nothing is done
//! here. The driver ([`super::driver`]) feeds events and carries out effects, in their order.
//!
//! ```text
//!            login                    forked            last session leaves
//! Stopped ─────────► Starting ───────────────► Running ───────────────────► Lingering
//!    ▲                  │ failed                 ▲  ▲                        │  │  ▲
//!    │                  ▼                        │  └──────── login ─────────┤  │  │ save failed,
//!    │               Failed(reason)      resumed │                           │  │  │ first time
//!    │                  │ login: Starting        │      linger over (save),  │  │  │
//!    │                                       Resuming   stop                 ▼  │  │
//!    │                                           ▲ login    ┌──────────── Saving ──┘
//!    │ ended, reset                              │          │ saved    │   │ called off by a login:
//!    │                                         Saved ◄── Stopping ◄────┘   └──► Running
//!    │                                           │          ▲  save failed again
//!    └───────────────────────────────────────────┴──────────┘  linger over (discard)
//! ```
//!
//! A machine that ends by itself, from whichever state, leads through Stopping (until its process is
//! gone and the disk is free) to Stopped, or to Failed while it was still starting. A login never fails
//! because of the moment it comes at: during Starting, Resuming and Stopping it waits; a save that only
//! the linger asked for is called off by it. Whether Resuming ends in the old memory or in a cold start
//! is the start's business ([`super::start`]): the machine is the account's either way.

use hermitage_storage::accounts::Policy;

/// Where the account's machine is.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum State {
    Stopped,
    Starting,
    /// Its memory is on the disk.
    Saved,
    /// A machine is being made of what was saved.
    Resuming,
    Running,
    Lingering,
    Saving(Saving),
    Stopping(Stopping),
    Failed(String),
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Saving {
    pub cause: StopCause,
    /// The sessions are gone and the save has begun.
    pub under_way: bool,
    pub called_off: bool,
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Stopping {
    pub cause: StopCause,
    /// The fork is still under way: it has to come to an end before it can be stopped.
    pub starting: bool,
    /// The guest was given its time; now it is killed.
    pub killed: bool,
    /// A save is still under way, which has to come to its own end.
    pub saving: bool,
    /// Its process is gone.
    pub gone: bool,
    /// Its memory is on the disk.
    pub saved: bool,
    /// What was saved of its memory is dropped.
    pub dropped: bool,
}

impl Stopping {
    fn for_cause(cause: StopCause) -> Self {
        let dropped = cause == StopCause::Reset;
        Self {
            cause,
            starting: false,
            killed: false,
            saving: false,
            gone: false,
            saved: false,
            dropped,
        }
    }
}

/// Why a machine is stopped.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum StopCause {
    /// Nobody is logged in and the linger is over.
    Idle,
    /// An operator asked for it.
    Admin,
    /// Its memory is to be dropped.
    Reset,
    /// The account was disabled or removed.
    Closed,
    /// The service stops.
    Shutdown,
    /// The machine ends by itself; its process is not gone yet.
    Died(String),
}

impl std::fmt::Display for StopCause {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(match self {
            StopCause::Idle => "nobody is logged in",
            StopCause::Admin => "an operator stopped this machine",
            StopCause::Reset => "this machine is started anew from its disk",
            StopCause::Closed => "this account was disabled",
            StopCause::Shutdown => "the service is stopping",
            StopCause::Died(reason) => reason,
        })
    }
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Event {
    /// Somebody has authenticated and will probably want the machine in a moment.
    Expected,
    /// Somebody wants the machine.
    Login,
    /// Somebody who had been admitted is gone.
    Leave,
    /// The machine runs and has its account.
    Forked,
    StartFailed(String),
    /// The save has come to its end.
    SaveOver(SaveOutcome),
    /// The machine has ended, but its process still has the disk.
    Dying(String),
    /// The machine's process is gone.
    Ended(String),
    /// The timer that the last [`Effect::SetTimer`] started has run out.
    TimerOver,
    Stop(StopCause),
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub enum SaveOutcome {
    /// The snapshot is published; the machine is paused for good.
    Done,
    /// The machine runs on.
    CalledOff,
    /// The machine runs on, if it did not end.
    Failed(String),
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Effect {
    /// Write this to the database before going on.
    Record(Intent),
    /// Make a machine, of what was saved if there is something; `Forked` or `StartFailed` follows.
    Start,
    /// Save the machine; `SaveOver` follows.
    Save,
    /// The save is not wanted any more; `SaveOver` tells whether that came in time.
    CallOff,
    /// End the machine that was saved.
    Release,
    /// Drop what was saved of the machine's memory.
    Drop,
    /// Let in everybody who waits.
    Admit,
    /// Turn away everybody who waits.
    Refuse(String),
    /// Tell the sessions why the machine goes away under them.
    EndSessions(String),
    /// Ask the guest to power off.
    PowerOff,
    /// End the machine without the guest's help.
    Kill,
    SetTimer(Timer),
    CancelTimer,
    /// Whoever waits for the machine's end is answered.
    Gone,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Timer {
    Linger,
    /// How long who has authenticated may take to come.
    Expected,
    /// How long sessions may take to leave, or a guest to power off.
    Grace,
    /// How long a killed machine may take to be gone.
    Kill,
}

/// What the database says about the machine.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Intent {
    Stopped,
    Starting,
    Running,
    Saving,
    Saved,
    Resuming,
    Stopping,
}

/// Saves that may fail before an idle machine is powered off instead.
const SAVE_ATTEMPTS: u8 = 2;

/// The state and who is involved.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Lifecycle {
    pub state: State,
    /// Sessions that have the machine.
    pub admitted: u32,
    /// Logins that wait for it.
    pub waiting: u32,
    /// What happens to the machine when nobody is logged in; kept up to date by the driver.
    pub policy: Policy,
    /// Why the next machine will not have the memory of the last one, if somebody might miss it.
    pub lost: Option<String>,
    failed_saves: u8,
}

impl Default for Lifecycle {
    fn default() -> Self {
        Self {
            state: State::Stopped,
            admitted: 0,
            waiting: 0,
            policy: Policy::default(),
            lost: None,
            failed_saves: 0,
        }
    }
}

type Step = (Lifecycle, Vec<Effect>);

impl Lifecycle {
    /// Of an account whose machine was saved before this service started.
    pub fn saved() -> Self {
        Self { state: State::Saved, ..Self::default() }
    }

    /// What `event` leads to. An event that means nothing in a state changes nothing.
    pub fn step(self, event: Event) -> Step {
        match event {
            Event::Expected => self.expected(),
            Event::Login => self.login(),
            Event::Leave => self.leave(),
            Event::Forked => self.forked(),
            Event::StartFailed(reason) => self.start_failed(reason),
            Event::SaveOver(outcome) => self.save_over(outcome),
            Event::Dying(reason) => self.dying(reason),
            Event::Ended(reason) => self.ended(reason),
            Event::TimerOver => self.timer_over(),
            Event::Stop(StopCause::Reset) => self.reset(),
            Event::Stop(cause) => self.stop(cause),
        }
    }

    /// If nobody comes after all, the machine lingers and is put away again.
    fn expected(self) -> Step {
        match self.state {
            State::Stopped | State::Saved | State::Failed(_) => self.start(vec![]),
            _ => (self, vec![]),
        }
    }

    fn login(mut self) -> Step {
        self.waiting += 1;
        match self.state {
            State::Stopped | State::Saved | State::Failed(_) => self.start(vec![]),
            State::Running => self.admit(vec![]),
            State::Lingering => {
                self.state = State::Running;
                self.admit(vec![Effect::CancelTimer])
            }
            // A save that somebody asked for is waited for; then the machine resumes.
            State::Saving(ref mut saving)
                if saving.cause == StopCause::Idle && !saving.called_off =>
            {
                saving.called_off = true;
                (self, vec![Effect::CallOff])
            }
            State::Starting | State::Resuming | State::Saving(_) | State::Stopping(_) => {
                (self, vec![])
            }
        }
    }

    fn leave(mut self) -> Step {
        self.admitted = self.admitted.saturating_sub(1);
        match self.state {
            State::Running if self.admitted == 0 => {
                self.state = State::Lingering;
                (self, vec![Effect::SetTimer(Timer::Linger)])
            }
            State::Saving(ref mut saving) if self.admitted == 0 && !saving.under_way => {
                saving.under_way = true;
                (self, vec![Effect::CancelTimer, Effect::Save])
            }
            _ => (self, vec![]),
        }
    }

    fn forked(mut self) -> Step {
        match self.state {
            State::Starting | State::Resuming => {
                self.state = State::Running;
                self.lost = None;
                self.failed_saves = 0;
                if self.admitted + self.waiting == 0 {
                    self.state = State::Lingering;
                    return (
                        self,
                        vec![Effect::Record(Intent::Running), Effect::SetTimer(Timer::Expected)],
                    );
                }
                // Admitted first: that the machine is starting is on record, and this is the login path.
                let (lifecycle, mut effects) = self.admit(vec![]);
                effects.push(Effect::Record(Intent::Running));
                (lifecycle, effects)
            }
            State::Stopping(Stopping { ref cause, starting: true, dropped, .. }) => {
                let cause = if dropped { StopCause::Reset } else { cause.clone() };
                self.put_away(cause)
            }
            _ => (self, vec![]),
        }
    }

    fn start_failed(mut self, reason: String) -> Step {
        match self.state {
            State::Starting | State::Resuming => {
                self.waiting = 0;
                self.state = State::Failed(reason.clone());
                (self, vec![Effect::Record(Intent::Stopped), Effect::Refuse(reason), Effect::Gone])
            }
            State::Stopping(Stopping { starting: true, .. }) => self.gone(),
            _ => (self, vec![]),
        }
    }

    fn save_over(mut self, outcome: SaveOutcome) -> Step {
        let cause = match self.state {
            State::Saving(ref saving) => saving.cause.clone(),
            // The machine ended meanwhile.
            State::Stopping(ref mut stopping) if stopping.saving => {
                stopping.saving = false;
                stopping.saved |= outcome == SaveOutcome::Done;
                return if stopping.gone { self.gone() } else { (self, vec![]) };
            }
            _ => return (self, vec![]),
        };
        match outcome {
            SaveOutcome::Done => {
                let stopping = Stopping { saved: true, ..Stopping::for_cause(cause) };
                self.state = State::Stopping(stopping);
                (self, vec![Effect::Release, Effect::SetTimer(Timer::Kill)])
            }
            _ if cause == StopCause::Reset => self.power_off(cause),
            SaveOutcome::CalledOff | SaveOutcome::Failed(_)
                if cause == StopCause::Idle && self.waiting > 0 =>
            {
                self.state = State::Running;
                let (lifecycle, mut effects) = self.admit(vec![]);
                effects.push(Effect::Record(Intent::Running));
                (lifecycle, effects)
            }
            SaveOutcome::CalledOff if cause == StopCause::Idle => self.linger(),
            SaveOutcome::CalledOff => self.put_away(cause),
            SaveOutcome::Failed(reason) => {
                self.failed_saves += 1;
                if cause == StopCause::Idle && self.failed_saves < SAVE_ATTEMPTS {
                    return self.linger();
                }
                self.lost = Some(format!("your machine's memory could not be saved: {reason}"));
                self.power_off(cause)
            }
        }
    }

    fn dying(mut self, reason: String) -> Step {
        let (saving, dropped) = match &self.state {
            State::Running | State::Lingering => (false, false),
            State::Saving(saving) => (saving.under_way, saving.cause == StopCause::Reset),
            _ => return (self, vec![]),
        };
        self.lost = Some(reason.clone());
        let died = Stopping::for_cause(StopCause::Died(reason));
        let stopping = Stopping { saving, dropped, ..died };
        self.state = State::Stopping(stopping);
        (self, vec![Effect::Record(Intent::Stopping), Effect::SetTimer(Timer::Kill)])
    }

    fn ended(mut self, reason: String) -> Step {
        match self.state {
            State::Starting | State::Resuming => self.start_failed(reason),
            State::Running | State::Lingering | State::Saving(_) => {
                let (lifecycle, mut effects) = self.dying(reason.clone());
                let (lifecycle, more) = lifecycle.ended(reason);
                effects.extend(more);
                (lifecycle, effects)
            }
            State::Stopping(ref mut stopping) if stopping.saving => {
                stopping.gone = true;
                (self, vec![Effect::CancelTimer])
            }
            State::Stopping(_) => self.gone(),
            State::Stopped | State::Saved | State::Failed(_) => (self, vec![]),
        }
    }

    fn timer_over(mut self) -> Step {
        match self.state {
            State::Lingering => match self.policy {
                // Looked at again later: the policy may have changed by then.
                Policy::Keep => (self, vec![Effect::SetTimer(Timer::Linger)]),
                Policy::Save | Policy::Discard => self.put_away(StopCause::Idle),
            },
            // Sessions that do not leave are not waited for.
            State::Saving(Saving { ref cause, under_way: false, .. }) => {
                self.lost = Some("your sessions did not end in time to save its memory".into());
                let cause = cause.clone();
                self.power_off(cause)
            }
            State::Stopping(ref mut stopping) if !stopping.starting && !stopping.gone => {
                stopping.killed = true;
                (self, vec![Effect::Kill, Effect::SetTimer(Timer::Kill)])
            }
            _ => (self, vec![]),
        }
    }

    fn stop(mut self, cause: StopCause) -> Step {
        match self.state {
            State::Stopped | State::Saved | State::Failed(_) => (self, vec![Effect::Gone]),
            State::Starting | State::Resuming => self.stop_start(cause),
            State::Running | State::Lingering => self.put_away(cause),
            State::Saving(Saving { cause: ref mut now, .. })
            | State::Stopping(Stopping { cause: ref mut now, .. }) => {
                // Logins that came since then wait for a new machine, which this forbids as well.
                let refuse = Effect::Refuse(cause.to_string());
                if *now != StopCause::Reset {
                    *now = cause;
                }
                self.waiting = 0;
                (self, vec![refuse])
            }
        }
    }

    /// Drops the memory there is, running or saved.
    fn reset(mut self) -> Step {
        let refuse = Effect::Refuse(StopCause::Reset.to_string());
        match self.state {
            State::Stopped | State::Saved | State::Failed(_) => {
                self.state = State::Stopped;
                self.lost = None;
                (self, vec![Effect::Drop, Effect::Record(Intent::Stopped), Effect::Gone])
            }
            State::Starting | State::Resuming => self.stop_start(StopCause::Reset),
            State::Running | State::Lingering => self.power_off(StopCause::Reset),
            State::Saving(ref mut saving) if saving.under_way => {
                let call_off = (!saving.called_off).then_some(Effect::CallOff);
                saving.cause = StopCause::Reset;
                saving.called_off = true;
                self.waiting = 0;
                (self, call_off.into_iter().chain([refuse]).collect())
            }
            State::Saving(_) => {
                self.waiting = 0;
                let (lifecycle, mut effects) = self.power_off(StopCause::Reset);
                effects.insert(0, refuse);
                (lifecycle, effects)
            }
            State::Stopping(ref mut stopping) => {
                stopping.dropped = true;
                self.waiting = 0;
                (self, vec![refuse])
            }
        }
    }

    fn stop_start(mut self, cause: StopCause) -> Step {
        self.waiting = 0;
        let refuse = Effect::Refuse(cause.to_string());
        self.state = State::Stopping(Stopping { starting: true, ..Stopping::for_cause(cause) });
        (self, vec![refuse])
    }

    fn linger(mut self) -> Step {
        self.state = State::Lingering;
        (self, vec![Effect::Record(Intent::Running), Effect::SetTimer(Timer::Linger)])
    }

    /// Ends a running machine as its policy says.
    fn put_away(mut self, cause: StopCause) -> Step {
        if cause == StopCause::Reset || self.policy == Policy::Discard {
            return self.power_off(cause);
        }
        let under_way = self.admitted == 0;
        let effects = match under_way {
            true => vec![Effect::Record(Intent::Saving), Effect::CancelTimer, Effect::Save],
            false => vec![
                Effect::Record(Intent::Saving),
                Effect::EndSessions(cause.to_string()),
                Effect::SetTimer(Timer::Grace),
            ],
        };
        self.state = State::Saving(Saving { cause, under_way, called_off: false });
        (self, effects)
    }

    fn power_off(mut self, cause: StopCause) -> Step {
        let end = Effect::EndSessions(cause.to_string());
        self.state = State::Stopping(Stopping::for_cause(cause));
        (
            self,
            vec![
                Effect::Record(Intent::Stopping),
                end,
                Effect::PowerOff,
                Effect::SetTimer(Timer::Grace),
            ],
        )
    }

    fn gone(mut self) -> Step {
        let mut effects = vec![Effect::CancelTimer];
        let (saved, dropped) = match self.state {
            State::Stopping(ref stopping) => (stopping.saved, stopping.dropped),
            _ => (false, false),
        };
        if dropped {
            effects.push(Effect::Drop);
        }
        if saved || dropped {
            self.lost = None;
        }
        (self.state, self.failed_saves) = match saved && !dropped {
            true => (State::Saved, 0),
            false => (State::Stopped, 0),
        };
        let intent = match self.state {
            State::Saved => Intent::Saved,
            _ => Intent::Stopped,
        };
        effects.extend([Effect::Record(intent), Effect::Gone]);
        if self.waiting > 0 {
            return self.start(effects);
        }
        (self, effects)
    }

    fn start(mut self, mut effects: Vec<Effect>) -> Step {
        let intent = match self.state {
            State::Saved => {
                self.state = State::Resuming;
                Intent::Resuming
            }
            _ => {
                self.state = State::Starting;
                Intent::Starting
            }
        };
        effects.extend([Effect::Record(intent), Effect::Start]);
        (self, effects)
    }

    fn admit(mut self, mut effects: Vec<Effect>) -> Step {
        self.admitted += self.waiting;
        self.waiting = 0;
        effects.push(Effect::Admit);
        (self, effects)
    }
}

#[cfg(test)]
mod tests;
