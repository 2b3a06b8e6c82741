//! PID 1 of every machine, from the initrd on: it boots the machine up to the state the base snapshot
//! is taken in, makes a fork somebody's ([`attach`]), runs the account's sessions and shuts down.
//! `docs/agent-protocol.md` is what it speaks.
//!
//! One thread, one poll(2) loop, no allocation that a guest's output could grow. `poll` and not
//! `epoll`: the set is a handful of descriptors whose interests change with nearly every event, which
//! would be a system call each.
//!
//! The user of the machine is root in it and may harm this process at will; it then harms her machine
//! alone. What it must not do is die of anything ordinary, because the kernel panics when PID 1 ends.

mod account;
mod agent;
mod ask;
mod attach;
mod boot;
mod buffer;
mod clock;
mod control;
mod environment;
mod forward;
mod freeze;
mod log;
mod modes;
mod mounts;
mod ports;
mod poweroff;
mod processes;
mod resources;
mod room;
mod session;
mod signals;
mod spawn;
mod strays;
mod streams;
mod sys;
mod terminal;
mod warm;
mod work;

use std::path::Path;

fn main() {
    let name = std::env::args_os().next().unwrap_or_default();
    if std::process::id() != 1 && Path::new(&name).file_name() == Some(ask::program::NAME.as_ref())
    {
        std::process::exit(ask::program::main());
    }
    if std::env::args_os().nth(1).is_some_and(|argument| argument == warm::CHILD_ARGUMENT) {
        return;
    }
    if name == forward::NAME {
        std::process::exit(forward::main());
    }
    if std::process::id() != 1 {
        eprintln!("hermitage-agent is PID 1 of a machine; it is of no use as an ordinary program");
        std::process::exit(2);
    }
    log::open();
    std::panic::set_hook(Box::new(|panic| {
        // Unwinding would end PID 1, and with it the machine, without the disk being synced.
        log::error(format_args!("{panic}"));
        poweroff::at_once();
    }));
    if let Err(error) = run() {
        log::error(format_args!("{error:#}"));
        poweroff::at_once();
    }
}

fn run() -> anyhow::Result<()> {
    let booted = boot::boot()?;
    agent::Agent::connect(booted)?.run()
}
