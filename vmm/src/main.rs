//! `hermitage-vmm`: builds bases, forks machines. Started by `hermitage`, seldom by hand.

use std::{
    fs::File,
    os::fd::{AsFd as _, BorrowedFd, OwnedFd},
    path::{Path, PathBuf},
    process::ExitCode,
    time::Instant,
};

use anyhow::{Context as _, anyhow, bail};
use clap::{Parser, Subcommand};
use hermitage_storage::{
    base::{self, Base, BaseWriter, Description, HostKind, Size},
    faults,
    image::{self, Image},
    sparse,
};
use hermitage_vmm::{
    SNAPSHOT_VERSION,
    base_state::BaseState,
    build_base::{self, Built, Config},
    fork_server::{self, Template},
    kvm,
    machine::{Machine, MachineState},
    memory::{self, Backing, GuestMemory, layout::Layout},
    probe,
    sandbox::{self, MachineJail},
    working_set::{self, WorkingSet},
};
use hermitage_vmm_proto::{ForkEvent, send};
use nix::sys::memfd::{MFdFlags, memfd_create};

/// Builds bases and forks machines of them. `hermitage` runs it; by hand only for a look.
#[derive(Parser)]
#[command(version)]
struct Cli {
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand)]
enum Command {
    /// Boot an image, wait for its agent, and save the machine as a base
    BuildBase(BuildBase),
    /// Serve forks of a base; the socket for requests is descriptor 3
    ForkServer(ForkServer),
    /// Tell whether this host's KVM runs guests (exit status 0) or why not (1)
    Probe,
    /// Tell whether machines of a base can run on this host (exit status 0) or why not (1)
    CheckBase {
        /// Base directory
        #[arg(long)]
        base: PathBuf,
    },
    /// Go into the sandbox as a machine does and try what must not work there (exit status 1: it did)
    CheckSandbox(CheckSandbox),
}

#[derive(clap::Args)]
struct BuildBase {
    /// Image directory, as `hermitage-image build` makes it
    #[arg(long)]
    image: PathBuf,
    /// Directory for the base; must not exist yet, appears whole or not at all
    #[arg(long)]
    out: PathBuf,
    /// RAM of a machine of which nothing else is said, in MiB: none has less
    #[arg(long, default_value_t = 512)]
    memory_mib: u64,
    /// RAM that a machine of this base can have at most, in MiB
    #[arg(long)]
    max_memory_mib: Option<u64>,
    /// Virtual CPUs of a machine of which nothing else is said: none has fewer
    #[arg(long, default_value_t = 1, value_parser = clap::value_parser!(u8).range(1..=i64::from(base::MAX_VCPUS)))]
    vcpus: u8,
    /// Virtual CPUs that a machine of this base can have at most
    #[arg(long, value_parser = clap::value_parser!(u8).range(1..=i64::from(base::MAX_VCPUS)))]
    max_vcpus: Option<u8>,
    /// Added to the kernel's command line
    #[arg(long, default_value = "")]
    cmdline_extra: String,
    /// Write what the guest's serial console says to this file
    #[arg(long)]
    serial_log: Option<PathBuf>,
}

#[derive(clap::Args)]
struct ForkServer {
    /// Base directory
    #[arg(long)]
    base: PathBuf,
    #[command(flatten)]
    sandbox: Sandbox,
    /// Run machines without a sandbox: for development without privileges, never for strangers
    #[arg(long)]
    no_sandbox: bool,
}

#[derive(clap::Args)]
struct Sandbox {
    /// User id that machines run as
    #[arg(long, default_value_t = 65534)]
    uid: u32,
    /// An existing empty directory, the root of the sandbox
    #[arg(long, default_value = "/var/empty")]
    sandbox_root: PathBuf,
}

#[derive(clap::Args)]
struct CheckSandbox {
    #[command(flatten)]
    sandbox: Sandbox,
    /// Check what older kernels get, without Landlock's scope for signals
    #[arg(long)]
    by_filter: bool,
}

