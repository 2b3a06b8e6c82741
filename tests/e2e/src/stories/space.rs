//! The host's disk fills up: new machines are refused in clear words, running ones get an error they
//! understand, and nobody loses what was there.

use std::time::Duration;

use anyhow::{Context as _, Result, ensure};

use crate::{
    harness::{
        Story,
        account::Account,
        process::{Input, Running},
        same, says,
        terminal::Terminal,
    },
    runner::{Test, skip, test},
};

pub const TESTS: [Test; 4] = [
    test("full_host_disk_loses_nothing", 600, full_host_disk),
    test("writes_wait_for_room_on_the_host", 600, writes_wait),
    test("a_quota_bounds_files_until_some_are_deleted", 180, quota),
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

/// The state directory, if its file system is one that may be filled.
fn fillable(story: &Story) -> Result<String> {
    let state = story.world.options.state_dir.display().to_string();
    let mount = story.host().run(&format!("findmnt -no TARGET -T {state}"))?;
    if mount.trim_end() == "/" {
        return skip(format!("{state} is on the root file system, which is not ours to fill"));
    }
    Ok(state)
}

/// Waits until the guest says how much of its disk is for programs: none, or some.
fn wait_for_room(story: &Story, shell: &mut Terminal<'_>, some: bool) -> Result<()> {
    let mut said = String::new();
    story
        .wait_for(&format!("the guest to be told of the room (some: {some})"), 20, || {
            said = shell.run("df -k --output=avail / | tail -1")?;
            let kib: u64 = said.trim().parse().context("df in the guest")?;
            Ok((some == (kib > 0)).then_some(()))
        })
        .with_context(|| format!("df says last: {said:?}"))
}

fn full_host_disk(story: &Story) -> Result<()> {
    let state = fillable(story)?;
    let ballast = format!("{state}/e2e-ballast");
    story.afterwards(format!("rm -f {ballast}"));
    let alice = story.account("alice")?;
    let bob = story.account("bob")?;
    bob.output("echo his > note")?;
    bob.stop_machine()?;
    alice.output("echo hers > note; head -c 1M /dev/zero > place; sync")?;
    let mut shell = alice.shell()?;

    leave(story, &ballast, 100 * 1024)?;
    let refused = bob.exec("true")?;
    ensure!(refused.code() != Some(0), "bob got a machine on a full disk");
    says("what bob is told", &refused.err(), "full")?;
    shell.run("cat note").context("a machine that runs already")?;
    wait_for_room(story, &mut shell, false)?;

    // Nothing left at all: what she writes beyond it fails in her machine, as on any full disk. An error
    // of her disk would not do: ext4 shuts the whole file system down at one, under all her sessions.
    leave(story, &ballast, 1024)?;
    for who in ["", "sudo "] {
        let dd = format!("{who}dd if=/dev/zero of=big bs=1M count=300 conv=fsync");
        let (output, status) = shell.run_status(&dd, 60)?;
        ensure!(status != 0, "300 MiB fit on a full disk: {output}");
        says("dd in the guest", &output, "no space left on device")?;
    }
    shell.run("cat note").context("her session afterwards")?;
    shell
        .run("yes | dd of=place bs=1M count=1 iflag=fullblock conv=notrunc,fsync status=none")
        .context("overwriting what has its place")?;
    shell.run("sudo rm -f big && sync").context("deleting")?;

    // There is room again, and nobody has to log in anew.
    story.host().run(&format!("rm -f {ballast}"))?;
    wait_for_room(story, &mut shell, true)?;
    shell.run("head -c 20M /dev/zero > big && sync && rm big")?;
    same("his note", bob.output("cat note")?.as_str(), "his")?;
    shell.run("exit").ok();
    alice.stop_machine()?;
    in_order(story, &alice)?;
    same("her note", alice.output("cat note")?.as_str(), "hers")?;
    same("what she overwrote", alice.output("head -c 4 place")?.as_str(), "y\ny")?;
    alice.output("echo more > more; sync; cat more").map(drop)
}

/// The disk of an account without a machine, checked by the journal's replay and e2fsck on a copy.
pub(super) fn in_order(story: &Story, account: &Account<'_>) -> Result<()> {
    let copy = format!("{}/e2e-space.img", story.world.options.state_dir.display());
    let checked = story.host().try_run(&format!(
        "trap 'rm -f {copy}' EXIT
         cp --sparse=always {disk} {copy} || exit 99
         e2fsck -E journal_only -y {copy} 2>&1 || [ $? = 1 ] || exit 98
         e2fsck -fn {copy} 2>&1",
        disk = account.disk()
    ))?;
    ensure!(checked.code() == Some(0), "e2fsck: {:?} {}", checked.code(), checked.out());
    Ok(())
}

/// A guest that writes all the same (she is root in it, and the host may fill up between two looks): its
/// writes wait, and nothing of them is lost when there is room again.
fn writes_wait(story: &Story) -> Result<()> {
    const DEFY: &str = "echo 0 | sudo tee /sys/fs/ext4/vda/reserved_clusters >/dev/null";
    let state = fillable(story)?;
    let ballast = format!("{state}/e2e-ballast");
    story.afterwards(format!("rm -f {ballast}"));
    let alice = story.account_with("alice", &["--linger", "1"])?;
    let mut shell = alice.shell()?;
    shell.run("echo hers > note; sync; head -c 60M /dev/urandom > /dev/shm/bytes")?;
    leave(story, &ballast, 100 * 1024)?;
    wait_for_room(story, &mut shell, false)?;
    leave(story, &ballast, 1024)?;
    shell.run(DEFY)?;

    let copy = "cp /dev/shm/bytes big && sync big && cmp /dev/shm/bytes big && echo whole";
    let mut writer = alice.login().start(copy, Input::Nothing)?;
    waits(story, &mut writer)?;
    shell.run("dd if=note iflag=direct bs=4096 status=none | grep -q hers").context("reading")?;
    story.host().run(&format!("rm -f {ballast}"))?;
    let ended = writer.wait(story.within(60))?;
    same("what waited", ended.success()?.trim(), "whole")?;
    let sum = alice.output("sha256sum < big")?;

    // A machine whose writes wait can be ended all the same, and has what was synced.
    wait_for_room(story, &mut shell, true)?;
    leave(story, &ballast, 100 * 1024)?;
    wait_for_room(story, &mut shell, false)?;
    leave(story, &ballast, 1024)?;
    shell.run(DEFY)?;
    let mut writer =
        alice.login().start("cp /dev/shm/bytes other && sync other", Input::Nothing)?;
    waits(story, &mut writer)?;
    drop((writer, shell));
    // By an operator: who waits for the disk is at work, and keeps the machine awake.
    alice.stop_machine()?;
    story.wait_for("a machine whose writes wait to be ended", 60, || {
        Ok(alice.machine()?.is_none().then_some(()))
    })?;
    story.host().run(&format!("rm -f {ballast}"))?;
    in_order(story, &alice)?;
    same("what was synced", alice.output("sha256sum < big")?, sum)?;
    same("her note", alice.output("cat note")?.as_str(), "hers")
}

/// Sees that a command goes on waiting, for a few seconds.
fn waits(story: &Story, command: &mut Running) -> Result<()> {
    story.sleep(story.world.patient(Duration::from_secs(3)));
    let out = command.out_so_far()?;
    ensure!(out.is_empty(), "it did not wait for room: {}", String::from_utf8_lossy(&out));
    ensure!(!command.has_ended()?, "it ended instead of waiting for room");
    Ok(())
}

/// A quota far below the disk's size: the host looks what she takes, and her kernel gives no new blocks.
fn quota(story: &Story) -> Result<()> {
    const QUOTA_MIB: u64 = 64;
    let alice = story.account("alice")?;
    story.host().run(&format!("hermitage account set {} --quota {QUOTA_MIB}MiB", alice.name))?;
    let mut shell = alice.shell()?;
    shell.run("echo kept > note; sync")?;
    let fill = "for n in $(seq 40); do \
                head -c 4M /dev/urandom > big.$n && sync || break; sleep 0.3; done; echo $n";
    let told = shell.run(fill)?;
    says("the shell at the quota", &told, "no space left on device")?;
    // It is looked at now and then: a little more than allowed may be there.
    let files: u64 = shell.run("ls big.* | wc -l")?.trim().parse().context("odd count")?;
    let most = QUOTA_MIB / 4 + 4;
    ensure!((4..=most).contains(&files), "{files} files of 4 MiB fit into {QUOTA_MIB} MiB: {told}");
    same("what was there", shell.run("cat note")?.trim(), "kept")?;
    shell.run("rm big.*; sync")?;
    story.wait_for("room after deleting", 60, || {
        let (_, status) = shell.run_status("head -c 4M /dev/urandom > again && sync", 60)?;
        Ok((status == 0).then_some(()))
    })
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
