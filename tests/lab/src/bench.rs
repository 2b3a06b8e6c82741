//! `cargo lab bench`: the benchmark on a lab of its own, with one emulated CPU, because timings are
//! quieter then.

use std::fs;
use std::io::{Read, Write};
use std::net::TcpListener;
use std::process::Stdio;

use anyhow::{Context, Result};

use crate::MachineOptions;
use crate::layout::Layout;
use crate::programs::build_package;
use crate::serving::Serving;
use crate::state::Claim;
use crate::steps::{note, step};
use crate::up;

/// True when everything could be measured.
pub fn run(
    layout: &Layout,
    machine: &MachineOptions,
    arguments: &[String],
    keep: bool,
) -> Result<bool> {
    fs::create_dir_all(layout.own())?;
    let mut machine = machine.clone();
    let _run = Claim::run(layout)?;
    let claim = Claim::take(layout)?;
    step("build the benchmark", || build_package(layout, "bench"))?;
    if machine.port.is_none() && Serving::find(layout).is_err() {
        machine.port = Some(TcpListener::bind(("127.0.0.1", 0))?.local_addr()?.port());
    }
    let serving = up::up(layout, &machine)?;
    drop(claim);

    let measured = measure(layout, &serving, arguments);
    if !keep {
        let _claim = Claim::take(layout)?;
        up::down(layout)?;
    }
    measured
}

fn measure(layout: &Layout, serving: &Serving, arguments: &[String]) -> Result<bool> {
    let results = layout.results();
    fs::create_dir_all(&results).with_context(|| format!("make {}", results.display()))?;
    // The port inside the emulated machine is the service's own.
    let port = if serving.is_native() { serving.state().port } else { 2222 };
    let mut words: Vec<String> =
        ["hermitage-bench", "--json", "--ssh-port"].map(str::to_owned).into();
    words.push(port.to_string());
    words.extend(["--state-dir".to_owned(), serving.state_path()]);
    words.extend(["--run-dir".to_owned(), serving.run_dir()]);
    words.extend(arguments.iter().filter(|argument| *argument != "--json").cloned());
    let mut child = serving
        .command(&words, false)
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .spawn()
        .context("start the benchmark")?;
    // The table goes to standard error, for the person; what is kept is the JSON.
    let mut json = Vec::new();
    child.stdout.take().context("the benchmark's output")?.read_to_end(&mut json)?;
    let status = child.wait()?;
    if arguments.iter().any(|argument| argument == "--json") {
        std::io::stdout().write_all(&json).context("print the report")?;
    }
    if !json.is_empty() {
        let file = results.join("bench.json");
        fs::write(&file, &json).with_context(|| format!("write {}", file.display()))?;
        note(&format!("report: {}", file.display()));
    }
    Ok(status.success())
}
