//! Memory that programs have used and left goes back to the host, and into no snapshot.

use anyhow::{Context as _, Result, ensure};

use crate::{
    harness::{Story, account::Account},
    runner::{Test, test},
};

pub const TESTS: [Test; 1] = [test("freed_memory_goes_back_to_the_host", 600, goes_back)];

/// What the program takes; far more than the rest of an idle machine.
const TAKEN_MIB: u64 = 120;
const REST_MIB: u64 = 40;

fn goes_back(story: &Story) -> Result<()> {
    let alice = story.account("alice")?;
    // No zeroes, and no two pages alike.
    let take = format!("import os; held = [os.urandom(1 << 20) for _ in range({TAKEN_MIB})]");
    let mut shell = alice.shell()?;
    shell.run(&format!("python3 -c '{take}'"))?;
    story.wait_for("the host to get back what a program has left", 90, || {
        Ok((private_mib(story, &alice)? < REST_MIB).then_some(()))
    })?;

    shell.run(&format!(
        "(python3 -c '{take}; print(\"has it\", flush=True); import time; time.sleep(9999)' > held &)"
    ))?;
    story.wait_for("the program to take memory", 90, || {
        Ok(alice.output("cat held")?.contains("has it").then_some(()))
    })?;
    shell.cut()?;
    alice.stop_machine()?;
    let large = snapshot_mib(story, &alice)?;
    ensure!(large >= TAKEN_MIB, "only {large} MiB are saved of a machine that holds {TAKEN_MIB}");

    // These pages are the snapshot's now, not the process's own.
    alice.output("pkill python3")?;
    story.wait_for("what the program held to be no longer saved", 120, || {
        alice.stop_machine()?;
        let small = snapshot_mib(story, &alice)?;
        alice.output("sleep 5")?;
        Ok((small < REST_MIB).then_some(()))
    })
}

fn private_mib(story: &Story, alice: &Account) -> Result<u64> {
    let pid = alice.running_machine()?;
    let awk = format!("awk '/^Anonymous/ {{print $2}}' /proc/{pid}/smaps_rollup");
    let kib: u64 = story.host().run(&awk)?.trim().parse().context("odd smaps_rollup")?;
    Ok(kib >> 10)
}

fn snapshot_mib(story: &Story, alice: &Account) -> Result<u64> {
    let shown = story.host().hermitage_json(&format!("snapshot show {}", alice.name))?;
    Ok(shown["bytes"].as_u64().context("`snapshot show` has no bytes")? >> 20)
}