fn main() -> ExitCode {
    tracing_subscriber::fmt()
        .with_env_filter(
            tracing_subscriber::EnvFilter::builder()
                .with_default_directive(tracing::level_filters::LevelFilter::INFO.into())
                .from_env_lossy(),
        )
        .with_writer(std::io::stderr)
        .init();
    let result = match Cli::parse().command {
        Command::BuildBase(args) => build(&args),
        Command::ForkServer(args) => serve(&args),
        Command::Probe => probe::run().map_err(anyhow::Error::msg),
        Command::CheckBase { base } => check_base(&base),
        Command::CheckSandbox(args) => check_sandbox(&args),
    };
    match result {
        Ok(()) => ExitCode::SUCCESS,
        Err(e) => {
            eprintln!("hermitage-vmm: {e:#}");
            ExitCode::FAILURE
        }
    }
}

fn build(args: &BuildBase) -> anyhow::Result<()> {
    let started = Instant::now();
    let progress = |what: &str| eprintln!("{:6.1} s  {what}", started.elapsed().as_secs_f64());
    probe::run().map_err(|e| anyhow::anyhow!("this host can't run machines: {e}"))?;
    let image = Image::open(&args.image)?;
    image.verify()?;
    progress("image checked");
    let config = Config {
        kernel: image.path(image::KERNEL),
        initrd: image.path(image::INITRD),
        root: image.path(image::ROOT),
        memory_mib: args.memory_mib,
        max_memory_mib: args.max_memory_mib.unwrap_or(args.memory_mib),
        vcpus: u32::from(args.vcpus),
        max_vcpus: u32::from(args.max_vcpus.unwrap_or(args.vcpus)),
        cmdline_extra: args.cmdline_extra.clone(),
        serial_log: args.serial_log.clone(),
    };
    if config.max_vcpus < config.vcpus {
        bail!("--max-vcpus {} is less than --vcpus {}", config.max_vcpus, config.vcpus);
    }
    let layout = config.layout()?;
    let writer = BaseWriter::create(&args.out, layout.max_ram_bytes())?;
    let built = build_base::boot_and_pause(&config, writer.memory(), &progress)?;
    let written = memory::save_ram(&built.memory, &built.layout, writer.memory())?;
    progress(&format!("memory saved, {} MiB of {}", written >> 20, args.memory_mib));
    let rehearsal = || rehearse(&config, &built, writer.memory(), &image);
    // A guest that dies of its host's own (an emulated CPU's, say) does not do it twice; one that dies of
    // how it was saved does it each time.
    let working_set = rehearsal().or_else(|error| {
        progress(&format!("once more, because: {error:#}"));
        rehearsal()
    })?;
    progress(&format!(
        "login rehearsed: it writes {} KiB and reads from {} MiB",
        working_set.written_bytes() >> 10,
        (working_set.hot.len() as u64 * working_set::HUGE) >> 20
    ));
    let state = BaseState { machine: built.state, working_set };
    let state = postcard::to_stdvec(&state).context("encode the machine's state")?;
    let description = Description {
        image: image.id.as_str().to_owned(),
        agent_protocol: hermitage_guest_proto::VERSION,
        guest_kernel: built.kernel_release,
        machine: base::Machine::new(
            Size { memory_bytes: layout.ram_bytes(), vcpus: args.vcpus },
            Size { memory_bytes: layout.max_ram_bytes(), vcpus: config.max_vcpus as u8 },
        ),
        restorable_on: host_kind(&kvm::open()?)?,
    };
    let id = writer.finish(description, &state, &config.root)?;
    progress("base sealed");
    println!("{id}");
    Ok(())
}

