//! `hermitage doctor`: whether this host can do what is asked of it, and what to do if not.
//!
//! Every finding that is not fine names the next step. Nothing is changed by looking; `--fix` does what is safe
//! whatever runs, says what it did, and has nothing to do the second time.

mod environment;
mod host;
mod repairs;
mod state;

use super::context::Context;
use super::{Said, output::table};
use serde_json::{Value, json};

#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
enum Level {
    Ok,
    /// It works; something is slower or riskier than need be, or not done yet.
    Warning,
    /// No machine can be run, or nobody can log in.
    Failure,
}

impl Level {
    fn name(self) -> &'static str {
        match self {
            Level::Ok => "ok",
            Level::Warning => "warning",
            Level::Failure => "failure",
        }
    }
}

/// What makes a base. Said once of each that can't be used.
const MAKE_BASE: &str = "hermitage base build";

struct Finding {
    check: &'static str,
    level: Level,
    /// What was seen.
    found: String,
    /// What to do; empty if nothing.
    advice: String,
    /// What `--fix` does about it.
    fix: Option<Fix>,
}

/// Something that can't do harm.
struct Fix {
    /// What it is, as a command would be given: `set the mode of … to 0700`.
    words: String,
    run: Box<Repair>,
}

type Repair = dyn FnOnce(&Context) -> anyhow::Result<()>;

impl Finding {
    fn ok(check: &'static str, found: impl Into<String>) -> Self {
        Self { check, level: Level::Ok, found: found.into(), advice: String::new(), fix: None }
    }

    fn warning(check: &'static str, found: impl Into<String>, advice: impl Into<String>) -> Self {
        let (found, advice) = (found.into(), advice.into());
        Self { check, level: Level::Warning, found, advice, fix: None }
    }

    fn failure(check: &'static str, found: impl Into<String>, advice: impl Into<String>) -> Self {
        let (found, advice) = (found.into(), advice.into());
        Self { check, level: Level::Failure, found, advice, fix: None }
    }

    /// A warning that `--fix` takes away; the words are its advice as well.
    fn fixable(
        check: &'static str,
        found: impl Into<String>,
        words: impl Into<String>,
        run: impl FnOnce(&Context) -> anyhow::Result<()> + 'static,
    ) -> Self {
        let words = words.into();
        let advice = format!("hermitage doctor --fix would {words}");
        let fix = Some(Fix { words, run: Box::new(run) });
        Self { check, level: Level::Warning, found: found.into(), advice, fix }
    }

    fn json(&self) -> Value {
        json!({
            "check": self.check,
            "level": self.level.name(),
            "found": self.found,
            "advice": self.advice,
            "fix": self.fix.as_ref().map(|fix| &fix.words),
        })
    }
}

pub const HELP: &str = "\
--fix does what can do no harm, whatever runs meanwhile: modes of folders and files, folders that are missing, what
killed commands left half-made, sockets of a service that is gone, a daily copy of the database that is due. It says each
thing that it did, and leaves the rest to you.";

#[derive(Debug, clap::Args)]
pub struct Doctor {
    /// Also do what is safe
    #[arg(long)]
    pub fix: bool,
}

pub fn run(context: &Context, doctor: &Doctor) -> anyhow::Result<()> {
    let mut done = Vec::new();
    if doctor.fix {
        for fix in state::check(context).into_iter().filter_map(|finding| finding.fix) {
            let Fix { words, run } = fix;
            let outcome = run(context).err().map(|error| format!("{error:#}"));
            context.detail(words.clone());
            done.push((words, outcome));
        }
    }
    // As it is now.
    let mut findings = host::check(context);
    findings.extend(environment::check(context));
    findings.extend(state::check(context));
    findings.extend(host::base(context, &findings));
    let worst = findings.iter().map(|finding| finding.level).max().unwrap_or(Level::Ok);
    let object = json!({
        "healthy": worst != Level::Failure,
        "findings": findings.iter().map(Finding::json).collect::<Vec<_>>(),
        "fixes": done.iter().map(|(words, error)| json!({ "did": words, "error": error })).collect::<Vec<_>>(),
    });
    context.out.show(&object, || {
        let mut text = text(&findings, worst);
        if doctor.fix {
            text = format!("{}\n{text}", told(&done));
        }
        text
    })?;
    let failed = done.iter().any(|(_, error)| error.is_some());
    if failed || worst == Level::Failure { Err(Said.into()) } else { Ok(()) }
}

fn told(done: &[(String, Option<String>)]) -> String {
    if done.is_empty() {
        return "There was nothing to fix.\n".into();
    }
    let line = |(words, error): &(String, Option<String>)| match error {
        None => format!("fixed: {words}\n"),
        Some(error) => format!("could not {words}: {error}\n"),
    };
    done.iter().map(line).collect()
}

fn text(findings: &[Finding], worst: Level) -> String {
    let mut table = table(["CHECK", "", "FOUND"]);
    for finding in findings {
        table.add_row([finding.check, finding.level.name(), &finding.found]);
        if !finding.advice.is_empty() {
            table.add_row(["", "→", &finding.advice]);
        }
    }
    let end = match worst {
        Level::Ok => "All is well.",
        Level::Warning => "Machines can be run; see the warnings.",
        Level::Failure => "Something is missing before accounts can log in: see the failures.",
    };
    format!("{}\n\n{end}", table.trim_fmt())
}
