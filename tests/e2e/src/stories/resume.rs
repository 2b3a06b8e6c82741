//! A machine that is saved and resumed is the same machine.
//!
//! These drive the machines' process itself, without the service: `hermitage-bench --prove-resume` is on
//! the serving machine anyway, and can look at a machine's memory from outside of it.

use anyhow::{Result, ensure};

use crate::{
    harness::{Story, same},
    runner::{Test, test},
};

pub const TESTS: [Test; 2] = [
    test("a_saved_machine_goes_on_exactly_as_it_was", 600, goes_on_exactly),
    test("a_machine_that_was_given_more_goes_on_exactly", 600, given_more),
];

fn goes_on_exactly(story: &Story) -> Result<()> {
    prove(story, 5, 16, 60, "512 MiB, 1 vCPUs")
}

/// With memory below and above 4 GiB that it did not boot with.
fn given_more(story: &Story) -> Result<()> {
    let size = "--machine 3328,2";
    prove_with(story, &format!("1 --program-mib 16 --flips 8 {size}"), "3328 MiB, 2 vCPUs")
}

/// Rounds of saving, comparing every byte and resuming; then damaged snapshots.
pub fn prove(story: &Story, rounds: u32, mib: u32, flips: u32, machine: &str) -> Result<()> {
    prove_with(story, &format!("{rounds} --program-mib {mib} --flips {flips}"), machine)
}

fn prove_with(story: &Story, words: &str, machine: &str) -> Result<()> {
    let told = story.host().run(&format!("hermitage-bench --prove-resume {words} 2>&1"))?;
    for line in told.lines().filter(|line| !line.starts_with("hermitage-bench:")) {
        println!("    {line}");
    }
    same("machine", told.lines().find_map(|line| line.strip_prefix("machine: ")), Some(machine))?;
    ensure!(told.contains("all refused"), "nothing is told of damaged snapshots:\n{told}");
    Ok(())
}
