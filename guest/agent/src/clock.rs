//! The time of day, as the host has it.
//!
//! What the host says in a message is old when it is read: a fork, or a machine that was asleep, has a way to go
//! before it can. KVM tells the host's time at the moment it is asked (KVM_HC_CLOCK_PAIRING, linux,
//! Documentation/virt/kvm/x86/hypercalls.rst), which the module `ptp_kvm` makes a clock of: a hypercall,
//! no device. Where the host can't (its own clock is not the TSC), the message is all there is.

use std::fs::File;
use std::os::fd::{AsRawFd, OwnedFd};
use std::path::Path;

use anyhow::{Context, Result};
use hermitage_guest_proto::WallClock;
use nix::sys::time::TimeSpec;
use nix::time::{ClockId, clock_gettime, clock_settime};

/// The only clock of its kind that a machine has.
const DEVICE: &str = "/dev/ptp0";

/// The host's clock, kept open from before there was anybody in the machine who could put something else
/// in its place.
pub struct HostClock(Option<OwnedFd>);

impl HostClock {
    pub fn open() -> Self {
        Self(File::open(Path::new(DEVICE)).ok().map(OwnedFd::from))
    }

    /// Sets the time of day to the host's.
    pub fn set(&self, told: WallClock) -> Result<()> {
        let told = TimeSpec::new(told.seconds, i64::from(told.nanoseconds));
        let time = self.now().filter(|now| *now >= told).unwrap_or(told);
        clock_settime(ClockId::CLOCK_REALTIME, time)
            .with_context(|| format!("setting the clock to {} s", time.tv_sec()))
    }

    /// What is behind the device may go: a base can be used on a host that is not the one it was made on.
    fn now(&self) -> Option<TimeSpec> {
        // linux/posix-timers.h: FD_TO_CLOCKID.
        const CLOCKFD: i32 = 3;
        let id = (!self.0.as_ref()?.as_raw_fd() << 3) | CLOCKFD;
        clock_gettime(ClockId::from_raw(id)).ok()
    }
}
