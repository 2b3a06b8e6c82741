//! What accounts have used since it was last written down: [`crate::history`] takes it from here.
//!
//! A machine's [`Meter`] and a session's [`Traffic`] remember what of theirs is in the ledger already, so that each
//! can be read at any time, by whoever comes by, and counts once.

use std::{
    collections::HashMap,
    path::PathBuf,
    sync::{
        Mutex, MutexGuard, PoisonError,
        atomic::{AtomicU64, Ordering},
    },
    time::{Duration, Instant},
};

use hermitage_storage::accounts::Used;
use uuid::Uuid;

use super::Watch;
use crate::{cgroup, process};

/// By account. As large as the number of accounts that do something between two writes.
#[derive(Default)]
pub struct Ledger(Mutex<HashMap<Uuid, Used>>);

impl Ledger {
    pub fn add(&self, account: Uuid, used: &Used) {
        self.table().entry(account).or_default().add(used);
    }

    /// All there is, which is not in it any more.
    pub fn take(&self) -> HashMap<Uuid, Used> {
        std::mem::take(&mut self.table())
    }

    fn table(&self) -> MutexGuard<'_, HashMap<Uuid, Used>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Bytes of a session's channels, as programs and clients see them: without SSH's own.
#[derive(Debug, Default)]
pub struct Traffic {
    received: Counter,
    sent: Counter,
}

#[derive(Debug, Default)]
struct Counter {
    total: AtomicU64,
    noted: AtomicU64,
}

impl Counter {
    fn add(&self, bytes: usize) {
        self.total.fetch_add(bytes as u64, Ordering::Relaxed);
    }

    /// What nobody has noted yet.
    fn note(&self) -> u64 {
        let total = self.total.load(Ordering::Relaxed);
        // Of two who note at the same time one may have seen less.
        total.saturating_sub(self.noted.fetch_max(total, Ordering::Relaxed))
    }
}

impl Traffic {
    /// From the client.
    pub fn received(&self, bytes: usize) {
        self.received.add(bytes);
    }

    /// To the client.
    pub fn sent(&self, bytes: usize) {
        self.sent.add(bytes);
    }

    /// From the client and to it, since the beginning.
    pub fn totals(&self) -> (u64, u64) {
        let total = |counter: &Counter| counter.total.load(Ordering::Relaxed);
        (total(&self.received), total(&self.sent))
    }

    pub fn settle(&self, account: Uuid, ledger: &Ledger) {
        let used =
            Used { received: self.received.note(), sent: self.sent.note(), ..Used::default() };
        if used != Used::default() {
            ledger.add(account, &used);
        }
    }
}

/// How long a machine has been there, what its process had of processors, and how long its cap kept it from them.
pub struct Meter {
    watch: Watch,
    account: Uuid,
    pid: i32,
    /// Its control group, where machines have one.
    group: Option<PathBuf>,
    noted: Mutex<Noted>,
}

struct Noted {
    since: Instant,
    cpu_ms: u64,
    held_us: u64,
}

impl Meter {
    /// Of a machine that has just begun to run.
    pub fn new(watch: Watch, account: Uuid, pid: i32, group: Option<PathBuf>) -> Self {
        let noted = Noted { since: Instant::now(), cpu_ms: 0, held_us: 0 };
        Self { watch, account, pid, group, noted: Mutex::new(noted) }
    }

