//! The monotonic clock as a number, so that two processes can compare readings.

use rustix::time::{ClockId, clock_gettime};

/// Nanoseconds of CLOCK_MONOTONIC.
pub fn now() -> u64 {
    let time = clock_gettime(ClockId::Monotonic);
    // Seconds since boot: far from overflowing, never negative.
    time.tv_sec as u64 * 1_000_000_000 + time.tv_nsec as u64
}
