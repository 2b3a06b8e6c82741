//! An account's lifecycle as a pure function: what happens next is decided here, and nothing is done
//! here. The driver ([`super::driver`]) feeds events and carries out effects, in their order.
//!
//! ```text
//!            login                    forked            last session leaves
//! Stopped ─────────► Starting ───────────────► Running ───────────────────► Lingering
//!    ▲                  │ failed                  ▲                              │
//!    │                  ▼                         └──────────── login ───────────┤
//!    │               Failed(reason)                                              │
//!    │                  │ login: Starting again                                  │
//!    │                                        admin stop, disabled, shutdown     │ linger over
//!    └───────────── ended ◄──────────────── Stopping ◄───────────────────────────┘
//!                   (a login meanwhile: Starting again)
//! ```
//!
//! A machine that ends by itself, from whichever state, leads through Stopping (until its process is
//! gone and the disk is free) to Stopped, or to Failed while it was still starting. A login never fails because of the moment it comes at: during Starting and Stopping it
//! waits. Saving, Saved and Resuming belong between Lingering and Stopped: where Lingering goes when
//! the linger is over, and where a login from there comes back.

/// Where the account's machine is.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum State {
    Stopped,
    Starting,
    Running,
    Lingering,
    Stopping(Stopping),
    Failed(String),
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Stopping {
    pub cause: StopCause,
    /// The fork is still under way: it has to come to an end before it can be stopped.
    pub starting: bool,
    /// The guest was given its time; now it is killed.
    pub killed: bool,
}

/// Why a machine is stopped.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum StopCause {
    /// Nobody is logged in and the linger is over.
    Idle,
    /// An operator asked for it.
    Admin,
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
    /// The machine has ended, but its process still has the disk.
    Dying(String),
    /// The machine's process is gone.
    Ended(String),
    /// The timer that the last [`Effect::SetTimer`] started has run out.
    TimerOver,
    Stop(StopCause),
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Effect {
    /// Write this to the database before going on.
    Record(Intent),
    /// Fork a machine; `Forked` or `StartFailed` follows.
    Start,
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
    /// How long a guest may take to power off.
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
    Stopping,
}

/// The state and who is involved.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Lifecycle {
    pub state: State,
    /// Sessions that have the machine.
    pub admitted: u32,
    /// Logins that wait for it.
    pub waiting: u32,
}

impl Default for Lifecycle {
    fn default() -> Self {
        Self { state: State::Stopped, admitted: 0, waiting: 0 }
    }
}

impl Lifecycle {
    /// What `event` leads to. An event that means nothing in a state changes nothing.
    pub fn step(self, event: Event) -> (Self, Vec<Effect>) {
        match event {
            Event::Expected => self.expected(),
            Event::Login => self.login(),
            Event::Leave => self.leave(),
            Event::Forked => self.forked(),
            Event::StartFailed(reason) => self.start_failed(reason),
            Event::Dying(reason) => self.dying(reason),
            Event::Ended(reason) => self.ended(reason),
            Event::TimerOver => self.timer_over(),
            Event::Stop(cause) => self.stop(cause),
        }
    }

    /// If nobody comes after all, the machine lingers and stops.
    fn expected(self) -> (Self, Vec<Effect>) {
        match self.state {
            State::Stopped | State::Failed(_) => self.start(vec![]),
            _ => (self, vec![]),
        }
    }

    fn login(mut self) -> (Self, Vec<Effect>) {
        self.waiting += 1;
        match self.state {
            State::Stopped | State::Failed(_) => self.start(vec![]),
            State::Running => self.admit(vec![]),
            State::Lingering => {
                self.state = State::Running;
                self.admit(vec![Effect::CancelTimer])
            }
            State::Starting | State::Stopping(_) => (self, vec![]),
        }
    }

