//! `hermitage doctor`: whether this host can do what is asked of it, and what to do if not.
//!
//! Every finding that is not fine names the next step. Nothing is changed by looking.

mod host;
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

struct Finding {
    check: &'static str,
    level: Level,
    /// What was seen.
    found: String,
    /// What to do; empty if nothing.
    advice: String,
}

impl Finding {
    fn ok(check: &'static str, found: impl Into<String>) -> Self {
        Self { check, level: Level::Ok, found: found.into(), advice: String::new() }
    }

    fn warning(check: &'static str, found: impl Into<String>, advice: impl Into<String>) -> Self {
        Self { check, level: Level::Warning, found: found.into(), advice: advice.into() }
    }

    fn failure(check: &'static str, found: impl Into<String>, advice: impl Into<String>) -> Self {
        Self { check, level: Level::Failure, found: found.into(), advice: advice.into() }
    }

    fn json(&self) -> Value {
        json!({
            "check": self.check,
            "level": self.level.name(),
            "found": self.found,
            "advice": self.advice,
        })
    }
}

pub fn run(context: &Context) -> anyhow::Result<()> {
    let mut findings = host::check(context);
    findings.extend(state::check(context));
    let worst = findings.iter().map(|finding| finding.level).max().unwrap_or(Level::Ok);
    let object = json!({
        "healthy": worst != Level::Failure,
        "findings": findings.iter().map(Finding::json).collect::<Vec<_>>(),
    });
    context.out.show(&object, || text(&findings, worst))?;
    if worst == Level::Failure { Err(Said.into()) } else { Ok(()) }
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
