//! Files in and out: scp, sftp, rsync and plain tar through exec.

use std::{
    fs::{self, File},
    process::Command,
};

use anyhow::{Context as _, Result, ensure};

use super::session::make_random;
use crate::{
    harness::{
        Story,
        process::{self, Input},
        same, says,
    },
    runner::{Test, skip, test},
};

pub const TESTS: [Test; 5] = [
    test("scp_there_and_back", 300, scp),
    test("scp_of_the_old_protocol", 300, scp_legacy),
    test("sftp_session", 300, sftp),
    test("small_files_bother_the_machine_little", 300, small_files),
    test("rsync_there_and_back", 300, rsync),
];

fn scp(story: &Story) -> Result<()> {
    scp_with(story, &[])
}

fn scp_legacy(story: &Story) -> Result<()> {
    scp_with(story, &["-O"])
}

fn scp_with(story: &Story, flags: &[&str]) -> Result<()> {
    let alice = story.account("alice")?;
    let (there, back) = (story.path("there"), story.path("back"));
    make_random(story, 3 << 20, &there)?;
    // With the old protocol the far shell splits names.
    let name = if flags.is_empty() { "copy of it" } else { "copy" };
    let remote = format!("{}:{name}", alice.login().destination());
    let mut up = alice.login().client("scp")?;
    up.args(flags).arg(&there).arg(&remote);
    process::run("scp up", up, Input::Nothing, story.within(120))?.success()?;
    let mut down = alice.login().client("scp")?;
    down.args(flags).arg(&remote).arg(&back);
    process::run("scp down", down, Input::Nothing, story.within(120))?.success()?;
    same(
        "the file that came back",
        process::hash(&mut File::open(&back)?)?,
        process::hash(&mut File::open(&there)?)?,
    )
}

fn sftp(story: &Story) -> Result<()> {
    let alice = story.account("alice")?;
    let (there, back) = (story.path("there"), story.path("back"));
    fs::write(&there, "by sftp\n")?;
    let mut command = alice.login().client("sftp")?;
    command.args(["-b", "-"]).arg(alice.login().destination());
    let batch = format!(
        "mkdir box\nput {} box/one\nrename box/one box/two\nchmod 600 box/two\nls -l box\nget box/two {}\n",
        there.display(),
        back.display()
    );
    let listing =
        process::run("sftp", command, Input::Bytes(batch.into_bytes()), story.within(120))?
            .success()?;
    says("sftp's listing", &listing, "-rw-------")?;
    same("the file that came back", fs::read_to_string(&back)?.as_str(), "by sftp\n")?;
    let owner = alice.output("stat -c '%U %a' box/two")?;
    same("owner and mode in her home", owner, format!("{} 600", alice.name))
}

/// Each request of sftp is a packet into the machine and one out of it. That it is slow if these cost more accesses to
/// devices than the one that tells of the answer, only their number shows.
fn small_files(story: &Story) -> Result<()> {
    const FILES: u64 = 50;
    // Open, write, close and what else a client asks for a file; one access each, and a few by the way.
    const MOST: u64 = 6 * FILES;
    let alice = story.account("alice")?;
    alice.output("mkdir box")?;
    let pid = alice.running_machine()?;
    let accesses = || -> Result<Option<u64>> {
        let script = format!("cat /sys/kernel/debug/kvm/{pid}-*/mmio_exits || true");
        Ok(story.host().run(&script)?.trim().parse().ok())
    };
    let Some(before) = accesses()? else { return skip("KVM's counters can't be read there") };
    let there = story.path("there");
    fs::write(&there, [b'.'; 1024])?;
    let put = |n| format!("put {} box/{n}\n", there.display());
    let batch: String = (0..FILES).map(put).collect();
    let mut command = alice.login().client("sftp")?;
    command.args(["-b", "-"]).arg(alice.login().destination());
    process::run("sftp", command, Input::Bytes(batch.into_bytes()), story.within(120))?
        .success()?;
    let cost = accesses()?.context("the machine is gone")? - before;
    same("files that arrived", alice.output("ls box | wc -l")?, FILES.to_string())?;
    ensure!(cost <= MOST, "{FILES} small files were {cost} accesses to devices");
    ensure!(cost >= FILES, "{FILES} small files can't be only {cost} accesses to devices");
    Ok(())
}

fn rsync(story: &Story) -> Result<()> {
    if Command::new("rsync").arg("--version").output().is_err() {
        return skip("there is no rsync on this machine");
    }
    let alice = story.account("alice")?;
    let (there, back) = (story.path("there"), story.path("back"));
    fs::create_dir(&there)?;
    for n in 0..story.world.options.files {
        fs::write(there.join(format!("file {n}")), format!("content {n}\n").repeat(n % 40))?;
    }
    let client = alice.login().client("ssh")?;
    let mut shell = vec!["ssh".to_owned()];
    shell.extend(client.get_args().map(|a| a.to_string_lossy().into_owned()));
    let shell = shell.join(" ");
    let remote = format!("{}:tree/", alice.login().destination());
    for (what, from, to) in [
        ("rsync up", format!("{}/", there.display()), remote.clone()),
        ("rsync down", remote.clone(), format!("{}/", back.display())),
    ] {
        let mut command = Command::new("rsync");
        command.args(["-a", "--delete", "-e", &shell, &from, &to]);
        process::run(what, command, Input::Nothing, story.within(120))?.success()?;
    }
    let mut diff = Command::new("diff");
    diff.arg("-r").arg(&there).arg(&back);
    process::run("diff", diff, Input::Nothing, story.within(30))?
        .success()
        .context("after rsync")
        .map(drop)
}
