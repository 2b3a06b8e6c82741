//! Terminals outlive links: the link drops, the shell stays, and who comes back finds it as it was.

use std::time::Duration;

use anyhow::{Result, ensure};

use crate::{
    harness::{Story, account::Account, same, says, ssh::Login, terminal::Terminal},
    runner::{Test, test},
};

pub const TESTS: [Test; 4] = [
    test("a_cut_link_leaves_the_shell", 240, cut_link),
    test("an_editor_is_there_after_a_cut_link", 240, editor),
    test("new_is_a_terminal_beside_the_others", 300, beside),
    test("a_cut_link_hangs_up_a_command", 240, hang_up),
];

/// The login that takes up a terminal: no prompt is waited for, the screen is what comes.
fn back<'a>(alice: &Account<'a>, columns: u16, rows: u16) -> Result<Terminal<'a>> {
    alice.login().terminal(None, columns, rows)
}

fn plus<'a>(story: &'a Story, alice: &Account<'a>, word: &str) -> Login<'a> {
    Login::with_key(story, &format!("{}+{word}", alice.name), &alice.key)
}

/// Waits until the service has noticed that a link is gone.
fn cut(story: &Story, alice: &Account, shell: Terminal) -> Result<()> {
    shell.cut()?;
    story.wait_for("the session to end", 30, || {
        let sessions = story.host().run(&format!("hermitage account show {}", alice.name))?;
        Ok(sessions.contains("the client went away").then_some(()))
    })
}

fn cut_link(story: &Story) -> Result<()> {
    let alice = story.account("alice")?;
    let mut shell = alice.shell()?;
    let pid = shell.run("kept='a word'; cd /tmp; echo $$")?;
    shell.run("printf '\\033[35mcolour\\033[m\\n'")?;
    // What it prints while nobody is there is on the screen as well.
    shell.send("(sleep 3; echo be''hind) &\n")?;
    shell.expect("[1]", 30)?;
    cut(story, &alice, shell)?;
    story.sleep(Duration::from_secs(4));

    let mut shell = back(&alice, 100, 30)?;
    let screen = shell.expect("behind", 60)?;
    says("the redrawn screen", &screen, "\x1b[35mcolour")?;
    says("the redrawn screen", &screen, "kept='a word'")?;
    same("the shell's process", shell.run("echo $$")?, pid)?;
    same("its variable and folder", shell.run("echo $kept $PWD")?.trim(), "a word /tmp")?;
    same("the window", shell.run("stty size")?.trim(), "30 100")?;
    // `exit` ends it; then there is nothing to come back to.
    shell.send("exit\n")?;
    same("exit status", shell.wait_end(30)?.0, 0)?;
    let mut shell = alice.shell()?;
    same("the next one", shell.run("echo -$kept-")?.trim(), "--")
}

fn editor(story: &Story) -> Result<()> {
    let alice = story.account("alice")?;
    let mut shell = alice.shell()?;
    shell.run("echo before the editor; printf 'one\\ntwo\\n' > file")?;
    shell.send("vim -u NONE -N file\n")?;
    shell.expect("two", 60)?;
    shell.send("Gothree typed")?;
    shell.expect("typed", 30)?;
    cut(story, &alice, shell)?;

    let mut shell = back(&alice, 80, 24)?;
    let screen = shell.expect("three typed", 60)?;
    says("the redraw", &screen, "\x1b[?1049h")?;
    says("the screen behind the editor", &screen, "before the editor")?;
    // It is in the middle of an insertion, and undo knows of it.
    shell.send(" and more\x1b:w\r")?;
    shell.expect("written", 30)?;
    same("the file", alice.output("cat file")?.as_str(), "one\ntwo\nthree typed and more")?;
    shell.send("u:wq\r")?;
    shell.expect("$ ", 30)?;
    same("after undo", alice.output("cat file")?.as_str(), "one\ntwo")?;
    shell.run("true").map(drop)
}

fn beside(story: &Story) -> Result<()> {
    let alice = story.account("alice")?;
    let mut first = alice.shell()?;
    first.run("n=first")?;
    cut(story, &alice, first)?;
    let mut new = plus(story, &alice, "new").shell()?;
    same("another shell", new.run("echo -$n-")?.trim(), "--")?;
    new.run("n=second")?;
    let mut first = back(&alice, 80, 24)?;
    first.expect("n=first", 60)?;
    same("the one that was left", first.run("echo $n")?.trim(), "first")?;
    same("the one beside it", new.run("echo $n")?.trim(), "second")?;
    // Both are attached now: nobody gets them.
    let mut third = alice.shell()?;
    same("a third", third.run("echo -$n-")?.trim(), "--")?;

    let refused = plus(story, &alice, "nwe").exec("true")?;
    says("a word nobody knows", &refused.err(), "+new opens another terminal")?;
    ensure!(refused.code() == Some(255), "it ended with {:?}", refused.code());
    Ok(())
}

/// A command on a terminal is told that its client is gone, as with any sshd.
fn hang_up(story: &Story) -> Result<()> {
    let alice = story.account("alice")?;
    let script =
        "trap 'echo hung up > trace; exit' HUP; echo set\"\"tled; while :; do sleep 0.2; done";
    let mut terminal = alice.login().terminal(Some(script), 80, 24)?;
    terminal.expect("settled", 90)?;
    terminal.cut()?;
    story.wait_for("the command to be hung up", 60, || {
        let ended = alice.exec("cat trace 2>/dev/null")?;
        Ok((ended.out().trim() == "hung up").then_some(()))
    })
}
