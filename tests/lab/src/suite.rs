//! `cargo lab test`: unit and property tests here, then the end-to-end suite against a lab of its own,
//! whose data is thrown away, and beside it the package's trial (`trial.rs`); the logs come back to
//! `target/lab/results`.

use std::fs;
use std::io::ErrorKind;
use std::net::TcpListener;
use std::path::Path;
use std::process::Command;

use anyhow::{Context, Result};

use crate::MachineOptions;
use crate::emulator;
use crate::layout::Layout;
use crate::process::{privileged, run_captured};
use crate::programs::{build_package, cargo};
use crate::serving::Serving;
use crate::ssh::quote;
use crate::state::Claim;
use crate::steps::{note, step};
use crate::tally::{Tally, closing_line, counted, libtest};
use crate::tools;
use crate::trial;
use crate::up;

/// Emulated, an ssh login takes seven times as long and a nested fork ten.
const EMULATED_PATIENCE: &str = "4";

#[derive(Clone, Debug)]
pub struct Selection {
    /// Only tests whose name contains one of these.
    pub filters: Vec<String>,
    pub unit: bool,
    pub end_to_end: bool,
    pub package: bool,
    /// Given to the end-to-end suite as they are.
    pub arguments: Vec<String>,
    /// Leave the labs up for looking into them.
    pub keep: bool,
}

impl Selection {
    /// The trial is one story, whose checks come one after the other.
    fn has_trial(&self) -> bool {
        let named = |filter: &String| trial::NAME.contains(filter.as_str());
        self.package && (self.filters.is_empty() || self.filters.iter().any(named))
    }
}

/// Runs what was asked for; true when nothing failed.
pub fn run(layout: &Layout, machine: &MachineOptions, selection: &Selection) -> Result<bool> {
    fs::create_dir_all(layout.own())?;
    // Some unit tests use an ssh client or make a file system, too.
    tools::install_missing(false, &layout.step_log())?;
    let mut parts = Vec::new();
    if selection.unit {
        parts.push(unit(layout, &selection.filters)?);
    }
    if selection.end_to_end {
        remove_tree(&layout.results())?;
        let beside = match selection.has_trial() {
            true => Some(trial::Beside::start(layout, selection.keep)?),
            false => None,
        };
        let told = end_to_end(layout, machine, selection);
        let tried = beside.map(trial::Beside::finish);
        parts.push(told?);
        parts.extend(tried);
    } else if selection.has_trial() {
        parts.push(trial::run(layout, selection.keep)?);
    }
    let mut total = Tally::default();
    parts.iter().for_each(|(tally, _)| total.add(*tally));
    println!("{total}");
    Ok(parts.iter().all(|(_, whole)| *whole) && total.failed == 0)
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

pub fn remove_tree(dir: &Path) -> Result<()> {
    match fs::remove_dir_all(dir) {
        Err(error) if error.kind() != ErrorKind::NotFound => {
            Err(error).with_context(|| format!("remove {}", dir.display()))
        }
        _ => Ok(()),
    }
}
