//! Counting what test programs say they passed.

use std::fmt;
use std::io::{BufRead, BufReader, Read};
use std::process::{Command, ExitStatus, Stdio};

use anyhow::{Context, Result, bail};

#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Tally {
    pub passed: u32,
    pub failed: u32,
    pub skipped: u32,
}

impl fmt::Display for Tally {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} passed, {} failed, {} skipped", self.passed, self.failed, self.skipped)
    }
}

impl Tally {
    pub fn add(&mut self, other: Tally) {
        self.passed += other.passed;
        self.failed += other.failed;
        self.skipped += other.skipped;
    }
}

/// Reads a line for what it adds; `None`: nothing.
pub type Reader = fn(&str) -> Option<Tally>;

/// Runs a test program, passing its output on and adding up what it says.
pub fn counted(command: &mut Command, read: Reader) -> Result<(Tally, bool)> {
    let name = command.get_program().to_string_lossy().into_owned();
    let mut child = command
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .spawn()
        .with_context(|| format!("start {name}"))?;
    let output = child.stdout.take().context("the tests' output")?;
    let tally = add_up(output, &name, read)?;
    judge(tally, child.wait()?, &name)
}

/// Passes on what a program says, and adds up what that says of its tests.
pub fn add_up(output: impl Read, name: &str, read: Reader) -> Result<Tally> {
    let mut tally = Tally::default();
    let mut lines = BufReader::new(output);
    let mut line = Vec::new();
    while lines.read_until(b'\n', &mut line).with_context(|| format!("read what {name} says"))? > 0
    {
        let text = String::from_utf8_lossy(&line);
        print!("{text}");
        if let Some(said) = read(text.trim_end()) {
            tally.add(said);
        }
        line.clear();
    }
    Ok(tally)
}

/// Whether all went well; a program that fails without a failed test broke off.
pub fn judge(tally: Tally, status: ExitStatus, name: &str) -> Result<(Tally, bool)> {
    if !status.success() && tally.failed == 0 {
        bail!("{name} ended with {status} without saying that a test failed");
    }
    Ok((tally, status.success()))
}

/// `test result: ok. 7 passed; 0 failed; 1 ignored; …`
pub fn libtest(line: &str) -> Option<Tally> {
    let rest = line.strip_prefix("test result: ")?.split_once(". ")?.1;
    let number = |what: &str| {
        rest.split("; ")
            .find_map(|part| part.strip_suffix(what))
            .and_then(|n| n.trim().parse().ok())
    };
    Some(Tally {
        passed: number(" passed")?,
        failed: number(" failed")?,
        skipped: number(" ignored")?,
    })
}

/// `7 passed, 0 failed, 1 skipped`
pub fn closing_line(line: &str) -> Option<Tally> {
    let mut parts = line.split(", ");
    let mut number = |what: &str| parts.next()?.strip_suffix(what)?.parse().ok();
    let tally = Tally {
        passed: number(" passed")?,
        failed: number(" failed")?,
        skipped: number(" skipped")?,
    };
    parts.next().is_none().then_some(tally)
}

/// `ok WHAT`, `FAILED WHAT: WHY` or `skipped WHAT: WHY`: one check of a script.
pub fn check(line: &str) -> Option<Tally> {
    let none = Tally::default();
    match line.split_once(' ')?.0 {
        "ok" => Some(Tally { passed: 1, ..none }),
        "FAILED" => Some(Tally { failed: 1, ..none }),
        "skipped" => Some(Tally { skipped: 1, ..none }),
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn results_are_read() {
        let line = "test result: FAILED. 7 passed; 2 failed; 1 ignored; 0 measured; 0 filtered out; finished in 0.03s";
        assert_eq!(libtest(line), Some(Tally { passed: 7, failed: 2, skipped: 1 }));
        assert_eq!(libtest("test a ... ok"), None);
        assert_eq!(
            closing_line("3 passed, 0 failed, 2 skipped"),
            Some(Tally { passed: 3, failed: 0, skipped: 2 })
        );
        assert_eq!(closing_line("3 passed, 0 failed"), None);
        assert_eq!(closing_line("3 passed, 0 failed, 2 skipped, 1 lost"), None);
        let script = "== install\nok the user is there (1 s)\nFAILED it serves: it does not\n  | ok, a log\nok\n";
        let said = add_up(script.as_bytes(), "a script", check).unwrap();
        assert_eq!(said, Tally { passed: 1, failed: 1, skipped: 0 });
    }

    #[test]
    fn a_program_that_breaks_off_is_no_passed_test() {
        let ended = |word: &str| Command::new(word).status().unwrap();
        let tally = Tally { passed: 3, ..Tally::default() };
        assert!(judge(tally, ended("false"), "it").is_err());
        assert!(judge(tally, ended("true"), "it").unwrap().1);
        let failed = Tally { failed: 1, ..tally };
        assert!(!judge(failed, ended("false"), "it").unwrap().1);
    }
}
