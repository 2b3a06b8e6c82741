//! Our fork against the floor, and from the fork to the agent and to the prompt.

use std::path::{Path, PathBuf};

use anyhow::Context as _;
use hermitage_vmm_proto::Stage;

use crate::{
    base::{Base, DISK_BYTES},
    clock,
    exits::Exits,
    floor::Floor,
    machines::{
        self, Died, Machine, STEP_LIMIT,
        server::{ForkServer, Parts},
    },
    progress,
    report::Section,
    stats::{Samples, Stages},
    wait::Deadline,
};

/// Floor and fork take turns in blocks: long enough to be warm, short enough that a host that gets
/// slower for a while slows both.
const BLOCK: usize = 10;

/// What the first issue asks for; `docs/bench.md` has where this goes.
const FORK_GOAL: f64 = 1.5;
const AGENT_GOAL: f64 = 16.0;

/// Machines that died by themselves, which the emulated CPU makes some do. Told, and too many of them
/// are an error.
#[derive(Default)]
pub struct Deaths {
    reasons: Vec<String>,
    tried: usize,
}

impl Deaths {
    /// None: this one died.
    pub fn survivor<T>(&mut self, result: anyhow::Result<T>) -> anyhow::Result<Option<T>> {
        self.tried += 1;
        let error = match result {
            Ok(value) => return Ok(Some(value)),
            Err(error) => error,
        };
        let Some(died) = error.downcast_ref::<Died>() else {
            return Err(error);
        };
        progress!("{died}");
        self.reasons.push(died.to_string());
        // One per cent, but one is always forgiven.
        if self.reasons.len() > 1.max(self.tried / 100) {
            return Err(error.context(format!(
                "{} of {} machines died by themselves",
                self.reasons.len(),
                self.tried
            )));
        }
        Ok(None)
    }

    pub fn tell(&self, section: &mut Section) {
        if !self.reasons.is_empty() {
            section.note(format!(
                "{} of {} machines died by themselves and are not in the figures: {}",
                self.reasons.len(),
                self.tried,
                self.reasons.join("; ")
            ));
        }
    }
}

/// The floor alone or beside our fork. Returns the sections and the floor's median.
pub fn measure(
    base: &Base,
    server: &mut ForkServer,
    n: usize,
) -> anyhow::Result<(Vec<Section>, u64)> {
    let mut floor = Floor::new(base)?;
    let mut stages = Stages::default();
    let mut total = Samples::new();
    let mut teardown = Samples::new();
    let mut deaths = Deaths::default();
    // Warm both.
    floor.sample()?;
    floor = Floor::new(base)?;
    deaths.survivor(fork_once(base, server))?;
    while total.count() < n {
        progress!("fork: {} of {n}", total.count());
        let block = BLOCK.min(n - total.count());
        for _ in 0..block {
            floor.sample()?;
        }
        for _ in 0..block {
            if let Some(fork) = deaths.survivor(fork_once(base, server))? {
                for stage in &fork.stages {
                    stages.push(&stage.name, stage.nanoseconds);
                }
                total.push(fork.total);
                teardown.push(fork.teardown);
            }
        }
    }

    let mut of_floor = Section::new("floor", "Floor: the bare KVM calls of a fork");
    for (name, samples) in floor.stages.iter() {
        of_floor.time(name, samples);
    }
    of_floor.time("sum", &floor.sum);
    of_floor.time("(teardown, not in the sum)", &floor.teardown);

    let median = floor.sum.p50();
    let mut of_fork =
        Section::new("fork", "Fork: a machine in a process of its own, no preparation");
    for (name, samples) in stages.iter() {
        of_fork.time(name, samples).over(Some(median), "floor");
    }
    of_fork.time("request to running", &total).over(Some(median), "floor").ratio_goal(FORK_GOAL);
    of_fork.time("(kill to reaped, not in the sum)", &teardown).over(Some(median), "floor");
    deaths.tell(&mut of_fork);
    Ok((vec![of_floor, of_fork], median))
}

struct Fork {
    total: u64,
    teardown: u64,
    stages: Vec<Stage>,
}

