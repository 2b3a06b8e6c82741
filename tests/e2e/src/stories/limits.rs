//! What the host lets a machine take (docs/limits.md), as its kernel counts it.

use anyhow::{Context as _, Result, ensure};
use serde_json::Value;

use crate::{
    harness::{Story, host::quote, process::Input, same, says},
    runner::{Test, test},
};

pub const TESTS: [Test; 1] = [test("a_machines_share_is_enforced_by_the_host", 120, share)];

fn share(story: &Story) -> Result<()> {
    let alice = story.account_with("alice", &["--cpu-weight 50 --policy discard"])?;
    // It never ends by itself.
    let burner = alice.login().start("echo begun; while :; do :; done", Input::Nothing)?;
    story.wait_for("her machine to run", 60, || Ok(alice.machine()?.map(drop)))?;
    let machine = alice.running_machine()?;
    let group = group(story, machine)?;
    let read = |script: &str| story.host().run(&format!("cd {} && {script}", quote(&group)));
    let found = read(&format!(
        "cat cgroup.procs cpu.weight cpu.max; ls /proc/{machine}/task | wc -l; cat pids.current \
         memory.current memory.max"
    ))?;
    let lines: Vec<_> = found.lines().collect();
    let [process, weight, cap, threads, counted, memory, most] = lines[..] else {
        anyhow::bail!("her machine's group has {found:?}")
    };
    same("who is in it", process, &machine.to_string())?;
    same("its share", (weight, cap), ("50", "max 50000"))?;
    same("threads that are counted", counted, threads)?;
    let (memory, most): (u64, u64) = (memory.parse()?, most.parse()?);
    ensure!(memory > 1 << 20 && memory < most, "{memory} of {most} bytes count for it");
    let free = used(story, &group)?;

    // At once, and nothing is lost.
    let name = &alice.name;
    read(&format!(
        "hermitage account set {name} --cpu-percent 20 --io-rate 64MiB >&2; \
         until grep -q '^10000 50000' cpu.max && grep -q wbps=67108864 io.max; do sleep 0.1; done"
    ))?;
    let capped = used(story, &group)?;
    ensure!(capped < 0.3, "a machine that may have 0.2 of a processor takes {capped:.2}");
    ensure!(free > 0.5, "without a cap she has {free:.2} of a processor; with one, {capped:.2}");
    let shown = read(&format!("hermitage account show {name}; kill -0 {machine}"))?;
    says("account show", &shown, "at most 20 %, weight 50")?;
    says("account show", &shown, "held back for")?;
    let top: Value = serde_json::from_str(&read("hermitage top --json")?).context("top's JSON")?;
    let rows = top["accounts"].as_array().context("top's accounts")?;
    let hers = rows.iter().find(|row| row["account"] == name.as_str()).context("her row")?;
    let held = hers["held_percent"].as_f64().context("how long she is held")?;
    ensure!(
        held > 20.0,
        "capped to a fifth of what she would take, she is held {held} % of the time"
    );

    read(&format!("kill -9 {machine}; cd /; while [ -d {} ]; do sleep 0.1; done", quote(&group)))?;
    drop(burner);
    Ok(())
}

/// The folder of a process' control group.
fn group(story: &Story, process: i32) -> Result<String> {
    let path = story.host().run(&format!("sed -n 's/^0:://p' /proc/{process}/cgroup"))?;
    let group = format!("/sys/fs/cgroup{}", path.trim());
    ensure!(group.contains("/machines/"), "the machine's process is in {group}");
    Ok(group)
}

/// Processors that a group used for a second.
fn used(story: &Story, group: &str) -> Result<f64> {
    // The program has to be there first, and what its start took to be over.
    let text = story.host().run(&format!(
        "cd {group}; sleep 0.3; look() {{ sed -n 's/^usage_usec //p' cpu.stat; date +%s%N; }}; \
         look; sleep 1; look"
    ))?;
    let numbers: Vec<f64> = text.split_whitespace().filter_map(|n| n.parse().ok()).collect();
    match numbers[..] {
        [used, at, used_then, then] => Ok((used_then - used) * 1e3 / (then - at)),
        _ => anyhow::bail!("wanted processor time and the time, twice, got {text:?}"),
    }
}
