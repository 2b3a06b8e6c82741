//! Writes down, once a minute, what accounts have used, and forgets what is older than the configuration says
//! (docs/accounts.md, "History").
//!
//! With a connection of its own to the database: a login must not wait for rows to be deleted.

use std::{
    path::Path,
    sync::Arc,
    time::{Duration, Instant},
};

use hermitage_storage::{
    StateDir,
    accounts::{Accounts, AccountsError, Keep, Pruned, Used, day_of},
    footprint::Footprint,
};
use tokio::sync::Mutex;

use crate::{config, lifecycle::Registry, server::Settings, time, watch::Watch};

/// How often what was used is written down: so much of it a killed service loses.
const WRITE: Duration = Duration::from_secs(60);

/// How often it is looked for what is too old.
const PRUNE: Duration = Duration::from_secs(3600);

/// Between two parts of what is forgotten: logins write in between.
const BREATH: Duration = Duration::from_millis(50);

#[derive(Clone)]
pub struct Recorder {
    accounts: Arc<Mutex<Accounts>>,
    state_dir: StateDir,
    config: Settings,
    registry: Registry,
    watch: Watch,
}

impl Recorder {
    pub fn open(
        database: &Path,
        state_dir: StateDir,
        config: Settings,
        registry: Registry,
        watch: Watch,
    ) -> Result<Self, AccountsError> {
        let accounts = Arc::new(Mutex::new(Accounts::open(database)?));
        Ok(Self { accounts, state_dir, config, registry, watch })
    }

    /// For ever.
    pub async fn keep(self) {
        let mut pruned: Option<Instant> = None;
        loop {
            if pruned.is_none_or(|at| at.elapsed() >= PRUNE) {
                self.prune().await;
                pruned = Some(Instant::now());
            }
            tokio::time::sleep(WRITE).await;
            self.write().await;
        }
    }

    /// What was used up to now.
    pub async fn write(&self) {
        let recorder = self.clone();
        let written = self.with(move |accounts| recorder.write_now(accounts)).await;
        if let Err(error) = written {
            tracing::error!(%error, "what accounts used can't be written down; it is tried again");
        }
    }

    /// Blocks.
    fn write_now(&self, accounts: &mut Accounts) -> Result<(), AccountsError> {
        self.registry.settle();
        for live in self.watch.sessions().list(None) {
            live.traffic.settle(live.who.id, self.watch.ledger());
        }
        let mut used: Vec<_> = self.watch.ledger().take().into_iter().collect();
        if used.is_empty() {
            return Ok(());
        }
        for (account, used) in &mut used {
            used.disk_bytes = Some(Footprint::of(&self.state_dir, *account).total());
        }
        let written = accounts.add_usage(day_of(time::now()), &used);
        if written.is_err() {
            // Nothing of it was taken.
            used.iter().for_each(|(account, used)| self.watch.ledger().add(*account, used));
        }
        written
    }

    async fn prune(&self) {
        let mut sum = Pruned::default();
        loop {
            let keep = keep(&self.config.history, time::now());
            match self.with(move |accounts| accounts.prune(&keep)).await {
                Ok(part) if part == Pruned::default() => break,
                Ok(part) => {
                    sum.sessions += part.sessions;
                    sum.usage += part.usage;
                }
                Err(error) => {
                    tracing::error!(%error, "what is too old can't be forgotten");
                    break;
                }
            }
            tokio::time::sleep(BREATH).await;
        }
        if sum != Pruned::default() {
            tracing::info!(
                sessions = sum.sessions,
                days = sum.usage,
                "forgot what is older than the configuration has it ([history])"
            );
        }
    }

    async fn with<T: Send + 'static>(
        &self,
        call: impl FnOnce(&mut Accounts) -> Result<T, AccountsError> + Send + 'static,
    ) -> Result<T, String> {
        let mut accounts = self.accounts.clone().lock_owned().await;
        let called = tokio::task::spawn_blocking(move || call(&mut accounts)).await;
        called.map_err(|error| error.to_string())?.map_err(|error| error.to_string())
    }
}

/// What is kept at that time.
fn keep(history: &config::History, now: i64) -> Keep {
    let days = |days: u32| (days > 0).then(|| i64::from(days));
    Keep {
        sessions_since: days(history.sessions_days).map(|days| now - days * 86_400),
        most_sessions: (history.most_sessions > 0).then_some(history.most_sessions),
        // Today is one of them.
        usage_since: days(history.usage_days).map(|days| day_of(now) - days + 1),
    }
}

/// What came together over days.
pub fn sum<'a>(days: impl IntoIterator<Item = &'a Used>) -> Used {
    let mut sum = Used::default();
    // The last is first: what was taken in the end stays.
    days.into_iter().for_each(|day| {
        let disk_bytes = sum.disk_bytes;
        sum.add(day);
        sum.disk_bytes = disk_bytes.or(day.disk_bytes);
    });
    sum
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn days_are_kept_with_today_and_nothing_is_without_end() {
        let now = 20_000 * 86_400 + 5;
        let history = config::History { sessions_days: 1, most_sessions: 7, usage_days: 1 };
        let wanted = Keep {
            sessions_since: Some(now - 86_400),
            most_sessions: Some(7),
            usage_since: Some(20_000),
        };
        assert_eq!(keep(&history, now), wanted);
        let all = config::History { sessions_days: 0, most_sessions: 0, usage_days: 0 };
        let wanted = Keep { sessions_since: None, most_sessions: None, usage_since: None };
        assert_eq!(keep(&all, now), wanted);
    }

    #[test]
    fn a_sum_has_what_the_last_day_took() {
        let day = |awake_s, disk_bytes| Used { awake_s, disk_bytes, ..Used::default() };
        let days = [day(1, None), day(2, Some(7)), day(4, Some(9))];
        assert_eq!(sum(&days), day(7, Some(7)));
    }
}
