//! The end-to-end suite: real `ssh` clients against a serving machine, and root commands on it.
//!
//! It is a program and not a libtest target because it needs a serving machine, which `cargo test`
//! does not have: `cargo lab test` brings one up and runs this. Against a machine that is up already:
//!
//! ```text
//! e2e --ssh-port 2222 --exec 'target/release/lab exec --'            everything
//! e2e --ssh-port 2222 --exec 'target/release/lab exec --' power_cut --rounds 50
//! e2e --list
//! ```
#![forbid(unsafe_code)]

mod harness;
mod runner;
mod stories;

use std::{path::PathBuf, process::ExitCode};

use clap::Parser;

#[derive(Clone, Debug, Parser)]
#[command(name = "e2e", about = "Hermitage's end-to-end tests, against a serving machine")]
pub struct Options {
    /// Only the tests whose name contains one of these
    filter: Vec<String>,
    /// Print the names of the tests and end
    #[arg(long)]
    list: bool,
    /// Address the service is reached at
    #[arg(long, default_value = "127.0.0.1")]
    ssh_host: String,
    /// Port the service is reached at
    #[arg(long, default_value_t = 2222)]
    ssh_port: u16,
    /// What comes before a command to run it as root on the serving machine (a shell's words);
    /// empty: here
    #[arg(long, default_value = "", value_name = "CMD PREFIX")]
    exec: String,
    /// State directory of the service, on the serving machine
    #[arg(long, default_value = "/var/lib/hermitage")]
    state_dir: PathBuf,
    /// Run directory of the service, on the serving machine
    #[arg(long, default_value = "/run/hermitage")]
    run_dir: PathBuf,
    /// Command on the serving machine that takes `start`, `stop` and `restart` for the service
    #[arg(long, default_value = "lab-serve", value_name = "CMD")]
    service: String,
    /// The service's log on the serving machine
    #[arg(long, default_value = "/var/log/hermitage.log", value_name = "FILE")]
    service_log: PathBuf,
    /// The serving machine's CPU is emulated: a guest may die by itself, and its test is told once more
    #[arg(long)]
    emulated: bool,
    /// Rounds of the tests that kill something at a random moment
    #[arg(long, default_value_t = 5)]
    rounds: u32,
    /// Seed of the random moments; printed, so that a failure can be repeated
    #[arg(long)]
    seed: Option<u64>,
    /// Rounds of the test that has something die at a point of a save or a resume
    #[arg(long, default_value_t = 6)]
    fault_rounds: u32,
    /// Forks of each of two accounts in the test that kills each a moment later
    #[arg(long, default_value_t = 8)]
    fork_rounds: u32,
    /// MiB that are sent through an exec both ways
    #[arg(long, default_value_t = 64)]
    transfer_mib: usize,
    /// Seconds that the test of a long life does nothing; with 3600, give --patience 30
    #[arg(long, default_value_t = 20)]
    idle_seconds: u64,
    /// How many times longer than on real hardware to wait
    #[arg(long, default_value_t = 1.0)]
    patience: f64,
    /// Folder with Python modules that the system does not have (ssh-audit)
    #[arg(long, value_name = "DIR")]
    python_modules: Option<PathBuf>,
    /// Files that rsync copies there and back
    #[arg(long, default_value_t = 40)]
    files: usize,
    /// Folder for results.json and a log of every failure
    #[arg(long, value_name = "DIR")]
    results: Option<PathBuf>,
}

fn main() -> ExitCode {
    let options = Options::parse();
    match runner::run(&options) {
        Ok(true) => ExitCode::SUCCESS,
        Ok(false) => ExitCode::FAILURE,
        Err(error) => {
            eprintln!("e2e: {error:#}");
            ExitCode::from(2)
        }
    }
}
