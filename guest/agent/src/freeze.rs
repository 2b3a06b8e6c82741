//! Before a save and after it: nothing of the user's runs, and everything written is on the disk.
//!
//! Processes are stopped by the cgroup freezer (linux, Documentation/admin-guide/cgroup-v2.rst,
//! `cgroup.freeze`), which they and their parents don't notice, other than by SIGSTOP. They go on only
//! after the generator has fresh entropy and the clock is right (invariant 7): a resumed machine's first
//! instruction may be anybody's, so stopping this program alone would not do. The disk is synced after
//! them, so that a machine that is not resumed has lost nothing: its next start replays the journal.

use std::fs::File;
use std::io::{Read, Write};
use std::os::fd::{AsFd, OwnedFd};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use nix::dir::{Dir, Type};
use nix::errno::Errno;
use nix::fcntl::{OFlag, openat};
use nix::sys::stat::{Mode, mkdirat};
use nix::unistd::{self, Pid, getsid};

use crate::attach::Stages;
use crate::strays::Strays;
use crate::{log, sys, work};

/// Where sessions start, because the root cgroup can't be frozen. What has got into that one all the
/// same ([`Strays`]) is moved here before a save.
pub const HOME: &str = "hermitage";

/// How long processes may take to stop: they do at once, unless they wait for something in the kernel
/// that can't be interrupted.
const STOP_LIMIT: Duration = Duration::from_secs(5);

/// Rounds of moving processes; each meets what those of the round before have started.
const ROUNDS: usize = 50;

/// Everything stands still as long as this lives.
pub struct Frozen {
    cgroups: OwnedFd,
    /// Cgroups that were stopped by us, by name.
    stopped: Vec<String>,
}

impl Frozen {
    /// Stops every process but this one, then syncs the disk. `disk` is its root directory, `cgroups` that
    /// of the cgroup hierarchy.
    pub fn new(cgroups: OwnedFd, strays: &mut Strays, disk: File) -> Result<Self> {
        // From here on an error undoes what was done.
        let mut frozen = Self { cgroups, stopped: Vec::new() };
        let mut stages = Stages::new();
        frozen.stop_processes(strays).context("stopping processes")?;
        stages.end("stop processes");
        sys::sync_file_system(&disk).context("syncing the disk's file system")?;
        stages.end("sync disk");
        log::info(format_args!("standing still:{}", stages.text));
        Ok(frozen)
    }

    fn stop_processes(&mut self, strays: &mut Strays) -> Result<()> {
        let deadline = Instant::now() + STOP_LIMIT;
        for _ in 0..ROUNDS {
            let looked = strays.may_be_there();
            let moved = if looked { self.move_processes()? } else { 0 };
            self.stop_cgroups()?;
            self.wait_until_stopped(deadline)?;
            // All of them are stopped: none has started another since, or gone where nobody looked.
            if moved == 0 && (looked || !strays.may_be_there()) {
                return Ok(());
            }
        }
        bail!("new ones come too fast")
    }

    /// Moves the root cgroup's processes out of it. Returns how many there were.
    fn move_processes(&self) -> Result<usize> {
        let list = self.read("cgroup.procs")?;
        let mut home = None;
        let mut moved = 0;
        for pid in list.lines().filter_map(|line| line.parse().ok()).map(Pid::from_raw) {
            if pid.as_raw() <= 1 || is_kernel_thread(pid) {
                continue;
            }
            let home = match &mut home {
                Some(home) => home,
                none => none.insert(Home::open(&self.cgroups)?.group),
            };
            match home.write_all(pid.to_string().as_bytes()) {
                Ok(()) => moved += 1,
                Err(error) if error.raw_os_error() == Some(Errno::ESRCH as i32) => {}
                Err(error) => return Err(error).with_context(|| format!("moving process {pid}")),
            }
        }
        Ok(moved)
    }

    /// Stops all cgroups below the root that run. What is below them is stopped with them.
    fn stop_cgroups(&mut self) -> Result<()> {
        for name in self.children()? {
            let file = format!("{name}/cgroup.freeze");
            if self.stopped.contains(&name) || self.read(&file)?.trim() == "1" {
                continue;
            }
            self.stopped.push(name);
            self.write(&file, "1")?;
        }
        Ok(())
    }

