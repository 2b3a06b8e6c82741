//! Runs the stories one after another and says how each went.
//!
//! One at a time, because several of them kill the service or measure its memory; and with two emulated
//! CPUs nothing would be faster in parallel.

use std::{
    io::Write as _,
    path::Path,
    sync::{Arc, mpsc},
    thread,
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result, bail};

use crate::{
    Options,
    harness::{SPINNING, Story, World},
    stories,
};

/// What tells of a nested guest that died by itself: the service's log, of one that reset itself
/// (KVM_EXIT_SHUTDOWN), and what [`World::evidence`] adds of one that does nothing but fault.
const DIED: [&str; 2] = ["the machine reset itself", SPINNING];

/// More than 1 % of the machines of a run, of which each test starts two or three.
const MOST_RETRIED: usize = 2;

/// Likewise of forks that the service itself makes once more.
const MOST_LOST: usize = 5;

/// Lines of the service's log that are shown of a test that failed.
const SHOWN: usize = 40;

/// A test: its name, how long it may take with patience 1, and what it does.
pub struct Test {
    pub name: &'static str,
    pub limit: Duration,
    pub story: fn(&Story) -> Result<()>,
}

pub const fn test(name: &'static str, seconds: u64, story: fn(&Story) -> Result<()>) -> Test {
    Test { name, limit: Duration::from_secs(seconds), story }
}

/// Returned by a story that can't be told here. Not a failure, but never silent.
#[derive(Debug)]
pub struct Skip(pub String);

impl std::fmt::Display for Skip {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(&self.0)
    }
}

impl std::error::Error for Skip {}

/// Ends a story as skipped.
pub fn skip<T>(why: impl Into<String>) -> Result<T> {
    Err(Skip(why.into()).into())
}

enum Outcome {
    Passed,
    Failed { why: String, evidence: String },
    Skipped(String),
}

struct Done {
    name: &'static str,
    outcome: Outcome,
    seconds: f64,
    /// Why it was told a second time.
    retried: Option<String>,
}

/// True if nothing failed.
pub fn run(options: &Options) -> Result<bool> {
    let tests: Vec<Test> = stories::all()
        .into_iter()
        .filter(|test| {
            options.filter.is_empty() || options.filter.iter().any(|part| test.name.contains(part))
        })
        .collect();
    if options.list {
        for test in &tests {
            println!("{}", test.name);
        }
        return Ok(true);
    }
    if tests.is_empty() {
        bail!("no test's name contains {:?}; --list shows them", options.filter);
    }
    if let Some(dir) = &options.results {
        std::fs::create_dir_all(dir)
            .with_context(|| format!("can't make the results folder {}", dir.display()))?;
    }
    let world = Arc::new(World::new(options)?);
    println!("seed {}, patience {}", world.seed, options.patience);

    let mut done = Vec::new();
    for test in tests {
        print!("{:<44} ", test.name);
        std::io::stdout().flush().ok();
        let result = one_patiently(&world, &test);
        println!("{}", line(&result));
        if let Outcome::Failed { why, evidence } = &result.outcome {
            let report = format!("{why}\n\n{evidence}");
            for text in why.lines().chain(last_of_log(evidence)) {
                println!("    {text}");
            }
            if let Some(dir) = &options.results {
                let path = dir.join(format!("{}.log", result.name));
                std::fs::write(&path, report)
                    .with_context(|| format!("can't write {}", path.display()))?;
            }
        }
        done.push(result);
    }
    if let Some(dir) = &options.results {
        write_json(dir, &done)?;
    }
    let retried = done.iter().filter(|d| d.retried.is_some()).count();
    if retried > MOST_RETRIED {
        println!("{retried} tests met a nested guest that died by itself; {MOST_RETRIED} may");
    } else if retried > 0 {
        println!("{retried} retried, as a nested guest had died by itself");
    }
    let lost = world.lost_forks();
    match &lost {
        Ok(0) => {}
        Ok(lost) => println!(
            "{lost} forks were lost before they were ready, and made once more by the service; {MOST_LOST} may"
        ),
        Err(error) => println!("nobody knows how many forks were lost: {error:#}"),
    }
    let count = |what: fn(&Outcome) -> bool| done.iter().filter(|d| what(&d.outcome)).count();
    let failed = count(|o| matches!(o, Outcome::Failed { .. }));
    println!(
        "{} passed, {failed} failed, {} skipped",
        count(|o| matches!(o, Outcome::Passed)),
        count(|o| matches!(o, Outcome::Skipped(_))),
    );
    Ok(failed == 0 && retried <= MOST_RETRIED && lost.is_ok_and(|lost| lost <= MOST_LOST))
}

