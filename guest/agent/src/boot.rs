//! From the kernel's hand-over to the state that is snapshot: everything a machine needs, mounted,
//! loaded, open and warm; no account, no user process, no randomness drawn that forks would share.

use std::fs::{self, File};
use std::os::fd::OwnedFd;
use std::path::Path;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use hermitage_guest_proto::{CONTROL_PORT, STREAM_PORT};
use nix::errno::Errno;
use nix::sys::resource::{RLIM_INFINITY, Resource, setrlimit};
use nix::sys::socket::{self, AddressFamily, SockFlag, SockType};

use crate::clock::HostClock;
use crate::freeze::Home;
use crate::strays::Strays;
use crate::{log, mounts, ports, processes, sys, warm};

/// The persistent-memory device that holds root.erofs.
const ROOT_DEVICE: &str = "/dev/pmem0";

/// How long a device may take to appear after its driver is loaded.
const DEVICE_WAIT: Duration = Duration::from_secs(10);

/// What systemd sets on any Debian (ping without privilege, and links and files in shared
/// directories that can't be used to trick others), and how long the disk waits for what is written.
const SETTINGS: [(&str, &str); 7] = [
    ("net/ipv4/ping_group_range", "0 2147483647"),
    ("fs/protected_hardlinks", "1"),
    ("fs/protected_symlinks", "1"),
    ("fs/protected_fifos", "1"),
    ("fs/protected_regular", "2"),
    // What programs wrote and did not sync is on the disk within some 4 s instead of 30, as metadata is by the
    // journal: less is lost when a machine dies, and little is left to be written when it is to stand still.
    ("vm/dirty_expire_centisecs", "300"),
    ("vm/dirty_writeback_centisecs", "100"),
];

pub struct Booted {
    /// The initial root, which keeps naming the mounts that the new root hides.
    pub initial_root: OwnedFd,
    /// Terminal ports, by number.
    pub ports: Vec<OwnedFd>,
    pub control: OwnedFd,
    pub streams: OwnedFd,
    /// The cgroups' root, whatever is mounted over it later.
    pub cgroups: OwnedFd,
    /// The one that sessions start in.
    pub home: Home,
    pub strays: Strays,
    pub clock: HostClock,
}

pub fn boot() -> Result<Booted> {
    nix::sys::stat::umask(nix::sys::stat::Mode::from_bits_truncate(0o022));
    mounts::mount_virtual()?;
    log::open();
    // What systemd gives a login: 1024 for programs that use select(2), more for those that ask.
    setrlimit(Resource::RLIMIT_NOFILE, 1024, 524_288).context("setting RLIMIT_NOFILE")?;
    // Counted by user, half of what the kernel can have, and met it ends her next login: no program can be run then.
    // Her cgroup's limit takes its place.
    setrlimit(Resource::RLIMIT_NPROC, RLIM_INFINITY, RLIM_INFINITY)
        .context("setting RLIMIT_NPROC")?;
    load_modules(Path::new("/modules"))?;

    wait_for("the root file system's device", || {
        Ok(Path::new(ROOT_DEVICE).exists().then_some(()))
    })?;
    mounts::mount_lower(ROOT_DEVICE)?;
    mounts::directory(mounts::DISK)?;
    mounts::directory(mounts::NEW_ROOT)?;
    prepare_run()?;
    for (name, value) in SETTINGS {
        if let Err(error) = fs::write(format!("/proc/sys/{name}"), value) {
            log::warn(format_args!("setting {name} to {value}: {error}"));
        }
    }
    if let Err(error) = loopback_up() {
        log::warn(format_args!("no loopback interface: {error}"));
    }

    let ports = wait_for("the terminals' ports", ports::open_all)?;
    let control = sys::listen(CONTROL_PORT).context("listening on the vsock control port")?;
    let streams = sys::listen(STREAM_PORT).context("listening on the vsock stream port")?;
    let initial_root = nix::fcntl::open(
        "/",
        nix::fcntl::OFlag::O_PATH | nix::fcntl::OFlag::O_DIRECTORY | nix::fcntl::OFlag::O_CLOEXEC,
        nix::sys::stat::Mode::empty(),
    )
    .context("opening the initial root")?;

    let cgroups = nix::fcntl::open(
        mounts::CGROUPS,
        nix::fcntl::OFlag::O_PATH | nix::fcntl::OFlag::O_DIRECTORY | nix::fcntl::OFlag::O_CLOEXEC,
        nix::sys::stat::Mode::empty(),
    )
    .context("opening the cgroups' root")?;
    let home = Home::open(&cgroups)?;
    if let Err(error) = processes::begin(&cgroups) {
        log::warn(format_args!("nothing bounds processes: {error:#}"));
    }

    let strays = Strays::watch(Path::new(mounts::CGROUPS)).unwrap_or_else(|error| {
        log::warn(format_args!("every save looks at every process: {error:#}"));
        Strays::unknown()
    });

    if let Err(error) = warm::warm() {
        log::warn(format_args!("warming up: {error:#}"));
    }
    log::info(format_args!("booted, waiting for the host on vsock port {CONTROL_PORT}"));
    // From here on the console is for what is wrong: errors and worse.
    sys::set_console_log_level(4).context("setting the console's log level")?;
    let clock = HostClock::open();
    Ok(Booted { initial_root, ports, control, streams, cgroups, home, strays, clock })
}

/// Loads the initrd's modules in the order its `order` file lists, then frees their memory.
fn load_modules(dir: &Path) -> Result<()> {
    let order = dir.join("order");
    let list =
        fs::read_to_string(&order).with_context(|| format!("reading {}", order.display()))?;
    for name in list.lines() {
        let path = dir.join(name);
        let module = File::open(&path).with_context(|| format!("opening {}", path.display()))?;
        match sys::load_module(&module) {
            Ok(()) | Err(Errno::EEXIST) => {}
            // This one is not for every host (clock.rs).
            Err(Errno::ENODEV | Errno::EOPNOTSUPP) if name == "ptp_kvm.ko" => {}
            Err(error) => bail!("loading the module {name}: {error}"),
        }
    }
    fs::remove_dir_all(dir).with_context(|| format!("removing {}", dir.display()))
}

/// What systemd-tmpfiles would make in /run.
fn prepare_run() -> Result<()> {
    const ROOT: (u32, u32) = (0, 0);
    mounts::directory_for("/run/lock", 0o1777, ROOT)?;
    mounts::directory_for("/run/user", 0o755, ROOT)?;
    mounts::directory_for("/run/sudo", 0o711, ROOT)?;
    // group utmp (43 in every Debian), of which screen(1) is a member by its mode
    mounts::directory_for("/run/screen", 0o1777, (0, 43))
}

fn loopback_up() -> nix::Result<()> {
    let socket =
        socket::socket(AddressFamily::Inet, SockType::Datagram, SockFlag::SOCK_CLOEXEC, None)?;
    sys::loopback_up(&socket)
}

/// Asks every few milliseconds until there is an answer. Only for the boot, which happens once a base.
fn wait_for<T>(what: &str, mut ask: impl FnMut() -> Result<Option<T>>) -> Result<T> {
    let started = Instant::now();
    loop {
        if let Some(answer) = ask().with_context(|| format!("waiting for {what}"))? {
            return Ok(answer);
        }
        if started.elapsed() > DEVICE_WAIT {
            bail!("{what} did not appear within {} s", DEVICE_WAIT.as_secs());
        }
        std::thread::sleep(Duration::from_millis(2));
    }
}
