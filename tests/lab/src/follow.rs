//! `cargo lab up` without `--detach`: the service's log until Ctrl-C.

use std::os::unix::process::CommandExt;
use std::process::{Child, Stdio};
use std::thread;
use std::time::Duration;

use anyhow::{Context, Result};
use nix::sys::signal::{SigSet, Signal, kill};
use nix::unistd::Pid;

use crate::serving::Serving;
use crate::ssh::quote;

/// Shows the log until the person has had enough, or there is nothing more to follow.
pub fn until_interrupted(serving: &Serving) -> Result<()> {
    let mut signals = SigSet::empty();
    for signal in [Signal::SIGINT, Signal::SIGTERM, Signal::SIGHUP] {
        signals.add(signal);
    }
    // Blocked in this thread and those started from here on, so that `wait` takes them.
    signals.thread_block().context("block signals")?;
    let mut log = tail(serving)?;
    let follower = Pid::from_raw(i32::try_from(log.id()).context("process id")?);
    let watcher = thread::spawn(move || {
        // Its end wakes the wait below: the machine is gone, or the log was taken away.
        let ended = log.wait();
        // This process exists as long as this thread does.
        let _ = kill(Pid::this(), Signal::SIGTERM);
        ended
    });
    let signal = signals.wait().context("wait for a signal")?;
    if signal == Signal::SIGTERM && watcher.is_finished() {
        crate::steps::note("the log has ended");
    }
    // Gone already when that was what woke us.
    let _ = kill(follower, Signal::SIGTERM);
    thread::sleep(Duration::from_millis(50));
    Ok(())
}

fn tail(serving: &Serving) -> Result<Child> {
    let line = format!("exec tail -n 20 -F {}", quote(&serving.log_file()));
    serving
        .command(&["sh", "-c", &line], false)
        .stdin(Stdio::null())
        // Ctrl-C is for us; the log goes on until the service has stopped.
        .process_group(0)
        .spawn()
        .context("follow the service's log")
}
