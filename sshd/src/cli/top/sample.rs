//! What the kernel counts of machines' processes, and between two looks.

use super::Row;
use crate::cli::context::Context;
use hermitage::admin::protocol::{SessionStatus, Status};
use hermitage::cgroup::Usage;
use hermitage::process::cpu_ms;
use hermitage_storage::StateDir;
use hermitage_storage::accounts::Accounts;
use hermitage_storage::disk;
use std::collections::HashMap;
use std::fs;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

/// What is known of an account's machine.
#[derive(Default)]
pub struct Sample {
    pub cpu: Option<f64>,
    pub held: Option<f64>,
    pub memory: Option<u64>,
    pub disk: Option<u64>,
    /// Bytes a second, from its sessions' clients and to them.
    pub traffic: Option<(u64, u64)>,
}

pub struct Meter {
    accounts: Accounts,
    state: StateDir,
    /// Milliseconds that the machines' processes had by the last look.
    ran: HashMap<i32, u64>,
    /// Likewise milliseconds that their caps held them back.
    stood: HashMap<i32, u64>,
    /// Bytes of sessions by then, by their numbers.
    passed: HashMap<u64, (u64, u64)>,
    looked: Instant,
}

impl Meter {
    pub fn new(context: &Context) -> anyhow::Result<Self> {
        Ok(Self {
            accounts: context.accounts()?,
            state: context.state.clone(),
            ran: HashMap::new(),
            stood: HashMap::new(),
            passed: HashMap::new(),
            looked: Instant::now(),
        })
    }

    /// `sessions`: if the service says.
    pub fn rows(&mut self, status: &Status, sessions: Option<&[SessionStatus]>) -> Vec<Row> {
        let since = self.looked.elapsed();
        self.looked = Instant::now();
        // Only of those that are there now: process ids come again.
        let before = std::mem::take(&mut self.ran);
        let stood = std::mem::take(&mut self.stood);
        let share = |before: &HashMap<i32, u64>, pid: i32, now: u64| {
            percent(now.saturating_sub(*before.get(&pid)?), since)
        };
        let traffic = self.traffic(sessions.unwrap_or_default());
        status
            .accounts
            .iter()
            .map(|account| {
                let mut sample = Sample { disk: self.disk(&account.account), ..Sample::default() };
                if let Some(pid) = account.machine_pid {
                    sample.memory = memory(pid);
                    if let Some(now) = cpu_ms(pid) {
                        sample.cpu = share(&before, pid, now);
                        self.ran.insert(pid, now);
                    }
                    if let Some(now) = account.cgroup.as_deref().and_then(held_ms) {
                        sample.held = share(&stood, pid, now);
                        self.stood.insert(pid, now);
                    }
                }
                if sessions.is_some() {
                    let (received, sent) =
                        traffic.get(account.account.as_str()).copied().unwrap_or_default();
                    sample.traffic = Some((rate(received, since), rate(sent, since)));
                }
                Row::new(account, &sample)
            })
            .collect()
    }

    /// Bytes since the last look, by account. Of a session that began since then, all.
    fn traffic<'a>(&mut self, sessions: &'a [SessionStatus]) -> HashMap<&'a str, (u64, u64)> {
        let before = std::mem::take(&mut self.passed);
        let mut sums: HashMap<&str, (u64, u64)> = HashMap::new();
        for session in sessions {
            let now = (session.received, session.sent);
            let (received, sent) = before.get(&session.number).copied().unwrap_or_default();
            let sum = sums.entry(&session.account).or_default();
            sum.0 = sum.0.saturating_add(now.0.saturating_sub(received));
            sum.1 = sum.1.saturating_add(now.1.saturating_sub(sent));
            self.passed.insert(session.number, now);
        }
        sums
    }

    /// A disk that can't be looked at is shown as none.
    fn disk(&self, name: &str) -> Option<u64> {
        let account = self.accounts.by_name(name).ok()??;
        let path: PathBuf = self.state.disk(account.id);
        disk::allocated(&path).ok()
    }
}

fn held_ms(group: &str) -> Option<u64> {
    Some(Usage::of(Path::new(group))?.throttled_microseconds? / 1000)
}

fn percent(ran_ms: u64, time: Duration) -> Option<f64> {
    let ms = time.as_secs_f64() * 1000.0;
    (ms > 0.0).then(|| ran_ms as f64 / ms * 100.0)
}

/// Of a second.
fn rate(bytes: u64, time: Duration) -> u64 {
    (bytes as f64 / time.as_secs_f64().max(0.001)) as u64
}

/// Private pages and page tables, in bytes (proc_pid_status(5)).
fn memory(pid: i32) -> Option<u64> {
    let status = fs::read_to_string(format!("/proc/{pid}/status")).ok()?;
    let kib = |name: &str| -> Option<u64> {
        let line = status.lines().find_map(|line| line.strip_prefix(name))?;
        line.split_ascii_whitespace().next()?.parse().ok()
    };
    Some((kib("RssAnon:")? + kib("VmPTE:")?) << 10)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_process_has_memory_and_time_has_its_share() {
        let me = std::process::id() as i32;
        assert!(memory(me).unwrap() > 1 << 16);
        assert_eq!(memory(i32::MAX), None);
        assert_eq!(percent(50, Duration::from_millis(200)), Some(25.0));
        assert_eq!(
            (percent(1, Duration::ZERO), rate(500, Duration::from_millis(500))),
            (None, 1000)
        );
    }
}