    /// Reads two small files. Of a process that is gone nothing more is known: whoever ends one settles before.
    pub fn settle(&self) {
        let mut noted = self.noted.lock().unwrap_or_else(PoisonError::into_inner);
        // Whole seconds: what is left of one counts the next time.
        let awake_s = noted.since.elapsed().as_secs();
        noted.since += Duration::from_secs(awake_s);
        let cpu_ms = process::cpu_ms(self.pid).unwrap_or(0).max(noted.cpu_ms);
        let ran = cpu_ms - std::mem::replace(&mut noted.cpu_ms, cpu_ms);
        let held_us = self.group.as_deref().and_then(cgroup::held_back).unwrap_or(0);
        let held_us = held_us.max(noted.held_us);
        let stood = held_us - std::mem::replace(&mut noted.held_us, held_us);
        drop(noted);
        self.watch.metrics().held_back(Duration::from_micros(stood));
        let used = Used { awake_s, cpu_ms: ran, ..Used::default() };
        self.watch.ledger().add(self.account, &used);
    }
}

impl Drop for Meter {
    fn drop(&mut self) {
        self.settle();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const ALICE: Uuid = Uuid::from_u128(1);

    #[test]
    fn bytes_count_once_whoever_asks() {
        let (ledger, traffic) = (Ledger::default(), Traffic::default());
        traffic.settle(ALICE, &ledger);
        assert!(ledger.take().is_empty(), "nothing is no entry");
        traffic.received(10);
        traffic.sent(5);
        std::thread::scope(|scope| {
            for _ in 0..4 {
                scope.spawn(|| traffic.settle(ALICE, &ledger));
            }
        });
        traffic.sent(1);
        traffic.settle(ALICE, &ledger);
        let used = Used { received: 10, sent: 6, ..Used::default() };
        assert_eq!(ledger.take(), HashMap::from([(ALICE, used)]));
        assert_eq!(traffic.totals(), (10, 6));
        assert!(ledger.take().is_empty());
    }

    #[test]
    fn a_machine_is_awake_in_whole_seconds_and_has_its_processors_time() {
        let watch = Watch::new(None);
        let me = std::process::id() as i32;
        let meter = Meter::new(watch.clone(), ALICE, me, None);
        meter.noted.lock().unwrap().since -= Duration::from_millis(2900);
        let begun = Instant::now();
        while process::cpu_ms(me).unwrap() == 0 || begun.elapsed().as_millis() < 50 {
            std::hint::black_box(begun.elapsed());
        }
        meter.settle();
        let first = watch.ledger().take()[&ALICE];
        assert_eq!(first.awake_s, 2);
        assert!(first.cpu_ms >= 10, "{first:?}");
        meter.noted.lock().unwrap().since -= Duration::from_millis(200);
        drop(meter);
        let last = watch.ledger().take()[&ALICE];
        assert_eq!(last.awake_s, 1, "the rest of the one before, and a little");
        assert!(last.cpu_ms < first.cpu_ms + 1000, "not all of it again: {last:?}");
        // One whose process is gone has been there all the same.
        drop(Meter::new(watch.clone(), ALICE, i32::MAX, None));
        assert_eq!(watch.ledger().take()[&ALICE], Used::default());
    }
    #[test]
    fn what_a_cap_takes_counts_once_and_stays_when_the_machine_has_gone() {
        let watch = Watch::new(None);
        let (first, second) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
        let held = |group: &tempfile::TempDir, microseconds: u64| {
            let stat = format!("usage_usec 9\nnr_throttled 1\nthrottled_usec {microseconds}\n");
            std::fs::write(group.path().join("cpu.stat"), stat).unwrap();
        };
        let meter = |group: &tempfile::TempDir| {
            Meter::new(watch.clone(), ALICE, i32::MAX, Some(group.path().to_owned()))
        };
        let total = || -> f64 {
            let text = watch.metrics().text();
            let line = |line: &str| {
                line.strip_prefix("hermitage_machine_held_back_seconds_total ")?.parse().ok()
            };
            text.lines().find_map(line).unwrap()
        };
        assert_eq!(total(), 0.0);
        held(&first, 1_500_000);
        held(&second, 250_000);
        let (one, other) = (meter(&first), meter(&second));
        one.settle();
        other.settle();
        one.settle();
        assert_eq!(total(), 1.75);
        held(&first, 2_000_000);
        drop(one);
        drop(first);
        drop(other);
        assert_eq!(total(), 2.25);
    }
}
