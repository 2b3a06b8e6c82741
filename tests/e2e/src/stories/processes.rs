//! How many processes a user may have (docs/limits.md, "Processes"), in real guests: programs that start more and more.

use std::ops::RangeInclusive;

use anyhow::{Context as _, Result, ensure};
use serde_json::Value;

use super::sleep::wait_saved;
use crate::{
    harness::{Story, account::Account, host::quote, process::Input, same, says},
    runner::{Test, test},
};

pub const TESTS: [Test; 2] = [
    test("a_fork_bomb_stops_at_its_limit_and_the_next_login_ends_it", 300, bomb),
    test("without_a_limit_some_processes_are_left_for_a_login", 240, spare),
];

/// Starts processes until it can't, says how many, and ends them.
const FILL: &str = "
import os, signal
begun = []
try:
    while len(begun) < 1000:
        child = os.fork()
        if child == 0: signal.pause()
        begun.append(child)
except OSError as error: print(len(begun), error.strerror)
for child in begun: os.kill(child, signal.SIGKILL)
";

fn bomb(story: &Story) -> Result<()> {
    let alice = story.account_with("alice", &["--processes 60 --linger 1 --max-linger 0s"])?;
    let mut shell = alice.shell()?;
    shell.send("while :; do sleep 1000 & done\n")?;
    shell.expect("Resource temporarily unavailable", 90)?;
    counts(story, &alice, 60, 50..=60)?;
    // Her next login needs no process but its own shell, which ends all others.
    same("what she is told", alice.output("kill -9 -1; echo ended")?.trim(), "ended")?;
    shell.wait_end(60)?;
    counts(story, &alice, 60, 0..=20)?;

    set(story, &alice, 200)?;
    let sleepers =
        "for i in {1..150}; do sleep 1000 </dev/null &>/dev/null & done; jobs -p | wc -l";
    same("sleepers", alice.output(sleepers)?.trim(), "150")?;
    counts(story, &alice, 200, 150..=160)?;
    room(&alice, 40..=50)?;
    // Those there are stay, and there are no more.
    set(story, &alice, 100)?;
    room(&alice, 0..=0)?;
    counts(story, &alice, 100, 150..=160)?;

    // In her sleep, too: it counts before anything of hers runs.
    wait_saved(story, &alice)?;
    set(story, &alice, 170)?;
    room(&alice, 10..=20)?;
    wait_saved(story, &alice)?;
    room(&alice, 10..=20)?;

    // She is root in her machine. It is told.
    alice.output("echo max | sudo tee /sys/fs/cgroup/hermitage/pids.max")?;
    let shown = story.host().run(&format!("hermitage account show {}", alice.name))?;
    says("account show", &shown, "not enforced: her machine's root has lifted it")
}

fn spare(story: &Story) -> Result<()> {
    let bob = story.account_with("bob", &["--policy discard"])?;
    let said = bob
        .output("cat /proc/sys/kernel/threads-max /sys/fs/cgroup/hermitage/pids.max; ulimit -u")?;
    let said: Vec<_> = said.split_whitespace().collect();
    let [all, most, of_user] = said[..] else { anyhow::bail!("limits are {said:?}") };
    same("processes by user", of_user, "unlimited")?;
    let (all, most): (u32, u32) = (all.parse()?, most.parse()?);
    ensure!(most <= all - all / 8 && most > all / 2, "{most} of {all} may be hers");

    // Threads take less memory than processes: they meet the number first.
    let threads = "import threading, time
threading.stack_size(1 << 16)
n = 0
try:
    while True:
        threading.Thread(target=time.sleep, args=(1000,), daemon=True).start()
        n += 1
except RuntimeError as error: print('full', n, error, flush=True)
time.sleep(1000)";
    let mut bomb =
        bob.login().start(&format!("exec python3 -c {}", quote(threads)), Input::Nothing)?;
    let full = story.wait_for("threads to be as many as there may be", 150, || {
        ensure!(!bomb.has_ended()?, "it ended: {}", bomb.errors_so_far()?);
        let said = String::from_utf8_lossy(&bomb.out_so_far()?).into_owned();
        Ok(said.contains("full").then_some(said))
    })?;
    let n: u32 = full.split_whitespace().nth(1).and_then(|n| n.parse().ok()).context(full)?;
    ensure!(n <= most && n + 20 > most, "it got {n} of {most} threads");
    let shown = story.host().run(&format!("hermitage account show {}", bob.name))?;
    says("account show", &shown, ", no limit")?;
    same("what he is told", bob.output("kill -9 -1; echo ended")?.trim(), "ended")?;
    let n = bob.output("exec cat /sys/fs/cgroup/hermitage/pids.current")?;
    ensure!(n.trim().parse::<u32>()? < 20, "there are {n} left");
    Ok(())
}

fn set(story: &Story, account: &Account, most: u32) -> Result<()> {
    let name = &account.name;
    story.host().run(&format!("hermitage account set {name} --processes {most} 2>&1")).map(drop)
}

/// What `account show` says of the limit, and of what is in use.
fn counts(story: &Story, account: &Account, most: u32, used: RangeInclusive<u64>) -> Result<()> {
    let show = || story.host().hermitage_json(&format!("account show {}", account.name));
    let shown: Value = story.wait_for(&format!("{used:?} processes"), 30, || {
        let shown = show()?;
        let count = shown["machine"]["processes"].as_u64();
        Ok(count.is_some_and(|count| used.contains(&count)).then_some(shown))
    })?;
    same("the limit", shown["limits"]["processes"].as_u64(), Some(most.into()))?;
    same("what is wrong with it", &shown["machine"]["processes_fault"], &Value::Null)
}

/// How many more she can start.
fn room(account: &Account, wanted: RangeInclusive<u32>) -> Result<()> {
    let said = account.output(&format!("exec python3 -c {}", quote(FILL)))?;
    says("starting more", &said, "Resource temporarily unavailable")?;
    let more: u32 = said.split_whitespace().next().context("a number")?.parse()?;
    ensure!(wanted.contains(&more), "{more} more, not {wanted:?}");
    Ok(())
}
