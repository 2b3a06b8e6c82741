//! Ending a machine: because it is idle, or because somebody wants it.

use hermitage_storage::accounts::Policy;

use super::{Effect, Intent, Lifecycle, Saving, State, Step, StopCause, Stopping, Timer};

impl Lifecycle {
    pub(super) fn stop(mut self, cause: StopCause) -> Step {
        match self.state {
            State::Stopped | State::Saved | State::Failed(_) => (self, vec![Effect::Gone]),
            State::Starting | State::Resuming => self.stop_start(cause),
            State::Running | State::Lingering => self.put_away(cause),
            State::Saving(ref mut saving)
                if cause == StopCause::OutOfTime && saving.cause != StopCause::Reset =>
            {
                self.waiting = 0;
                let refuse = Effect::Refuse(cause.to_string());
                if !saving.under_way {
                    let (lifecycle, mut effects) = self.out_of_time();
                    effects.insert(0, refuse);
                    return (lifecycle, effects);
                }
                let call_off = (!saving.called_off).then_some(Effect::CallOff);
                (saving.cause, saving.called_off) = (cause, true);
                (self, call_off.into_iter().chain([refuse]).collect())
            }
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
    pub(super) fn reset(mut self) -> Step {
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

    pub(super) fn stop_start(mut self, cause: StopCause) -> Step {
        self.waiting = 0;
        let refuse = Effect::Refuse(cause.to_string());
        self.state = State::Stopping(Stopping { starting: true, ..Stopping::for_cause(cause) });
        (self, vec![refuse])
    }

    /// Ends a running machine as its policy says.
    pub(super) fn put_away(mut self, cause: StopCause) -> Step {
        let unsaved = matches!(cause, StopCause::Reset | StopCause::OutOfTime);
        if unsaved || self.policy == Policy::Discard {
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

    /// What can't be saved in the time that is left is powered off, with its disk synced.
    pub(super) fn out_of_time(mut self) -> Step {
        self.lost = Some("the service had no time to save your machine's memory".into());
        self.power_off(StopCause::OutOfTime)
    }

    pub(super) fn power_off(mut self, cause: StopCause) -> Step {
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
}
