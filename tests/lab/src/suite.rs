//! `cargo lab test`: unit and property tests here, then the end-to-end suite against a lab of its own,
//! whose data is thrown away; the logs come back to `target/lab/results`.

use std::fs;
use std::io::{BufRead, BufReader, ErrorKind};
use std::net::TcpListener;
use std::path::Path;
use std::process::{Command, Stdio};

use anyhow::{Context, Result, bail};

use crate::MachineOptions;
use crate::emulator;
use crate::layout::Layout;
use crate::process::{privileged, run_captured};
use crate::programs::{build_package, cargo};
use crate::serving::Serving;
use crate::ssh::quote;
use crate::state::Claim;
use crate::steps::{note, step};
use crate::tools;
use crate::up;

/// Emulated, an ssh login takes seven times as long and a nested fork ten.
const EMULATED_PATIENCE: &str = "4";

#[derive(Clone, Debug)]
pub struct Selection {
    /// Only tests whose name contains one of these.
    pub filters: Vec<String>,
    pub unit: bool,
    pub end_to_end: bool,
    /// Given to the end-to-end suite as they are.
    pub arguments: Vec<String>,
    /// Leave the lab up for looking into it.
    pub keep: bool,
}

#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Tally {
    passed: u32,
    failed: u32,
    skipped: u32,
}

impl Tally {
    fn add(&mut self, other: Tally) {
        self.passed += other.passed;
        self.failed += other.failed;
        self.skipped += other.skipped;
    }
}

/// Runs what was asked for; true when nothing failed.
pub fn run(layout: &Layout, machine: &MachineOptions, selection: &Selection) -> Result<bool> {
    fs::create_dir_all(layout.own())?;
    // Some unit tests use an ssh client or make a file system, too.
    tools::install_missing(false, &layout.step_log())?;
    let mut total = Tally::default();
    let mut whole = true;
    if selection.unit {
        let (tally, ok) = unit(layout, &selection.filters)?;
        total.add(tally);
        whole &= ok;
    }
    if selection.end_to_end {
        let (tally, ok) = end_to_end(layout, machine, selection)?;
        total.add(tally);
        whole &= ok;
    }
    println!("{} passed, {} failed, {} skipped", total.passed, total.failed, total.skipped);
    Ok(whole && total.failed == 0)
}

fn unit(layout: &Layout, filters: &[String]) -> Result<(Tally, bool)> {
    note("unit and property tests");
    let mut command = cargo(layout);
    command.args(["test", "--workspace", "--no-fail-fast"]);
    if !filters.is_empty() {
        command.arg("--").args(filters);
    }
    counted(&mut command, libtest)
}

fn end_to_end(
    layout: &Layout,
    machine: &MachineOptions,
    selection: &Selection,
) -> Result<(Tally, bool)> {
    note("end-to-end tests");
    tools::install_clients(&layout.python_modules(), &layout.step_log());
    step("build the end-to-end suite", || build_package(layout, "e2e"))?;
    // Some stories have it look into machines' memory.
    step("build the benchmark", || build_package(layout, "bench"))?;
    let _run = Claim::run(layout)?;
    let claim = Claim::take(layout)?;
    let running = Serving::find(layout).is_ok();
    if !running {
        // An earlier run's accounts would be in this one's way.
        remove(&layout.data_disk())?;
        let native = layout.own().join("native");
        run_captured(privileged("rm").arg("-rf").arg(native))?;
    }
    let mut machine = machine.clone();
    if machine.port.is_none() && !running {
        machine.port = Some(TcpListener::bind(("127.0.0.1", 0))?.local_addr()?.port());
    }
    let serving = up::up(layout, &machine)?;
    drop(claim);

    let results = layout.results();
    remove_tree(&results)?;
    fs::create_dir_all(&results).with_context(|| format!("make {}", results.display()))?;
    let lab = std::env::current_exe().context("find this program")?;
    let exec = format!("{} --lab {} exec --", quote(&lab.to_string_lossy()), layout.name());
    let mut suite = Command::new(layout.program("e2e"));
    suite
        .current_dir(layout.root())
        .args(["--ssh-port", &serving.state().port.to_string(), "--exec", &exec])
        .args(["--run-dir", &serving.run_dir(), "--state-dir", &serving.state_path()])
        .args(["--patience", if serving.is_native() { "1" } else { EMULATED_PATIENCE }])
        .args((!serving.is_native()).then_some("--emulated"))
        .arg("--python-modules")
        .arg(layout.python_modules())
        .arg("--results")
        .arg(&results)
        .args(&selection.arguments)
        .args(&selection.filters);
    let outcome = counted(&mut suite, closing_line);
    let logs = step("bring the logs back", || bring_logs(&serving, &results));
    if selection.keep {
        note(&format!("lab {} stays up: `cargo lab --lab {0} shell`", layout.name()));
    } else {
        let _claim = Claim::take(layout)?;
        up::down(layout)?;
    }
    let outcome = outcome?;
    logs?;
    note(&format!("logs: {}", results.display()));
    Ok(outcome)
}

/// Runs a test program, passing its output on and adding up what it says.
fn counted(command: &mut Command, read: fn(&str) -> Option<Tally>) -> Result<(Tally, bool)> {
    let name = command.get_program().to_string_lossy().into_owned();
    let mut child = command
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .spawn()
        .with_context(|| format!("start {name}"))?;
    let output = child.stdout.take().context("the tests' output")?;
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
    let status = child.wait()?;
    if !status.success() && tally.failed == 0 {
        bail!("{name} ended with {status} without saying that a test failed");
    }
    Ok((tally, status.success()))
}

/// `test result: ok. 7 passed; 0 failed; 1 ignored; …`
fn libtest(line: &str) -> Option<Tally> {
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
fn closing_line(line: &str) -> Option<Tally> {
    let mut parts = line.split(", ");
    let mut number = |what: &str| parts.next()?.strip_suffix(what)?.parse().ok();
    let tally = Tally {
        passed: number(" passed")?,
        failed: number(" failed")?,
        skipped: number(" skipped")?,
    };
    parts.next().is_none().then_some(tally)
}

fn bring_logs(serving: &Serving, results: &Path) -> Result<()> {
    if !serving.is_native() {
        fs::copy(serving.layout().serial_log(), results.join("serial.log"))
            .context("copy the serial log")?;
        let kernel = serving.run("dmesg").context(emulator::last_words(serving.layout()))?;
        fs::write(results.join("dmesg.log"), kernel.stdout)?;
    }
    let log = run_captured(&mut serving.command(&["cat", &serving.log_file()], false))?;
    fs::write(results.join("hermitage.log"), log.stdout)?;
    Ok(())
}

fn remove(file: &Path) -> Result<()> {
    match fs::remove_file(file) {
        Err(error) if error.kind() != ErrorKind::NotFound => {
            Err(error).with_context(|| format!("remove {}", file.display()))
        }
        _ => Ok(()),
    }
}

fn remove_tree(dir: &Path) -> Result<()> {
    match fs::remove_dir_all(dir) {
        Err(error) if error.kind() != ErrorKind::NotFound => {
            Err(error).with_context(|| format!("remove {}", dir.display()))
        }
        _ => Ok(()),
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
    }
}
