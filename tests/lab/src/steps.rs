//! What a person sees while `cargo lab` works: one line a step, with the time it took.

use std::io::{IsTerminal, Write, stderr};
use std::time::Instant;

use anyhow::{Context, Result};

/// Does one step of the work and prints how long it took.
pub fn step<T>(what: &str, work: impl FnOnce() -> Result<T>) -> Result<T> {
    let terminal = stderr().is_terminal();
    let mut out = stderr().lock();
    // Printing must never be why the work fails: a closed pipe is not an error here.
    if terminal {
        let _ = write!(out, "  …        {what}");
        let _ = out.flush();
    }
    drop(out);
    let start = Instant::now();
    let result = work();
    let time = start.elapsed().as_secs_f64();
    let mark = if result.is_ok() { "" } else { "  FAILED" };
    let back = if terminal { "\r" } else { "" };
    let _ = writeln!(stderr(), "{back}  {time:6.1} s {what}{mark}");
    result.with_context(|| what.to_owned())
}

/// Says that there was nothing to do.
pub fn skip(what: &str, why: &str) {
    let _ = writeln!(stderr(), "       –   {what}: {why}");
}

pub fn note(text: &str) {
    let _ = writeln!(stderr(), "{text}");
}
