//! A machine is a copy-on-write fork of its base: what nobody wrote, everybody shares.

use anyhow::{Context as _, Result, ensure};

use crate::{
    harness::{Story, account::Account, same},
    runner::{Test, skip, test},
    stories::resume,
};

pub const TESTS: [Test; 3] = [
    test("pages_not_written_stay_shared", 300, pages_stay_shared),
    test("freed_machines_give_their_memory_back", 300, memory_comes_back),
    test("big_base_with_two_cpus_forks", 1200, big_base),
];

/// What a machine has of its base's memory, from the kernel's own books.
#[derive(Debug)]
struct Memory {
    /// KiB mapped of the base's memory file.
    mapped: u64,
    /// KiB present in the page tables.
    resident: u64,
    /// KiB that are the machine's own.
    own: u64,
}

fn memory_of(story: &Story, machine: i32) -> Result<Memory> {
    let text = story.host().run(&format!(
        "awk '/^[0-9a-f]+-[0-9a-f]+ / {{ base = /memory\\.img/ }}
              base && /^(Size|Rss|Anonymous):/ {{ sum[$1] += $2 }}
              END {{ print sum[\"Size:\"]+0, sum[\"Rss:\"]+0, sum[\"Anonymous:\"]+0 }}' \
         /proc/{machine}/smaps"
    ))?;
    let numbers: Vec<u64> = text.split_whitespace().filter_map(|n| n.parse().ok()).collect();
    match numbers[..] {
        [mapped, resident, own] if mapped > 0 => Ok(Memory { mapped, resident, own }),
        _ => anyhow::bail!("process {machine} maps nothing of a memory.img: {text:?}"),
    }
}

fn pages_stay_shared(story: &Story) -> Result<()> {
    let alice = story.account("alice")?;
    let bob = story.account("bob")?;
    alice.output("true")?;
    bob.output("true")?;
    let (hers, his) = (alice.running_machine()?, bob.running_machine()?);
    let before = memory_of(story, hers)?;
    ensure!(before.own < before.mapped / 8, "an idle machine owns much of its memory: {before:?}");
    let idle = memory_of(story, his)?;

    // 64 MiB written in hers: hers grows by that, his by nothing.
    let mut shell = alice.shell()?;
    shell.send("python3 -c 'import os,sys; a = bytearray(os.urandom(1 << 20) * 64); print(\"writ\" \"ten\", flush=True); sys.stdin.read()'\n")?;
    shell.expect("written", 120)?;
    let after = memory_of(story, hers)?;
    let grown = after.own.saturating_sub(before.own) >> 10;
    ensure!((60..160).contains(&grown), "64 MiB written show as {grown} MiB: {before:?} {after:?}");
    let still = memory_of(story, his)?;
    ensure!(
        still.own < idle.own + 16 * 1024,
        "bob's machine grew with alice's: {idle:?}, then {still:?}"
    );

    // Page by page: what is present is either the file's or counted as the machine's own.
    let (file, anonymous) = pagemap(story, his)?;
    ensure!(file + anonymous > 0, "no page of the base is present");
    let drift = (anonymous * 4).abs_diff(memory_of(story, his)?.own);
    ensure!(drift < 4096, "pagemap and smaps disagree by {drift} KiB ({anonymous} pages)");
    ensure!(still.resident >= still.own, "smaps contradicts itself: {still:?}");
    Ok(())
}

/// Pages present of the base's memory: shared with the file, and the machine's own
/// (Documentation/admin-guide/mm/pagemap.rst: bit 63 present, bit 62 swapped, bit 61 file-mapped).
fn pagemap(story: &Story, machine: i32) -> Result<(u64, u64)> {
    let text = story.host().run(&format!(
        r#"perl -e '
            open(my $maps, "<", "/proc/{machine}/maps") or die "maps: $!";
            open(my $pages, "<:raw", "/proc/{machine}/pagemap") or die "pagemap: $!";
            my ($file, $own) = (0, 0);
            while (<$maps>) {{
                next unless /memory\.img/ && /^([0-9a-f]+)-([0-9a-f]+)/;
                my ($page, $end) = (hex($1) >> 12, hex($2) >> 12);
                while ($page < $end) {{
                    my $n = $end - $page; $n = 65536 if $n > 65536;
                    sysseek($pages, $page * 8, 0); sysread($pages, my $buffer, $n * 8) or die "read: $!";
                    for my $entry (unpack("Q*", $buffer)) {{
                        if ($entry >> 62 & 1) {{ $own++ }}
                        elsif ($entry >> 63) {{ if ($entry >> 61 & 1) {{ $file++ }} else {{ $own++ }} }}
                    }}
                    $page += $n;
                }}
            }}
            print "$file $own\n";'"#
    ))?;
    let mut numbers = text.split_whitespace().map(str::parse::<u64>);
    match (numbers.next(), numbers.next()) {
        (Some(Ok(file)), Some(Ok(own))) => Ok((file, own)),
        _ => anyhow::bail!("wanted two numbers of pages, got {text:?}"),
    }
}

fn memory_comes_back(story: &Story) -> Result<()> {
    let available = || -> Result<u64> {
        let text = story.host().run("sync; awk '/^MemAvailable/ {print $2}' /proc/meminfo")?;
        text.trim().parse().with_context(|| format!("odd MemAvailable {text:?}"))
    };
    let alice = story.account("alice")?;
    alice.output("true")?;
    alice.stop_machine()?;
    let before = available()?;
    alice.output("python3 -c 'import os; a = os.urandom(1 << 20) * 200'")?;
    let during = available()?;
    ensure!(during + 150 * 1024 < before, "200 MiB in the guest take {} KiB", before - during);
    alice.stop_machine()?;
    let after = available()?;
    // The host's own caches move meanwhile; a machine that stayed would keep twice as much.
    ensure!(after + 100 * 1024 > before, "of {before} KiB available only {after} came back");
    Ok(())
}

/// More memory than fits below 4 GiB (the hole of the PCI range), and a second processor.
fn big_base(story: &Story) -> Result<()> {
    let total: u64 = story
        .host()
        .run("awk '/^MemTotal/ {print $2}' /proc/meminfo")?
        .trim()
        .parse()
        .context("odd MemTotal")?;
    if total < 3_700_000 {
        return skip(format!("the serving machine has only {} MiB of memory", total >> 10));
    }
    let list = story.host().hermitage_json("base list")?;
    let current = list["current"].as_str().context("there is no current base")?.to_owned();
    // Whatever happens, the others get the base they know; one that failed half-way has no id.
    story.afterwards(format!(
        "hermitage base use {current}; \
         for base in $(hermitage base list --json | tr '{{' '\\n' | grep '\"memory_bytes\": *3758096384' | \
                       sed 's/.*\"id\": *\"\\([^\"]*\\)\".*/\\1/'); do \
           hermitage base remove $base; done; true"
    ));
    let carol = story.account("carol")?;
    let mut before = carol.shell()?;
    let shell_before = before.run("echo $$; echo kept > ~/file; sync")?;
    before.cut()?;
    let built = story.host().hermitage_json("base build --memory-mib 3584 --vcpus 2")?;
    ensure!(built["vcpus"] == 2, "`base build` tells of another base: {built}");
    ensure!(current != built["id"], "the other base has the id of the first");
    old_base(story, &carol, &current, &shell_before)?;

    let alice = story.account("alice")?;
    let bob = story.account("bob")?;
    for account in [&alice, &bob] {
        same("processors", account.output("nproc")?.as_str(), "2")?;
        let kib: u64 = account.output("awk '/^MemTotal/ {print $2}' /proc/meminfo")?.parse()?;
        ensure!(kib > 3 << 20, "the machine has only {kib} KiB of memory");
        // Memory above 4 GiB is another slot of the machine's: it must have come along.
        let high: u64 = account
            .output(
                "awk '/^Node.*zone *Normal/ {z=1} z && /present/ {print $2; exit}' /proc/zoneinfo",
            )?
            .parse()?;
        ensure!(high > 10_000, "only {high} pages above 4 GiB");
        two_at_once(account)?;
    }
    let hers = alice.output("cat /proc/sys/kernel/random/boot_id")?;
    let his = bob.output("cat /proc/sys/kernel/random/boot_id")?;
    ensure!(hers != his, "both machines have boot_id {hers}");
    // Pages everywhere in memory, also high up, hold what was written to them.
    let check = "python3 -c 'import hashlib
blocks = [hashlib.sha256(bytes([n])).digest() * 32768 for n in range(200)]
assert all(b == hashlib.sha256(bytes([n])).digest() * 32768 for n, b in enumerate(blocks))
print(\"whole\")'";
    same("200 MiB written and read", alice.output(check)?.as_str(), "whole")?;
    alice.stop_machine()?;
    bob.stop_machine()?;
    resume::prove(story, 1, 16, 8, "3584 MiB, 2 vCPUs")?;
    unneeded_bases(story, [&alice, &bob, &carol], &current, built["id"].as_str().unwrap_or("?"))
}

/// Who was saved on the former base resumes on it, and is on the new one after a start from the disk.
fn old_base(story: &Story, carol: &Account, old: &str, shell_before: &str) -> Result<()> {
    carol.stop_machine()?;
    let needed = || -> Result<()> {
        let plan = story.host().hermitage_json("base gc --dry-run")?;
        let kept = plan["kept"].as_array().context("`base gc` names none it keeps")?;
        ensure!(kept.iter().any(|base| base["id"] == old), "base {old} is not kept: {plan}");
        Ok(())
    };
    needed()?;
    let mut shell = carol.shell()?;
    same("the shell", shell.run("echo $$")?.as_str(), shell_before)?;
    same("processors of the old base", carol.output("nproc")?.as_str(), "1")?;
    needed()?;
    shell.send("exit\n")?;
    shell.wait_end(60)?;
    carol.stop_machine()?;
    story.host().run(&format!("hermitage account reset {}", carol.name))?;
    same("processors of the new base", carol.output("nproc")?.as_str(), "2")?;
    same("the file", carol.output("cat file")?.as_str(), "kept")?;
    carol.stop_machine()
}

/// The first base is current again; the other one goes when nothing saved needs it any more.
fn unneeded_bases(story: &Story, accounts: [&Account; 3], first: &str, other: &str) -> Result<()> {
    let removed = || -> Result<bool> {
        let done = story.host().hermitage_json("base gc")?;
        let removed = done["removed"].as_array().context("`base gc` names none it removed")?;
        Ok(removed.iter().any(|base| base["id"] == other))
    };
    story.host().run(&format!("hermitage base use {first}"))?;
    for account in accounts {
        ensure!(!removed()?, "base {other} was removed with {}'s memory on it", account.name);
        story.host().run(&format!("hermitage snapshot drop {}", account.name))?;
    }
    // Its fork server takes a moment to notice that its last machine is gone and another base current.
    story.wait_for("the unneeded base to go", 60, || Ok(removed()?.then_some(())))
}

/// Both processors run user programs, and each one's timer ticks.
fn two_at_once(account: &Account<'_>) -> Result<()> {
    let script = "for cpu in 0 1; do taskset -c $cpu sh -c 'sleep 0.3; cat /proc/self/stat' & done | \
                  awk '{print $39}' | sort | tr '\\n' ' '; wait";
    same("processors that ran programs", account.output(script)?.trim(), "0 1")
}
