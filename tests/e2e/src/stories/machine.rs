//! A machine's life as its user sees it: when it starts, when it leaves, and how it may end.

use std::time::{Duration, SystemTime};

use anyhow::{Context as _, Result, ensure};

use crate::{
    harness::{
        Story,
        process::{self, Input, Running},
        same, says,
    },
    runner::{Test, skip, test},
};

pub const TESTS: [Test; 8] = [
    test("logins_at_once_share_one_machine", 180, logins_at_once),
    test("machine_leaves_when_its_linger_is_over", 240, linger),
    test("clock_is_right", 180, clock),
    test("out_of_memory_kills_a_process_only", 300, out_of_memory),
    test("poweroff_from_inside_ends_the_session", 240, poweroff),
    test("kernel_panic_ends_one_machine", 240, kernel_panic),
    test("forwarding_does_not_reach_the_host", 240, forwarding),
    test("fsync_in_the_guest_is_one_on_the_host", 240, fsync),
];

fn logins_at_once(story: &Story) -> Result<()> {
    let alice = story.account("alice")?;
    let logins = (0..6)
        .map(|_| alice.login().start("cat /proc/sys/kernel/random/boot_id", Input::Nothing))
        .collect::<Result<Vec<Running>>>()?;
    let mut machines = Vec::new();
    for login in logins {
        machines.push(login.wait(story.within(120))?.success()?);
    }
    machines.dedup();
    same("machines that six logins of one moment saw", machines.len(), 1)?;
    alice.running_machine().map(drop)
}

fn linger(story: &Story) -> Result<()> {
    let alice = story.account_with("alice", &["--linger", "5", "--policy", "discard"])?;
    let boot = "cat /proc/sys/kernel/random/boot_id";
    let first = alice.output(boot)?;
    same("her machine, a moment later", alice.output(boot)?, first.clone())?;
    alice.output("echo unsynced > note")?;
    story.wait_for("the machine to leave", 60, || {
        story.sleep(Duration::from_secs(1));
        Ok(alice.machine()?.is_none().then_some(()))
    })?;
    same("her note", alice.output("cat note")?.as_str(), "unsynced")?;
    ensure!(alice.output(boot)? != first, "the machine was no other");
    // Nobody's machine leaves under a session.
    let mut shell = alice.shell()?;
    let during = alice.running_machine()?;
    story.sleep(story.world.patient(Duration::from_secs(8)));
    shell.run("true")?;
    same("the machine of a session", alice.running_machine()?, during)
}

fn clock(story: &Story) -> Result<()> {
    let alice = story.account("alice")?;
    let offset = || -> Result<f64> {
        let now =
            || SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).map(|d| d.as_secs_f64());
        let before = now()?;
        let guest: f64 = alice.output("date +%s.%N")?.parse().context("odd date")?;
        let after = now()?;
        Ok(if guest < before { before - guest } else { (guest - after).max(0.0) })
    };
    // The serving machine's own clock may be off against ours.
    let host: f64 = story.host().run("date +%s.%N")?.trim().parse().context("odd date")?;
    let here = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH)?.as_secs_f64();
    let tolerance = 2.0 + (here - host).abs();
    for _ in 0..2 {
        let off = offset()?;
        ensure!(off < tolerance, "the guest's clock is {off:.1} s off");
        alice.stop_machine()?;
    }
    // It runs at the host's pace.
    let slept =
        alice.output("a=$(date +%s%N); sleep 3; echo $((($(date +%s%N) - a) / 1000000))")?;
    let slept: u64 = slept.parse().context("odd time")?;
    ensure!((2950..6000).contains(&slept), "`sleep 3` took {slept} ms of the guest's clock");
    let monotonic = alice.output("cut -d' ' -f1 /proc/uptime")?;
    ensure!(monotonic.parse::<f64>().is_ok_and(|up| up < 3600.0), "up since {monotonic} s");
    Ok(())
}

fn out_of_memory(story: &Story) -> Result<()> {
    let alice = story.account("alice")?;
    let mut shell = alice.shell()?;
    let before = alice.running_machine()?;
    let hog = "python3 -c 'a = []\nwhile True: a.append(bytearray(16 << 20))'";
    let ended = alice.exec(hog)?;
    ensure!(ended.code() != Some(0), "endless memory was found");
    shell.run("true").context("a shell beside it")?;
    same("the machine afterwards", alice.running_machine()?, before)
}

