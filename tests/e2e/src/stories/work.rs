//! Leave something running: what keeps a machine awake, for how long, and what becomes of it then.

use std::time::Duration;

use anyhow::{Context as _, Result, ensure};
use serde_json::Value;

use crate::{
    harness::{Story, account::Account, same, says, terminal::Terminal},
    runner::{Test, test},
};

pub const TESTS: [Test; 3] = [
    test("a_job_is_finished_before_its_machine_sleeps", 600, finishes),
    test("an_idle_machine_sleeps_unless_it_is_held", 600, idle_and_held),
    test("a_job_beyond_the_limit_is_paused_and_goes_on", 600, limited),
];

fn show(story: &Story, alice: &Account) -> Result<Value> {
    story.host().hermitage_json(&format!("account show {}", alice.name))
}

fn wait_saved(story: &Story, alice: &Account) -> Result<String> {
    story.wait_for("the machine to be saved", 120, || {
        let shown = show(story, alice)?;
        let because = shown["because"].as_str().unwrap_or_default().to_owned();
        Ok((shown["machine_state"] == "saved").then_some(because))
    })
}

fn wait_awake(story: &Story, alice: &Account) -> Result<String> {
    story.wait_for("something to keep the machine awake", 60, || {
        Ok(show(story, alice)?["machine"]["awake"].as_str().map(str::to_owned))
    })
}

fn back<'a>(alice: &Account<'a>) -> Result<Terminal<'a>> {
    alice.login().terminal(None, 80, 24)
}

/// Starts a program of this name that counts in `~/count` until a file says stop. All its work is its own:
/// no process is started.
fn start_job(shell: &mut Terminal, name: &str) -> Result<()> {
    shell.send(&format!(
        "cp /bin/bash ./{name}; ./{name} -c 'echo at \"work\"; n=0; until [ -e stop ]; do n=$((n+1)); \
         [ $((n % 500)) = 0 ] && echo $n > count; done; echo finished > result'\n"
    ))?;
    shell.expect("at work", 60).map(drop)
}

fn finishes(story: &Story) -> Result<()> {
    let alice = story.account_with("alice", &["--linger", "2"])?;
    let mut shell = alice.shell()?;
    start_job(&mut shell, "make")?;
    let machine = alice.running_machine()?;
    shell.cut()?;
    let awake = wait_awake(story, &alice)?;
    says("what keeps it awake", &awake, "make (pid ")?;
    says("what keeps it awake", &awake, "% CPU")?;
    // More than its linger and every look.
    story.sleep(Duration::from_secs(4));
    same("the machine's process", alice.machine()?, Some(machine))?;
    let list = story.host().run("hermitage status")?;
    says("`status`", &list, "awake: make (pid ")?;

    let mut shell = back(&alice)?;
    shell.expect("still running: make (pid ", 60)?;
    shell.expect(") kept this machine awake", 10)?;
    alice.output("touch stop; until [ -e result ]; do sleep 0.2; done")?;
    shell.expect("$ ", 30)?;
    shell.cut()?;
    let because = wait_saved(story, &alice)?;
    says("why it sleeps", &because, "idle for 2 s")?;
    let mut shell = back(&alice)?;
    let line = shell.expect("resumed from ", 90).and_then(|_| shell.expect("\r\n", 30))?;
    ensure!(!line.contains("paused"), "nothing was at work, but {line:?}");
    same("the result", shell.run("cat result")?.trim(), "finished")
}

fn idle_and_held(story: &Story) -> Result<()> {
    let alice = story.account_with("alice", &["--linger", "2"])?;
    let mut shell = alice.shell()?;
    shell.run("sleep 1000 & tail -f /dev/null & (while sleep 50; do :; done) & true")?;
    shell.send("vim -u NONE -N file\n")?;
    shell.expect("[New]", 60)?;
    shell.cut()?;
    let because = wait_saved(story, &alice)?;
    says("why it sleeps", &because, "idle for 2 s")?;

    let hold = story.host().hermitage_json(&format!("account hold {} 1h", alice.name))?;
    same("a hold", &hold["changed"], &true.into())?;
    let mut shell = back(&alice)?;
    shell.expect("resumed from ", 90)?;
    shell.cut()?;
    says("what keeps it awake", &wait_awake(story, &alice)?, "held until ")?;
    story.sleep(Duration::from_secs(4));
    let machine = alice.running_machine()?;
    let mut shell = back(&alice)?;
    shell.expect("still running: its operator's hold kept this machine awake", 60)?;
    shell.cut()?;
    wait_awake(story, &alice)?;
    same("the machine's process", alice.machine()?, Some(machine))?;
    story.host().run(&format!("hermitage account hold {} --off", alice.name))?;
    wait_saved(story, &alice).map(drop)
}

fn limited(story: &Story) -> Result<()> {
    let alice = story.account_with("alice", &["--linger", "1", "--max-linger", "4s"])?;
    let mut shell = alice.shell()?;
    start_job(&mut shell, "crunch")?;
    shell.cut()?;
    let because = wait_saved(story, &alice)?;
    says("why it sleeps", &because, "as long as work may keep it awake; crunch (pid ")?;
    ensure!(alice.machine()?.is_none(), "a saved machine still has a process");
    goes_on(story, &alice)?.cut()?;

    // An operator who wants no exceptions.
    let limit = format!("account policy {} --max-linger 0s", alice.name);
    same("the limit", &story.host().hermitage_json(&limit)?["max_linger_seconds"], &0.into())?;
    let because = wait_saved(story, &alice)?;
    says("why it sleeps", &because, "nobody was logged in for 1 s; crunch (pid ")?;
    goes_on(story, &alice)?;
    alice.output("touch stop; until [ -e result ]; do sleep 0.2; done")?;
    same("the result", alice.output("cat result")?.as_str(), "finished")
}

/// Who comes back is told that her job was paused, and sees it count on.
fn goes_on<'a>(story: &'a Story, alice: &Account<'a>) -> Result<Terminal<'a>> {
    let mut shell = back(alice)?;
    let line = shell.expect("resumed from ", 90).and_then(|_| shell.expect("\r\n", 30))?;
    says("the login line", &line, "; crunch (pid ")?;
    says("the login line", &line, ") was paused meanwhile")?;
    // Empty for the moment in which the job writes it.
    let read = "until grep . count; do :; done";
    let count = || -> Result<u64> { alice.output(read)?.trim().parse().context("count") };
    let first = count()?;
    story.wait_for("the counter to go on", 60, || Ok((count()? > first).then_some(())))?;
    Ok(shell)
}
