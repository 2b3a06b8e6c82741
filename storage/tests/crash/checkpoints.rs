//! Checkpoints that are taken and gone back to by processes that die between any two steps, and power that is
//! cut there. A *state* is known by its generation, a number on its disk that is the same in its memory.
//!
//! Whatever dies: there is a disk, memory is of its disk wherever the two lie together, and no state that
//! was kept or replaced is lost (docs/formats/checkpoint.md).

use crate::life::{self, Account, Random};
use crate::medium::{self, Folder, Medium, PowerCut};
use crate::{ACCOUNT, SEED, live_and_die};
use hermitage_storage::checkpoint::{self, Known, Name};
use hermitage_storage::disk;
use hermitage_storage::faults::{Point, Process};
use hermitage_storage::rest::AtRest;
use hermitage_storage::saved;
use hermitage_storage::snapshot::Snapshot;
use std::collections::BTreeMap;
use std::fs::{self, File};
use std::os::unix::fs::{FileExt as _, PermissionsExt as _};
use std::os::unix::process::ExitStatusExt as _;

const ROOM: u64 = 1 << 30;
/// Checkpoints that the child lets there be.
const FEW: usize = 4;

/// Not a test of its own: what the parents run.
#[test]
fn keeping_states() {
    if let Some(root) = std::env::var_os(ACCOUNT) {
        let seed = std::env::var(SEED).ok().and_then(|seed| seed.parse().ok()).unwrap_or(0);
        hermitage_storage::faults::arm().unwrap();
        keep_states(&Account::new(root.as_ref()), Random(seed), seed);
    }
}

#[test]
fn a_process_that_dies_anywhere_loses_no_state() {
    let folder = medium::dir();
    Trial::new(Folder(folder.path().to_owned())).run(crate::rounds(100));
}

#[test]
fn a_power_cut_anywhere_loses_no_state() {
    match PowerCut::new() {
        Ok(medium) => Trial::new(medium).run(crate::rounds(40)),
        Err(reason) => {
            eprintln!("SKIPPED: no file system of our own to cut the power of: {reason}")
        }
    }
}

fn points() -> Vec<Point> {
    Point::ALL.iter().copied().filter(|point| point.process() == Process::Rest).collect()
}

fn rest(account: &Account) -> AtRest {
    AtRest::take(&account.state, account.id).unwrap()
}

fn states(account: &Account) -> BTreeMap<String, u64> {
    let all = checkpoint::list(&account.state, account.id).unwrap();
    let dir = account.state.checkpoints_dir(account.id);
    let of = |name: &Name| {
        account.generation(&File::open(dir.join(name.as_str()).join("disk.img")).unwrap())
    };
    all.into_iter().map(|one| (one.name.to_string(), of(&one.name))).collect()
}

/// What the child does, telling of each step before and after it.
fn keep_states(account: &Account, mut random: Random, seed: u64) {
    let (state, id) = (&account.state, account.id);
    // Larger than all that others have drawn.
    let mut generation = account.generation(&rest(account).disk);
    generation = generation.max(states(account).values().copied().max().unwrap_or(0));
    for step in 0..12 {
        generation += 1;
        live(account, generation, &mut random);
        life::tell(&format!("live {generation}"));
        let there = states(account);
        let name = Name::parse(&format!("c{:x}-{step}", seed as u32)).unwrap();
        let mut names: Vec<&String> = there.keys().collect();
        if names.len() >= FEW {
            let goes = Name::parse(names.remove(random.below(FEW as u64) as usize)).unwrap();
            life::tell(&format!("removing {goes}"));
            if checkpoint::remove(state, id, &goes).is_ok() {
                life::tell("done");
            }
        } else if names.is_empty() || random.below(2) == 0 {
            life::tell(&format!("creating {name} {generation}"));
            let made = checkpoint::create(state, &rest(account), &name, Known::default(), 1, ROOM);
            life::tell(if made.is_ok() { "done" } else { "failed" });
        } else {
            let back = *random.one_of(&names);
            let (to, target) = (Name::parse(back).unwrap(), there[back]);
            life::tell(&format!("backing {to} {target} {name} {generation}"));
            let at_rest = rest(account);
            let made = checkpoint::rollback(state, at_rest, &to, &name, Known::default(), 1, ROOM);
            life::tell(if made.is_ok() { "done" } else { "failed" });
        }
    }
}

