//! Processes that die between any two steps of a snapshot's way in and out, and power that is cut there:
//! invariants 2, 3 and 5 hold for whoever opens the account next.
//!
//! The parent plans a fault and runs [`life`] in a process of its own, which uses an account as `serve` and
//! a machine do until the fault strikes; then it looks at what is there. In the second test the account lies
//! in a file system in a file. That file is copied when the process has died and before the kernel wrote
//! anything more to it: what was not synced is lost, as at a power cut. (Not modelled: a disk that loses
//! writes from its own cache which it had confirmed.)
//!
//! `CRASH_ROUNDS=5000 cargo test -p hermitage-storage --test crash -- --nocapture` for more of it.

mod checkpoints;
mod life;
mod medium;

use hermitage_storage::disk::{self, Tag};
use hermitage_storage::faults::{Point, Process, VARIABLE};
use hermitage_storage::saved::{self, Found};
use hermitage_storage::snapshot::Snapshot;
use life::{Account, Random};
use medium::{Folder, Medium, PowerCut};
use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::os::unix::fs::{DirBuilderExt as _, PermissionsExt as _};
use std::os::unix::process::ExitStatusExt as _;
use std::path::Path;
use std::process::{Command, Output};
use std::sync::{Mutex, MutexGuard, PoisonError};

/// Where the child finds its account. Set: this process is the child.
const ACCOUNT: &str = "HERMITAGE_CRASH_ACCOUNT";
const SEED: &str = "HERMITAGE_CRASH_SEED";

/// The points that this crate passes by itself; the others are in the machine's process.
fn points() -> Vec<Point> {
    let elsewhere = |point: &Point| {
        !matches!(
            point,
            Point::SaveDisk
                | Point::SaveTold
                | Point::ResumeChecked
                | Point::ResumeBuilt
                | Point::ResumeTold
                | Point::ResumeGo
                | Point::ResumeRuns
        )
    };
    let asleep = |point: &Point| point.process() != Process::Rest;
    Point::ALL.iter().copied().filter(elsewhere).filter(asleep).collect()
}

/// Runs one of the lives, a test by its name, in a process of its own, in which faults strike as planned.
fn live_and_die(life: &str, account: &Path, seed: u64, faults: &Path, plan: &str) -> Output {
    fs::write(faults.join("plan"), plan).unwrap();
    fs::write(faults.join("log"), "").unwrap();
    Command::new(std::env::current_exe().unwrap())
        .args([life, "--exact", "--nocapture"])
        .env(ACCOUNT, account)
        .env(SEED, seed.to_string())
        .env(VARIABLE, faults)
        .output()
        .unwrap()
}

/// Not a test of its own: what the parents run.
#[test]
fn life() {
    if let Some(root) = std::env::var_os(ACCOUNT) {
        let seed = std::env::var(SEED).ok().and_then(|seed| seed.parse().ok()).unwrap_or(0);
        life::live(Account::new(root.as_ref()), seed);
    }
}

#[test]
fn a_process_that_dies_anywhere_leaves_memory_and_disk_in_step() {
    let folder = medium::dir();
    Trial::new(Folder(folder.path().to_owned())).run(rounds(500));
}

#[test]
fn a_power_cut_anywhere_leaves_memory_and_disk_in_step() {
    match PowerCut::new() {
        Ok(medium) => Trial::new(medium).run(rounds(120)),
        Err(reason) => {
            eprintln!("SKIPPED: no file system of our own to cut the power of: {reason}")
        }
    }
}

/// One trial at a time: between fork and exec a child that the other one starts has a copy of every
/// descriptor, and with it the lock of a disk that its owner has closed.
fn alone() -> MutexGuard<'static, ()> {
    static ALONE: Mutex<()> = Mutex::new(());
    ALONE.lock().unwrap_or_else(PoisonError::into_inner)
}

fn rounds(usual: u64) -> u64 {
    std::env::var("CRASH_ROUNDS").ok().and_then(|rounds| rounds.parse().ok()).unwrap_or(usual)
}

struct Trial<M> {
    medium: M,
    faults: tempfile::TempDir,
    random: Random,
    /// Snapshots that were used up, of all rounds.
    resumed: BTreeSet<Tag>,
    /// What the machine had synced when it last told of it.
    synced: u64,
    struck: BTreeMap<&'static str, u64>,
    usable: u64,
}

