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
//! When the linger is over the machine stays Lingering while something keeps it awake: [`idle`].
//!
//! A machine that ends by itself, from whichever state, leads through Stopping (until its process is
//! gone and the disk is free) to Stopped, or to Failed while it was still starting. A login never fails
//! because of the moment it comes at: during Starting, Resuming and Stopping it waits; a save that only
//! the linger asked for is called off by it. Whether Resuming ends in the old memory or in a cold start
//! is the start's business ([`super::start`]): the machine is the account's either way.
//!
//! The disk can be copied in Running and Lingering. An idle machine is not put to rest before that is over;
//! whatever else ends the machine calls the copy off.

mod copying;
mod idle;
mod parts;
mod stop;

use hermitage_storage::accounts::Policy;

pub use parts::{
    Awake, Copying, Effect, Event, Intent, SaveOutcome, Saving, State, StopCause, Stopping, Timer,
    Work,
};

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
    /// The end of its hold, if it has one; kept up to date by the driver.
    pub held: Option<i64>,
    /// Whether work may keep the machine awake (still); kept up to date by the driver.
    pub extendable: bool,
    /// An [`Effect::Look`] is under way.
    pub looking: bool,
    /// What keeps the machine awake beyond its linger.
    pub awake: Option<Awake>,
    /// What works in the machine and is put to sleep all the same.
    pub paused: Option<Work>,
    /// Whether the disk is being copied.
    pub copying: Copying,
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
            held: None,
            extendable: false,
            looking: false,
            awake: None,
            paused: None,
            copying: Copying::No,
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
        let (mut lifecycle, mut effects) = self.react(event);
        lifecycle.forget_idleness();
        if lifecycle.forget_copy() {
            effects.insert(0, Effect::CallOffCopy);
        }
        (lifecycle, effects)
    }

    fn react(self, event: Event) -> Step {
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
            Event::Looked(work) => self.looked(work),
            Event::Reconsider => self.reconsider(),
            Event::Copy => self.copy(),
            Event::CopyOver => self.copy_over(),
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
                let greeting = self.awake.take().map(Effect::Greet);
                self.admit([Effect::CancelTimer].into_iter().chain(greeting).collect())
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
            _ if cause == StopCause::OutOfTime => self.out_of_time(),
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
            State::Lingering => self.linger_over(),
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