/// Finds out what a login touches, with a disk that nobody will see.
fn rehearse(
    config: &Config,
    built: &Built,
    memory: &File,
    image: &Image,
) -> anyhow::Result<WorkingSet> {
    let open = |path: &Path| File::open(path).with_context(|| format!("open {}", path.display()));
    let memory = memory::map(&built.layout, Backing::Base(memory), &open(&config.root)?)?;
    let memory = memory::limited(&memory, built.layout.ram_bytes())?;
    let disk = File::from(
        memfd_create(c"rehearsal", MFdFlags::MFD_CLOEXEC).context("make a disk in memory")?,
    );
    sparse::copy(&open(&image.path(image::DISK_TEMPLATE))?, &disk)
        .context("copy the disk template")?;
    working_set::rehearse(&kvm::open()?, memory, (&built.state, config.vcpus as usize), disk)
        .context("rehearse a login in the new base")
}

fn host_kind(kvm: &kvm_ioctls::Kvm) -> anyhow::Result<HostKind> {
    let digest = kvm::cpuid::fingerprint(&kvm::cpuid::supported(kvm)?);
    HostKind::here(SNAPSHOT_VERSION, digest).context("look at this host's CPU")
}

fn serve(args: &ForkServer) -> anyhow::Result<()> {
    fork_server::keep_large_buffers_out_of_the_heap();
    let socket = request_socket()?;
    // Before the sandbox, in which it could open nothing.
    faults::arm()?;
    match template(args) {
        Ok(template) => {
            fork_server::give_back_free_memory();
            fork_server::serve(&template, socket)
        }
        Err(e) => {
            let reason = format!("{e:#}");
            // Said twice: to `serve` and, should that be gone, to whoever reads our error output.
            let _ = send(&socket, &ForkEvent::Refused { reason }, &[]);
            Err(e)
        }
    }
}

/// The socket that `hermitage serve` passed as descriptor 3.
fn request_socket() -> anyhow::Result<OwnedFd> {
    const EXPECTED: &str =
        "descriptor 3 is to be a SOCK_SEQPACKET socket: `hermitage serve` starts this";
    // SAFETY: called first thing in `serve`; nothing in this process owns descriptor 3, which is either
    // not open, and then fails below, or was passed to us.
    let inherited = unsafe { BorrowedFd::borrow_raw(3) };
    let socket = rustix::io::fcntl_dupfd_cloexec(inherited, 4).context(EXPECTED)?;
    let kind = rustix::net::sockopt::socket_type(&socket).context(EXPECTED)?;
    if kind != rustix::net::SocketType::SEQPACKET {
        bail!(EXPECTED);
    }
    // The number stays open, but not as a second way to the socket, whose end has to be seen.
    let null = File::open("/dev/null").context("open /dev/null")?;
    fork_server::replace(inherited, null.as_fd());
    Ok(socket)
}

fn template(args: &ForkServer) -> anyhow::Result<Template> {
    let (base, kvm, state, memory) = usable(&args.base)?;
    let machine = base.manifest.content.machine;
    let mut template = Template::new(base.id().clone(), machine, kvm, memory, state)
        .with_context(|| format!("base {}", args.base.display()))?;
    if !args.no_sandbox {
        make_root(&args.sandbox.sandbox_root)?;
        template.jail = Some(MachineJail::new()?);
        sandbox::enter(&args.sandbox.sandbox_root, args.sandbox.uid)?;
    }
    Ok(template)
}

fn check_base(dir: &Path) -> anyhow::Result<()> {
    let (_, kvm, state, memory) = usable(dir)?;
    Machine::rehearse_restore(&kvm, &memory, &state.machine)
        .with_context(|| format!("base {}", dir.display()))
}

