//! Whose machine it is, whose files, and that no two machines share a secret.

use std::collections::BTreeSet;

use anyhow::{Context as _, Result, ensure};

use crate::{
    harness::{Story, account::Account, process::Input, same},
    runner::{Test, test},
};

pub const TESTS: [Test; 7] = [
    test("files_persist_across_logins", 180, files_persist),
    test("files_persist_after_the_machine_stopped", 300, files_outlive_the_machine),
    test("bob_does_not_see_alices_files", 240, bob_sees_nothing),
    test("two_forks_share_no_secret", 300, forks_differ),
    test("two_forks_of_one_instant_share_no_secret", 300, twins_differ),
    test("sudo_without_a_password", 180, sudo),
    test("df_and_free_tell_the_truth", 240, df_and_free),
];

fn files_persist(story: &Story) -> Result<()> {
    let alice = story.account("alice")?;
    alice.output("echo mine > note")?;
    same("her note, one login later", alice.output("cat note")?.as_str(), "mine")?;
    let mut shell = alice.shell()?;
    same("her note, on a terminal", shell.run("cat note")?.trim(), "mine")
}

fn files_outlive_the_machine(story: &Story) -> Result<()> {
    let alice = story.account_with("alice", &["--policy", "discard"])?;
    alice.output("echo mine > note; echo '* hers' | sudo tee /etc/motd.hers >/dev/null")?;
    let first = alice.output("cat /proc/sys/kernel/random/boot_id")?;
    alice.stop_machine()?;
    same("her note", alice.output("cat note")?.as_str(), "mine")?;
    same("her file in /etc", alice.output("cat /etc/motd.hers")?.as_str(), "* hers")?;
    let second = alice.output("cat /proc/sys/kernel/random/boot_id")?;
    ensure!(first != second, "the machine did not stop: boot_id is still {first}");
    Ok(())
}

fn bob_sees_nothing(story: &Story) -> Result<()> {
    let alice = story.account("alice")?;
    let bob = story.account("bob")?;
    let secret = story.unique("secret");
    alice
        .output(&format!("echo {secret} > secret; sudo sh -c 'echo {secret} > /root/{secret}'"))?;
    // As root in his own machine, in every place that could be shared.
    let found = bob.output(&format!(
        "sudo find / -xdev -name '*{secret}*' -print; ls /home; \
         sudo grep -rls {secret} /home /root /tmp /var/tmp /etc /run 2>/dev/null; true"
    ))?;
    same("what bob finds", found.as_str(), &bob.name)?;
    // Nor any block device with it: his is his own.
    let devices = bob.output("ls /sys/block | grep -v -e '^loop' -e '^pmem'")?;
    same("disks of bob's machine beside the base", devices.as_str(), "vda")
}

/// What must differ between any two machines.
const SECRETS: &str = "hostname; cat /etc/machine-id /proc/sys/kernel/random/boot_id; \
    head -c 16 /dev/urandom | od -An -tx1; cat /proc/sys/kernel/random/uuid; \
    python3 -c 'import os; print(os.getrandom(16).hex())'; \
    python3 -c 'import random; print(random.getrandbits(64))'; \
    bash -c 'echo $$ $RANDOM $RANDOM $RANDOM'; mktemp -u; \
    sudo od -An -tx1 -N16 /dev/random";

fn forks_differ(story: &Story) -> Result<()> {
    let alice = story.account_with("alice", &["--policy", "discard"])?;
    let bob = story.account("bob")?;
    let first = secrets(&alice.output(SECRETS)?)?;
    let other = secrets(&bob.output(SECRETS)?)?;
    disjoint("alice's and bob's machine", &first, &other)?;
    // Her own next machine keeps name and id, as a person's machine does, and nothing else.
    let identity = alice.output("hostname; cat /etc/machine-id")?;
    alice.stop_machine()?;
    let again = secrets(&alice.output(SECRETS)?)?;
    same(
        "her machine's identity",
        alice.output("hostname; cat /etc/machine-id")?,
        identity.clone(),
    )?;
    let strip = |all: &BTreeSet<String>| -> BTreeSet<String> {
        all.iter().filter(|s| !identity.contains(s.as_str())).cloned().collect()
    };
    disjoint("alice's two machines", &strip(&first), &strip(&again))?;
    same("lines that stay", first.intersection(&again).count(), 2)
}

