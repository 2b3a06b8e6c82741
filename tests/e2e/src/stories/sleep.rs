//! Leave in the middle of something, come back to it: machines that are saved and resumed.

use std::time::Duration;

use anyhow::{Context as _, Result, ensure};
use serde_json::Value;

use crate::{
    harness::{Story, account::Account, same, says, terminal::Terminal},
    runner::{Test, test},
};

pub const TESTS: [Test; 6] = [
    test("a_shell_is_there_after_a_save", 600, comes_back),
    test("an_editor_is_there_after_a_save", 600, editor),
    test("what_left_its_group_stands_still_for_a_save", 300, strays),
    test("a_restart_of_the_service_keeps_every_machine", 600, restart),
    test("ten_logins_at_once_resume_one_machine", 600, ten_logins),
    test("a_kill_during_a_save_or_resume_never_brings_stale_memory", 3600, kills),
];

/// What is on record of an account.
fn show(story: &Story, alice: &Account) -> Result<Value> {
    let text = story.host().run(&format!("hermitage account show {} --json", alice.name))?;
    serde_json::from_str(&text).with_context(|| format!("`account show` printed {text:?}"))
}

pub fn wait_saved(story: &Story, alice: &Account) -> Result<()> {
    story.wait_for("the machine to be saved", 120, || {
        Ok((show(story, alice)?["machine_state"] == "saved").then_some(()))
    })
}

pub fn back<'a>(alice: &Account<'a>) -> Result<Terminal<'a>> {
    alice.login().terminal(None, 80, 24)
}

fn comes_back(story: &Story) -> Result<()> {
    // Its counter may be work enough to stay awake for.
    let alice = story.account_with("alice", &["--linger 1", "--max-linger 0s"])?;
    let mut shell = alice.shell()?;
    let pid = shell.run("kept='a word'; cd /tmp; echo $$")?;
    shell.run(
        "(n=0; while :; do n=$((n+1)); echo $n > ~/n; mv ~/n ~/count; sleep 0.2; done) & exec 7<>/tmp/open",
    )?;
    let boot = shell.run("cat /proc/sys/kernel/random/boot_id")?;
    let mut last = 0;
    for round in 0..3 {
        shell.cut()?;
        wait_saved(story, &alice)?;
        ensure!(alice.machine()?.is_none(), "a saved machine still has a process");
        story.sleep(Duration::from_secs(2));
        shell = back(&alice)?;
        let line = shell.expect("resumed from ", 90).and_then(|_| shell.expect(" ms)", 30))?;
        says("the login line", &line, "iB, ")?;
        same("the shell's process", shell.run("echo $$")?, pid.clone())?;
        same("variable and folder", shell.run("echo $kept $PWD")?.trim(), "a word /tmp")?;
        same("the boot", shell.run("cat /proc/sys/kernel/random/boot_id")?, boot.clone())?;
        shell.run("echo through >&7")?;
        // The counter goes on where it was.
        let count =
            || -> Result<u64> { alice.output("cat ~/count")?.trim().parse().context("count") };
        let now = count()?;
        ensure!(now > last, "round {round}: the counter went from {last} to {now}");
        story.wait_for("the counter to go on", 30, || Ok((count()? > now).then_some(())))?;
        last = count()?;
        let guest: i64 = shell.run("date +%s")?.trim().parse().context("date")?;
        let host: i64 = story.host().run("date +%s")?.trim().parse().context("date")?;
        ensure!((guest - host).abs() <= 2, "the guest's clock says {guest}, the host's {host}");
    }
    Ok(())
}

/// The root cgroup can't be frozen: whatever is in it is moved out of it.
fn strays(story: &Story) -> Result<()> {
    let alice = story.account_with("alice", &["--linger 1 --max-linger 0s"])?;
    let group = |of: &str| alice.output(&format!("cat /proc/$(pgrep -xf '{of}')/cgroup"));
    alice.output("sleep 1111 </dev/null &>/dev/null &")?;
    same("where sessions are", group("sleep 1111")?.trim(), "0::/hermitage")?;
    wait_saved(story, &alice)?;
    // Between two saves, of which the first had nothing to look for.
    alice.output("pgrep -xf 'sleep 1111' | sudo tee /sys/fs/cgroup/cgroup.procs")?;
    same("where it went", group("sleep 1111")?.trim(), "0::/")?;
    wait_saved(story, &alice)?;
    same("where the save found it", group("sleep 1111")?.trim(), "0::/hermitage")?;

    // The kernel starts this one.
    let bob = story.account_with("bob", &["--linger 1 --max-linger 0s"])?;
    let group = |of: &str| bob.output(&format!("cat /proc/$(pgrep -xf '{of}')/cgroup"));
    // Until it has read the dump, who crashes can't stop.
    let handler = r"#!/bin/sh\ncat > /dev/null; exec sleep 2222\n";
    bob.output(&format!("printf '{handler}' > ~/handler; chmod +x ~/handler"))?;
    bob.output("echo \"|$HOME/handler\" | sudo tee /proc/sys/kernel/core_pattern")?;
    bob.output("ulimit -c unlimited; sh -c 'kill -SEGV $$'; until pgrep -xf 'sleep 2222'; do sleep 0.2; done")?;
    same("where the kernel starts it", group("sleep 2222")?.trim(), "0::/")?;
    wait_saved(story, &bob)?;
    same("where the save found it", group("sleep 2222")?.trim(), "0::/hermitage")
}

