//! What the kernel counts of machines' processes, and between two looks.

use super::Row;
use crate::cli::context::Context;
use hermitage::admin::protocol::Status;
use hermitage_storage::StateDir;
use hermitage_storage::accounts::Accounts;
use hermitage_storage::disk;
use std::collections::HashMap;
use std::fs;
use std::path::PathBuf;
use std::time::{Duration, Instant};

/// What is known of an account's machine.
#[derive(Default)]
pub struct Sample {
    pub cpu: Option<f64>,
    pub memory: Option<u64>,
    pub disk: Option<u64>,
}

pub struct Meter {
    accounts: Accounts,
    state: StateDir,
    /// Ticks of the machines' processes at the last look.
    ticks: HashMap<i32, u64>,
    looked: Instant,
    per_second: f64,
}

impl Meter {
    pub fn new(context: &Context) -> anyhow::Result<Self> {
        let per_second = nix::unistd::sysconf(nix::unistd::SysconfVar::CLK_TCK)?.unwrap_or(100);
        Ok(Self {
            accounts: context.accounts()?,
            state: context.state.clone(),
            ticks: HashMap::new(),
            looked: Instant::now(),
            per_second: per_second as f64,
        })
    }

    pub fn rows(&mut self, status: &Status) -> Vec<Row> {
        let since = self.looked.elapsed();
        self.looked = Instant::now();
        // Only of those that are there now: process ids come again.
        let before = std::mem::take(&mut self.ticks);
        status
            .accounts
            .iter()
            .map(|account| {
                let mut sample = Sample { disk: self.disk(&account.account), ..Sample::default() };
                if let Some(pid) = account.machine_pid {
                    sample.memory = memory(pid);
                    if let Some(now) = ticks(pid) {
                        let ran = before.get(&pid).map(|before| now.saturating_sub(*before));
                        sample.cpu = ran.and_then(|ran| self.percent(ran, since));
                        self.ticks.insert(pid, now);
                    }
                }
                Row::new(account, &sample)
            })
            .collect()
    }

    fn percent(&self, ticks: u64, time: Duration) -> Option<f64> {
        let seconds = time.as_secs_f64();
        (seconds > 0.0).then(|| ticks as f64 / self.per_second / seconds * 100.0)
    }

    /// A disk that can't be looked at is shown as none.
    fn disk(&self, name: &str) -> Option<u64> {
        let account = self.accounts.by_name(name).ok()??;
        let path: PathBuf = self.state.disk(account.id);
        disk::allocated(&path).ok()
    }
}

/// Time that a process had on processors, of user and system (proc_pid_stat(5), fields 14 and 15).
fn ticks(pid: i32) -> Option<u64> {
    let stat = fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
    // Its name, in parentheses, may have blanks and parentheses.
    let fields = stat.get(stat.rfind(')')? + 2..)?;
    let mut fields = fields.split_ascii_whitespace().skip(11);
    let (user, system): (u64, u64) = (fields.next()?.parse().ok()?, fields.next()?.parse().ok()?);
    Some(user + system)
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
    fn a_busy_process_has_ticks_and_memory() {
        let me = std::process::id() as i32;
        let begun = Instant::now();
        let mut sum = 0u64;
        while begun.elapsed() < Duration::from_millis(200) {
            sum = std::hint::black_box(sum.wrapping_add(1));
        }
        assert!(ticks(me).unwrap() > 0);
        assert!(memory(me).unwrap() > 1 << 16);
        assert_eq!((ticks(i32::MAX), memory(i32::MAX)), (None, None));
    }
}