/// One machine whose agent is not spoken to: it idles until it is killed.
fn fork_once(base: &Base, server: &mut ForkServer) -> anyhow::Result<Fork> {
    let parts = Parts { disk: base.disk(&base.new_disk)?, for_agent: Vec::new() };
    let mut machine = server.fork(parts)?;
    let asked_at = machine.asked_at;
    let running = machine.running();
    let before = clock::now();
    server.end(machine)?;
    let teardown = clock::now() - before;
    let (at, stages) = running?;
    Ok(Fork { total: at - asked_at, teardown, stages })
}

/// From the fork to what a person waits for.
pub fn measure_agent(
    base: &Base,
    server: &mut ForkServer,
    n: usize,
    floor: u64,
) -> anyhow::Result<Section> {
    let mut section =
        Section::new("agent", "Fork with an account: from the request, one machine at a time");
    let mut deaths = Deaths::default();
    let used = used_disk(base, server)?;
    for (whose, template) in [("known account", &used), ("new account", &base.new_disk)] {
        let [mut running, mut agent, mut attached, mut first, mut prompt] =
            [const { Samples::new() }; 5];
        let [mut exits, mut faults, mut mmio] = [const { Samples::new() }; 3];
        for round in 0..n {
            if round % BLOCK == 0 {
                progress!("agent: {whose}, {round} of {n}");
            }
            let times = start_once(base, server, template, round as u64);
            let Some((times, counted)) = deaths.survivor(times)? else {
                continue;
            };
            running.push(times.running);
            agent.push(times.agent);
            attached.push(times.attached);
            first.push(times.first_byte);
            prompt.push(times.prompt);
            if let Some(counted) = counted {
                exits.push(counted.all);
                faults.push(counted.page_faults);
                mmio.push(counted.mmio);
            }
        }
        for (what, samples, goal) in [
            ("running", &running, None),
            ("the agent's first byte", &agent, Some(AGENT_GOAL)),
            ("disk and account in place", &attached, None),
            ("the terminal's first byte", &first, None),
            ("the shell's prompt", &prompt, None),
        ] {
            let row = section.time(format!("{whose}: to {what}"), samples);
            row.over(Some(floor), "floor");
            if let Some(goal) = goal {
                row.ratio_goal(goal);
            }
        }
        if exits.count() > 0 {
            section.count(format!("{whose}: exits until the prompt"), &exits);
            section.count(format!("{whose}: of that, page faults"), &faults);
            section.count(format!("{whose}: of that, devices' registers"), &mmio);
        } else if section.notes.is_empty() {
            section.note("no exits counted: debugfs is not mounted at /sys/kernel/debug");
        }
    }
    deaths.tell(&mut section);
    Ok(section)
}

/// A disk on which an account has logged in once and whose machine was powered off in order. It is the
/// fork server's first machine with an account, so it also warms what all share.
pub fn used_disk(base: &Base, server: &mut ForkServer) -> anyhow::Result<PathBuf> {
    let (path, disk) = base.kept_disk(&base.new_disk)?;
    let mut machine = server.fork(Parts { disk, for_agent: machines::attach(0, DISK_BYTES)? })?;
    let result = bring_to_prompt(&mut machine).and_then(|_| machine.power_off());
    server.end(machine)?;
    result.context("the machine that prepares a disk")?;
    Ok(path)
}

/// Nanoseconds since the request.
pub struct Times {
    pub running: u64,
    pub agent: u64,
    pub attached: u64,
    pub first_byte: u64,
    pub prompt: u64,
}

pub fn start_once(
    base: &Base,
    server: &mut ForkServer,
    template: &Path,
    n: u64,
) -> anyhow::Result<(Times, Option<Exits>)> {
    let disk = base.disk(template)?;
    let mut machine = server.fork(Parts { disk, for_agent: machines::attach(n, DISK_BYTES)? })?;
    let result = bring_to_prompt(&mut machine).and_then(|times| {
        let pid = server.forked(&machine, Deadline::after(STEP_LIMIT))?;
        Ok((times, Exits::of(pid)))
    });
    server.end(machine)?;
    result
}

/// Waits until its shell shows a prompt.
pub fn bring_to_prompt(machine: &mut Machine) -> anyhow::Result<Times> {
    let start = machine.asked_at;
    let (running, _) = machine.running()?;
    let (agent, attached) = machine.attached()?;
    let terminal = machine.open_terminal()?;
    Ok(Times {
        running: running - start,
        agent: agent - start,
        attached: attached - start,
        first_byte: terminal.first_byte - start,
        prompt: terminal.prompt - start,
    })
}
