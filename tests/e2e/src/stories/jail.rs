//! What a machine's process holds and where it lives, seen by the host's root. What it can't do there is
//! tried from inside by `hermitage-vmm check-sandbox`.

use std::collections::{BTreeMap, BTreeSet};

use anyhow::{Context as _, Result, ensure};

use crate::{
    harness::{Story, account::Account, same, says},
    runner::{Test, test},
};

pub const TESTS: [Test; 2] = [
    test("a_machine_is_in_its_jail", 240, in_its_jail),
    test("the_jail_bars_what_it_must", 120, bars),
];

fn bars(story: &Story) -> Result<()> {
    for means in ["", "--by-filter"] {
        let said = story.host().run(&format!("hermitage-vmm check-sandbox {means}"))?;
        for line in ["barred   kill another machine", "works    a thread"] {
            says("check-sandbox", &said, line)?;
        }
    }
    Ok(())
}

fn in_its_jail(story: &Story) -> Result<()> {
    let alice = story.account("alice")?;
    let bob = story.account("bob")?;
    let (mut hers, mut his) = (alice.shell()?, bob.shell()?);
    // Everything a machine opens in its life: disk, terminals, streams.
    alice.output("echo hers > note; sync")?;
    let (machine, other) = (alice.running_machine()?, bob.running_machine()?);

    let status = fields(&story.host().run(&format!("cat /proc/{machine}/status"))?);
    let is = |field: &str, wanted: &str| {
        let found = status.get(field).with_context(|| format!("no {field} in its status"))?;
        same(field, found.as_str(), wanted)
    };
    for id in ["Uid", "Gid"] {
        is(id, "65534 65534 65534 65534")?;
    }
    is("Groups", "")?;
    for set in ["CapInh", "CapPrm", "CapEff", "CapAmb"] {
        is(set, "0000000000000000")?;
    }
    is("NoNewPrivs", "1")?;
    // By filter (proc(5)): the three of the fork server, and on older kernels one of its own.
    is("Seccomp", "2")?;
    let filters: u32 = status.get("Seccomp_filters").context("no filters")?.parse()?;
    ensure!(filters >= 3, "{filters} filters of system calls");

    let outside = story.host().run(&format!(
        "ls -A /proc/{machine}/root/
         awk '$5 == \"/\" {{ print $6 }}' /proc/{machine}/mountinfo | cut -d, -f1
         for ns in net mnt ipc uts; do
           [ $(readlink /proc/{machine}/ns/$ns) != $(readlink /proc/1/ns/$ns) ] || echo shares $ns
         done"
    ))?;
    same("its root, how it is mounted, and namespaces it shares", outside.trim(), "ro")?;

    let mine = descriptors(story, machine)?;
    expected_only(&alice, &mine)?;
    let theirs = descriptors(story, other)?;
    expected_only(&bob, &theirs)?;
    let sockets = |all: &[String]| -> BTreeSet<String> {
        all.iter().filter(|link| link.starts_with("socket:")).cloned().collect()
    };
    let shared: Vec<_> = sockets(&mine).intersection(&sockets(&theirs)).cloned().collect();
    ensure!(shared.is_empty(), "two machines share {shared:?}");
    let server = story.host().run(&format!("grep PPid /proc/{machine}/status | cut -f2"))?;
    let server = descriptors(story, server.trim().parse().context("odd process id")?)?;
    let shared: Vec<_> = sockets(&mine).intersection(&sockets(&server)).cloned().collect();
    ensure!(shared.is_empty(), "a machine and its fork server share {shared:?}");
    hers.run("true")?;
    his.run("true").map(drop)
}

/// `Name:\tvalues`
fn fields(status: &str) -> BTreeMap<String, String> {
    let lines = status.lines().filter_map(|line| line.split_once(':'));
    let words = |text: &str| text.split_whitespace().collect::<Vec<_>>().join(" ");
    lines.map(|(name, value)| (name.to_owned(), words(value))).collect()
}

/// Where a process' descriptors lead.
fn descriptors(story: &Story, process: i32) -> Result<Vec<String>> {
    let text =
        story.host().run(&format!("find /proc/{process}/fd -type l -printf '%l\\n' | sort"))?;
    Ok(text.lines().map(str::to_owned).collect())
}

/// Of each kind what a machine needs, and nothing else.
fn expected_only(account: &Account<'_>, links: &[String]) -> Result<()> {
    let disk = account.disk();
    let count = |what: &str| links.iter().filter(|link| link.starts_with(what)).count();
    same("its disk", count(&disk), 1)?;
    same("virtual machines", count("anon_inode:kvm-vm"), 1)?;
    same("virtual CPUs", count("anon_inode:kvm-vcpu"), 1)?;
    let known = |link: &String| {
        ["socket:", "anon_inode:kvm-", "anon_inode:[event", "anon_inode:[timerfd]", "/dev/null", "/dev/kvm"]
            .iter()
            .any(|start| link.starts_with(start))
            || *link == disk
            // The base's files, read-only and the same for all; the service's log.
            || ["/memory.img", "/root.erofs", ".log"].iter().any(|end| link.ends_with(end))
    };
    let unknown: Vec<_> = links.iter().filter(|link| !known(link)).collect();
    ensure!(unknown.is_empty(), "the machine of {} holds {unknown:?}", account.name);
    Ok(())
}
