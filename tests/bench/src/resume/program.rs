//! The program in the machine, as seen from outside.

use std::time::{Duration, SystemTime, UNIX_EPOCH};

use anyhow::{Context as _, ensure};
use serde::Deserialize;

use crate::machines::Machine;

const SOURCE: &str = include_str!("program.py");

/// Longer than the first rounds take, shorter than the others do.
const TIMER: f64 = 20.0;

/// A sleep of 20 ms may take long on a busy emulated CPU; the time a machine was saved would be far more
/// in a test that lets it lie, and any jump of the clock shows as one.
const LONGEST_TICK: f64 = 5.0;

/// The wall clock is right to this after a resume. The answer's way through a busy terminal is in it.
const CLOCK_DRIFT: f64 = 3.0;

#[derive(Debug, Deserialize)]
struct Answer {
    wrong: Vec<String>,
    pid: u32,
    ticks: u64,
    gap: f64,
    fired: Vec<f64>,
    monotonic: f64,
    wall: f64,
    random: String,
}

pub struct Program {
    last: Option<Answer>,
    /// Random bytes that it has drawn.
    drawn: Vec<String>,
}

impl Program {
    pub fn start(machine: &mut Machine, memory: u64) -> anyhow::Result<Self> {
        let source = SOURCE.replace('\'', r"'\''");
        let command = format!("exec python3 -c '{source}' {memory}");
        machine.run_on_terminal(command.into_bytes())?;
        machine.ask("", "@@ ready")?;
        Ok(Self { last: None, drawn: Vec::new() })
    }

    pub fn work(&mut self, machine: &mut Machine, round: u64) -> anyhow::Result<()> {
        machine.ask(&format!("work {round}"), "@@ worked").map(drop)
    }

    pub fn set_timer(&mut self, machine: &mut Machine) -> anyhow::Result<()> {
        machine.ask(&format!("timer {TIMER}"), "@@ waiting").map(drop)
    }

    /// Everything is as it was, and goes on.
    pub fn check(&mut self, machine: &mut Machine) -> anyhow::Result<()> {
        let line = machine.ask("check", "@@ {")?;
        let json = line.trim_start_matches("@@ ");
        let answer: Answer = serde_json::from_str(json).with_context(|| line.clone())?;
        ensure!(answer.wrong.is_empty(), "not as it was: {}", answer.wrong.join(", "));
        ensure!(answer.gap < LONGEST_TICK, "monotonic time jumped by {} s", answer.gap);
        let now = SystemTime::now().duration_since(UNIX_EPOCH)?.as_secs_f64();
        ensure!(
            (now - answer.wall).abs() < CLOCK_DRIFT,
            "the clock is {} s off",
            now - answer.wall
        );
        ensure!(!self.drawn.contains(&answer.random), "the same random bytes were drawn twice");
        if let Some(last) = &self.last {
            ensure!(answer.pid == last.pid, "process {} is now {}", last.pid, answer.pid);
            ensure!(answer.monotonic > last.monotonic, "monotonic time went back: {line}");
            ensure!(answer.ticks >= last.ticks, "the counter went back: {line}");
        }
        self.drawn.push(answer.random.clone());
        self.last = Some(answer);
        Ok(())
    }

    /// The timer that was set went off once, when it was due by the machine's own time.
    pub fn timer_fired(&mut self, machine: &mut Machine) -> anyhow::Result<()> {
        for _ in 0..60 {
            self.check(machine)?;
            if self.last.as_ref().is_some_and(|answer| !answer.fired.is_empty()) {
                break;
            }
            std::thread::sleep(Duration::from_secs(1));
        }
        let fired = self.last.as_ref().map(|answer| answer.fired.clone()).unwrap_or_default();
        ensure!(fired.len() == 1, "the timer went off {} times", fired.len());
        ensure!(fired[0] < LONGEST_TICK, "the timer was {} s late", fired[0]);
        Ok(())
    }
}