    fn leave(mut self) -> (Self, Vec<Effect>) {
        self.admitted = self.admitted.saturating_sub(1);
        match self.state {
            State::Running if self.admitted == 0 => {
                self.state = State::Lingering;
                (self, vec![Effect::SetTimer(Timer::Linger)])
            }
            _ => (self, vec![]),
        }
    }

    fn forked(mut self) -> (Self, Vec<Effect>) {
        match self.state {
            State::Starting => {
                self.state = State::Running;
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
            State::Stopping(Stopping { ref cause, starting: true, .. }) => {
                let cause = cause.clone();
                self.power_off(cause)
            }
            _ => (self, vec![]),
        }
    }

    fn start_failed(mut self, reason: String) -> (Self, Vec<Effect>) {
        match self.state {
            State::Starting => {
                self.waiting = 0;
                self.state = State::Failed(reason.clone());
                (self, vec![Effect::Record(Intent::Stopped), Effect::Refuse(reason), Effect::Gone])
            }
            State::Stopping(Stopping { starting: true, .. }) => self.gone(),
            _ => (self, vec![]),
        }
    }

    fn dying(mut self, reason: String) -> (Self, Vec<Effect>) {
        match self.state {
            State::Running | State::Lingering => {
                let cause = StopCause::Died(reason);
                self.state = State::Stopping(Stopping { cause, starting: false, killed: false });
                (self, vec![Effect::Record(Intent::Stopping), Effect::SetTimer(Timer::Kill)])
            }
            _ => (self, vec![]),
        }
    }

    fn ended(self, reason: String) -> (Self, Vec<Effect>) {
        match self.state {
            State::Starting => self.start_failed(reason),
            State::Running | State::Lingering | State::Stopping(_) => self.gone(),
            State::Stopped | State::Failed(_) => (self, vec![]),
        }
    }

    fn timer_over(mut self) -> (Self, Vec<Effect>) {
        match self.state {
            State::Lingering => self.power_off(StopCause::Idle),
            State::Stopping(ref mut stopping) if !stopping.starting => {
                stopping.killed = true;
                (self, vec![Effect::Kill, Effect::SetTimer(Timer::Kill)])
            }
            _ => (self, vec![]),
        }
    }

    fn stop(mut self, cause: StopCause) -> (Self, Vec<Effect>) {
        match self.state {
            State::Stopped | State::Failed(_) => (self, vec![Effect::Gone]),
            State::Starting => {
                self.waiting = 0;
                let refuse = Effect::Refuse(cause.to_string());
                self.state = State::Stopping(Stopping { cause, starting: true, killed: false });
                (self, vec![refuse])
            }
            State::Running | State::Lingering => self.power_off(cause),
            State::Stopping(ref mut stopping) => {
                // Logins that came since then wait for a new machine, which this forbids as well.
                self.waiting = 0;
                let refuse = Effect::Refuse(cause.to_string());
                stopping.cause = cause;
                (self, vec![refuse])
            }
        }
    }

    fn power_off(mut self, cause: StopCause) -> (Self, Vec<Effect>) {
        let end = Effect::EndSessions(cause.to_string());
        self.state = State::Stopping(Stopping { cause, starting: false, killed: false });
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

    fn gone(mut self) -> (Self, Vec<Effect>) {
        self.state = State::Stopped;
        let effects = vec![Effect::CancelTimer, Effect::Record(Intent::Stopped), Effect::Gone];
        if self.waiting > 0 {
            return self.start(effects);
        }
        (self, effects)
    }

    fn start(mut self, mut effects: Vec<Effect>) -> (Self, Vec<Effect>) {
        self.state = State::Starting;
        effects.extend([Effect::Record(Intent::Starting), Effect::Start]);
        (self, effects)
    }

    fn admit(mut self, mut effects: Vec<Effect>) -> (Self, Vec<Effect>) {
        self.admitted += self.waiting;
        self.waiting = 0;
        effects.push(Effect::Admit);
        (self, effects)
    }
}

#[cfg(test)]
mod tests;
