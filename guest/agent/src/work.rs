//! Whether something is being worked on here while nobody is logged in: the host puts machines to sleep
//! that do nothing, and asks first.
//!
//! A look takes the processor time of every process of the user from `/proc/PID/stat`
//! (proc_pid_stat(5)) and whether it waits for the processor or the disk; what lies between two looks is
//! the answer. Shells and editors that wait for a key, sleeping timers and daemons that wait for a message
//! do neither. Processor time is cumulative and passes to the parent when a process is reaped, so the
//! difference of two sums has that of processes that were never seen: all of `make`'s compilers.
//!
//! Nothing is done in between: no timer ticks in an idle machine, and no page of it is touched.

mod look;
mod tcp;

use std::os::fd::AsFd;
use std::time::{Duration, Instant};

use hermitage_guest_proto::{Activity, Busy, LookAtWork, MAX_BUSY, MAX_WINDOW_MS, WaitsFor};

use crate::strays::Strays;
use look::{Look, Seen};
pub use look::{flags, processes};

/// Below this much of a processor a process is not worth naming, in thousandths.
const WORTH_NAMING: u64 = 5;

#[derive(Default)]
pub struct Work {
    last: Option<(Instant, Look)>,
    /// The question that is not answered yet, and when it can be.
    asked: Option<(u64, Instant)>,
}

impl Work {
    pub fn ask(
        &mut self,
        question: LookAtWork,
        cgroups: impl AsFd,
        strays: &mut Strays,
        now: Instant,
    ) {
        let window = Duration::from_millis(question.window_ms.min(MAX_WINDOW_MS).into());
        if question.fresh {
            self.last = None;
        }
        let (from, _) = self.last.get_or_insert_with(|| (now, Look::take(cgroups, strays)));
        self.asked = Some((question.question, *from + window));
    }

    pub fn deadline(&self) -> Option<Instant> {
        self.asked.map(|(_, due)| due)
    }

    /// The answer, if there is a question and it is time.
    pub fn answer(
        &mut self,
        cgroups: impl AsFd,
        strays: &mut Strays,
        now: Instant,
    ) -> Option<Activity> {
        let (question, _) = self.asked.filter(|(_, due)| *due <= now)?;
        self.asked = None;
        let (from, then) = self.last.take()?;
        let look = Look::take(cgroups, strays);
        let activity = between(question, now - from, &then, &look);
        self.last = Some((now, look));
        Some(activity)
    }

    /// The last look says nothing about what comes.
    pub fn forget(&mut self) {
        *self = Self::default();
    }
}

fn between(question: u64, time: Duration, then: &Look, now: &Look) -> Activity {
    let over_ms = u32::try_from(time.as_millis()).unwrap_or(u32::MAX).max(1);
    let permille = |ticks: u64| ticks * look::TICK_MS * 1000 / u64::from(over_ms);
    let mut busy: Vec<(u64, Busy)> = Vec::new();
    for process in &now.processes {
        let before = then.find(process);
        let cpu = permille(process.ticks.saturating_sub(before.map_or(0, |seen| seen.ticks)));
        let waits_for = match before {
            Some(before) if before.waits_for == process.waits_for => process.waits_for,
            _ => WaitsFor::Nothing,
        };
        if cpu >= WORTH_NAMING || waits_for != WaitsFor::Nothing {
            busy.push((cpu, named(process, cpu, waits_for)));
        }
    }
    busy.sort_by_key(|(cpu, _)| std::cmp::Reverse(*cpu));
    busy.truncate(MAX_BUSY);
    Activity {
        question,
        over_ms,
        cpu_permille: clamp(permille(now.ticks().saturating_sub(then.ticks()))),
        busy: busy.into_iter().map(|(_, busy)| busy).collect(),
        connections: now.connections.count,
        peer: now.connections.peer.map(|peer| peer.to_string()),
    }
}

fn named(process: &Seen, cpu: u64, waits_for: WaitsFor) -> Busy {
    let (pid, name) = (process.pid, process.name.clone());
    Busy { pid, name, cpu_permille: clamp(cpu), waits_for }
}

fn clamp(permille: u64) -> u32 {
    permille.try_into().unwrap_or(u32::MAX)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn seen(pid: u32, started: u64, ticks: u64, waits_for: WaitsFor) -> Seen {
        Seen { pid, started, ticks, waits_for, name: format!("p{pid}") }
    }

    fn look(processes: Vec<Seen>, reaped: u64) -> Look {
        Look { processes, reaped, connections: Default::default() }
    }

    const SECONDS: Duration = Duration::from_secs(2);

    #[test]
    fn what_waits_for_a_key_does_not_work() {
        let idle = |ticks| look(vec![seen(10, 5, ticks, WaitsFor::Nothing)], 7);
        let activity = between(3, SECONDS, &idle(400), &idle(400));
        assert_eq!((activity.question, activity.over_ms), (3, 2000));
        assert_eq!((activity.cpu_permille, activity.busy), (0, vec![]));
    }

    #[test]
    fn who_uses_the_processor_is_named_busiest_first() {
        let then = look(vec![seen(10, 5, 100, WaitsFor::Nothing)], 0);
        let now = look(
            vec![
                seen(10, 5, 150, WaitsFor::Processor),
                seen(11, 6, 100, WaitsFor::Nothing),
                // Its number was another's before.
                seen(12, 9, 1, WaitsFor::Nothing),
            ],
            0,
        );
        let activity = between(0, SECONDS, &then, &now);
        assert_eq!(activity.cpu_permille, 755);
        let busy: Vec<_> = activity.busy.iter().map(|b| (b.pid, b.cpu_permille)).collect();
        assert_eq!(busy, [(11, 500), (10, 250), (12, 5)]);
        // Waiting for the processor once is what every process does at times.
        assert_eq!(activity.busy[1].waits_for, WaitsFor::Nothing);
    }

    #[test]
    fn what_waits_for_the_disk_at_both_looks_works() {
        let then = look(vec![seen(10, 5, 0, WaitsFor::Disk)], 0);
        let now = look(vec![seen(10, 5, 0, WaitsFor::Disk)], 0);
        let activity = between(0, SECONDS, &then, &now);
        assert_eq!(activity.busy[0].waits_for, WaitsFor::Disk);
    }

    /// A shell's children come and go between two looks; their time is the shell's, or of whoever has
    /// reaped them.
    #[test]
    fn processes_that_were_never_seen_count() {
        let then =
            look(vec![seen(10, 5, 100, WaitsFor::Nothing), seen(11, 6, 30, WaitsFor::Nothing)], 50);
        let reaped_by_parent = look(vec![seen(10, 5, 180, WaitsFor::Nothing)], 50);
        assert_eq!(between(0, SECONDS, &then, &reaped_by_parent).cpu_permille, 250);
        let reaped_by_us = look(vec![seen(10, 5, 100, WaitsFor::Nothing)], 130);
        assert_eq!(between(0, SECONDS, &then, &reaped_by_us).cpu_permille, 250);
        // Nobody has waited for them: their time is lost, which is no work.
        let lost = look(vec![seen(10, 5, 100, WaitsFor::Nothing)], 50);
        assert_eq!(between(0, SECONDS, &then, &lost).cpu_permille, 0);
    }

    #[test]
    fn no_more_are_named_than_the_message_takes() {
        let many =
            |ticks| look((0..100).map(|pid| seen(pid, 1, ticks, WaitsFor::Nothing)).collect(), 0);
        assert_eq!(between(0, SECONDS, &many(0), &many(9)).busy.len(), MAX_BUSY);
    }
}
