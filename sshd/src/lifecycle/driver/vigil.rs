//! Watching over a machine that nobody is logged in to: what its operator wants, and what works in it.

use std::time::Duration;

use hermitage_storage::accounts::{Account, Policy};
use tokio::{task::JoinHandle, time::Instant};

use super::{super::work, Driver};
use crate::{config::Machines, lifecycle::state::Work, limits::Limits, time};

/// How often an awake machine is looked at again: as often as it would go to rest, within reason.
const RECHECK: (Duration, Duration) = (Duration::from_secs(1), Duration::from_secs(30));

/// How long the first look after a linger takes. Later ones look back to the one before.
const WINDOW: (Duration, Duration) = (Duration::from_secs(1), Duration::from_secs(5));

pub(super) struct Vigil {
    pub linger: Duration,
    /// How long work may keep the machine awake.
    pub max_linger: Duration,
    /// Since when nobody is there, and nobody wants it awake.
    since: Instant,
    /// There was a look since then.
    looked: bool,
    pub look: Option<JoinHandle<Option<Work>>>,
}

impl Vigil {
    pub fn new(machines: &Machines) -> Self {
        Self {
            linger: machines.linger(),
            max_linger: machines.max_linger(),
            since: Instant::now(),
            looked: false,
            look: None,
        }
    }

    pub fn begin(&mut self) {
        self.since = Instant::now();
        self.looked = false;
    }

    pub fn give_up(&mut self) {
        if let Some(look) = self.look.take() {
            look.abort();
        }
    }

    /// How long work may keep the machine awake from now on.
    pub fn left(&self) -> Duration {
        self.max_linger.saturating_sub(self.since.elapsed())
    }

    /// When to look again: also when the limit is reached, or the hold ends.
    pub fn recheck(&self, held: Option<i64>) -> Duration {
        let limit = match held {
            Some(until) => {
                Duration::from_secs(until.saturating_sub(time::now()).max(1).unsigned_abs())
            }
            None => self.left(),
        };
        self.linger.clamp(RECHECK.0, RECHECK.1).min(limit)
    }

    fn window(&self) -> Duration {
        (self.linger / 10).clamp(WINDOW.0, WINDOW.1)
    }
}

impl Driver {
    /// True if the account's row says something new of idle machines.
    pub(super) async fn look_up_wishes(&mut self) -> bool {
        match self.context.store.by_id(self.account).await {
            Ok(Some(account)) => self.take_wishes(&account),
            Ok(None) => false,
            Err(error) => {
                tracing::error!(account = %self.account, %error, "can't look up the policy");
                false
            }
        }
    }

    pub(super) fn take_wishes(&mut self, account: &Account) -> bool {
        let limits = Limits::of(&self.context.config, account);
        let before =
            (self.lifecycle.policy, self.lifecycle.held, self.vigil.linger, self.vigil.max_linger);
        self.quota.send_if_modified(|quota| std::mem::replace(quota, limits.quota) != limits.quota);
        self.lifecycle.policy = limits.policy;
        self.lifecycle.held = account.hold_at(time::now());
        self.vigil.linger = limits.linger;
        self.vigil.max_linger = limits.max_linger;
        if let Some(machine) = self.machine() {
            machine.limit(limits.share);
            machine.limit_processes(limits.processes);
        }
        if self.lifecycle.held.is_some() || limits.policy == Policy::Keep {
            // Work may go on for as long when they end.
            self.vigil.begin();
        }
        self.lifecycle.extendable = !self.vigil.left().is_zero();
        let now =
            (self.lifecycle.policy, self.lifecycle.held, self.vigil.linger, self.vigil.max_linger);
        before != now
    }

    /// Asks the machine, beside this task: a login must not wait for the answer.
    pub(super) fn look(&mut self) {
        self.vigil.give_up();
        let (fresh, window) = (!self.vigil.looked, self.vigil.window());
        self.vigil.looked = true;
        let busy = self.context.config.machines.busy_cpu_percent;
        let (machine, account) = (self.machine(), self.account);
        self.vigil.look = Some(tokio::spawn(async move {
            let activity = machine?.look_at_work(fresh, window).await;
            if activity.is_none() {
                tracing::warn!(%account, "the machine does not say what it does; taken as idle");
            }
            let work = work::work(&activity?, busy);
            tracing::debug!(%account, ?work, "looked");
            work
        }));
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::Config;

    fn vigil(linger: u64, max_linger: u64) -> Vigil {
        let seconds = Duration::from_secs;
        let machines = Config::default().machines;
        Vigil { linger: seconds(linger), max_linger: seconds(max_linger), ..Vigil::new(&machines) }
    }

    #[test]
    fn it_is_looked_again_in_time() {
        let seconds = |n| Duration::from_secs(n);
        assert_eq!(vigil(0, 3600).recheck(None), seconds(1));
        assert_eq!(vigil(10, 3600).recheck(None), seconds(10));
        assert_eq!(vigil(600, 3600).recheck(None), seconds(30));
        assert!(vigil(600, 5).recheck(None) <= seconds(5), "at the limit");
        assert!(vigil(600, 0).left().is_zero(), "work does not count");
        // The limit is no matter of who is held.
        let soon = vigil(600, 0).recheck(Some(time::now() + 7));
        assert!(soon > seconds(3) && soon <= seconds(7), "{soon:?}");
        assert_eq!(vigil(600, 0).recheck(Some(time::now() - 7)), seconds(1));
    }

    #[test]
    fn the_first_look_is_short() {
        let windows = [0, 60, 3600].map(|linger| vigil(linger, 1).window().as_secs());
        assert_eq!(windows, [1, 5, 5]);
    }
}