fn editor(story: &Story) -> Result<()> {
    let alice = story.account_with("alice", &["--linger 1"])?;
    let mut shell = alice.shell()?;
    shell.run("echo before the editor; printf 'one\\ntwo\\n' > file")?;
    shell.send("vim -u NONE -N file\n")?;
    shell.expect("two", 60)?;
    shell.send("Gothree typed")?;
    shell.expect("typed", 30)?;
    shell.cut()?;
    wait_saved(story, &alice)?;
    let mut shell = back(&alice)?;
    let screen = shell.expect("three typed", 90)?;
    says("the redraw", &screen, "\x1b[?1049h")?;
    says("the screen behind the editor", &screen, "before the editor")?;
    shell.send(" and more\x1b:w\r")?;
    shell.expect("written", 30)?;
    same("the file", alice.output("cat file")?.as_str(), "one\ntwo\nthree typed and more")?;
    shell.send("u:wq\r")?;
    shell.expect("$ ", 30)?;
    same("after undo", alice.output("cat file")?.as_str(), "one\ntwo")
}

/// The service stops in order and starts again: whoever was there goes on.
fn restart(story: &Story) -> Result<()> {
    let alice = story.account("alice")?;
    let bob = story.account("bob")?;
    let mut hers = alice.shell()?;
    let mut his = bob.shell()?;
    let pids = (hers.run("mine=hers; echo $$")?, his.run("mine=his; echo $$")?);
    story
        .host()
        .run("lab-serve restart; until hermitage status >/dev/null 2>&1; do sleep 0.3; done")?;
    let (_, words) = hers.wait_end(120)?;
    says("her session", &words, "the service is stopping")?;
    for (account, pid, mine) in [(&alice, pids.0, "hers"), (&bob, pids.1, "his")] {
        let mut shell = back(account)?;
        shell.expect("resumed from ", 120)?;
        same("the process", shell.run("echo $$")?, pid)?;
        same("the variable", shell.run("echo $mine")?.trim(), mine)?;
    }
    Ok(())
}

fn ten_logins(story: &Story) -> Result<()> {
    use crate::harness::process::Input;
    let alice = story.account_with("alice", &["--linger 1"])?;
    let mut shell = alice.shell()?;
    shell.run("echo kept > /dev/shm/memory")?;
    shell.cut()?;
    wait_saved(story, &alice)?;
    let logins: Vec<_> = (0..10)
        .map(|_| {
            alice
                .login()
                .start("cat /dev/shm/memory /proc/sys/kernel/random/boot_id", Input::Nothing)
        })
        .collect::<Result<_>>()?;
    let mut seen = std::collections::BTreeSet::new();
    for login in logins {
        seen.insert(login.wait(story.within(180))?.success()?);
    }
    ensure!(seen.len() == 1, "ten logins saw different machines: {seen:?}");
    says("what they saw", seen.first().map_or("", String::as_str), "kept")
}

/// Memory and disk carry the same number; whatever is killed whenever, they never differ, and what was
/// synced is there.
fn kills(story: &Story) -> Result<()> {
    let alice = story.account_with("alice", &["--linger 1"])?;
    let rounds = story.world.options.rounds.max(3) * 2;
    for round in 1..=rounds {
        let mut shell = alice.login().terminal(None, 80, 24)?;
        // Taken up or new: a line of its own either way.
        shell.send("\n")?;
        shell.run(&format!("echo {round} > /dev/shm/n; echo {round} > ~/n; sync ~/n"))?;
        shell.cut()?;
        if round % 2 == 0 {
            // Killed while, or shortly after, it is saved.
            story.wait_for("the save", 60, || {
                let state = show(story, &alice)?["machine_state"].clone();
                Ok((state == "saving" || state == "saved").then_some(()))
            })?;
            story.sleep(Duration::from_millis(story.world.random() % 1500));
            kill(story, &alice, round)?;
        } else {
            // Killed while it is resumed.
            wait_saved(story, &alice)?;
            let login = alice.login().start("true", crate::harness::process::Input::Nothing)?;
            story.sleep(Duration::from_millis(story.world.random() % 2500));
            kill(story, &alice, round)?;
            let _ = login.wait(story.within(120))?;
        }
        let seen = alice.output("cat ~/n; cat /dev/shm/n 2>/dev/null || echo none")?;
        let words: Vec<&str> = seen.split_whitespace().collect();
        let wanted = round.to_string();
        ensure!(
            words.first() == Some(&wanted.as_str()),
            "round {round}: what was synced is {seen:?}"
        );
        ensure!(
            words.get(1) == Some(&wanted.as_str()) || words.get(1) == Some(&"none"),
            "round {round}: stale memory, {seen:?}"
        );
    }
    Ok(())
}

/// The service, the machine, or both.
fn kill(story: &Story, alice: &Account, round: u32) -> Result<()> {
    let machine = alice.machine()?.map_or(String::new(), |pid| format!("kill -9 {pid};"));
    let service = "kill -9 $(pgrep -xo hermitage)";
    let script = match round % 3 {
        0 => format!("{machine} true"),
        1 => format!(
            "{service}; lab-serve start; until hermitage status >/dev/null 2>&1; do sleep 0.3; done"
        ),
        _ => format!(
            "{machine} {service}; lab-serve start; until hermitage status >/dev/null 2>&1; do sleep 0.3; done"
        ),
    };
    story.host().run(&script).map(drop)
}