fn poweroff(story: &Story) -> Result<()> {
    let alice = story.account("alice")?;
    let mut shell = alice.shell()?;
    shell.run("echo kept > note")?;
    shell.send("sudo poweroff || sudo kill -TERM 1\n")?;
    let (status, shown) = shell.wait_end(90)?;
    says("the last words", &shown, "machine")?;
    ensure!(status != 0, "the session ended as if the shell had");
    same("her note, in the next machine", alice.output("cat note")?.as_str(), "kept")
}

fn kernel_panic(story: &Story) -> Result<()> {
    let alice = story.account("alice")?;
    let bob = story.account("bob")?;
    let mut hers = alice.shell()?;
    let mut his = bob.shell()?;
    hers.run("echo kept > note; sync")?;
    hers.send("echo 1 | sudo tee /proc/sys/kernel/sysrq; echo c | sudo tee /proc/sysrq-trigger\n")?;
    let (_, shown) = hers.wait_end(120)?;
    says("the last words", &shown, "machine")?;
    his.run("true").context("bob's session")?;
    same("her note, in the next machine", alice.output("cat note")?.as_str(), "kept")
}

/// What the client asks to be connected to is the account's own machine or nothing, never the host.
fn forwarding(story: &Story) -> Result<()> {
    let alice = story.account("alice")?;
    alice.output("true")?;
    let port = story.world.options.ssh_port;
    for target in
        ["127.0.0.1:22", "localhost:2222", "[::1]:22", "10.0.2.2:22", &format!("127.0.0.1:{port}")]
    {
        let command = alice.login().ssh(&["-W", target])?;
        let ended =
            process::run(&format!("ssh -W {target}"), command, Input::Pipe, story.within(60))?;
        ensure!(ended.stdout.is_empty(), "{target} answered: {:?}", ended.out());
        ensure!(ended.code() != Some(0), "a connection to {target} went through");
    }
    // What is asked to listen does so in the machine.
    let listeners = || story.host().run("ss -Hltnx | awk '{ print $1, $5 }' | sort");
    let before = listeners()?;
    let mut client = super::forwarding::forward(&alice, &["-R", "0:127.0.0.1:22"])?;
    story.wait_for("the forward", 60, || {
        Ok(client.errors_so_far()?.contains("Allocated port ").then_some(()))
    })?;
    same("what listens on the host", listeners()?, before)?;
    client.kill();
    alice.output("true").map(drop)
}

/// An acknowledged flush is on the medium (invariant 4): a killed process does not show it, as the
/// host's page cache outlives it; the system calls do.
fn fsync(story: &Story) -> Result<()> {
    const TRACE: &str = "/sys/kernel/tracing";
    const EVENTS: &str = "/sys/kernel/tracing/events/syscalls";
    let there = story.host().try_run(&format!(
        "mountpoint -q {TRACE} || mount -t tracefs tracefs {TRACE}; [ -d {EVENTS} ]"
    ))?;
    if there.code() != Some(0) {
        return skip("the serving machine's kernel does not trace system calls");
    }
    let alice = story.account("alice")?;
    alice.output("true; sync")?;
    let machine = alice.running_machine()?;
    let event = |event: &str, on: u8| format!("echo {on} > {EVENTS}/{event}/enable");
    let switch =
        |on| format!("{}; {}", event("sys_enter_fdatasync", on), event("sys_exit_fdatasync", on));
    story.afterwards(format!("{}; echo > {TRACE}/set_event_pid; echo > {TRACE}/trace", switch(0)));
    story.host().run(&format!(
        "echo > {TRACE}/trace && ls /proc/{machine}/task > {TRACE}/set_event_pid && {}",
        switch(1)
    ))?;
    alice.output(
        "for n in 1 2 3 4 5; do dd if=/dev/urandom of=f$n bs=64k count=1 conv=fsync 2>&1; done",
    )?;
    let trace = story.host().run(&format!("cat {TRACE}/trace"))?;
    let done = trace.lines().filter(|line| line.contains("sys_fdatasync -> 0x0")).count();
    ensure!(done >= 5, "five fsyncs in the guest made {done} on the host:\n{trace}");
    // `sys_fdatasync(fd: 7)`, in hexadecimal.
    let fd = trace.split("sys_fdatasync(fd: ").nth(1).and_then(|rest| rest.split(')').next());
    let fd = u32::from_str_radix(fd.context("no call in the trace")?, 16)?;
    let file = story.host().run(&format!("readlink /proc/{machine}/fd/{fd}"))?;
    same("what was synced", file.trim(), alice.disk().as_str())
}