    fn children(&self) -> Result<Vec<String>> {
        let flags = OFlag::O_RDONLY | OFlag::O_DIRECTORY | OFlag::O_CLOEXEC;
        let mut dir =
            Dir::openat(&self.cgroups, ".", flags, Mode::empty()).context("the cgroups' root")?;
        let mut names = Vec::new();
        for entry in dir.iter() {
            let entry = entry.context("listing cgroups")?;
            let name = entry.file_name().to_string_lossy().into_owned();
            if entry.file_type() == Some(Type::Directory) && !name.starts_with('.') {
                names.push(name);
            }
        }
        Ok(names)
    }

    fn wait_until_stopped(&self, deadline: Instant) -> Result<()> {
        // Most have to be on a CPU once, and are stopped: sleeping would cost a timer and its exits.
        let mut turns = 8;
        let mut pause = Duration::from_micros(100);
        for name in &self.stopped {
            while !self.read(&format!("{name}/cgroup.events"))?.lines().any(|l| l == "frozen 1") {
                if Instant::now() > deadline {
                    let seconds = STOP_LIMIT.as_secs();
                    bail!("those of the cgroup {name} have not stopped within {seconds} s");
                }
                if turns > 0 {
                    turns -= 1;
                    std::thread::yield_now();
                    continue;
                }
                std::thread::sleep(pause);
                pause = (pause * 2).min(Duration::from_millis(5));
            }
        }
        Ok(())
    }

    fn read(&self, path: &str) -> Result<String> {
        let mut text = String::new();
        open(&self.cgroups, path, OFlag::O_RDONLY)?
            .read_to_string(&mut text)
            .with_context(|| format!("reading {path} of the cgroups"))?;
        Ok(text)
    }

    fn write(&self, path: &str, text: &str) -> Result<()> {
        open(&self.cgroups, path, OFlag::O_WRONLY)?
            .write_all(text.as_bytes())
            .with_context(|| format!("writing {text} to {path} of the cgroups"))
    }
}

impl Drop for Frozen {
    fn drop(&mut self) {
        for name in &self.stopped {
            if let Err(error) = self.write(&format!("{name}/cgroup.freeze"), "0") {
                log::error(format_args!("going on: {error:#}"));
            }
        }
    }
}

/// Programs that the kernel starts are none, though they belong to no session as well. One that is gone, or can't
/// be told, is left where it is.
fn is_kernel_thread(pid: Pid) -> bool {
    /// PF_KTHREAD (linux, include/linux/sched.h) of the flags in proc_pid_stat(5).
    const KERNEL: u64 = 0x0020_0000;
    match getsid(Some(pid)) {
        Ok(session) if session.as_raw() != 0 => false,
        Ok(_) => work::flags(pid).is_none_or(|flags| flags & KERNEL != 0),
        Err(_) => true,
    }
}

/// The cgroup that sessions start in.
pub struct Home {
    group: File,
    root: File,
}

impl Home {
    /// Makes it, if it is not there: its user may be root and have removed it.
    pub fn open(cgroups: impl AsFd) -> Result<Self> {
        match mkdirat(&cgroups, HOME, Mode::from_bits_truncate(0o755)) {
            Ok(()) | Err(Errno::EEXIST) => {}
            Err(error) => return Err(error).context("making a cgroup"),
        }
        let group = open(&cgroups, &format!("{HOME}/cgroup.procs"), OFlag::O_WRONLY)?;
        let root = open(&cgroups, "cgroup.procs", OFlag::O_WRONLY)?;
        Ok(Self { group, root })
    }

    /// In a child before it has started anything: from here on it is in this cgroup. It works without: it stays
    /// where it is, in the root, and says so, as [`Strays`] has to know.
    pub fn enter(&self) {
        if unistd::write(&self.group, b"0").is_err() {
            let _ = unistd::write(&self.root, b"0");
        }
    }

    #[cfg(test)]
    pub fn with_group(self, group: File) -> Self {
        Self { group, ..self }
    }
}

pub fn open(cgroups: impl AsFd, path: &str, access: OFlag) -> Result<File> {
    openat(cgroups, path, access | OFlag::O_CLOEXEC, Mode::empty())
        .map(File::from)
        .with_context(|| format!("opening {path} of the cgroups"))
}

/// The account disk's root directory, whatever is mounted over it by now.
pub fn disk_root(initial_root: impl AsFd) -> Result<File> {
    let path = crate::mounts::DISK.trim_start_matches('/');
    let flags = OFlag::O_RDONLY | OFlag::O_DIRECTORY | OFlag::O_CLOEXEC;
    openat(initial_root, path, flags, Mode::empty())
        .map(File::from)
        .context("opening the disk's root")
}
