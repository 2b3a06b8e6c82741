//! A machine that nobody is logged in to: whether it goes to rest, and what keeps it from that.
//!
//! ```text
//!               linger over          nothing works
//! Lingering ─────────────────► Look ───────────────► Saving
//!    ▲   ▲  policy save          │ works, and the limit is not reached
//!    │   └──── Recheck over ─────┴──► awake: stays Lingering
//!    └──── policy keep, a hold: no look, asked again later
//! ```
//!
//! Policies: `keep` never rests, `discard` rests whatever works, `save` looks first. A hold counts more
//! than work and less than `keep`. Work keeps a machine awake up to a limit, which the driver tells by
//! [`Lifecycle::extendable`]: a guest can say of itself what it likes. Beyond it, what works is paused
//! with the rest, and its name is kept for whoever comes back.

use hermitage_storage::accounts::Policy;

use super::{Awake, Copying, Effect, Intent, Lifecycle, State, Step, StopCause, Timer, Work};

impl Lifecycle {
    /// After a save that came to nothing.
    pub(super) fn linger(mut self) -> Step {
        self.state = State::Lingering;
        (self, vec![Effect::Record(Intent::Running), Effect::SetTimer(Timer::Linger)])
    }

    pub(super) fn linger_over(mut self) -> Step {
        if self.rest_waits() {
            return (self, vec![]);
        }
        if self.stays() {
            return self.stay();
        }
        if self.policy == Policy::Save {
            self.looking = true;
            return (self, vec![Effect::Look]);
        }
        self.put_away(StopCause::Idle)
    }

    pub(super) fn looked(mut self, work: Option<Work>) -> Step {
        // Somebody has logged in meanwhile, say.
        if self.state != State::Lingering || !self.looking {
            return (self, vec![]);
        }
        self.looking = false;
        if self.rest_waits() {
            return (self, vec![]);
        }
        if self.stays() {
            return self.stay();
        }
        match work {
            Some(work) if self.extendable && self.policy == Policy::Save => {
                self.awake = Some(Awake::Work(work));
                (self, vec![Effect::SetTimer(Timer::Recheck)])
            }
            work => {
                self.paused = work;
                self.put_away(StopCause::Idle)
            }
        }
    }

    pub(super) fn reconsider(mut self) -> Step {
        match self.state {
            // The look's answer meets what is wanted now.
            State::Lingering if self.looking => (self, vec![]),
            // The timer that is set now has the word, not the one that was over.
            State::Lingering if self.copying == Copying::RestWaits => {
                self.copying = Copying::UnderWay;
                self.reconsider()
            }
            State::Lingering if self.stays() => self.stay(),
            State::Lingering => {
                self.awake = None;
                (self, vec![Effect::SetTimer(Timer::Linger)])
            }
            _ => (self, vec![]),
        }
    }

    /// Whether an operator wants it awake.
    fn stays(&self) -> bool {
        self.policy == Policy::Keep || self.held.is_some()
    }

    /// Asked again later: it may be wanted otherwise by then.
    fn stay(mut self) -> Step {
        let timer = match (self.policy, self.held) {
            (Policy::Save | Policy::Discard, Some(until)) => {
                self.awake = Some(Awake::Held(until));
                Timer::Recheck
            }
            _ => {
                self.awake = None;
                Timer::Linger
            }
        };
        (self, vec![Effect::SetTimer(timer)])
    }

    /// What was found out about an idle machine means nothing in another state.
    pub(super) fn forget_idleness(&mut self) {
        if self.state != State::Lingering {
            self.looking = false;
            self.awake = None;
        }
        if !matches!(self.state, State::Saving(_) | State::Stopping(_)) {
            self.paused = None;
        }
    }
}
