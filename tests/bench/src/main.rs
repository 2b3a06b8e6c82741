//! `hermitage-bench`: runs the measurements asked for and prints what they found.

use std::{path::PathBuf, process::ExitCode};

use anyhow::Context as _;
use bench::{
    host::Host,
    login, progress,
    report::{Report, Section},
};
use clap::{Parser, ValueEnum};

/// Measure what machines and logins cost on this host.
///
/// Run as root on the host that serves. Prints a table; with --json the table goes to standard error
/// and standard output is JSON.
#[derive(Debug, Parser)]
#[command(name = "hermitage-bench", version)]
struct Options {
    /// Measure only this; may be repeated. Rows that need another section's figure for a ratio get it.
    #[arg(long, value_enum, value_name = "SECTION")]
    only: Vec<What>,
    /// Samples of each section instead of its default (login 10 rounds).
    #[arg(short, value_name = "N", value_parser = clap::value_parser!(u32).range(1..=100_000))]
    n: Option<u32>,
    /// Print JSON on standard output.
    #[arg(long)]
    json: bool,
    /// Port of `hermitage serve` on loopback.
    #[arg(long, value_name = "PORT", default_value_t = 2222)]
    ssh_port: u16,
    #[arg(long, value_name = "DIR", default_value = "/var/lib/hermitage")]
    state_dir: PathBuf,
    #[arg(long, value_name = "DIR", default_value = "/run/hermitage")]
    run_dir: PathBuf,
    /// Where `hermitage` and `hermitage-vmm` are. Default: beside this program.
    #[arg(long, value_name = "DIR", env = "HERMITAGE_LIBEXEC")]
    libexec_dir: Option<PathBuf>,
    /// For ssh, which runs this program as its ProxyCommand.
    #[arg(long, hide = true, num_args = 2, value_names = ["ADDRESS", "FILE"])]
    dial: Option<Vec<String>>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
enum What {
    /// Login by ssh against OpenSSH.
    Login,
}

fn main() -> ExitCode {
    let options = Options::parse();
    if let Some([address, note]) = options.dial.as_deref() {
        return finish(login::dial::dial(address, note.as_ref()));
    }
    finish(run(&options))
}

fn finish(result: anyhow::Result<()>) -> ExitCode {
    match result {
        Ok(()) => ExitCode::SUCCESS,
        Err(e) => {
            eprintln!("hermitage-bench: {e:#}");
            ExitCode::FAILURE
        }
    }
}

/// Measures section after section. One that fails is told and does not keep the others from being
/// measured, but the run has failed then.
fn run(options: &Options) -> anyhow::Result<()> {
    let mut report = Report::new(Host::look());
    let libexec = libexec_dir(options)?;
    let mut failed = Vec::new();
    let mut take = |name: &'static str, result: anyhow::Result<Vec<Section>>| match result {
        Ok(sections) => report.sections.extend(sections),
        Err(e) => {
            progress!("{name}: {e:#}");
            let mut section = Section::new(name, format!("{name}: FAILED"));
            section.note(format!("{e:#}"));
            report.sections.push(section);
            failed.push(name);
        }
    };
    let wanted = |what| options.only.is_empty() || options.only.contains(&what);
    if wanted(What::Login) {
        let config = login::Config {
            hermitage: &libexec.join("hermitage"),
            state_dir: &options.state_dir,
            run_dir: &options.run_dir,
            port: options.ssh_port,
            rounds: options.n.unwrap_or(10) as usize,
        };
        take("login", login::measure(&config).map(|section| vec![section]));
    }

    let table = report.table();
    if options.json {
        eprint!("{table}");
        println!("{}", serde_json::to_string_pretty(&report).context("write the report as JSON")?);
    } else {
        print!("{table}");
    }
    if !failed.is_empty() {
        anyhow::bail!("not measured: {}", failed.join(", "));
    }
    Ok(())
}

fn libexec_dir(options: &Options) -> anyhow::Result<PathBuf> {
    if let Some(dir) = &options.libexec_dir {
        return Ok(dir.clone());
    }
    let program = std::env::current_exe().context("find this program")?;
    Ok(program.parent().context("this program has no folder")?.to_owned())
}