/// A nested guest of an emulated CPU dies by itself about once in 250 (docs/lab.md): the machine resets
/// with nobody having asked, or takes the same fault for ever. A test that failed and had such a machine is
/// told once more; anything else is a failure at once.
fn one_patiently(world: &Arc<World>, test: &Test) -> Done {
    let first = one(world, test);
    let Outcome::Failed { why, evidence } = &first.outcome else { return first };
    let died = evidence.lines().find(|line| DIED.iter().any(|sign| line.contains(sign)));
    let Some(died) = died.filter(|_| world.options.emulated) else { return first };
    println!("retried  {:6.1} s", first.seconds);
    println!("    {died}\n    {}", why.replace('\n', "\n    "));
    print!("{:<44} ", test.name);
    std::io::stdout().flush().ok();
    Done { retried: Some(died.to_owned()), ..one(world, test) }
}

/// Runs one test in a thread of its own: a panic in it is its failure, and one that does not heed its
/// deadline is left behind instead of holding up the others.
fn one(world: &Arc<World>, test: &Test) -> Done {
    let limit = world.patient(test.limit);
    let begun = Instant::now();
    let (sender, receiver) = mpsc::channel();
    let story = Story::new(world.clone(), begun + limit);
    let tell = test.story;
    let handle = thread::spawn(move || {
        let result = tell(&story);
        // Before cleaning up, while what there is to see is there.
        let failed = result.as_ref().is_err_and(|error| error.downcast_ref::<Skip>().is_none());
        let evidence = if failed { story.world.evidence(&story.accounts()) } else { String::new() };
        let result = result.and(story.finish());
        // The receiver is gone when this test was given up.
        let _ = sender.send((result, evidence));
    });
    let failed = |why: String, evidence: String| Outcome::Failed { why, evidence };
    // Every wait of a story ends at its deadline; what is added is for evidence and cleaning up.
    let outcome = match receiver.recv_timeout(limit + world.patient(Duration::from_secs(90))) {
        Ok((Ok(()), _)) => Outcome::Passed,
        Ok((Err(error), evidence)) => match error.downcast_ref::<Skip>() {
            Some(skip) => Outcome::Skipped(skip.0.clone()),
            None => failed(format!("{error:#}"), evidence),
        },
        Err(mpsc::RecvTimeoutError::Disconnected) => {
            let panic = handle.join().err();
            let text = panic
                .as_ref()
                .and_then(|p| p.downcast_ref::<String>().map(String::as_str))
                .or_else(|| panic.as_ref().and_then(|p| p.downcast_ref::<&str>().copied()));
            let why = format!("panicked: {}", text.unwrap_or("no message"));
            failed(why, world.evidence(&[]))
        }
        Err(mpsc::RecvTimeoutError::Timeout) => {
            let why = format!("did not end within {} s and was given up", limit.as_secs());
            failed(why, world.evidence(&[]))
        }
    };
    Done { name: test.name, outcome, seconds: begun.elapsed().as_secs_f64(), retried: None }
}

/// The service's log is the last of the evidence. Whoever reads this elsewhere has no other.
fn last_of_log(evidence: &str) -> impl Iterator<Item = &str> {
    let lines: Vec<_> = evidence.lines().collect();
    let from = lines.len().saturating_sub(SHOWN);
    lines.into_iter().skip(from)
}

fn line(done: &Done) -> String {
    match &done.outcome {
        Outcome::Passed => format!("ok       {:6.1} s", done.seconds),
        Outcome::Failed { .. } => format!("FAILED   {:6.1} s", done.seconds),
        Outcome::Skipped(why) => format!("skipped  {:6.1} s  {why}", done.seconds),
    }
}

fn write_json(dir: &Path, done: &[Done]) -> Result<()> {
    let rows: Vec<_> = done
        .iter()
        .map(|done| {
            let (outcome, detail) = match &done.outcome {
                Outcome::Passed => ("passed", None),
                Outcome::Failed { why, .. } => ("failed", Some(why)),
                Outcome::Skipped(why) => ("skipped", Some(why)),
            };
            serde_json::json!({
                "test": done.name, "outcome": outcome, "detail": detail, "seconds": done.seconds,
                "retried": done.retried,
            })
        })
        .collect();
    let path = dir.join("results.json");
    std::fs::write(&path, serde_json::to_vec_pretty(&rows)?)
        .with_context(|| format!("can't write {}", path.display()))
}
