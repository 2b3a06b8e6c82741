//! What forking, logging in and idling cost, measured on the serving machine.
//!
//! Every figure comes with its ratio to a peer of the same run, because absolute times mean nothing on
//! an emulated CPU. `docs/bench.md` tells what each row is.

pub mod base;
pub mod cgroup;
pub mod clock;
pub mod exits;
pub mod floor;
pub mod fork;
pub mod host;
pub mod idle;
pub mod login;
pub mod machines;
pub mod prompt;
pub mod report;
pub mod resume;
pub mod sleep;
pub mod stats;
pub mod transfer;
pub mod wait;

/// Says on standard error what is being done.
#[macro_export]
macro_rules! progress {
    ($($what:tt)*) => { eprintln!("hermitage-bench: {}", format_args!($($what)*)) };
}
