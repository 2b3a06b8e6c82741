//! A service whose crashes are planned: the fault points of `storage/src/faults.rs`, by root's hands.

use std::collections::BTreeMap;

use anyhow::{Context as _, Result, ensure};
use hermitage_storage::faults::{Point, VARIABLE};

use super::{Story, account::Account};

/// Who dies at a point.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Victim {
    /// The process that is there.
    Itself,
    /// The machine's process, while the one that is there waits.
    Machine,
    Service,
    Both,
}

pub struct Faults<'a> {
    story: &'a Story,
    dir: String,
}

impl<'a> Faults<'a> {
    /// Restarts the service under a plan, which is empty; afterwards it is started without one.
    pub fn new(story: &'a Story) -> Result<Self> {
        let dir = format!("{}-faults", story.world.options.run_dir.display());
        let service = &story.world.options.service;
        story.afterwards(format!("{service} stop; rm -rf {dir}; {service} start; {SERVING}"));
        story.host().run(&format!(
            "{service} stop; rm -rf {dir}; mkdir -m 700 {dir} && {VARIABLE}={dir} {service} start; {SERVING}"
        ))?;
        let armed = story.host().try_run(&format!("test -e {dir}/log"))?;
        ensure!(armed.code() == Some(0), "{service} does not pass {VARIABLE} on to the service");
        Ok(Self { story, dir })
    }

    /// What is to happen; it replaces what was planned and has not happened.
    pub fn plan(&self, lines: &[&str]) -> Result<()> {
        let plan: String = lines.iter().map(|line| format!("{line} 0\n")).collect();
        let script = format!("echo plan 0 - >> {0}/log; printf '{plan}' > {0}/plan", self.dir);
        self.story.host().run(&script).map(drop)
    }

    /// Plans a death at a point, after something else that leads there.
    pub fn plan_death(&self, before: &[&str], point: Point, victim: Victim) -> Result<()> {
        let action = if victim == Victim::Itself { "kill" } else { "hang" };
        let mut lines = before.to_vec();
        let line = format!("{} {action}", point.name());
        lines.push(&line);
        self.plan(&lines)
    }

    /// Waits until the point is reached, ends the victim, and has a service serve again.
    pub fn strike(&self, account: &Account<'_>, point: Point, victim: Victim) -> Result<()> {
        let Self { story, dir } = self;
        let machine = format!("kill -9 $({}) 2>/dev/null", account.machine_script());
        let service = "kill -9 $(pgrep -xo hermitage) 2>/dev/null";
        let kill = match victim {
            Victim::Itself => "true".to_owned(),
            Victim::Machine => machine,
            Victim::Service => service.to_owned(),
            Victim::Both => format!("{machine}; {service}"),
        };
        let patience = story.world.patient(std::time::Duration::from_secs(20)).as_secs();
        let start = format!("{VARIABLE}={dir} {} start", story.world.options.service);
        story
            .host()
            .run(&format!(
                "end=$(( $(date +%s) + {patience} ))
                 until tac {dir}/log | sed '/^plan/q' | grep -E '^{name} [0-9]+ (kill|hang)$' >&2; do
                   [ $(date +%s) -lt $end ] || {{ tail -n 30 {dir}/log >&2; exit 9; }}
                   sleep 0.05
                 done
                 {kill}
                 sleep 0.2
                 pgrep -x hermitage >/dev/null || {{ {start}; {SERVING}; }}",
                name = point.name().replace('.', "\\."),
            ))
            .with_context(|| format!("waiting for {}", point.name()))?;
        Ok(())
    }

    /// How often each point was passed since the last call, and how often with an effect.
    pub fn count(&self) -> Result<BTreeMap<String, (u64, u64)>> {
        let log = self.story.host().run(&format!("cat {0}/log; : > {0}/log", self.dir))?;
        let mut counts = BTreeMap::new();
        for line in log.lines() {
            let mut words = line.split(' ');
            let count: &mut (u64, u64) =
                counts.entry(words.next().unwrap_or_default().to_owned()).or_default();
            count.0 += 1;
            count.1 += u64::from(words.nth(1) != Some("-"));
        }
        Ok(counts)
    }
}

const SERVING: &str = "until hermitage status >/dev/null 2>&1; do sleep 0.1; done";