impl<M: Medium> Trial<M> {
    fn new(medium: M) -> Self {
        let account = Account::new(medium.root());
        account.make();
        let faults = tempfile::tempdir().unwrap();
        fs::set_permissions(faults.path(), fs::Permissions::from_mode(0o700)).unwrap();
        let random = Random(0x5eed);
        let (resumed, struck) = Default::default();
        Self { medium, faults, random, resumed, synced: 0, struck, usable: 0 }
    }

    fn run(mut self, rounds: u64) {
        let _alone = alone();
        let points = points();
        for round in 0..rounds {
            let point = points[round as usize % points.len()];
            self.round(round, point);
        }
        println!(
            "{rounds} rounds, {} snapshots resumed, {} left usable by a crash",
            self.resumed.len(),
            self.usable
        );
        for point in &points {
            let times = self.struck.get(point.name()).copied().unwrap_or(0);
            println!("{times:6} × {}", point.name());
            assert!(times > 0, "{} never struck in {rounds} rounds", point.name());
        }
        assert!(self.usable > 0 && !self.resumed.is_empty(), "nothing was ever resumed");
    }

    fn round(&mut self, round: u64, point: Point) {
        let told = |what: &str| format!("round {round}, {}: {what}", point.name());
        let (plan, seed) = (self.plan(point), self.random.next());
        let child = live_and_die("life", self.medium.root(), seed, self.faults.path(), &plan);
        let said = String::from_utf8_lossy(&child.stdout).into_owned();
        let log = fs::read_to_string(self.faults.path().join("log")).unwrap();
        let status = child.status;
        let ended = status.signal() == Some(9) || status.success();
        assert!(
            ended,
            "{}",
            told(&format!("{status}\n{said}{}", String::from_utf8_lossy(&child.stderr)))
        );
        if status.signal() == Some(9) {
            let line = log.lines().last().unwrap_or_default();
            assert!(line.ends_with(" kill"), "{}", told("it was somebody else who killed it"));
            *self.struck.entry(point.name()).or_default() += 1;
            self.medium.crash(self.random.next());
        }
        for line in said.lines() {
            if let Some(synced) = line.strip_prefix("synced ") {
                self.synced = synced.parse().unwrap();
            } else if let Some(tag) = line.strip_prefix("resumed ") {
                let tag = u128::from_str_radix(tag, 16).unwrap().to_be_bytes();
                assert!(self.resumed.insert(tag), "{}", told("a snapshot was resumed twice"));
            }
        }
        let usable = self.look(&told);
        // A save that came to its end was not in vain.
        let saved = point == Point::PublishDone && status.signal() == Some(9);
        assert!(usable || !saved, "{}", told("what was saved is not there"));
    }

    /// Death at the point, sometimes at its second or third time, and sometimes after something failed.
    fn plan(&mut self, point: Point) -> String {
        let name = point.name();
        let passes = if name.starts_with("aside") { 0 } else { self.random.below(3) };
        let kill = format!("{name} kill {passes}\n");
        let error = *self.random.one_of(&["eio", "enospc"]);
        let before = match point {
            // A snapshot that can't be opened.
            Point::AsideRename | Point::AsideDone => {
                format!("resume.find eio {}\n", 1 + self.random.below(2))
            }
            _ if self.random.below(4) == 0 => {
                let other = *self.random.one_of(&points());
                format!("{} {error} {}\n", other.name(), self.random.below(3))
            }
            _ => String::new(),
        };
        before + &kill
    }

    /// What the next `serve` finds; whether there is something to resume.
    fn look(&mut self, told: &dyn Fn(&str) -> String) -> bool {
        let account = Account::new(self.medium.root());
        let disk = disk::open_locked(&account.disk())
            .unwrap_or_else(|e| panic!("{}", told(&e.to_string())));
        let on_disk = account.generation(&disk);
        assert!(on_disk >= self.synced, "{}", told("what was synced is not there"));
        let Found::Usable(file, header) = saved::find(&account.state, account.id, &disk) else {
            return false;
        };
        self.usable += 1;
        let snapshot = Snapshot::open(file).unwrap_or_else(|e| panic!("{}", told(&e.to_string())));
        let memory = life::memory(&snapshot);
        assert_eq!(memory, on_disk, "{}", told("memory is not of this disk"));
        let used = self.resumed.contains(&header.description.disk_tag);
        assert!(!used, "{}", told("a used snapshot can be used again"));
        true
    }
}

fn private_dir(path: &std::path::Path) {
    fs::DirBuilder::new().recursive(true).mode(0o700).create(path).unwrap();
}
