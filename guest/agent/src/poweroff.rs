//! The end of a machine: processes first, then the disk, then the power.

use std::os::fd::{AsRawFd, OwnedFd};
use std::time::{Duration, Instant};

use nix::errno::Errno;
use nix::mount::{MsFlags, mount};
use nix::sys::reboot::{RebootMode, reboot};
use nix::sys::signal::{Signal, kill};
use nix::sys::wait::{WaitPidFlag, WaitStatus, waitpid};
use nix::unistd::Pid;

use crate::{log, mounts};

/// What a process may still take to go after SIGKILL; one in uninterruptible sleep may never.
const AFTER_KILL: Duration = Duration::from_secs(2);

/// Stops everything in order and never comes back.
pub fn in_order(initial_root: &OwnedFd, grace: Duration) -> ! {
    signal_all(Signal::SIGTERM);
    signal_all(Signal::SIGCONT);
    if !all_gone_within(grace) {
        signal_all(Signal::SIGKILL);
        if !all_gone_within(AFTER_KILL) {
            log::warn(format_args!("some processes outlive SIGKILL"));
        }
    }
    nix::unistd::sync();
    make_read_only(initial_root);
    power_off()
}

/// Syncs and powers off: for when this program can't go on.
pub fn at_once() -> ! {
    nix::unistd::sync();
    power_off()
}

fn signal_all(signal: Signal) {
    // -1: every process but PID 1 and this one, which is the same
    let _ = kill(Pid::from_raw(-1), signal);
}

/// Ends every process at once, whether it is stopped or not. They are reaped later.
pub fn kill_all() {
    signal_all(Signal::SIGKILL);
}

/// Reaps until there is no process left.
fn all_gone_within(limit: Duration) -> bool {
    let deadline = Instant::now() + limit;
    loop {
        match waitpid(None, Some(WaitPidFlag::WNOHANG)) {
            Err(Errno::ECHILD) => return true,
            Ok(WaitStatus::StillAlive) => {
                if Instant::now() >= deadline {
                    return false;
                }
                std::thread::sleep(Duration::from_millis(2));
            }
            _ => {}
        }
    }
}

/// Remounts the root and the disk below it read-only: ext4 then writes its journal back and marks
/// itself clean. The disk's mount is hidden by the new root; the initial root still leads to it.
fn make_read_only(initial_root: &OwnedFd) {
    let flags = MsFlags::MS_REMOUNT | MsFlags::MS_RDONLY;
    let disk = format!("/proc/self/fd/{}{}", initial_root.as_raw_fd(), mounts::DISK);
    for path in ["/", disk.as_str()] {
        if let Err(error) = mount(None::<&str>, path, None::<&str>, flags, None::<&str>) {
            // Not mounted yet: powered off before it was anybody's.
            if error != Errno::EINVAL {
                log::warn(format_args!("remounting {path} read-only: {error}"));
            }
        }
    }
    nix::unistd::sync();
}

fn power_off() -> ! {
    // Needs the power button's ACPI state S5; where there is none, a reset ends the machine too.
    let _ = reboot(RebootMode::RB_POWER_OFF);
    let _ = reboot(RebootMode::RB_AUTOBOOT);
    loop {
        std::thread::sleep(Duration::from_secs(3600));
    }
}
