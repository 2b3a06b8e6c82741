//! `cargo lab`: from a checkout to a served login with one command, on real KVM or in an emulated
//! machine that has it; and the place where the end-to-end tests and benchmarks run.

mod bench;
mod checks;
mod emulator;
mod follow;
mod guest_image;
mod hold;
mod layout;
mod package;
mod process;
mod programs;
mod service;
mod serving;
mod ssh;
mod state;
mod steps;
mod suite;
mod tally;
mod tools;
mod trial;
mod up;

use std::ffi::OsString;
use std::os::unix::process::ExitStatusExt;
use std::process::ExitCode;

use anyhow::{Context, Result};
use clap::{Args, Parser, Subcommand};

use crate::emulator::{image::MachineImage, recipe::Recipe};
use crate::layout::Layout;
use crate::serving::Serving;
use crate::state::{Claim, Place};

/// Serve, look into, test and measure Hermitage from a checkout.
#[derive(Parser)]
#[command(name = "cargo lab", bin_name = "cargo lab")]
struct Cli {
    /// Which lab: each has a machine and data of its own [default: dev; test and bench have their own]
    #[arg(long = "lab", global = true, value_name = "NAME")]
    name: Option<String>,
    #[command(subcommand)]
    command: Verb,
}

#[derive(Subcommand)]
enum Verb {
    /// Build what is not built, start the service, print the ssh line
    ///
    /// Quick when everything is up to date. Without --detach it shows the service's log and stops the
    /// lab at Ctrl-C.
    Up {
        #[command(flatten)]
        machine: MachineOptions,
        /// Leave the lab running and return
        #[arg(long)]
        detach: bool,
    },
    /// Start the lab machine alone, without building or serving anything
    Boot(MachineOptions),
    /// Run a command as root on the serving machine
    Exec {
        #[arg(trailing_var_arg = true, required = true, value_name = "CMD")]
        command: Vec<OsString>,
    },
    /// Open a root shell on the serving machine
    Shell,
    /// Build, bring the new programs to the running lab, restart the service if it changed
    Sync {
        /// Bring what is in target/release without building
        #[arg(long)]
        no_build: bool,
    },
    /// Say what runs and where
    Status,
    /// Show the service's log, or the lab machine's console
    Logs {
        /// The emulated machine's serial console instead
        #[arg(long)]
        serial: bool,
        /// Go on as more comes
        #[arg(short, long)]
        follow: bool,
    },
    /// Run the tests: those that need no machine, the end-to-end suite, the package's trial
    ///
    /// The latter two each have a lab of their own, and run beside each other. Of --unit, --e2e and --package, what is
    /// named is run; all three if none is.
    Test {
        #[command(flatten)]
        machine: MachineOptions,
        /// The tests that need no machine
        #[arg(long)]
        unit: bool,
        /// The end-to-end suite
        #[arg(long)]
        e2e: bool,
        /// The package's trial: from installation to purge in a fresh Debian with systemd
        #[arg(long)]
        package: bool,
        /// Leave the labs up afterwards, to look into them
        #[arg(long)]
        keep: bool,
        /// Only tests whose name contains one of these
        filter: Vec<String>,
        /// After `--`: options of the end-to-end suite, such as `--rounds 50 --seed 7`
        #[arg(last = true, value_name = "E2E OPTIONS")]
        options: Vec<String>,
    },
    /// Measure, in a lab of its own
    Bench {
        #[command(flatten)]
        machine: MachineOptions,
        /// Leave the lab up afterwards
        #[arg(long)]
        keep: bool,
        /// After `--`: options of hermitage-bench
        #[arg(last = true, value_name = "BENCH OPTIONS")]
        options: Vec<String>,
    },
    /// Build the Debian package
    Package,
    /// Check licences, directions of imports, and paths that documents name
    Check,
    /// Stop the service and the machine in order; data stays
    Down,
    #[command(hide = true)]
    HoldKvm,
    #[command(hide = true)]
    MakeMachine { recipe: String },
}

#[derive(Args, Clone, Debug, Default)]
struct MachineOptions {
    /// Port on 127.0.0.1 for ssh into accounts [default: 2222]
    #[arg(long)]
    port: Option<u16>,
    /// Memory of the emulated machine in MiB [default: 4096]
    #[arg(long, value_parser = clap::value_parser!(u32).range(1024..))]
    memory: Option<u32>,
    /// CPUs of the emulated machine [default: 1]; with two, guests die by themselves (docs/lab.md)
    #[arg(long, value_parser = clap::value_parser!(u32).range(1..=64))]
    cpus: Option<u32>,
    /// Use the emulated machine even where KVM is real
    #[arg(long, conflicts_with = "native")]
    emulated: bool,
    /// Use this machine's KVM without asking whether it is real
    #[arg(long)]
    native: bool,
}

