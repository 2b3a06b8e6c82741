//! Keys that may do less than their account.

use std::process::Command;

use anyhow::{Context as _, Result};

use crate::{
    harness::{
        Story,
        account::{Account, new_key},
        host::quote,
        process::{self, Ended, Input},
        same, says,
        ssh::Login,
    },
    runner::{Test, test},
};

pub const TESTS: [Test; 1] = [test("a_key_does_what_its_options_say", 240, bound)];

/// A login by a new key of the account that has these options.
fn bind<'a>(
    story: &'a Story,
    alice: &'a Account<'a>,
    hint: &str,
    options: &str,
) -> Result<Login<'a>> {
    let (key, line) = new_key(story, hint)?;
    story.host().run(&format!(
        "printf '%s\\n' {} | hermitage account key add {} - --options {}",
        quote(&line),
        alice.name,
        quote(options)
    ))?;
    Ok(Login::with_key(story, &alice.name, &key))
}

fn run(story: &Story, what: &str, command: Command) -> Result<Ended> {
    process::run(what, command, Input::Nothing, story.within(60))
}

fn bound(story: &Story) -> Result<()> {
    let alice = story.account("alice")?;
    let forced = "restrict,command=\"echo as $(whoami): ${SSH_ORIGINAL_COMMAND-a shell}; exit 3\"";
    let backup = bind(story, &alice, "backup", forced)?;
    let ran = backup.exec("rm -rf /")?;
    same("what ran", ran.out(), format!("as {}: rm -rf /\n", alice.name))?;
    same("its exit status", ran.code(), Some(3))?;
    let mut subsystem = backup.ssh(&["-s"])?;
    subsystem.arg("sftp");
    let ran = run(story, "ssh -s sftp", subsystem)?;
    says("what ran in place of sftp", &ran.out(), "sftp-server")?;
    let mut forward = backup.option("-oLogLevel=INFO").client("ssh")?;
    forward.args(["-W", "localhost:22"]).arg(alice.login().destination());
    let refused = run(story, "ssh -W", forward)?;
    says("a forward", &refused.err(), "administratively prohibited")?;

    let files = bind(story, &alice, "files", "restrict,command=\"internal-sftp\"")?;
    alice.output("echo hers > note; sync").context("by her own key")?;
    let fetched = story.path("note");
    let mut scp = files.client("scp")?;
    scp.arg("-q").arg(format!("{}:note", files.destination())).arg(&fetched);
    run(story, "scp", scp)?.success()?;
    same("the file", std::fs::read_to_string(fetched)?, "hers\n".into())?;

    let elsewhere = bind(story, &alice, "elsewhere", "from=\"192.0.2.0/24\"")?;
    same("from elsewhere", elsewhere.exec("true")?.code(), Some(255))
}