fn twins_differ(story: &Story) -> Result<()> {
    let accounts: Vec<Account<'_>> =
        (0..4).map(|_| story.account("twin")).collect::<Result<_>>()?;
    let running = accounts
        .iter()
        .map(|account| account.login().start(SECRETS, Input::Nothing))
        .collect::<Result<Vec<_>>>()?;
    let mut seen: Vec<BTreeSet<String>> = Vec::new();
    for machine in running {
        let mine = secrets(&machine.wait(story.within(180))?.success()?)?;
        for other in &seen {
            disjoint("two machines of one instant", &mine, other)?;
        }
        seen.push(mine);
    }
    Ok(())
}

fn secrets(text: &str) -> Result<BTreeSet<String>> {
    let lines: BTreeSet<String> = text.lines().map(|line| line.trim().to_owned()).collect();
    // One line each, or the comparison would compare nothing.
    ensure!(lines.len() == 10, "wanted 10 different lines, got {text:?}");
    Ok(lines)
}

fn disjoint(what: &str, a: &BTreeSet<String>, b: &BTreeSet<String>) -> Result<()> {
    let common: Vec<_> = a.intersection(b).collect();
    ensure!(common.is_empty(), "{what} have in common: {common:?}");
    Ok(())
}

fn sudo(story: &Story) -> Result<()> {
    let alice = story.account("alice")?;
    same("her uid as root", alice.output("sudo -n id -u")?.as_str(), "0")?;
    let mut shell = alice.shell()?;
    same("on a terminal", shell.run("sudo whoami")?.trim(), "root")?;
    let uid: u32 = alice.output("id -u")?.parse().context("odd uid")?;
    ensure!((1000..60000).contains(&uid), "alice's uid is {uid}");
    same("a process's owner", alice.output("stat -L -c %U /proc/self")?.as_str(), &alice.name)
}

fn df_and_free(story: &Story) -> Result<()> {
    let alice = story.account("alice")?;
    let disk = alice.disk();
    let host: u64 = story.host().run(&format!("stat -c %s {disk}"))?.trim().parse()?;
    let size: u64 = alice.output("df -B1 --output=size / | tail -1")?.trim().parse()?;
    // ext4's tables take their share.
    ensure!(size <= host && size > host / 10 * 9, "df shows {size} bytes of a disk of {host}");
    let home: u64 = alice.output("df -B1 --output=size ~ | tail -1")?.trim().parse()?;
    same("size of / and of her home", home, size)?;
    let before: u64 = alice.output("df -B1 --output=avail / | tail -1")?.trim().parse()?;
    alice.output("head -c 40M /dev/urandom > big; sync")?;
    let after: u64 = alice.output("df -B1 --output=avail / | tail -1")?.trim().parse()?;
    let taken = before.saturating_sub(after) >> 20;
    ensure!((39..60).contains(&taken), "40 MiB took {taken} MiB of what df shows as free");

    let memory = base_memory(story)?;
    let total: u64 = alice.output("free -b | awk '/^Mem:/ {print $2}'")?.parse()?;
    ensure!(
        total <= memory && total > memory / 100 * 80,
        "free shows {total} bytes of the base's {memory}"
    );
    let available: u64 = alice.output("free -b | awk '/^Mem:/ {print $7}'")?.parse()?;
    ensure!(
        available > total / 2,
        "an idle machine has only {available} of {total} bytes available"
    );
    // A process that takes memory is seen, and its end gives it back.
    let script = "python3 -c 'a = bytearray(100 << 20); import subprocess; \
        print(subprocess.check_output([\"free\", \"-b\"], text=True).splitlines()[1].split()[6])'";
    let taken = available.saturating_sub(alice.output(script)?.parse::<u64>()?) >> 20;
    ensure!((70..200).contains(&taken), "100 MiB in use show as {taken} MiB less available");
    Ok(())
}

/// Bytes of memory that new machines have.
fn base_memory(story: &Story) -> Result<u64> {
    let list = story.host().hermitage_json("base list")?;
    list["bases"]
        .as_array()
        .and_then(|bases| bases.iter().find(|base| base["current"] == true))
        .and_then(|base| base["memory_bytes"].as_u64())
        .with_context(|| format!("`base list` tells no memory of the current base: {list}"))
}