/// A machine works until this generation; its memory is saved, or not.
fn live(account: &Account, generation: u64, random: &mut Random) {
    let at_rest = rest(account);
    saved::withdraw(&account.state, account.id).unwrap();
    at_rest.disk.write_all_at(&generation.to_le_bytes(), 8192).unwrap();
    at_rest.disk.sync_all().unwrap();
    if random.below(3) > 0 {
        life::save(account, &at_rest.disk, generation, random, false).unwrap();
    }
}

/// What was under way when the child died.
#[derive(Debug)]
enum Step {
    None,
    Removing(String),
    Creating(String, u64),
    Backing { target: u64, keep: String, old: u64 },
}

struct Trial<M> {
    medium: M,
    faults: tempfile::TempDir,
    random: Random,
    live: u64,
    kept: BTreeMap<String, u64>,
    struck: BTreeMap<&'static str, u64>,
    resumable: u64,
}

impl<M: Medium> Trial<M> {
    fn new(medium: M) -> Self {
        Account::new(medium.root()).make();
        let faults = tempfile::tempdir().unwrap();
        fs::set_permissions(faults.path(), fs::Permissions::from_mode(0o700)).unwrap();
        let (kept, struck) = Default::default();
        Self { medium, faults, random: Random(0xc0de), live: 0, kept, struck, resumable: 0 }
    }

    fn run(mut self, rounds: u64) {
        let _alone = crate::alone();
        let points = points();
        for round in 0..rounds {
            self.round(round, points[round as usize % points.len()]);
        }
        for point in &points {
            let times = self.struck.get(point.name()).copied().unwrap_or(0);
            println!("{times:6} × {}", point.name());
            assert!(times > 0, "{} never struck in {rounds} rounds", point.name());
        }
        assert!(self.resumable > 0, "no memory was ever there to be resumed");
    }

    fn round(&mut self, round: u64, point: Point) {
        let error = *self.random.one_of(&["eio", "enospc"]);
        let before = match self.random.below(3) {
            0 => format!(
                "{} {error} {}\n",
                self.random.one_of(&points()).name(),
                self.random.below(2)
            ),
            _ => String::new(),
        };
        let plan = format!("{before}{} kill {}\n", point.name(), self.random.below(2));
        let (life, seed) = ("checkpoints::keeping_states", self.random.next());
        let child = live_and_die(life, self.medium.root(), seed, self.faults.path(), &plan);
        let said = String::from_utf8_lossy(&child.stdout).into_owned();
        let told = |what: &str| format!("round {round}, {}: {what}\n{said}", point.name());
        let killed = child.status.signal() == Some(9);
        let errors = String::from_utf8_lossy(&child.stderr).into_owned();
        assert!(killed || child.status.success(), "{}", told(&errors));
        if killed {
            *self.struck.entry(point.name()).or_default() += 1;
        }
        let step = self.follow(&said);
        if killed {
            self.medium.crash(self.random.next());
        }
        self.look(step, killed && point == Point::RollbackDone, &told);
    }