fn main() -> ExitCode {
    match run(Cli::parse()) {
        Ok(code) => code,
        Err(error) => {
            eprintln!("cargo lab: {error:#}");
            ExitCode::FAILURE
        }
    }
}

fn run(cli: Cli) -> Result<ExitCode> {
    // Runs inside the lab machine, where there is no checkout.
    if let Verb::HoldKvm = cli.command {
        match hold::hold()? {}
    }
    let own_lab = match cli.command {
        Verb::Test { .. } => "test",
        Verb::Bench { .. } => "bench",
        _ => "dev",
    };
    let layout = Layout::new(cli.name.as_deref().unwrap_or(own_lab))?;
    match cli.command {
        Verb::HoldKvm => {}
        Verb::Up { machine, detach } => {
            let serving = {
                let _claim = Claim::take(&layout)?;
                let serving = up::up(&layout, &machine)?;
                up::greet(&serving)?;
                serving
            };
            if !detach {
                follow::until_interrupted(&serving)?;
                let _claim = Claim::take(&layout)?;
                up::down(&layout)?;
            }
        }
        Verb::Boot(options) => {
            let _claim = Claim::take(&layout)?;
            up::boot(&layout, &options)?;
        }
        Verb::Exec { command } => return exec(&layout, &command),
        Verb::Shell => return exec(&layout, &["bash".into(), "-l".into()]),
        Verb::Logs { serial, follow } => return logs(&layout, serial, follow),
        Verb::Sync { no_build } => {
            let _claim = Claim::take(&layout)?;
            up::sync(&mut Serving::find(&layout)?, !no_build)?;
        }
        Verb::Test { machine, unit, e2e, package, keep, filter, options } => {
            let all = !(unit || e2e || package);
            let selection = suite::Selection {
                filters: filter,
                unit: all || unit,
                end_to_end: all || e2e,
                package: all || package,
                arguments: options,
                keep,
            };
            return Ok(code(suite::run(&layout, &machine, &selection)?));
        }
        Verb::Bench { machine, keep, options } => {
            return Ok(code(bench::run(&layout, &machine, &options, keep)?));
        }
        Verb::Package => println!("{}", package::build(&layout)?.display()),
        Verb::Check => checks::all(&layout)?,
        Verb::Status => status(&layout)?,
        Verb::Down => {
            let _claim = Claim::take(&layout)?;
            up::down(&layout)?;
        }
        Verb::MakeMachine { recipe } => {
            let recipe = Recipe::named(&recipe)
                .with_context(|| format!("there is no recipe {recipe:?} for a machine"))?;
            MachineImage::current(&layout, recipe).build(&layout)?;
        }
    }
    Ok(ExitCode::SUCCESS)
}

/// Passes streams, terminal and exit status through.
fn exec(layout: &Layout, command: &[OsString]) -> Result<ExitCode> {
    let serving = Serving::find(layout)?;
    serving.connect()?;
    let status = serving
        .command(command, ssh::wants_terminal())
        .status()
        .context("start the command's client")?;
    let code = status.code().unwrap_or_else(|| 128 + status.signal().unwrap_or(0));
    Ok(ExitCode::from(u8::try_from(code).unwrap_or(255)))
}

fn logs(layout: &Layout, serial: bool, follow: bool) -> Result<ExitCode> {
    let mut tail = vec!["tail".to_owned(), "-n".to_owned(), "200".to_owned()];
    if follow {
        tail.push("-F".to_owned());
    }
    if !serial {
        tail.push(Serving::find(layout)?.log_file());
        return exec(layout, &tail.into_iter().map(OsString::from).collect::<Vec<_>>());
    }
    let status = std::process::Command::new("tail")
        .args(&tail[1..])
        .arg(layout.serial_log())
        .status()
        .context("start tail")?;
    Ok(code(status.success()))
}

fn code(success: bool) -> ExitCode {
    if success { ExitCode::SUCCESS } else { ExitCode::FAILURE }
}

fn status(layout: &Layout) -> Result<()> {
    let serving = Serving::find(layout)?;
    let state = serving.state();
    match &state.place {
        Place::Native => println!("lab {}: native, on this machine's KVM", layout.name()),
        Place::Emulated { process, ssh_port, memory_mib, cpus } => println!(
            "lab {}: emulated machine, {cpus} CPUs, {memory_mib} MiB, process {}, its own ssh on 127.0.0.1:{ssh_port}",
            layout.name(),
            process.pid()
        ),
    }
    let service = if service::is_serving(&serving) { "runs" } else { "does not run" };
    println!("service: {service}");
    println!("accounts: ssh -p {} NAME@127.0.0.1", state.port);
    for (path, digest) in &state.pushed {
        println!("  {path}  {}", digest.get(..12).unwrap_or(digest));
    }
    Ok(())
}
