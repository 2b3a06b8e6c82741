//! What an account's lifecycle shows of itself: the state, and why, for people.

use std::{sync::Arc, time::SystemTime};

use hermitage_storage::accounts::{MachineState, Policy};

use super::Driver;
use crate::{
    lifecycle::{
        save::SaveOver,
        state::{Awake, Copying, SaveOutcome, State, StopCause},
        words,
    },
    time,
    watch::Event,
};

impl Driver {
    pub(super) fn tell_of_failure(&self, reason: String) {
        self.context.watch.tell(Event::MachineFailed { id: self.account, reason });
    }

    pub(super) fn tell_of_end(&self, reason: String) {
        self.context.watch.tell(Event::MachineEnded { id: self.account, reason });
    }

    pub(super) fn tell_of_save(&self, over: &SaveOver) {
        let id = self.account;
        self.context.watch.tell(match &over.outcome {
            SaveOutcome::Done => Event::MachineSaved {
                id,
                bytes: over.bytes,
                milliseconds: time::ms(over.took),
                because: self.saved_because.clone(),
                stages: over.stages.clone(),
            },
            SaveOutcome::CalledOff => Event::SaveCalledOff { id },
            SaveOutcome::Failed(reason) => Event::SaveFailed { id, reason: reason.clone() },
        });
    }

    pub(super) fn publish(&self) {
        let state = match &self.lifecycle.state {
            State::Stopped => MachineState::Stopped,
            State::Starting => MachineState::Starting,
            State::Running => MachineState::Running,
            State::Lingering => MachineState::Lingering,
            State::Saving(_) => MachineState::Saving,
            State::Saved => MachineState::Saved,
            State::Resuming => MachineState::Resuming,
            State::Stopping(_) => MachineState::Stopping,
            State::Failed(_) => MachineState::Failed,
        };
        self.status.send_modify(|status| {
            if status.state != state {
                status.since = SystemTime::now();
            }
            status.state = state;
            status.why = self.why();
            status.machine_pid = self.machine().map(|machine| machine.pid);
            status.base = self.machine().map(|machine| machine.base.clone());
            status.sessions = self.lifecycle.admitted;
            status.awake = self.awake();
            status.machine =
                self.machine.as_ref().map(|attached| Arc::downgrade(&attached.machine));
        });
    }

    pub(super) fn why(&self) -> String {
        match &self.lifecycle.state {
            State::Stopped => self.lifecycle.lost.clone().unwrap_or_default(),
            State::Saved => self.why_saved(),
            State::Saving(saving) if saving.called_off => {
                "somebody has come back while it was being saved".into()
            }
            State::Saving(_) if !self.saved_because.is_empty() => {
                format!("{}; its memory is being saved", self.saved_because)
            }
            State::Saving(saving) => format!("{}; its memory is being saved", saving.cause),
            State::Starting | State::Resuming => match self.lifecycle.waiting {
                0 => "somebody has just authenticated".into(),
                1 => "1 login waits".into(),
                waiting => format!("{waiting} logins wait"),
            },
            State::Running => match self.lifecycle.admitted {
                1 => "1 session".into(),
                admitted => format!("{admitted} sessions"),
            },
            State::Lingering => self.why_lingering(),
            State::Stopping(stopping) if stopping.killed => {
                format!("{}; the guest did not power off and is killed", stopping.cause)
            }
            State::Stopping(stopping) => stopping.cause.to_string(),
            State::Failed(reason) => reason.clone(),
        }
    }

    /// What keeps the machine awake that nobody is logged in to.
    fn awake(&self) -> Option<String> {
        match (&self.lifecycle.state, self.lifecycle.policy, &self.lifecycle.awake) {
            (State::Lingering, Policy::Keep, _) => Some("its policy is keep".into()),
            (State::Lingering, _, Some(awake)) => Some(words::awake(awake)),
            _ => None,
        }
    }

    fn why_lingering(&self) -> String {
        let linger = self.vigil.linger.as_secs();
        if self.lifecycle.copying == Copying::RestWaits {
            return "nobody is logged in; its disk is being copied".into();
        }
        match (&self.lifecycle.awake, self.lifecycle.policy) {
            (_, Policy::Keep) => "nobody is logged in; its policy is to keep it running".into(),
            (Some(awake @ Awake::Held(_)), _) => format!("awake: {}", words::awake(awake)),
            (Some(awake @ Awake::Work(_)), _) => {
                let left = words::span(self.vigil.left());
                format!("awake: {}; for {left} more at most", words::awake(awake))
            }
            (None, Policy::Discard) => format!("nobody is logged in; stops after {linger} s"),
            (None, Policy::Save) if self.lifecycle.looking => {
                "nobody is logged in; is saved unless something works in it".into()
            }
            (None, Policy::Save) => format!("nobody is logged in; is saved after {linger} s"),
        }
    }

    fn why_saved(&self) -> String {
        let size = match self.saved_bytes {
            0 => String::new(),
            bytes => format!(" ({})", words::size(bytes)),
        };
        let saved = format!("its memory is saved{size}");
        match self.saved_because.as_str() {
            "" => saved,
            because => format!("{because}; {saved}"),
        }
    }

    /// Why the machine that is about to be saved is.
    pub(super) fn rest_cause(&self) -> String {
        let cause = match &self.lifecycle.state {
            State::Saving(saving) => &saving.cause,
            _ => return String::new(),
        };
        match (cause, &self.lifecycle.paused) {
            (StopCause::Idle, None) => format!("idle for {} s", self.vigil.linger.as_secs()),
            (StopCause::Idle, Some(work)) if self.vigil.max_linger <= self.vigil.linger => {
                let linger = self.vigil.linger.as_secs();
                format!("nobody was logged in for {linger} s; {} is paused", work.who)
            }
            (StopCause::Idle, Some(work)) => {
                let limit = words::span(self.vigil.max_linger);
                format!(
                    "nobody was logged in for {limit}, as long as work may keep it awake; {} is paused",
                    work.who
                )
            }
            (cause, _) => cause.to_string(),
        }
    }
}