    /// What the child says that it has done, and what it had begun.
    fn follow(&mut self, said: &str) -> Step {
        let mut step = Step::None;
        for line in said.lines() {
            let words: Vec<&str> = line.split(' ').collect();
            let number = |at: usize| words[at].parse::<u64>().unwrap();
            match words[0] {
                "live" => self.live = number(1),
                "removing" => step = Step::Removing(words[1].into()),
                "creating" => step = Step::Creating(words[1].into(), number(2)),
                "backing" => {
                    let (target, old) = (number(2), number(4));
                    step = Step::Backing { target, keep: words[3].into(), old };
                }
                "done" => match std::mem::replace(&mut step, Step::None) {
                    Step::Removing(name) => drop(self.kept.remove(&name)),
                    Step::Creating(name, state) => drop(self.kept.insert(name, state)),
                    Step::Backing { target, keep, old } => {
                        self.kept.insert(keep, old);
                        self.live = target;
                    }
                    Step::None => {}
                },
                // It may have failed when it was done, all but the last sync; and is told apart at the next
                // look, or by what it left.
                "failed" => self.settle(&mut step),
                _ => {}
            }
        }
        step
    }

    /// After a failure the child goes on from either of two states; what may have been kept by it is noted
    /// with a `?`.
    fn settle(&mut self, step: &mut Step) {
        match std::mem::replace(step, Step::None) {
            Step::Creating(name, state) => drop(self.kept.insert(format!("?{name}"), state)),
            Step::Backing { keep, old, target } => {
                self.kept.insert(format!("?{keep}"), old);
                self.live = target.min(old);
            }
            other => *step = other,
        }
    }

    fn look(&mut self, step: Step, complete: bool, told: &dyn Fn(&str) -> String) {
        let account = Account::new(self.medium.root());
        let at_rest = AtRest::take(&account.state, account.id)
            .unwrap_or_else(|error| panic!("{}", told(&error.to_string())));
        let live = account.generation(&at_rest.disk);
        // Taking one completes what was cut off.
        let probe = Name::parse("probe").unwrap();
        checkpoint::create(&account.state, &at_rest, &probe, Known::default(), 1, ROOM)
            .unwrap_or_else(|error| panic!("{}", told(&error.to_string())));
        checkpoint::remove(&account.state, account.id, &probe).unwrap();
        if let Some((file, _)) = at_rest.saved() {
            let memory = Snapshot::open(file.try_clone().unwrap()).unwrap();
            assert_eq!(life::memory(&memory), live, "{}", told("memory is not of its disk"));
            self.resumable += 1;
        }
        let there = states(&account);
        for one in checkpoint::list(&account.state, account.id).unwrap() {
            let what = |what: &str| told(&format!("{}: {what}", one.name));
            let about = one.about.unwrap_or_else(|error| panic!("{}", what(&error)));
            let dir = account.state.checkpoints_dir(account.id).join(one.name.as_str());
            assert_eq!(
                about.memory.is_some(),
                dir.join("resume.snap").exists(),
                "{}",
                what("memory")
            );
            if about.memory.is_some() {
                let memory = Snapshot::open(File::open(dir.join("resume.snap")).unwrap()).unwrap();
                assert_eq!(life::memory(&memory), there[one.name.as_str()], "{}", what("stale"));
                let tag = disk::tag(&File::open(dir.join("disk.img")).unwrap()).unwrap();
                assert_eq!(tag, Some(memory.header.description.disk_tag), "{}", what("tag"));
            }
        }
        for (name, state) in &self.kept {
            let removing = matches!(&step, Step::Removing(removing) if removing == name);
            match name.strip_prefix('?') {
                Some(name) => {
                    let found = there.get(name).is_none_or(|found| found == state);
                    assert!(found, "{}", told(name));
                }
                None => {
                    let found = there.get(name).map_or(removing, |found| found == state);
                    assert!(found, "{}", told(&format!("{name} is lost: {there:?}")));
                }
            }
        }
        match step {
            Step::Backing { target, keep, old } => {
                let is_kept = there.get(&keep) == Some(&old);
                let fine =
                    (live == target && is_kept) || (live == old && !there.contains_key(&keep));
                assert!(fine, "{}", told(&format!("live {live}, kept {there:?}")));
                assert!(!complete || live == target, "{}", told("it was done and is not"));
            }
            _ => assert!(live >= self.live, "{}", told(&format!("live is {live}"))),
        }
        (self.live, self.kept) = (live, there);
    }
}
