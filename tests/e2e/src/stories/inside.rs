//! What a user asks her host from inside of her machine: `hermitage status` in her shell.

use anyhow::{Result, ensure};

use crate::{
    harness::{Story, account::Account, process::Ended, same, says},
    runner::{Test, test},
};

pub const TESTS: [Test; 2] = [
    test("a_shell_asks_its_host", 300, asks),
    test("a_question_that_slept_is_asked_again", 420, slept),
];

fn refused(what: &str, ended: &Ended, words: &str) -> Result<()> {
    same(what, ended.code(), Some(1))?;
    same(what, ended.out().as_str(), "")?;
    says(what, &ended.err(), words)
}

fn asks(story: &Story) -> Result<()> {
    let alice = story.account("alice")?;
    let bob = story.account("bob")?;
    let name = &alice.name;
    let help = alice.output("hermitage --help")?;
    says("help", &help, "hermitage hold [TIME|off]")?;
    says("help", &help, &format!("ssh {name}+help@"))?;
    // Each is told of her own.
    for account in [&alice, &bob] {
        let status = account.output("hermitage status")?;
        says("status", &status, &format!("account    {}\n", account.name))?;
        says("status", &status, "machine    running since ")?;
    }
    let held = alice.output("hermitage hold 1h")?;
    says("the hold", &held, "held awake until ")?;
    let over_ssh = alice.login_as(&format!("{name}+hold")).exec("")?.success()?;
    same("the same over ssh", over_ssh.trim_end(), held.as_str())?;
    same("its end", alice.output("hermitage hold off")?.as_str(), "The hold is taken back.")?;
    let over_ssh = format!("ssh {name}+reset@");
    refused("reset", &alice.exec("hermitage reset yes")?, &over_ssh)?;
    refused("no word", &alice.exec("hermitage nonsense")?, "\"hermitage help\" lists")?;

    // Whose the socket is, who may use it, and that nothing that runs in the machine has it open.
    let socket = "/run/hermitage.socket";
    same("its mode", alice.output(&format!("stat -c '%a %U' {socket}"))?, format!("600 {name}"))?;
    says("as root", &alice.output("sudo hermitage status")?, "machine    running")?;
    let other = alice.exec("sudo -u nobody hermitage status")?;
    same("another user's status", other.code(), Some(255))?;
    says("another user", &other.err(), "only the account's own user")?;
    let holders = alice.output(
        "sudo sh -c 'inode=$(awk \"/hermitage.socket/ {print \\$7; exit}\" /proc/net/unix)
         for fd in /proc/[0-9]*/fd/*; do
             [ \"$(readlink $fd)\" = \"socket:[$inode]\" ] && echo $fd
         done; true'",
    )?;
    let own = holders.lines().count() == 1 && holders.starts_with("/proc/1/");
    ensure!(own, "who has the listening socket: {holders:?}");

    flood(&alice)?;
    // Neither the other account nor what she asks over ssh is held up by it.
    bob.output("hermitage keys")?;
    alice.login_as(&format!("{name}+status")).exec("")?.success()?;
    Ok(())
}

/// More questions than an account may ask: some are refused in words, all are answered.
fn flood(alice: &Account<'_>) -> Result<()> {
    let script = "for i in $(seq 30); do hermitage keys >/dev/null 2>why; s=$?; \
                  [ $s = 1 ] && grep -q 'too many questions at once' why; echo $s-$?; done | sort | uniq -c";
    let counted = alice.output(script)?;
    let kinds: Vec<_> = counted.lines().filter_map(|line| line.split_whitespace().nth(1)).collect();
    ensure!(kinds.contains(&"1-0"), "none of 30 was refused: {counted}");
    ensure!(kinds.iter().all(|kind| ["0-1", "1-0"].contains(kind)), "{counted}");
    Ok(())
}

/// A checkpoint that is asked for from inside has the question in its memory: who goes back to it is told that it was
/// asked in another life.
fn slept(story: &Story) -> Result<()> {
    let alice = story.account("alice")?;
    let mut shell = alice.login().terminal(None, 80, 24)?;
    shell.run("hermitage checkpoint clean > out 2>&1; echo $? >> out")?;
    let taken = "clean has your files and memory as they are now.\n0";
    same("the answer", alice.output("cat out")?.as_str(), taken)?;
    let back = format!("hermitage checkpoint restore {} clean --stop", alice.name);
    says("what the operator is told", &story.host().run(&back)?, "resumes it")?;
    shell.wait_end(60)?;
    let shell = alice.login().terminal(None, 80, 24)?;
    let said = story.wait_for("an end of the question", 90, || {
        let said = alice.output("cat out")?;
        Ok((said.lines().count() == 2).then_some(said))
    })?;
    same(
        "the answer",
        said.as_str(),
        "hermitage: that was asked before the machine slept; ask again\n255",
    )?;
    // The same listening socket answers in the resumed machine.
    says("asked again", &alice.output("hermitage checkpoint")?, "clean ")?;
    shell.cut()
}
