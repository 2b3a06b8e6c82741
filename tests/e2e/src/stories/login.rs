//! Who gets in, who doesn't, and what the latter can learn from it.

use anyhow::{Result, anyhow, ensure};

use crate::{
    harness::{Story, account::new_key, process::Ended, same, says, ssh::Login},
    runner::{Test, test},
};

pub const TESTS: [Test; 7] = [
    test("login_by_key", 180, by_key),
    test("login_by_password", 180, by_password),
    test("refused_wrong_password", 120, wrong_password),
    test("refused_wrong_key", 120, wrong_key),
    test("refusals_tell_nothing", 400, refusals_tell_nothing),
    test("disabled_account_is_refused", 180, disabled_is_refused),
    test("disabling_ends_the_session", 180, disabling_ends_the_session),
];

fn by_key(story: &Story) -> Result<()> {
    let alice = story.account("alice")?;
    let mut shell = alice.shell()?;
    same("who is logged in", shell.run("id -un")?.trim(), &alice.name)?;
    same("her home", shell.run("pwd")?.trim(), &format!("/home/{}", alice.name))?;
    shell.send("exit 7\n")?;
    let (status, _) = shell.wait_end(30)?;
    same("the shell's exit status", status, 7)
}

fn by_password(story: &Story) -> Result<()> {
    let alice = story.account("alice")?;
    alice.set_password("correct horse, battery")?;
    let login = Login::with_password(story, &alice.name, "correct horse, battery");
    same("who is logged in", login.exec("id -un")?.success()?.trim(), &alice.name)?;
    login.shell()?.run("true").map(drop)
}

fn wrong_password(story: &Story) -> Result<()> {
    let alice = story.account("alice")?;
    alice.set_password("the right one")?;
    refused(&Login::with_password(story, &alice.name, "not the right one").exec("true")?)?;
    refused(&Login::with_password(story, &alice.name, "").exec("true")?)?;
    ensure!(alice.machine()?.is_none(), "a refused login started a machine");
    Login::with_password(story, &alice.name, "the right one").exec("true")?.success().map(drop)
}

fn wrong_key(story: &Story) -> Result<()> {
    let alice = story.account("alice")?;
    let bob = story.account("bob")?;
    refused(&Login::with_key(story, &alice.name, &bob.key).exec("true")?)?;
    refused(&Login::with_key(story, &alice.name, &new_key(story, "nobody")?.0).exec("true")?)?;
    ensure!(alice.machine()?.is_none(), "a refused login started a machine");
    Ok(())
}

/// A stranger can't tell an account that exists from one that doesn't, is disabled or has no password:
/// same words, same methods, and about the same time. Only who has its password is told that it is disabled.
fn refusals_tell_nothing(story: &Story) -> Result<()> {
    let alice = story.account("alice")?;
    alice.set_password("the right one")?;
    let keys_only = story.account("keys")?;
    let disabled = story.account("gone")?;
    disabled.set_password("the right one")?;
    disabled.disable()?;
    let nobody = story.unique("nobody");
    let attempts = [
        ("a wrong password", alice.name.as_str(), "not the right one"),
        ("no such account", nobody.as_str(), "not the right one"),
        ("no password set", keys_only.name.as_str(), "not the right one"),
        ("a disabled account", disabled.name.as_str(), "not the right one"),
    ];
    let mut words: Option<String> = None;
    // Fastest of each, in turns, so that a busy moment of the host hits all of them; and what is only
    // noise is not there twice.
    let mut verdict = Ok(());
    for _ in 0..2 {
        let mut times = attempts.map(|(what, ..)| (what, f64::MAX));
        for _ in 0..3 {
            for ((what, name, password), time) in attempts.iter().zip(&mut times) {
                let ended = Login::with_password(story, name, password).exec("true")?;
                refused(&ended)?;
                time.1 = time.1.min(ended.seconds);
                let said = ended.err().replace(name, "NAME");
                match &words {
                    None => words = Some(said),
                    Some(words) => same(what, said.as_str(), words)?,
                }
            }
        }
        let slowest = times.iter().map(|t| t.1).fold(0.0, f64::max);
        let fastest = times.iter().map(|t| t.1).fold(f64::MAX, f64::min);
        verdict = if slowest < fastest * 1.5 + 0.1 {
            return Ok(());
        } else {
            Err(anyhow!("the time tells who exists: {times:?}"))
        };
    }
    verdict
}

fn disabled_is_refused(story: &Story) -> Result<()> {
    let alice = story.account("alice")?;
    alice.set_password("the right one")?;
    alice.output("echo kept > file")?;
    alice.disable()?;
    let by_key = alice.exec("true")?;
    let by_password = Login::with_password(story, &alice.name, "the right one").exec("true")?;
    for ended in [&by_key, &by_password] {
        same("its exit status", ended.code(), Some(255))?;
        says("what alice is told", &ended.err(), "this account is disabled")?;
    }
    alice.enable()?;
    same("her file", alice.output("cat file")?.as_str(), "kept")
}

fn disabling_ends_the_session(story: &Story) -> Result<()> {
    let alice = story.account("alice")?;
    let bob = story.account("bob")?;
    let mut shell = alice.shell()?;
    let mut other = bob.shell()?;
    alice.disable()?;
    let (_, shown) = shell.wait_end(60)?;
    says("what alice is told", &shown, "disabled")?;
    other.run("true")?;
    story
        .wait_for("alice's machine to be gone", 60, || Ok(alice.machine()?.is_none().then_some(())))
}

fn refused(ended: &Ended) -> Result<()> {
    same("exit status of a refused login", ended.code(), Some(255))?;
    says("a refused login", &ended.err(), "permission denied")?;
    ensure!(ended.stdout.is_empty(), "a refused login printed {:?}", ended.out());
    Ok(())
}
