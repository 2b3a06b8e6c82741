//! Making a base: boot the image, wait until its agent is ready and the machine quiet, pause, save.

use std::{
    fs::File,
    io::{self, Read as _},
    os::unix::net::UnixStream,
    path::{Path, PathBuf},
    sync::atomic::{AtomicBool, Ordering},
    thread,
    time::{Duration, Instant},
};

use anyhow::{Context as _, bail};
use hermitage_guest_proto::{AgentMessage, CONTROL_PORT, Decoder, VERSION};
use hermitage_vmm_proto::stream_pair;

use crate::{
    kvm::{self, IdleVm},
    machine::{BootConfig, Machine, MachineState, control, vcpus::lock},
    memory::{self, Backing, GuestMemory, layout::Layout},
};

/// How long the guest may take to boot: a minute would do on hardware; under emulation with other
/// work beside it, several.
const BOOT_LIMIT: Duration = Duration::from_secs(300);
const QUIET_LIMIT: Duration = Duration::from_secs(60);

/// The kernel command line of every machine.
///
/// The whole boot goes to the console's log, which every fork's operator sees; the agent makes the
/// console quiet before the snapshot. `no_timer_check`: there is no PIT to check. `transparent_hugepage=never`: a fork pays for each
/// 4 KiB page it writes, a huge page would be 512 of them. `random.trust_cpu=off`: what is seeded
/// before the snapshot is shared by all forks anyway; each gets its own seed at once.
/// `init_on_alloc=0`: free pages are zero in the base; writing zeroes over them again costs a private
/// page each. `tsc=nowatchdog`: kvm-clock is watched by nobody, and waking up twice a second to watch the
/// TSC is not free. `pci=conf1`: see [`crate::devices::bus::PCI_ADDRESS_PORT`].
/// `page_reporting_order=4`: free memory is reported in blocks of 64 KiB and more, not of 2 MiB and more, which
/// a machine that has run for a while has few of. `panic=-1`: a panic ends the machine at once.
pub const CMDLINE: &str = "console=ttyS0 panic=-1 reboot=k no_timer_check \
    transparent_hugepage=never random.trust_cpu=off init_on_alloc=0 mitigations=auto \
    tsc=nowatchdog nowatchdog pci=conf1 audit=0 selinux=0 apparmor=0 \
    page_reporting.page_reporting_order=4";

pub struct Config {
    pub kernel: PathBuf,
    pub initrd: PathBuf,
    pub root: PathBuf,
    /// What machines boot with, and what they can have at most.
    pub memory_mib: u64,
    pub max_memory_mib: u64,
    pub vcpus: u32,
    pub max_vcpus: u32,
    pub cmdline_extra: String,
    pub serial_log: Option<PathBuf>,
}

/// A paused machine and all that a base is made of.
pub struct Built {
    pub state: MachineState,
    pub memory: GuestMemory,
    pub layout: Layout,
    pub kernel_release: String,
    pub cmdline: String,
}

impl Config {
    pub fn layout(&self) -> anyhow::Result<Layout> {
        let root =
            self.root.metadata().with_context(|| format!("look at {}", self.root.display()))?;
        Ok(Layout::new(self.memory_mib << 20, self.max_memory_mib << 20, root.len())?)
    }

    /// The kernel's command line, with what makes room for machines of other sizes.
    ///
    /// `maxcpus`: how many CPUs are started; the agent starts others. `noreplace-smp`: on one CPU the kernel would take
    /// the lock prefixes out of its code, and put them back when a second one is started: private copies of most of
    /// its pages, in each machine that has two. `memhp_default_state`: memory devices' memory is there, and the
    /// agent takes into use what the account has. `memmap_on_memory`: what describes a block of memory lies in
    /// that block, not in the memory that every machine has, and is made when the block is taken into use.
    fn cmdline(&self) -> String {
        let mut line = CMDLINE.to_owned();
        if self.max_vcpus > self.vcpus {
            line += &format!(" maxcpus={} noreplace-smp", self.vcpus);
        }
        if self.max_memory_mib > self.memory_mib {
            line += " memhp_default_state=offline memory_hotplug.memmap_on_memory=1";
        }
        format!("{line} {}", self.cmdline_extra).trim().to_owned()
    }
}

