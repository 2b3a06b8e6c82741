//! Sudden deaths: of a machine, of the service, of the power.

use std::time::Duration;

use anyhow::{Context as _, Result, ensure};

use crate::{
    harness::{Story, account::Account, host::quote, process::Input, same, says},
    runner::{Test, test},
};

pub const TESTS: [Test; 5] = [
    test("a_killed_machine_harms_nobody_else", 300, killed_machine),
    test("a_killed_machine_leaves_nothing", 300, nothing_remains),
    test("machines_forked_and_killed_without_a_pause_come_up", 1200, without_a_pause),
    test("a_killed_service_stops_in_order", 400, killed_service),
    test("power_cut_costs_nothing_fsynced", 3600, power_cut),
];

fn killed_machine(story: &Story) -> Result<()> {
    let alice = story.account("alice")?;
    let bob = story.account("bob")?;
    let mut hers = alice.shell()?;
    let mut his = bob.shell()?;
    hers.run("echo kept > kept; sync")?;
    let command = alice.login().start("echo begun; sleep 1000", Input::Nothing)?;
    let machine = alice.running_machine()?;
    story.sleep(Duration::from_secs(1));
    story.host().run(&format!("kill -9 {machine}"))?;

    let (status, shown) = hers.wait_end(60)?;
    says("the terminal's last words", &shown, "machine")?;
    ensure!(status != 0, "the terminal's session ended as if all were well");
    let ended = command.wait(story.within(60))?;
    says("the command's last words", &ended.err(), "machine")?;
    ensure!(ended.code() != Some(0), "the command's session ended as if all were well");

    same("bob's session", his.run("echo still here")?.trim(), "still here")?;
    same("her file, one login later", alice.output("cat kept")?.as_str(), "kept")?;
    ensure!(alice.running_machine()? != machine, "a dead machine was found again");
    his.run("true").map(drop)
}

