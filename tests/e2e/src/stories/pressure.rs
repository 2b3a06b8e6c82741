//! A client that stops reading stops its program, not the host (invariant 10).

use std::{
    fs::File,
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result, ensure};
use nix::unistd::pipe;

use crate::{
    harness::{
        Story,
        process::{self, Input, Running},
        same,
        terminal::Terminal,
    },
    runner::{Test, test},
};

pub const TESTS: [Test; 3] = [
    test("unread_output_of_a_command_costs_nothing", 300, unread_command),
    test("unread_output_of_a_terminal_costs_nothing", 300, unread_terminal),
    test("unread_input_costs_little", 300, unread_input),
];

/// What queues and windows may hold on the way, all of them together.
const SLACK_KIB: u64 = 12 * 1024;

fn unread_command(story: &Story) -> Result<()> {
    let alice = story.account("alice")?;
    alice.output("true")?;
    let mut watch = Watch::begin(story, alice.running_machine()?)?;
    let (reader, writer) = pipe().context("no pipe")?;
    let yes = alice.login().ssh(&["-T"]).map(|mut c| {
        c.arg("yes");
        c
    })?;
    let yes = process::start_into("ssh: yes", yes, Input::Nothing, File::from(writer))?;
    watch.nothing_grows(|| alice.shell())?;
    // The program in the guest sleeps in a write; it was not killed, nor does it spin.
    let state = alice.output("ps -o stat= -C yes")?;
    ensure!(state.starts_with('S') || state.starts_with('D'), "`yes` is in state {state:?}");
    drop(reader);
    drop(yes);
    story.wait_for("`yes` to end with its client", 60, || {
        Ok((alice.exec("pgrep -x yes")?.code() == Some(1)).then_some(()))
    })
}

fn unread_terminal(story: &Story) -> Result<()> {
    let alice = story.account("alice")?;
    alice.output("true")?;
    let mut watch = Watch::begin(story, alice.running_machine()?)?;
    let mut yes = alice.shell()?;
    yes.send("yes\n")?;
    watch.nothing_grows(|| alice.shell())?;
    // Read again, it goes on from where it was, and Ctrl-C is heard.
    ensure!(yes.discard(Duration::from_secs(2))? > 1000, "`yes` does not go on");
    yes.send("\x03")?;
    yes.discard(Duration::from_secs(3))?;
    same("the shell afterwards", yes.run("echo here")?.trim(), "here")
}

/// The other direction: a program that does not read what its client sends.
fn unread_input(story: &Story) -> Result<()> {
    let alice = story.account("alice")?;
    alice.output("true")?;
    let mut watch = Watch::begin(story, alice.running_machine()?)?;
    let zeros = File::open("/dev/zero").context("can't open /dev/zero")?;
    let pour: Running = alice.login().start("sleep 1000", Input::File(zeros))?;
    watch.nothing_grows(|| alice.shell())?;
    drop(pour);
    Ok(())
}

/// Memory of the service and of one machine, and how soon another account's keys are echoed.
struct Watch<'a> {
    story: &'a Story,
    machine: i32,
    bob: Terminal<'a>,
    /// Bob's echo before anything went on.
    quiet: Duration,
}

impl<'a> Watch<'a> {
    fn begin(story: &'a Story, machine: i32) -> Result<Self> {
        let mut bob = story.account("bob")?.shell()?;
        bob.run("true")?;
        let quiet = echo(story, &mut bob)?;
        Ok(Self { story, machine, bob, quiet })
    }

    /// KiB that the service has resident, and that the machine has for itself.
    fn memory(&self) -> Result<(u64, u64)> {
        let text = self.story.host().run(&format!(
            "awk '/^VmRSS/ {{print $2}}' /proc/$(pgrep -xo hermitage)/status; \
             awk '/^Anonymous/ {{print $2}}' /proc/{}/smaps_rollup",
            self.machine
        ))?;
        let mut numbers = text.split_whitespace().map(str::parse::<u64>);
        match (numbers.next(), numbers.next()) {
            (Some(Ok(service)), Some(Ok(machine))) => Ok((service, machine)),
            _ => anyhow::bail!("wanted the memory of service and machine, got {text:?}"),
        }
    }

    fn nothing_grows(&mut self, own_shell: impl Fn() -> Result<Terminal<'a>>) -> Result<()> {
        // Until all queues on the way are full.
        self.story.sleep(self.story.world.patient(Duration::from_secs(5)));
        let before = self.memory()?;
        let mut most = before;
        let begun = Instant::now();
        while begun.elapsed() < Duration::from_secs(15) {
            self.story.sleep(Duration::from_secs(2));
            let now = self.memory()?;
            most = (most.0.max(now.0), most.1.max(now.1));
        }
        let (grown, machine) = (most.0 - before.0, most.1 - before.1);
        ensure!(grown < SLACK_KIB, "the service grew by {grown} KiB from {}", before.0);
        ensure!(machine < SLACK_KIB, "the machine grew by {machine} KiB from {}", before.1);
        let (blocked, quiet) = (echo(self.story, &mut self.bob)?, self.quiet);
        ensure!(
            blocked < quiet * 3 + Duration::from_millis(100),
            "another account's echo takes {blocked:?}; before, it took {quiet:?}"
        );
        // Her other sessions go on as well.
        own_shell()?.run("true").context("another session of the same account").map(drop)
    }
}

/// How long a keystroke takes to be echoed: the 90th percentile of 20.
fn echo(story: &Story, shell: &mut Terminal<'_>) -> Result<Duration> {
    let mut times = Vec::new();
    for n in 0..20u8 {
        let key = char::from(b'a' + n).to_string();
        let begun = Instant::now();
        shell.send(&key)?;
        shell.expect(&key, 30)?;
        times.push(begun.elapsed());
        story.sleep(Duration::from_millis(50));
    }
    shell.send("\x15")?;
    times.sort();
    Ok(times[17])
}
