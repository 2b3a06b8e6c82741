//! The host's disk fills up: new machines are refused in clear words, running ones get an error they
//! understand, and nobody loses what was there.

use anyhow::{Context as _, Result, ensure};

use crate::{
    harness::{Story, same, says},
    runner::{Test, skip, test},
};

pub const TESTS: [Test; 2] = [
    test("full_host_disk_loses_nothing", 600, full_host_disk),
    test("full_account_disk_is_hers_alone", 600, full_account_disk),
];

/// Leaves so many KiB of the state directory's file system.
fn leave(story: &Story, ballast: &str, kib: u64) -> Result<()> {
    story
        .host()
        .run(&format!(
            "have=$(df -k --output=avail {state} | tail -1)
             size=$(stat -c %s {ballast} 2>/dev/null || echo 0)
             fallocate -l $(( size + (have - {kib}) * 1024 )) {ballast}",
            state = story.world.options.state_dir.display()
        ))
        .map(drop)
}

fn full_host_disk(story: &Story) -> Result<()> {
    if std::env::var_os("HERMITAGE_E2E_KNOWN_DEFECTS").is_none() {
        return skip(
            "known defect: a write without room is an i/o error to the guest, which shuts its file \
             system down instead of saying ENOSPC (set HERMITAGE_E2E_KNOWN_DEFECTS to see it fail)",
        );
    }
    let state = story.world.options.state_dir.display().to_string();
    let kind = story
        .host()
        .run(&format!("findmnt -no SOURCE,TARGET -T {state}; df -k {state} | tail -1"))?;
    if kind.lines().next().is_some_and(|line| line.trim_end().ends_with(" /")) {
        return skip(format!("{state} is on the root file system, which is not ours to fill"));
    }
    let ballast = format!("{state}/e2e-ballast");
    story.afterwards(format!("rm -f {ballast}"));
    let alice = story.account("alice")?;
    let bob = story.account("bob")?;
    bob.output("echo his > note")?;
    bob.stop_machine()?;
    alice.output("echo hers > note; sync")?;
    let mut shell = alice.shell()?;

    leave(story, &ballast, 100 * 1024)?;
    let refused = bob.exec("true")?;
    ensure!(refused.code() != Some(0), "bob got a machine on a full disk");
    says("what bob is told", &refused.err(), "full")?;
    shell.run("cat note").context("a machine that runs already")?;

    // Nothing left at all: what she writes beyond it fails in her machine, as on any full disk. An error
    // of her disk would not do: ext4 shuts the whole file system down at one, under all her sessions.
    leave(story, &ballast, 1024)?;
    let (output, status) =
        shell.run_status("dd if=/dev/zero of=big bs=1M count=300 conv=fsync", 200)?;
    ensure!(status != 0, "300 MiB fit on a full disk: {output}");
    says("dd in the guest", &output, "no space left on device")?;
    shell.run("cat note").context("her session afterwards")?;

    story.host().run(&format!("rm -f {ballast}"))?;
    same("his note", bob.output("cat note")?.as_str(), "his")?;
    alice.stop_machine()?;
    same("her note", alice.output("cat note")?.as_str(), "hers")?;
    alice.output("rm -f big; echo more > more; sync; cat more").map(drop)
}

/// Her own limit: she is told, and can make room again.
fn full_account_disk(story: &Story) -> Result<()> {
    let alice = story.account_with("alice", &["--disk", "512M"])?;
    let bob = story.account("bob")?;
    let mut shell = alice.shell()?;
    let (output, status) =
        shell.run_status("dd if=/dev/zero of=big bs=1M count=600 conv=fsync", 300)?;
    ensure!(status != 0, "600 MiB fit into 512: {output}");
    says("dd in the guest", &output, "no space left on device")?;
    bob.output("head -c 20M /dev/zero > big; sync").context("bob, meanwhile")?;
    shell.run("rm big && echo room > note && sync && cat note")?;
    let disk = alice.disk();
    // What she deletes is given back to the host, at the latest when her machine stops.
    alice.stop_machine()?;
    let kib: u64 = story.host().run(&format!("du -k {disk} | cut -f1"))?.trim().parse()?;
    ensure!(kib < 600 * 1024, "a disk of 512 MiB takes {kib} KiB");
    same("her note", alice.output("cat note")?.as_str(), "room")
}