/// Two accounts' machines side by side, each forked, killed a moment later and forked again: each time it gets as
/// far as having its account, on a disk that lost its machine at an odd moment.
fn without_a_pause(story: &Story) -> Result<()> {
    let rounds = story.world.options.fork_rounds;
    let lost = story.world.lost_forks()?;
    let accounts = [story.account("alice")?, story.account("bob")?];
    let mut script = String::from("set -e; waited=\n");
    for account in &accounts {
        let (name, machine) = (&account.name, account.machine_script());
        script += &format!(
            "( for round in $(seq {rounds}); do
                 hermitage account start {name} || {{ echo \"{name}, round $round\" >&2; exit 1; }}
                 sleep 0.$((RANDOM % 5))
                 machine=$({machine}); kill -9 $machine
                 while test -e /proc/$machine; do sleep 0.05; done
               done ) & waited=\"$waited $!\"\n"
        );
    }
    script += "for pid in $waited; do wait $pid; done";
    story.host().run(&script)?;
    for account in &accounts {
        same("a login after it", account.output("echo in")?.trim(), "in")?;
    }
    let lost = story.world.lost_forks()?.saturating_sub(lost);
    println!("    {} forks, {lost} of them made once more", 2 * rounds);
    Ok(())
}

/// What a machine has on the host while it lives, and nobody afterwards.
fn nothing_remains(story: &Story) -> Result<()> {
    let alice = story.account_with("alice", &["--policy discard"])?;
    // The first one may make what the service keeps (fork server, caches).
    alice.output("true")?;
    alice.stop_machine()?;
    let before = traces(story, &alice)?;
    for round in 0..4 {
        let mut shell = alice.shell()?;
        let machine = alice.running_machine()?;
        let during = traces(story, &alice)?;
        ensure!(during != before, "a living machine leaves no trace: the test looks at nothing");
        if round < 3 {
            story.host().run(&format!("kill -9 {machine}"))?;
        } else {
            alice.stop_machine()?;
        }
        shell.wait_end(60)?;
    }
    let mut last = String::new();
    story
        .wait_for("everything of the machine to be gone", 30, || {
            last = traces(story, &alice)?;
            Ok((last == before).then_some(()))
        })
        .with_context(|| format!("before:\n{before}\nafter:\n{last}"))
}

/// Processes, descriptors by kind, locks on the disk, control groups, files.
fn traces(story: &Story, alice: &Account<'_>) -> Result<String> {
    let options = &story.world.options;
    story.host().run(&format!(
        "disk={disk}; state={state}; run={run}
         echo processes $(pgrep -c 'hermitage') threads $(ls -d /proc/$(pgrep -xo hermitage)/task/* | wc -l) > /dev/null
         echo machines and fork servers: $(pgrep -cx hermitage-vmm)
         for pid in $(pgrep -x 'hermitage|hermitage-vmm' | sort -n); do
           echo descriptors of $pid: $(find /proc/$pid/fd -type l -printf '%l\\n' 2>/dev/null |
             sed 's/\\[[0-9]*\\]//' | grep -v -e anon_inode -e pipe: | sort | uniq -c | tr -s ' \\n' ' ')
         done
         echo locks: $(grep -c \":$(stat -c %i $disk) \" /proc/locks)
         echo shared memory: $(ls /dev/shm | wc -l)
         [ -d /sys/fs/cgroup ] && find /sys/fs/cgroup -type d -path '*hermitage*' | sort
         find $run /tmp -mindepth 1 | grep -i hermitage | grep -v e2e | sort
         find $state -not -name 'accounts.db*' -not -path '*/lost+found*' | sort",
        disk = quote(&alice.disk()),
        state = quote(&options.state_dir.to_string_lossy()),
        run = quote(&options.run_dir.to_string_lossy()),
    ))
}

fn killed_service(story: &Story) -> Result<()> {
    let service = &story.world.options.service;
    let alice = story.account("alice")?;
    let bob = story.account("bob")?;
    let mut hers = alice.shell()?;
    bob.output("true")?;
    let (disk, machine) = (alice.disk(), alice.running_machine()?);
    let second = bob.running_machine()?;
    // Not synced: only an orderly stop of the guest brings it to the disk.
    hers.run("echo in order > last")?;
    story.afterwards(format!("{service} start"));
    story.host().run("kill -9 $(pgrep -xo hermitage)")?;
    hers.wait_end(60).context("her session after the service's death")?;
    story.wait_for("the machines to stop by themselves", 60, || {
        let ended = story.host().try_run(&format!("kill -0 {machine} || kill -0 {second}"))?;
        Ok((ended.code() != Some(0)).then_some(()))
    })?;
    story.wait_for("every hermitage process to end", 60, || {
        Ok((story.host().try_run("pgrep -l hermitage")?.code() == Some(1)).then_some(()))
    })?;
    let check = story.host().try_run(&format!("e2fsck -fn {disk} 2>&1"))?;
    ensure!(check.code() == Some(0), "the disk was not left in order: {}", check.out());
    story.host().run(&format!("{service} start"))?;
    wait_until_serving(story, &alice)?;
    same("her last file", alice.output("cat last")?.as_str(), "in order")?;
    bob.output("true").map(drop)
}

pub fn wait_until_serving(story: &Story, account: &Account<'_>) -> Result<()> {
    let mut last = String::new();
    story
        .wait_for("the service to serve again", 120, || {
            let ended = account.exec("true")?;
            last = ended.err();
            Ok((ended.code() == Some(0)).then_some(()))
        })
        .with_context(|| format!("the client said last: {last}"))
}

/// Writes numbered files for ever and says each number once the file and its folder are fsynced.
const DILIGENT: &str = r#"
import hashlib, os, sys
d = sys.argv[1]
os.mkdir(d)
os.sync()
folder = os.open(d, os.O_RDONLY)
n = 0
while True:
    with open(f"{d}/{n}", "wb") as f:
        f.write(hashlib.sha256(str(n).encode()).digest() * (1 + n * 37 % 2000))
        f.flush()
        os.fsync(f.fileno())
    os.fsync(folder)
    print(n, flush=True)
    n += 1
"#;

/// Exits with words at the first file that is not what was written.
const CHECK: &str = r#"
import hashlib, sys
d, last = sys.argv[1], int(sys.argv[2])
for n in range(last + 1):
    with open(f"{d}/{n}", "rb") as f:
        if f.read() != hashlib.sha256(str(n).encode()).digest() * (1 + n * 37 % 2000):
            sys.exit(f"{d}/{n} is not what was written")
print("whole", last)
"#;

fn power_cut(story: &Story) -> Result<()> {
    let alice = story.account("alice")?;
    alice.output("true")?;
    let disk = alice.disk();
    let copy = format!("{}/e2e-power-cut.img", story.world.options.state_dir.display());
    story.afterwards(format!("rm -f {copy}"));
    let mut acknowledged = 0u64;
    for round in 0..story.world.options.rounds {
        let what = || format!("round {round} of {}", story.world.options.rounds);
        let dir = format!("round{round}");
        let script =
            |program: &str, rest: &str| format!("python3 -c {} {dir} {rest}", quote(program));
        let mut writer = alice.login().start(&script(DILIGENT, ""), Input::Nothing)?;
        story.wait_for("the first file on the disk", 90, || {
            Ok((!writer.out_so_far()?.is_empty()).then_some(()))
        })?;
        let machine = alice.running_machine()?;
        let moment = Duration::from_millis(story.world.random() % 3000);
        story.sleep(moment);
        story.host().run(&format!("kill -9 {machine}")).with_context(what)?;
        let ended = writer.wait(story.within(60)).with_context(what)?;
        // A line may be cut; what is whole was acknowledged.
        let text = ended.out();
        let whole = text.rfind('\n').map_or("", |end| &text[..end]);
        let last: u64 =
            whole.lines().last().context("nothing written")?.parse().with_context(what)?;
        acknowledged += last;

        // On a copy: her machine replays its own journal.
        let checked = story.host().try_run(&format!(
            "cp --sparse=always {disk} {copy} || exit 99
             e2fsck -E journal_only -y {copy} 2>&1 || [ $? = 1 ] || exit 98
             e2fsck -fn {copy} 2>&1"
        ))?;
        ensure!(
            checked.code() == Some(0),
            "{}: e2fsck after {moment:?} and {last} files: {:?} {}",
            what(),
            checked.code(),
            checked.out()
        );
        let read = alice.exec(&script(CHECK, &last.to_string())).with_context(what)?;
        same(&what(), read.success().with_context(what)?.trim(), &format!("whole {last}"))?;
        alice.output(&format!("rm -r {dir}"))?;
    }
    ensure!(acknowledged > 0, "no round got beyond its first file");
    Ok(())
}
