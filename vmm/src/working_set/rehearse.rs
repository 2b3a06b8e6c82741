//! A login that nobody sees: a machine is forked from the base that is just being made, gets an account and
//! a disk, opens a shell, stands still as before a save, and is thrown away. What it touched is the base's working
//! set.

use std::{
    fs::File,
    io::{ErrorKind, Read as _, Write as _},
    os::unix::net::UnixStream,
    sync::atomic::{AtomicBool, Ordering},
    thread,
    time::{Duration, Instant},
};

use anyhow::{Context as _, bail};
use hermitage_guest_proto::{
    AgentMessage, Attach, Decoder, HostMessage, OpenTerminal, WallClock, Window, encode,
};
use hermitage_vmm_proto::stream_pair;
use kvm_ioctls::Kvm;

use super::{WorkingSet, record};
use crate::{
    machine::{Machine, MachineState, control},
    memory::GuestMemory,
};

/// How long attaching the account, and then starting the shell, may take.
const LIMIT: Duration = Duration::from_secs(60);

/// A shell that has said something, and then nothing for so long, is at its prompt.
const QUIET: Duration = Duration::from_secs(2);

/// Rehearses a login in a machine with `memory`, a fresh private mapping of the base's, as many CPUs as were
/// started, and `disk`, an account disk to be thrown away.
pub fn rehearse(
    kvm: &Kvm,
    memory: GuestMemory,
    (state, vcpus): (&MachineState, usize),
    disk: File,
) -> anyhow::Result<WorkingSet> {
    let disk_size = disk.metadata().context("look at the disk")?.len();
    let (ours, theirs) = stream_pair(true).context("make a socket pair")?;
    let mut agent = UnixStream::from(ours);
    agent.write_all(&encode(&HostMessage::Attach(somebody(disk_size)?))?)?;
    let machine = Machine::restore(kvm, memory.clone(), (state, vcpus), disk, theirs, &mut |_| ())?;
    let stop = AtomicBool::new(false);
    let result = thread::scope(|scope| {
        scope.spawn(|| control::pump(&machine, &stop));
        let result = match log_in(&machine, agent) {
            Ok(_sockets) => {
                machine.pause()?;
                record(&memory).context("look at what was touched")
            }
            Err(error) => Err(error.context(machine.where_it_stands())),
        };
        stop.store(true, Ordering::SeqCst);
        machine.wake();
        result
    });
    // It stays paused; this process is about to end.
    std::mem::forget(machine);
    result
}

fn somebody(disk_size: u64) -> anyhow::Result<Attach> {
    let mut entropy = vec![0; 64];
    getrandom::fill(&mut entropy).map_err(|e| anyhow::anyhow!("no random numbers: {e}"))?;
    let time = rustix::time::clock_gettime(rustix::time::ClockId::Realtime);
    Ok(Attach {
        account: "rehearsal".into(),
        uid: 1000,
        hostname: "rehearsal".into(),
        machine_id: [0x11; 16],
        entropy,
        clock: WallClock { seconds: time.tv_sec, nanoseconds: time.tv_nsec as u32 },
        disk_size,
    })
}

/// Returns the terminal's socket, so that nothing is hung up.
fn log_in(machine: &Machine, mut agent: UnixStream) -> anyhow::Result<(UnixStream, UnixStream)> {
    let mut decoder = Decoder::default();
    for expected in [AgentMessage::Awake, AgentMessage::Attached] {
        let message = answer(machine, &mut agent, &mut decoder)?;
        if message != expected {
            bail!("the agent said {message:?} instead of {expected:?} to Attach");
        }
    }
    let (ours, theirs) = stream_pair(true).context("make a socket pair")?;
    machine.devices.console.attach(0, theirs, None)?;
    let open = HostMessage::OpenTerminal(OpenTerminal {
        session: 1,
        terminal: 0,
        term: "xterm-256color".into(),
        window: Window { columns: 80, rows: 24, ..Window::default() },
        modes: Vec::new(),
        env: Vec::new(),
        command: None,
        greeting: String::new(),
    });
    agent.write_all(&encode(&open)?).context("write to the agent")?;
    match answer(machine, &mut agent, &mut decoder)? {
        AgentMessage::Started { .. } => {}
        other => bail!("the agent answered {other:?} to OpenTerminal"),
    }
    let mut terminal = UnixStream::from(ours);
    until_quiet(machine, &mut terminal)?;
    // Every login ends so, and then somebody waits.
    agent.write_all(&encode(&HostMessage::Freeze)?).context("write to the agent")?;
    match answer(machine, &mut agent, &mut decoder)? {
        AgentMessage::Frozen => Ok((terminal, agent)),
        other => bail!("the agent answered {other:?} to Freeze"),
    }
}

fn answer(
    machine: &Machine,
    agent: &mut UnixStream,
    decoder: &mut Decoder,
) -> anyhow::Result<AgentMessage> {
    let deadline = Instant::now() + LIMIT;
    let mut bytes = [0; 4096];
    loop {
        if let Some(message) = decoder.message().context("the agent's message")? {
            return Ok(message);
        }
        match read(machine, agent, &mut bytes, deadline, "answer from the agent")? {
            Some(n) => decoder.feed(&bytes[..n]),
            None => continue,
        }
    }
}

fn until_quiet(machine: &Machine, terminal: &mut UnixStream) -> anyhow::Result<()> {
    let deadline = Instant::now() + LIMIT;
    let mut bytes = [0; 4096];
    let mut last = None;
    loop {
        match read(machine, terminal, &mut bytes, deadline, "prompt on the terminal")? {
            Some(_) => last = Some(Instant::now()),
            None if last.is_some_and(|last: Instant| last.elapsed() > QUIET) => return Ok(()),
            None => continue,
        }
    }
}

/// None: nothing came for a moment.
fn read(
    machine: &Machine,
    socket: &mut UnixStream,
    bytes: &mut [u8],
    deadline: Instant,
    what: &str,
) -> anyhow::Result<Option<usize>> {
    if let Some(end) = machine.ended() {
        bail!("the guest ended before the {what}: {end}");
    }
    if Instant::now() > deadline {
        bail!("no {what} within {} s", LIMIT.as_secs());
    }
    socket.set_nonblocking(false)?;
    socket.set_read_timeout(Some(Duration::from_millis(100)))?;
    match socket.read(bytes) {
        Ok(0) => bail!("the guest closed the connection instead of the {what}"),
        Ok(n) => Ok(Some(n)),
        Err(e) if matches!(e.kind(), ErrorKind::WouldBlock | ErrorKind::Interrupted) => Ok(None),
        Err(e) => Err(e).with_context(|| format!("read the {what}")),
    }
}
