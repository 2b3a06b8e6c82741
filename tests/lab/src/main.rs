//! `cargo lab`: from a checkout to a served login with one command, on real KVM or in an emulated
//! machine that has it; and the place where the end-to-end tests and benchmarks run.

mod emulator;
mod hold;
mod layout;
mod process;
mod programs;
mod serving;
mod ssh;
mod state;
mod steps;
mod tools;
mod up;

use std::ffi::OsString;
use std::os::unix::process::ExitStatusExt;
use std::process::ExitCode;

use anyhow::{Context, Result};
use clap::{Args, Parser, Subcommand};

use crate::layout::Layout;
use crate::serving::Serving;
use crate::state::{Claim, Place};

/// Serve, look into, test and measure Hermitage from a checkout.
#[derive(Parser)]
#[command(name = "cargo lab", bin_name = "cargo lab")]
struct Cli {
    /// Which lab: each has a machine and data of its own
    #[arg(long = "lab", global = true, default_value = "dev", value_name = "NAME")]
    name: String,
    #[command(subcommand)]
    command: Verb,
}

#[derive(Subcommand)]
enum Verb {
    /// Start the lab machine alone, without building or serving anything
    Boot(MachineOptions),
    /// Run a command as root on the serving machine
    Exec {
        #[arg(trailing_var_arg = true, required = true, value_name = "CMD")]
        command: Vec<OsString>,
    },
    /// Open a root shell on the serving machine
    Shell,
    /// Bring the programs in target/release to the serving machine
    Sync,
    /// Say what runs and where
    Status,
    /// Stop the service and the machine in order; data stays
    Down,
    #[command(hide = true)]
    HoldKvm,
    #[command(hide = true)]
    MakeMachine,
}

#[derive(Args, Clone, Debug)]
struct MachineOptions {
    /// Port on 127.0.0.1 for ssh into accounts
    #[arg(long, default_value_t = 2222)]
    port: u16,
    /// Memory of the emulated machine in MiB
    #[arg(long, default_value_t = 4096, value_parser = clap::value_parser!(u32).range(1024..))]
    memory: u32,
    /// CPUs of the emulated machine
    #[arg(long, default_value_t = 2, value_parser = clap::value_parser!(u32).range(1..=64))]
    cpus: u32,
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
    let layout = Layout::new(&cli.name)?;
    match cli.command {
        Verb::HoldKvm => {}
        Verb::Boot(options) => {
            let _claim = Claim::take(&layout)?;
            up::boot(&layout, &options)?;
        }
        Verb::Exec { command } => return exec(&layout, &command),
        Verb::Shell => return exec(&layout, &["bash".into(), "-l".into()]),
        Verb::Sync => {
            let _claim = Claim::take(&layout)?;
            up::sync(&mut Serving::find(&layout)?)?;
        }
        Verb::Status => status(&layout)?,
        Verb::Down => {
            let _claim = Claim::take(&layout)?;
            up::down(&layout)?;
        }
        Verb::MakeMachine => {
            emulator::image::MachineImage::current(&layout).build(&layout)?;
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
    println!("accounts: ssh -p {} NAME@127.0.0.1", state.port);
    for (path, digest) in &state.pushed {
        println!("  {path}  {}", digest.get(..12).unwrap_or(digest));
    }
    Ok(())
}
