//! From an account's disk to its running machine: docs/architecture.md "One login", steps 2 and 3.

use std::{
    io::Write,
    os::fd::OwnedFd,
    sync::{
        Arc, Mutex,
        atomic::{AtomicBool, Ordering},
    },
    time::Duration,
};

use hermitage_guest_proto::{ASKING, Attach, HostMessage, encode};
use hermitage_storage::base::Size;
use hermitage_vmm_proto::{End, MachineEvent, ProcessExit, message_pair, stream_pair};
use tokio::{
    sync::{mpsc, oneshot, watch},
    time::{Instant, timeout},
};

use super::{
    AGENT_QUEUE, ByteStream, Line, Machine,
    agent::{self, AgentError, Reader},
    fork_server::{ForkError, ForkServers, Forked},
    given::Given,
    processes,
    socket::MessageSocket,
};
use crate::{
    cgroup::{Admission, CgroupError, Cgroups, Group},
    process,
};

/// How long a process may take to be reaped once it has said that it ends.
const REAP_TIMEOUT: Duration = Duration::from_secs(10);

/// How long a machine may go on without its agent: it powers off, and PID 1 is the last to know.
const ORPHAN_TIMEOUT: Duration = Duration::from_secs(30);

#[derive(Debug, thiserror::Error)]
pub enum LaunchError {
    #[error(transparent)]
    Fork(#[from] ForkError),
    #[error("can't make sockets for the machine: {0}")]
    Sockets(#[from] std::io::Error),
    #[error("can't tell the agent who the machine is for: {0}")]
    Attach(#[from] hermitage_guest_proto::FrameError),
    #[error("the machine could not take up the account: {0}")]
    AttachFailed(String),
    #[error("the machine ended before it was ready: {0}")]
    Ended(String),
    #[error("the machine was not ready within {after:?}: {seen}")]
    Timeout { after: Duration, seen: Seen },
    #[error(
        "what was saved of the machine was not read and checked within {after:?}; it is kept, and the next login tries \
         again. A faster disk, a higher io_rate of the account's or a longer machines.start_timeout helps"
    )]
    Unread { after: Duration },
    #[error("no control group for the machine: {0}")]
    Cgroup(#[from] CgroupError),
}

/// What a machine that never got ready did: one that burnt its processor is another trouble than one that
/// waited.
#[derive(Debug)]
pub struct Seen {
    agent_spoke: bool,
    /// Milliseconds; None if its process is gone.
    cpu: Option<u64>,
}

impl std::fmt::Display for Seen {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let agent = if self.agent_spoke { "its agent was awake" } else { "its agent said nothing" };
        match self.cpu {
            Some(cpu) => {
                write!(f, "{agent}, and it used {:.1} s of processor time", cpu as f64 / 1e3)
            }
            None => write!(f, "{agent}, and its process is gone"),
        }
    }
}

impl LaunchError {
    /// The guest went away or hung, which another fork need not. What an agent says of its account's disk
    /// it would say again.
    pub fn is_of_the_guest(&self) -> bool {
        matches!(self, LaunchError::Ended(_) | LaunchError::Timeout { .. })
    }
}

pub struct Spec {
    pub attach: Attach,
    /// The account's disk, open for writing and locked.
    pub disk: OwnedFd,
    pub timeout: Duration,
    /// Whether room for disks is scarce; the guest is kept told.
    pub scarce: watch::Receiver<bool>,
    pub admission: Admission,
    pub line: Line,
}

/// Forks a machine and waits until it has its account.
pub async fn launch(
    forks: &ForkServers,
    cgroups: &Cgroups,
    spec: Spec,
) -> Result<Arc<Machine>, LaunchError> {
    let label = spec.attach.account.clone();
    let (control, control_far) = message_pair(false)?;
    let (agent, agent_far) = stream_pair(true)?;
    let server = forks.server().await?;
    let given = Given::of(server.sizes, &spec.admission, None);
    // Before the fork, so that it is there when the guest looks; it fits any socket buffer.
    let mut frames = encode(&HostMessage::Attach(spec.attach))?;
    let most = spec.admission.processes;
    let more = [given.message(), processes::first_message(server.agent_protocol, most)];
    for message in more.into_iter().flatten() {
        frames.extend(encode(&message)?);
    }
    let mut agent = std::os::unix::net::UnixStream::from(agent);
    agent.write_all(&frames)?;
    let agent = ByteStream::new(agent)?;

    let group = cgroups.admit(&spec.admission, given.size).await?;
    let descriptors = [control_far, agent_far, spec.disk];
    let forked = forks.fork(server, label.clone(), given.size, descriptors, group.as_ref()).await?;
    let born = Born { label, forked, given, most, group, line: spec.line };
    let machine = supervise(born, MessageSocket::new(control)?, agent, spec.scarce);

    let mut attached = machine.attached.subscribe();
    let outcome = tokio::select! {
        outcome = attached.wait_for(Option::is_some) => match outcome.ok().and_then(|o| o.clone()) {
            Some(Ok(())) => return Ok(machine),
            Some(Err(reason)) => LaunchError::AttachFailed(reason),
            None => LaunchError::AttachFailed("no answer".into()),
        },
        reason = machine.ended() => LaunchError::Ended(reason),
        () = tokio::time::sleep(spec.timeout) => machine.not_ready_within(spec.timeout),
    };
    machine.kill().await;
    // Its disk is free only then, and the next attempt wants it.
    let _ = timeout(REAP_TIMEOUT, machine.gone()).await;
    Err(outcome)
}

/// A machine that was saved.
pub struct Sleeper {
    pub label: String,
    pub base: String,
    /// The account's disk, open for writing and locked.
    pub disk: OwnedFd,
    pub snapshot: OwnedFd,
    /// What it had.
    pub had: Size,
    /// Of the snapshot.
    pub bytes: u64,
    /// The terminals that wait for their user, the one left last first.
    pub left: Vec<u8>,
    pub timeout: Duration,
    pub scarce: watch::Receiver<bool>,
    pub admission: Admission,
    pub line: Line,
}

/// Why a saved machine did not come back. In any case nothing of it is left running.
#[derive(Debug, thiserror::Error)]
pub enum ResumeError {
    /// The snapshot as such; nothing was run of it.
    #[error("{0}")]
    Refused(String),
    #[error(transparent)]
    Launch(#[from] LaunchError),
}

impl From<ForkError> for ResumeError {
    fn from(error: ForkError) -> Self {
        ResumeError::Launch(error.into())
    }
}

impl From<std::io::Error> for ResumeError {
    fn from(error: std::io::Error) -> Self {
        ResumeError::Launch(error.into())
    }
}

/// Makes a machine of its base and its snapshot. Once it is whole and before it runs, `consume` marks the
/// snapshot as used up, durably.
pub async fn resume(
    forks: &ForkServers,
    cgroups: &Cgroups,
    sleeper: Sleeper,
    consume: impl Future<Output = std::io::Result<()>>,
) -> Result<Arc<Machine>, ResumeError> {
    let (control, control_far) = message_pair(false)?;
    let (agent, agent_far) = stream_pair(true)?;
    let agent = ByteStream::new(agent)?;
    let Sleeper {
        label,
        base,
        disk,
        snapshot,
        had,
        bytes,
        left,
        timeout: limit,
        scarce,
        admission,
        line,
    } = sleeper;
    let server = forks.server_of(&base).await?;
    if server.sizes.is_some_and(|sizes| !sizes.allows(had)) {
        let mib = had.memory_bytes >> 20;
        let words = format!("it has {mib} MiB and {} CPUs, which its base can't have", had.vcpus);
        return Err(ResumeError::Refused(words));
    }
    let given = Given::of(server.sizes, &admission, Some(had));
    let asks = server.agent_protocol.is_some_and(|version| version >= ASKING);
    // All of it is read and checked first, as fast as the machine may read.
    let limit = limit + given.time_for(bytes);
    let group = cgroups.admit(&admission, given.size).await.map_err(LaunchError::from)?;
    let descriptors = [control_far, agent_far, disk, snapshot];
    let forked =
        forks.resume(server, label.clone(), given.size, descriptors, group.as_ref()).await?;
    let most = admission.processes;
    let born = Born { label, forked, given, most, group, line };
    let machine = supervise_with(born, MessageSocket::new(control)?, agent, |machine| {
        machine.expect_sessions(left);
        machine.when_restored()
    });
    let (machine, restored) = machine;
    let consumed = AtomicBool::new(false);
    let come_back = async {
        tokio::select! {
            restored = restored => match restored {
                Ok(outcome) => outcome.map_err(ResumeError::Refused)?,
                Err(_) => return Err(LaunchError::Ended("no answer".into()).into()),
            },
            reason = machine.ended() => return Err(LaunchError::Ended(reason).into()),
        }
        consumed.store(true, Ordering::Relaxed);
        consume.await.map_err(|error| {
            ResumeError::Refused(format!("it can't be marked as used: {error}"))
        })?;
        machine.run_restored().await.map_err(LaunchError::Ended)?;
        // What it was saved with may be another: before its processes go on.
        machine.tell_limit(most).await;
        machine.wake().await.map_err(|reason| LaunchError::Ended(reason).into())
    };
    let outcome = timeout(limit, come_back).await.unwrap_or_else(|_| {
        // Nothing has become of it: it can be tried again.
        Err(match consumed.load(Ordering::Relaxed) {
            true => machine.not_ready_within(limit).into(),
            false => LaunchError::Unread { after: limit }.into(),
        })
    });
    if let Err(error) = outcome {
        machine.kill().await;
        let _ = timeout(REAP_TIMEOUT, machine.gone()).await;
        return Err(error);
    }
    if let Some(take) = given.message() {
        machine.tell(take).await;
    }
    if asks {
        machine.disown_questions().await;
    }
    // Its first message was another one.
    keep_told(&machine, scarce, None);
    machine.keep_limited(most);
    Ok(machine)
}

/// A process that is to be a machine.
struct Born {
    label: String,
    forked: Forked,
    given: Given,
    /// Processes that its user may have.
    most: Option<u32>,
    group: Option<Group>,
    line: Line,
}

/// Starts the tasks that go with a machine.
fn supervise(
    born: Born,
    control: MessageSocket,
    agent: ByteStream,
    scarce: watch::Receiver<bool>,
) -> Arc<Machine> {
    let most = born.most;
    let machine =
        supervise_with(born, control, agent, |machine| machine.expect_first_answer(most)).0;
    keep_told(&machine, scarce, Some(false));
    machine.keep_limited(most);
    machine
}

/// The same, with something to be done before the first event is looked at.
fn supervise_with<T>(
    Born { label, forked, given, most, group, line }: Born,
    control: MessageSocket,
    agent: ByteStream,
    before: impl FnOnce(&Machine) -> T,
) -> (Arc<Machine>, T) {
    let (agent_sender, agent_messages) = mpsc::channel(AGENT_QUEUE);
    let agent_version = forked.server.agent_protocol;
    let machine = Arc::new(Machine {
        id: forked.id,
        pid: forked.pid,
        base: forked.server.base.clone(),
        label,
        control,
        agent: agent_sender,
        line,
        table: Default::default(),
        terminal_left: Default::default(),
        standing: Default::default(),
        woken: watch::channel(0).0,
        server: forked.server,
        agent_spoke: AtomicBool::new(false),
        taking: AtomicBool::new(given.message().is_some()),
        given,
        unused: Default::default(),
        agent_version,
        most_processes: watch::channel(most).0,
        attached: watch::channel(None).0,
        ended: watch::channel(None).0,
        gone: watch::channel(None).0,
        group: Mutex::new(group.map(Arc::new)),
    });
    let first = before(&machine);
    let (reader, writer) = agent.into_split();
    let writing = tokio::spawn(agent::write(writer, agent_messages));
    let supervised = machine.clone();
    tokio::spawn(async move {
        run(&supervised, Reader::new(reader), forked.exited).await;
        writing.abort();
    });
    (machine, first)
}

/// Keeps the guest told about its disk's room until the machine ends. `told`: what it believes; one that was saved
/// believes what was so then, which nobody knows.
fn keep_told(machine: &Arc<Machine>, scarce: watch::Receiver<bool>, told: Option<bool>) {
    let machine = machine.clone();
    tokio::spawn(async move {
        tokio::select! {
            () = tell_room(machine.clone(), scarce, told) => {}
            _ = machine.ended() => {}
        }
    });
}

/// Keeps the guest told whether there is room for its disk, for as long as the service looks. `Attach`
/// is on its way already, so the disk is mounted when this arrives.
async fn tell_room(
    machine: Arc<Machine>,
    mut scarce: watch::Receiver<bool>,
    mut told: Option<bool>,
) {
    let mut woken = machine.woken.subscribe();
    loop {
        let is = *scarce.borrow_and_update();
        if told != Some(is) {
            if !machine.tell(HostMessage::DiskRoom { scarce: is }).await {
                // It does not read, or is about to be gone, which ends this task.
                tokio::time::sleep(Duration::from_secs(1)).await;
                continue;
            }
            told = Some(is);
        }
        tokio::select! {
            changed = scarce.changed() => if changed.is_err() {
                return;
            },
            // A guest that has stood still believes that there is room (docs/agent-protocol.md, Resume).
            _ = woken.changed() => told = Some(false),
        }
    }
}

/// Serves the machine's events until it is gone.
async fn run(machine: &Machine, mut agent: Reader, mut exited: oneshot::Receiver<ProcessExit>) {
    let mut reason = None;
    let mut listening = true;
    let mut orphaned = None;
    let mut exit = None;
    loop {
        tokio::select! {
            event = machine.control.receive::<MachineEvent>() => match event {
                Ok(packet) => match packet.message {
                    MachineEvent::Ended(end) => reason = Some(last_words(machine, &end)),
                    event => machine.machine_event(event),
                },
                Err(_) => break,
            },
            message = agent.message(), if listening => match message {
                Ok(message) => machine.agent_message(message),
                // A machine that ends with something of ours unread resets the connection.
                Err(AgentError::Closed | AgentError::Io(_)) => {
                    listening = false;
                    orphaned = Some(Instant::now() + ORPHAN_TIMEOUT);
                }
                Err(error) => {
                    tracing::warn!(machine = machine.label, %error, "ending the machine");
                    reason = Some(format!("its agent failed: {error}"));
                    listening = false;
                    machine.kill().await;
                }
            },
            () = deadline(orphaned) => {
                orphaned = None;
                reason = Some("its agent is gone".into());
                machine.kill().await;
            }
            status = &mut exited => {
                exit = Some(status);
                // What it said last may still be in the socket.
                while let Ok(Ok(packet)) =
                    timeout(Duration::ZERO, machine.control.receive::<MachineEvent>()).await
                {
                    match packet.message {
                        MachineEvent::Ended(end) => reason = Some(last_words(machine, &end)),
                        event => machine.machine_event(event),
                    }
                }
                // Likewise: an exit status that the agent sent in time.
                while listening && let Ok(Ok(message)) =
                    timeout(Duration::ZERO, agent.message()).await
                {
                    machine.agent_message(message);
                }
                break;
            },
        }
    }
    if exit.is_none() && reason.is_none() {
        // The process tells nothing any more; its exit status will tell something, and soon.
        exit = timeout(Duration::from_secs(1), &mut exited).await.ok();
    }
    let reason = reason.unwrap_or_else(|| match exit {
        Some(Ok(ProcessExit::Signal(signal))) => {
            format!("your machine was killed (signal {signal}); your next login starts it again")
        }
        Some(Ok(ProcessExit::Code(code))) => format!(
            "your machine ended unexpectedly (status {code}); your next login starts it again"
        ),
        Some(Err(_)) | None => "your machine is gone; your next login starts it again".into(),
    });
    tracing::info!(machine = machine.label, pid = machine.pid, reason, "machine ended");
    machine.ended.send_replace(Some(reason.clone()));
    machine.drop_waiting();
    if exit.is_none() && timeout(REAP_TIMEOUT, &mut exited).await.is_err() {
        tracing::warn!(machine = machine.label, pid = machine.pid, "not reaped; killing it");
        machine.kill().await;
        let _ = timeout(REAP_TIMEOUT, &mut exited).await;
    }
    // Nothing is in it any more; whoever waits for the end finds nothing left.
    machine.leave_group();
    machine.gone.send_replace(Some(reason));
}

async fn deadline(at: Option<Instant>) {
    match at {
        Some(at) => tokio::time::sleep_until(at).await,
        None => std::future::pending().await,
    }
}

fn last_words(machine: &Machine, end: &End) -> String {
    if let End::SnapshotRefused(reason) = end {
        machine.refused(reason);
    }
    super::printable(&end.to_string())
}

impl Machine {
    fn not_ready_within(&self, after: Duration) -> LaunchError {
        let agent_spoke = self.agent_spoke.load(Ordering::Relaxed);
        LaunchError::Timeout { after, seen: Seen { agent_spoke, cpu: process::cpu_ms(self.pid) } }
    }

    /// Whoever waits for an answer gets none any more.
    fn drop_waiting(&self) {
        let mut table = self.table();
        table.sessions.clear();
        table.connecting.clear();
    }
}
