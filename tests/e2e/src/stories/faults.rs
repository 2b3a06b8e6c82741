//! Death in the middle of a save or a resume, at every step that has a name (`storage/src/faults.rs`): of
//! the machine, the service or both. Whoever logs in next gets a machine that is one of two: the one she
//! left, with the disk as she left it, or a new one, with a word about it and what was synced.
//!
//! `cargo lab test --e2e fault -- --fault-rounds 200` visits every point with every victim twice.

use std::{collections::BTreeMap, time::Duration};

use anyhow::{Context as _, Result, bail, ensure};
use hermitage_storage::faults::{Point, Process};

use crate::{
    harness::{
        Story,
        account::Account,
        faults::{Faults, Victim},
        same, says,
        terminal::Terminal,
    },
    runner::{Test, test},
};

pub const TESTS: [Test; 2] = [
    test("a_fault_at_any_point_brings_back_a_whole_machine", 7200, deaths),
    test("a_save_that_fails_harms_nothing_and_is_told", 900, failing_saves),
];

/// Between two looks at the disk.
const LOOK: u32 = 25;

fn deaths(story: &Story) -> Result<()> {
    let faults = Faults::new(story)?;
    let alice = story.account_with("alice", &["--linger 1"])?;
    let rounds = story.world.options.fault_rounds;
    let mut deck = deck(story);
    let mut struck: BTreeMap<&str, u64> = BTreeMap::new();
    let mut counts: BTreeMap<String, (u64, u64)> = BTreeMap::new();
    let (mut resumed, mut cold) = (0, 0);
    let mut shell = back(&alice)?.0;
    let mut boot = shell.run(BOOT)?.trim().to_owned();
    for round in 1..=rounds {
        if deck.is_empty() {
            deck = self::deck(story);
        }
        let (point, victim) = deck.pop().context("a deck has cards")?;
        let what = || format!("round {round} of {rounds}, {victim:?} at {}", point.name());
        let told = die(story, &faults, &alice, shell, round, point, victim).with_context(what)?;
        *struck.entry(point.name()).or_default() += 1;
        let (again, words) = back(&alice).with_context(what)?;
        shell = again;
        let now = seen(&mut shell, round).with_context(what)?;
        match now.memory {
            true => {
                same("the boot of the same memory", now.boot.clone(), boot).with_context(what)?
            }
            false => {
                ensure!(now.boot != boot, "{}: the same boot without its memory", what());
                says(&format!("{}: the login line", what()), &(told + &words), "cold start")?;
            }
        }
        *(if now.memory { &mut resumed } else { &mut cold }) += 1;
        boot = now.boot;
        if round % LOOK == 0 || round == rounds {
            shell.cut()?;
            in_order(story, &alice).with_context(what)?;
            for (name, (passed, acted)) in faults.count()? {
                let count = counts.entry(name).or_default();
                *count = (count.0 + passed, count.1 + acted);
            }
            shell = back(&alice)?.0;
        }
    }
    println!("    {rounds} rounds: {resumed} with their memory, {cold} from the disk");
    if rounds as usize >= self::deck(story).len() {
        for point in points() {
            let (passed, acted) = counts.get(point.name()).copied().unwrap_or_default();
            println!("    {:<16} passed {passed:4} times, {acted:3} with a fault", point.name());
            ensure!(struck.contains_key(point.name()), "{} was never struck", point.name());
        }
    }
    Ok(())
}

/// Those that a save and a resume pass.
fn points() -> impl Iterator<Item = Point> {
    Point::ALL.iter().copied().filter(|point| point.process() != Process::Rest)
}

/// Every point with every victim, shuffled.
fn deck(story: &Story) -> Vec<(Point, Victim)> {
    let mut deck: Vec<_> = points()
        .flat_map(|point| {
            let other = match point.process() {
                Process::Machine => Victim::Service,
                Process::Serve | Process::Rest => Victim::Machine,
            };
            [Victim::Itself, other, Victim::Both].map(|victim| (point, victim))
        })
        .collect();
    for end in (1..deck.len()).rev() {
        deck.swap(end, story.world.random() as usize % (end + 1));
    }
    deck
}

const BOOT: &str = "cat /proc/sys/kernel/random/boot_id";

/// A shell that answers, and what was shown before.
fn back<'a>(alice: &Account<'a>) -> Result<(Terminal<'a>, String)> {
    let mut shell = alice.login().terminal(None, 80, 24)?;
    // Taken up or new: a line of its own either way.
    shell.send("\necho he''re $((6*7))\n")?;
    let words = shell.expect("here 42", 90)?;
    Ok((shell, words))
}