/// A base, if it is whole and this host can run machines of it.
fn usable(dir: &Path) -> anyhow::Result<(Base, kvm_ioctls::Kvm, BaseState, GuestMemory)> {
    let base = Base::open(dir)?;
    let kvm = kvm::open_on_boot()?;
    let content = &base.manifest.content;
    let here = host_kind(&kvm)?;
    let refuse = |why: String| {
        let dir = dir.display();
        format!(
            "{dir}: this base can't be used on this host: {why}; make a new one with: hermitage base build"
        )
    };
    let mismatches = content.restorable_on.mismatches(&here);
    if !mismatches.is_empty() {
        bail!(refuse(mismatches.join("; ")));
    }
    // What the agent in the base does not understand would end its machine.
    let (theirs, ours) = (content.agent_protocol, hermitage_guest_proto::SPOKEN);
    if !ours.contains(&theirs) {
        bail!(
            "{}: the agent in this base speaks version {theirs} of its protocol, this program {} to {}; \
             make a new one with: hermitage image build, then hermitage base build",
            dir.display(),
            ours.start(),
            ours.end(),
        );
    }
    let (state, memory) = load(&base).with_context(|| format!("base {}", dir.display()))?;
    if content.restorable_on.cpuid_digest != here.cpuid_digest {
        other_features(&kvm, &state.machine, &memory).map_err(|why| anyhow!(refuse(why)))?;
    }
    Ok((base, kvm, state, memory))
}

/// A base of a host that offered its guests other features, as this one may have done before its kernel was
/// upgraded: whether all that its guest uses is here.
fn other_features(
    kvm: &kvm_ioctls::Kvm,
    state: &MachineState,
    memory: &GuestMemory,
) -> Result<(), String> {
    let offered = kvm::cpuid::supported(kvm).map_err(|error| error.to_string())?;
    if let Some(vcpu) = state.vcpus.first() {
        let lacking = kvm::compatible::lacking(&vcpu.cpuid, &offered);
        if !lacking.is_empty() {
            return Err(format!(
                "its guest uses of the processor what is not here: {}",
                lacking.join(", ")
            ));
        }
    }
    Machine::rehearse_restore(kvm, memory, state).map_err(|error| error.to_string())?;
    tracing::info!(
        "KVM offers other features than when the base was made; all that it uses are there"
    );
    Ok(())
}

fn load(base: &Base) -> anyhow::Result<(BaseState, GuestMemory)> {
    let content = &base.manifest.content;
    let state = BaseState::decode(&base.state)?;
    let vcpus = state.machine.vcpus.len();
    let (least, most) = (content.machine.least(), content.machine.most());
    if vcpus != usize::from(most.vcpus) || !(1..=most.vcpus).contains(&least.vcpus) {
        bail!("base.json says {} to {} vCPUs, state.bin has {vcpus}", least.vcpus, most.vcpus);
    }
    let layout = Layout::new(least.memory_bytes, most.memory_bytes, content.files.root.length)?;
    let memory = memory::map(&layout, Backing::Base(&base.memory), &base.root)?;
    state.working_set.check(&memory)?;
    let huge = working_set::hot::share(&memory, &layout, &state.working_set)
        .context("copy the hot parts of memory")?;
    tracing::info!(huge, of = state.working_set.hot.len(), "hot parts of memory in huge pages");
    Ok((state, memory))
}

fn check_sandbox(args: &CheckSandbox) -> anyhow::Result<()> {
    let Sandbox { uid, sandbox_root } = &args.sandbox;
    make_root(sandbox_root)?;
    let jail = if args.by_filter { MachineJail::filter() } else { MachineJail::new() }?;
    let attempts = sandbox::check::inside(sandbox_root, *uid, &jail)?;
    let mut wrong = 0;
    for attempt in &attempts {
        let said = match (attempt.needed, attempt.worked) {
            (false, false) => "barred",
            (true, true) => "works",
            (false, true) => "WORKS",
            (true, false) => "FAILS",
        };
        wrong += u32::from(!attempt.is_right());
        println!("{said:<8} {}", attempt.what);
    }
    if wrong > 0 {
        bail!("{wrong} of {} attempts in the sandbox did not go as they must", attempts.len());
    }
    Ok(())
}

fn make_root(root: &Path) -> anyhow::Result<()> {
    std::fs::create_dir_all(root)
        .with_context(|| format!("create the sandbox's root {}", root.display()))
}
