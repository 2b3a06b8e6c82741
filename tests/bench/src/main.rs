//! `hermitage-bench`: runs the measurements asked for and prints what they found.

use std::{
    path::{Path, PathBuf},
    process::ExitCode,
};

use anyhow::Context as _;
use bench::{
    base::Base,
    fork,
    host::Host,
    idle, login,
    machines::server::ForkServer,
    progress,
    report::{Report, Section},
    resume::{self, Extent, Size},
    sleep, transfer,
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
    /// Samples of each section instead of its default (floor and fork 200, agent 50, sleep 20, login 10, transfer 3).
    #[arg(short, value_name = "N", value_parser = clap::value_parser!(u32).range(1..=100_000))]
    n: Option<u32>,
    /// Machines to have alive at once for their memory.
    #[arg(long, value_name = "N", default_value_t = 50, value_parser = clap::value_parser!(u32).range(1..=100_000))]
    machines: u32,
    /// Measure nothing; prove that a machine is saved and resumed exactly, so many times in a row.
    #[arg(long, value_name = "ROUNDS", value_parser = clap::value_parser!(u64).range(1..=10_000))]
    prove_resume: Option<u64>,
    /// With --prove-resume: MiB that the program in the machine holds.
    #[arg(long, value_name = "MIB", default_value_t = 64, requires = "prove_resume")]
    program_mib: u64,
    /// With --prove-resume: MiB and CPUs of the machine, if not its base's least.
    #[arg(long, value_name = "MIB,CPUS", requires = "prove_resume")]
    machine: Option<Size>,
    /// With --prove-resume: bytes of a snapshot to damage, one after another.
    #[arg(long, value_name = "N", default_value_t = 100, requires = "prove_resume")]
    flips: u64,
    /// MiB of the file that `transfer` copies.
    #[arg(long, value_name = "MIB", default_value_t = 16, value_parser = clap::value_parser!(u64).range(1..=65_536))]
    transfer_mib: u64,
    /// Small files that `transfer` copies.
    #[arg(long, value_name = "N", default_value_t = 500, value_parser = clap::value_parser!(u64).range(1..=1_000_000))]
    transfer_files: u64,
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
    /// Where the disks of fork, agent and memory are made instead of the state directory. In memory
    /// (/dev/shm), it takes the cost of the host's own disk out of the figures.
    #[arg(long, value_name = "DIR")]
    disks: Option<PathBuf>,
    /// Where `hermitage` and `hermitage-vmm` are. Default: beside this program.
    #[arg(long, value_name = "DIR", env = "HERMITAGE_LIBEXEC")]
    libexec_dir: Option<PathBuf>,
    /// For ssh, which runs this program as its ProxyCommand.
    #[arg(long, hide = true, num_args = 2, value_names = ["ADDRESS", "FILE"])]
    dial: Option<Vec<String>>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
enum What {
    /// The bare KVM calls of a fork.
    Floor,
    /// A machine, by stage, against the floor.
    Fork,
    /// From the fork to the agent and to the shell's prompt.
    Agent,
    /// A machine saved and resumed, against a fork and against writing a file.
    Sleep,
    /// Login by ssh against OpenSSH.
    Login,
    /// Commands, copies, small files and streams by ssh against OpenSSH.
    Transfer,
    /// An idle logged-in machine, many alive.
    Memory,
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
    let mut bench = Bench {
        options,
        libexec: libexec_dir(options)?,
        report: Report::new(Host::look()),
        failed: Vec::new(),
    };
    // Held for the whole run: where no machine is alive, making and dropping many in a row has locked
    // up an emulated host, and a host that serves always has some.
    let kvm = kvm_ioctls::Kvm::new().context("open /dev/kvm")?;
    let _idle = kvm.create_vm().context("create a VM to hold")?;
    if let Some(rounds) = options.prove_resume {
        let base = Base::current(&options.state_dir, options.disks.as_deref())?;
        let (memory, flips, size) = (options.program_mib, options.flips, options.machine);
        let extent = Extent { rounds, memory, flips, size };
        return resume::prove(&base, &bench.libexec.join("hermitage-vmm"), extent);
    }
    bench.machines();
    bench.login();
    bench.transfer();
    let Bench { report, failed, .. } = bench;

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

struct Bench<'a> {
    options: &'a Options,
    libexec: PathBuf,
    report: Report,
    failed: Vec<&'static str>,
}

impl Bench<'_> {
    fn wanted(&self, what: &[What]) -> bool {
        self.options.only.is_empty() || what.iter().any(|what| self.options.only.contains(what))
    }

    fn n(&self, default: usize) -> usize {
        self.options.n.map_or(default, |n| n as usize)
    }

    fn machines(&mut self) {
        if !self.wanted(&[What::Floor, What::Fork, What::Agent, What::Sleep, What::Memory]) {
            return;
        }
        progress!("reading the base");
        let base = match Base::current(&self.options.state_dir, self.options.disks.as_deref()) {
            Ok(base) => base,
            Err(e) => return self.fail("base", &e),
        };
        self.report.base = Some(base.id.clone());
        let vmm = self.libexec.join("hermitage-vmm");
        let start = || ForkServer::start(&vmm, &base.dir);

        if self.wanted(&[What::Floor, What::Fork, What::Agent]) {
            // The others' ratios are to the floor: it is measured with them in any case.
            let n = self.n(200);
            let result = start().and_then(|mut server| {
                let (mut sections, floor) = fork::measure(&base, &mut server, n)?;
                if self.wanted(&[What::Agent]) {
                    sections.push(fork::measure_agent(&base, &mut server, self.n(50), floor)?);
                }
                Ok(sections)
            });
            self.take("fork", result);
        }
        if self.wanted(&[What::Sleep]) {
            let n = self.n(20);
            let result = start().and_then(|mut server| sleep::measure(&base, &mut server, n));
            self.take("sleep", result.map(|section| vec![section]));
        }
        if self.wanted(&[What::Memory]) {
            let n = self.options.machines as usize;
            let result = start().and_then(|server| idle::measure(&base, server, n));
            self.take("memory", result.map(|section| vec![section]));
        }
    }

    fn login(&mut self) {
        if self.wanted(&[What::Login]) {
            let hermitage = self.libexec.join("hermitage");
            let result = login::measure(&self.service(&hermitage, 10));
            self.take("login", result.map(|section| vec![section]));
        }
    }

    fn transfer(&mut self) {
        if self.wanted(&[What::Transfer]) {
            let hermitage = self.libexec.join("hermitage");
            let Options { transfer_mib: file_mib, transfer_files: files, .. } = *self.options;
            let extent = transfer::Extent { file_mib, files };
            let result = transfer::measure(&self.service(&hermitage, 3), extent);
            self.take("transfer", result.map(|section| vec![section]));
        }
    }

    fn service<'a>(&'a self, hermitage: &'a Path, rounds: usize) -> login::Config<'a> {
        login::Config {
            hermitage,
            state_dir: &self.options.state_dir,
            run_dir: &self.options.run_dir,
            port: self.options.ssh_port,
            rounds: self.n(rounds),
        }
    }

    fn take(&mut self, name: &'static str, result: anyhow::Result<Vec<Section>>) {
        match result {
            Ok(sections) => self.report.sections.extend(sections),
            Err(e) => self.fail(name, &e),
        }
    }

    fn fail(&mut self, name: &'static str, error: &anyhow::Error) {
        progress!("{name}: {error:#}");
        let mut section = Section::new(name, format!("{name}: FAILED"));
        section.note(format!("{error:#}"));
        self.report.sections.push(section);
        self.failed.push(name);
    }
}

fn libexec_dir(options: &Options) -> anyhow::Result<PathBuf> {
    if let Some(dir) = &options.libexec_dir {
        return Ok(dir.clone());
    }
    let program = std::env::current_exe().context("find this program")?;
    Ok(program.parent().context("this program has no folder")?.to_owned())
}