/// Works, leaves, and has somebody die at the point. What a login that it met was shown.
fn die(
    story: &Story,
    faults: &Faults<'_>,
    alice: &Account<'_>,
    mut shell: Terminal<'_>,
    round: u32,
    point: Point,
    victim: Victim,
) -> Result<String> {
    shell.run(&format!(
        "echo {round} > /dev/shm/n; echo {round} > ~/n.new; mv ~/n.new ~/n; sync ~/n ~"
    ))?;
    if let Some(before) = on_the_way_out(point) {
        faults.plan_death(before, point, victim)?;
        shell.cut()?;
        faults.strike(alice, point, victim)?;
        return Ok(String::new());
    }
    let before: &[&str] = match point {
        // A snapshot that is refused.
        Point::AsideRename | Point::AsideDone => &["resume.checked eio"],
        _ => &[],
    };
    shell.cut()?;
    wait_saved(story, alice)?;
    faults.plan_death(before, point, victim)?;
    let mut login = alice.login().terminal(None, 80, 24)?;
    faults.strike(alice, point, victim)?;
    let told = login.look(Duration::from_millis(300))?;
    login.cut()?;
    Ok(told)
}

/// What has to happen before, for a point that is passed when a machine is saved.
fn on_the_way_out(point: Point) -> Option<&'static [&'static str]> {
    let name = point.name();
    match name.split_once('.').map(|(step, _)| step) {
        Some("save" | "publish") => Some(&[]),
        // A save that fails as late as it can.
        Some("withdraw") => Some(&["publish.dir-sync eio"]),
        _ => None,
    }
}

struct Seen {
    /// The memory of the last round is there.
    memory: bool,
    boot: String,
}

/// What was synced is there, in the guest's cache and on its disk alike.
fn seen(shell: &mut Terminal<'_>, round: u32) -> Result<Seen> {
    let text = shell.run(&format!(
        "cat ~/n; dd if=$HOME/n iflag=direct bs=4096 status=none; \
         cat /dev/shm/n 2>/dev/null || echo none; {BOOT}"
    ))?;
    let words: Vec<&str> = text.split_whitespace().collect();
    let [cached, on_disk, memory, boot] = words[..] else { bail!("odd answer {text:?}") };
    let wanted = round.to_string();
    same("what was synced", cached, &wanted)?;
    same("what was synced, on the disk itself", on_disk, &wanted)?;
    ensure!(memory == wanted || memory == "none", "stale memory: {text:?}");
    Ok(Seen { memory: memory == wanted, boot: boot.to_owned() })
}

fn wait_saved(story: &Story, alice: &Account<'_>) -> Result<()> {
    story.wait_for("the machine to be saved", 60, || {
        let account = story.host().hermitage_json(&format!("account show {}", alice.name))?;
        Ok((account["machine_state"] == "saved").then_some(()))
    })
}

/// A disk whose machine sleeps is as after an unmount: there is not even a journal to replay.
fn in_order(story: &Story, alice: &Account<'_>) -> Result<()> {
    wait_saved(story, alice)?;
    let checked = story.host().try_run(&format!("e2fsck -fn {} 2>&1", alice.disk()))?;
    ensure!(checked.code() == Some(0), "e2fsck: {:?} {}", checked.code(), checked.out());
    Ok(())
}

/// Errors of the medium, at each step of a save. After one the machine runs on and is saved a little
/// later; after two it is powered off in order, and she is told.
fn failing_saves(story: &Story) -> Result<()> {
    const CASES: [(&str, &str); 9] = [
        ("save.pages enospc", "No space left"),
        ("publish.tag-sync eio", "Input/output error"),
        ("save.create enospc", "No space left"),
        ("save.disk eio", "Input/output error"),
        ("save.index enospc", "No space left"),
        ("save.sync eio", "Input/output error"),
        ("publish.tag enospc", "No space left"),
        ("publish.rename eio", "Input/output error"),
        ("publish.dir-sync eio", "Input/output error"),
    ];
    let faults = Faults::new(story)?;
    let alice = story.account_with("alice", &["--linger 1"])?;
    let mut shell = back(&alice)?.0;
    let all = story.world.options.fault_rounds as usize >= 10 * CASES.len();
    for (n, (fault, words)) in CASES.iter().enumerate().take(if all { CASES.len() } else { 2 }) {
        let n = n as u32 + 1;
        let work = format!("echo {n} > /dev/shm/n; echo {n} > ~/n; echo $$");
        let pid = shell.run(&work)?;
        faults.plan(&[fault])?;
        shell.cut()?;
        in_order(story, &alice).context(*fault)?;
        let (again, told) = back(&alice)?;
        shell = again;
        says(fault, &told, "resumed from ")?;
        ensure!(seen(&mut shell, n)?.memory, "{fault}: her machine did not go on");
        same("her shell", shell.run("echo $$")?, pid)?;

        faults.plan(&[fault, fault])?;
        shell.cut()?;
        story.wait_for("the machine to be stopped", 60, || {
            let account = story.host().hermitage_json(&format!("account show {}", alice.name))?;
            Ok((account["machine_state"] == "stopped").then_some(()))
        })?;
        let (again, told) = back(&alice)?;
        shell = again;
        says(fault, &told, "cold start: your machine's memory could not be saved")?;
        says(fault, &told.replace("\r\n", ""), words)?;
        ensure!(!seen(&mut shell, n)?.memory, "{fault}: memory that was not saved");
    }
    Ok(())
}
