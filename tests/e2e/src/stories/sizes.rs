//! Memory and CPUs by account (docs/limits.md, "Memory and processors"), in real guests.

use std::ops::Range;

use anyhow::{Result, bail, ensure};

use super::sleep::{back, wait_saved};
use crate::{
    harness::{Story, account::Account, host::quote, same, says},
    runner::{Test, test},
};

pub const TESTS: [Test; 3] = [
    test("an_account_has_the_memory_and_the_cpus_it_was_given", 240, given),
    test("a_machine_that_was_saved_comes_back_with_more", 300, raised),
    test("what_an_account_was_not_given_its_root_can_not_take", 240, not_given),
];

/// Holds 32 MiB of noise, says their hash when told to, and burns nothing meanwhile.
const HOLDER: &str = "python3 -c '
import hashlib, os, sys
noise = os.urandom(32 << 20)
for line in sys.stdin:
    print(\"hash-\" + hashlib.sha256(noise).hexdigest()[:16] + \".\", flush=True)
'";

fn given(story: &Story) -> Result<()> {
    let alice = story.account_with("alice", &["--memory 1GiB --vcpus 2 --policy discard"])?;
    Has::of(&alice)?.check(2, 900..1024)?;
    // More than a machine of the base's size has, and two CPUs at work at once.
    let script = "python3 -c '
b = bytearray(520 << 20)
for i in range(0, len(b), 4096): b[i] = 1
print(sum(b[::4096]))
' & (i=0; while [ $i -lt 3000 ]; do i=$((i+1)); done; echo counted) & wait";
    let said = alice.output(script)?;
    says("a program of 520 MiB", &said, &(520u64 << 8).to_string())?;
    says("the other CPU", &said, "counted")?;
    let shown = story.host().run(&format!("hermitage account show {}", alice.name))?;
    says("account show", &shown, "1 GiB of memory, 2 CPUs (its own)")?;
    // Its process may have more as well.
    let pid = alice.running_machine()?;
    let most = story
        .host()
        .run(&format!("cat /sys/fs/cgroup$(sed -n 's/^0:://p' /proc/{pid}/cgroup)/memory.max"))?;
    let most: u64 = most.trim().parse()?;
    ensure!(most > 1 << 30, "the host lets it have {most} bytes");

    let bob = story.account_with("bob", &["--policy discard"])?;
    Has::of(&bob)?.check(1, 300..512)?;

    let refused =
        story.host().try_run(&format!("hermitage account set {} --memory 32GiB", alice.name))?;
    says("a refusal", &refused.err(), "--max-memory-mib 32768")
}

fn raised(story: &Story) -> Result<()> {
    let carol = story.account_with("carol", &["--memory 768MiB --linger 1 --max-linger 0s"])?;
    let mut shell = carol.shell()?;
    shell.run(&format!("coproc {{ {HOLDER}; }}"))?;
    shell.run("ask() { echo >&${COPROC[1]}; read -r said <&${COPROC[0]}; echo $said; }")?;
    let hash = shell.run("ask")?;
    says("the program", &hash, "hash-")?;
    shell.cut()?;
    wait_saved(story, &carol)?;
    let set = |what: &str| {
        let script = format!("hermitage account set {} {what} 2>&1", carol.name);
        story.host().run(&script)
    };
    set("--memory 1GiB --vcpus 2")?;

    let mut shell = back(&carol)?;
    shell.expect("resumed from ", 90)?;
    shell.expect(" ms)", 30)?;
    same("what a program holds", shell.run("ask")?, hash.clone())?;
    Has::of(&carol)?.check(2, 900..1024)?;
    // And once more, with memory and CPUs that the first save did not have.
    same(
        "300 MiB",
        shell.run("head -c 300M /dev/zero | tail -c 300M | wc -c")?.trim(),
        "314572800",
    )?;
    shell.cut()?;
    wait_saved(story, &carol)?;
    let mut shell = back(&carol)?;
    shell.expect("resumed from ", 90)?;
    shell.expect(" ms)", 30)?;
    same("what it holds after a second time", shell.run("ask")?, hash)?;
    Has::of(&carol)?.check(2, 900..1024)?;

    // Less is for the next start from the disk.
    let said = set("--memory default --vcpus default")?;
    says("account set", &said, "keeps it until it next starts from its disk")?;
    shell.cut()?;
    story.host().run(&format!("hermitage account reset {}", carol.name))?;
    Has::of(&carol)?.check(1, 300..512)
}

/// The guest's kernel knows of the most that there is; nothing is behind it.
fn not_given(story: &Story) -> Result<()> {
    let mallory = story.account_with("mallory", &["--policy discard"])?;
    let cpu = "echo 1 > /sys/devices/system/cpu/cpu1/online";
    let done = mallory.exec(&format!("sudo bash -c {}; nproc", quote(cpu)))?;
    says("starting a CPU that is not there", &done.err(), "Input/output error")?;
    same("CPUs", done.out().trim(), "1")?;
    // Its kernel writes there before it has the memory, and gets nowhere.
    let memory = "cd /sys/devices/system/memory; for block in memory*; do \
                  grep -q offline $block/state && echo online > $block/state; done";
    mallory.exec(&format!("sudo timeout -s KILL 20 bash -c {}", quote(memory)))?;
    let after = mallory.exec("awk '/^MemTotal/ { print int($2 / 1024) }' /proc/meminfo")?;
    let mib: u64 = after.out().trim().parse().unwrap_or(0);
    ensure!(mib < 512, "she has {mib} MiB");

    let alice = story.account_with("alice", &["--policy discard"])?;
    same("another's machine", alice.output("echo well")?.as_str(), "well")?;
    same("the service", story.host().run("hermitage status >&2 && echo up")?.trim(), "up")
}

struct Has {
    cpus: u32,
    mib: u64,
}

impl Has {
    fn of(account: &Account<'_>) -> Result<Self> {
        let said =
            account.output("nproc; awk '/^MemTotal/ { print int($2 / 1024) }' /proc/meminfo")?;
        let numbers: Vec<&str> = said.split_whitespace().collect();
        let [cpus, mib] = numbers[..] else { bail!("CPUs and memory are {said:?}") };
        Ok(Self { cpus: cpus.parse()?, mib: mib.parse()? })
    }

    /// Some of the memory is the kernel's and not in the total.
    fn check(&self, cpus: u32, mib: Range<u64>) -> Result<()> {
        same("CPUs", self.cpus, cpus)?;
        ensure!(mib.contains(&self.mib), "{} MiB of memory, not {mib:?}", self.mib);
        Ok(())
    }
}