/// Boots and stops at the moment that becomes the base. The machine never goes on: `Built` holds its
/// memory, its vCPUs stay paused until the process ends.
/// `memory_file` is the base's memory file, of its whole length.
pub fn boot_and_pause(
    config: &Config,
    memory_file: &File,
    progress: &dyn Fn(&str),
) -> anyhow::Result<Built> {
    let open = |path: &Path| File::open(path).with_context(|| format!("open {}", path.display()));
    let root = open(&config.root)?;
    let layout = config.layout()?;
    let memory = memory::map(&layout, Backing::New(memory_file), &root)?;
    let serial_log = match &config.serial_log {
        Some(path) => {
            Some(File::create(path).with_context(|| format!("create {}", path.display()))?)
        }
        None => None,
    };
    let kvm = kvm::open()?;
    let _idle = IdleVm::new(&kvm)?;
    let cmdline = config.cmdline();
    let started = Instant::now();
    let machine = Machine::boot(
        &kvm,
        memory.clone(),
        BootConfig {
            layout: &layout,
            vcpus: config.max_vcpus,
            kernel: &mut open(&config.kernel)?,
            initrd: &mut open(&config.initrd)?,
            cmdline: &cmdline,
            serial_log,
        },
    )?;
    progress("the guest boots");

    let stop = AtomicBool::new(false);
    let state = thread::scope(|scope| {
        // The devices' host side is served by a thread of its own while this one waits for the agent.
        scope.spawn(|| control::pump(&machine, &stop));
        let result = wait_and_save(&kvm, &machine, config.max_vcpus, started, progress, &stop);
        stop.store(true, Ordering::SeqCst);
        machine.wake();
        result
    });
    let (state, kernel_release) = state.map_err(|e| {
        let tail = lock(&machine.devices.serial).tail(4096);
        e.context(format!("the guest's console ended with:\n{}", String::from_utf8_lossy(&tail)))
    })?;
    // Paused for good; the process is about to end.
    std::mem::forget(machine);
    Ok(Built { state, memory, layout, kernel_release, cmdline })
}

fn wait_and_save(
    kvm: &kvm_ioctls::Kvm,
    machine: &Machine,
    vcpus: u32,
    started: Instant,
    progress: &dyn Fn(&str),
    stop: &AtomicBool,
) -> anyhow::Result<(MachineState, String)> {
    let kernel = wait_for_ready(machine, started)?;
    progress(&format!("the agent is ready after {:.1} s", started.elapsed().as_secs_f64()));
    wait_until_quiet(machine)?;
    stop.store(true, Ordering::SeqCst);
    machine.wake();
    let cpuid = kvm::cpuid::for_vcpu(&kvm::cpuid::supported(kvm)?, 0, vcpus);
    let fresh = kvm::fresh_msrs(kvm, &cpuid)?;
    let state = machine.pause_and_save(&fresh, &mut |_| ())?;
    Ok((state, kernel))
}

/// Connects to the agent as soon as it listens and waits for its word.
fn wait_for_ready(machine: &Machine, started: Instant) -> anyhow::Result<String> {
    let mut attempt = 0;
    'connect: loop {
        attempt += 1;
        let (ours, theirs) = stream_pair(true)?;
        machine.devices.vsock.connect(attempt, CONTROL_PORT, theirs)?;
        let mut stream = UnixStream::from(ours);
        stream.set_nonblocking(false)?;
        stream.set_read_timeout(Some(Duration::from_millis(200)))?;
        let mut decoder = Decoder::default();
        let mut bytes = [0; 4096];
        loop {
            if let Some(end) = machine.ended() {
                bail!("the guest ended before its agent was ready: {end}");
            }
            if started.elapsed() > BOOT_LIMIT {
                bail!("the agent was not ready within {} s", BOOT_LIMIT.as_secs());
            }
            match stream.read(&mut bytes) {
                // Refused: nobody listens yet.
                Ok(0) => {
                    thread::sleep(Duration::from_millis(100));
                    continue 'connect;
                }
                Ok(n) => decoder.feed(&bytes[..n]),
                Err(e) if e.kind() == io::ErrorKind::WouldBlock => continue,
                Err(e) => return Err(e).context("read from the agent"),
            }
            if let Some(message) = decoder.message::<AgentMessage>().context("agent's message")? {
                let AgentMessage::Ready { version, kernel } = message else {
                    bail!("the agent's first word was {message:?}, not Ready");
                };
                if version != VERSION {
                    bail!(
                        "the image's agent speaks version {version} of the protocol, this program \
                         {VERSION}: build the image again"
                    );
                }
                // Keep our end open: the connection is part of the snapshot.
                std::mem::forget(stream);
                return Ok(kernel);
            }
        }
    }
}

/// Waits until the guest uses next to no CPU: late work of booting is then done, and is not repeated
/// by every fork.
fn wait_until_quiet(machine: &Machine) -> anyhow::Result<()> {
    const WINDOW: Duration = Duration::from_millis(500);
    let started = Instant::now();
    let mut quiet = 0;
    let mut last = machine.cpu_time();
    while quiet < 3 {
        if let Some(end) = machine.ended() {
            bail!("the guest ended: {end}");
        }
        if started.elapsed() > QUIET_LIMIT {
            bail!("the guest is still busy after {} s", QUIET_LIMIT.as_secs());
        }
        thread::sleep(WINDOW);
        let now = machine.cpu_time();
        quiet = if (now - last) < WINDOW / 20 { quiet + 1 } else { 0 };
        last = now;
    }
    Ok(())
}
