//! A running machine, as the service sees it: three sockets and a process.
//!
//! - the *control socket* (`hermitage-vmm-proto`): terminals and streams are attached over it;
//! - the *agent stream* (`hermitage-guest-proto`): the conversation with PID 1 in the guest. What comes
//!   from there was written by a guest: a frame that does not decode ends the machine, a message about
//!   nothing we asked for is ignored;
//! - the *fork server*, which tells when the process is gone.
//!
//! Two ends are told apart: [`Machine::ended`] is the first sign (sessions are told then),
//! [`Machine::gone`] is the process reaped, after which the account's disk is free.

mod agent;
mod asking;
mod copying;
mod fork_server;
mod forwarder;
mod given;
mod launch;
mod limited;
mod open;
mod processes;
mod sleep;
mod socket;
mod stream;
mod takeover;
mod terminals;
mod work;

use std::{
    collections::HashMap,
    io::Write as _,
    os::fd::AsFd,
    sync::{
        Arc, Mutex, MutexGuard, PoisonError,
        atomic::{AtomicBool, Ordering},
    },
    time::{Duration, Instant},
};

use hermitage_guest_proto::{AgentMessage, ExitStatus, HostMessage, SessionId, TERMINALS};
use hermitage_vmm_proto::{MachineEvent, MachineId, MachineRequest, SocketError, stream_pair};
use tokio::{
    net::UnixStream,
    sync::{Notify, mpsc, oneshot, watch},
    time::timeout,
};

use crate::cgroup::Group;
pub use agent::Reader;
pub use asking::{Asked, DESK_QUEUE, Line};
pub use copying::DiskCopy;
pub use fork_server::{ForkError, ForkServer, ForkServers};
pub use forwarder::Forwarder;
pub use launch::{LaunchError, ResumeError, Sleeper, Spec, launch, resume};
pub use open::{Command, OpenError, Remote, Terminal, TerminalSpec};
pub use processes::Counted;
pub use sleep::clock;
use socket::MessageSocket;
pub use stream::{ByteStream, ReadHalf, WriteHalf};
pub use takeover::{Claim, Taken};
use terminals::TerminalState;

/// Messages waiting for the agent to read. A guest that does not read makes its own sessions wait.
const AGENT_QUEUE: usize = 64;

/// How long a request to the machine's process may take: it only has to be taken out of a socket.
const REQUEST_TIMEOUT: Duration = Duration::from_secs(10);

/// How long a power-off waits for a guest that is standing still: about as long as that should take.
const STANDING_TIMEOUT: Duration = Duration::from_secs(5);

pub struct Machine {
    pub id: MachineId,
    pub pid: i32,
    pub base: String,
    pub label: String,
    control: MessageSocket,
    agent: mpsc::Sender<HostMessage>,
    line: Line,
    table: Mutex<Table>,
    terminal_left: Notify,
    /// Held by whoever has the guest stand still.
    standing: Arc<tokio::sync::Mutex<()>>,
    /// Times that the guest went on after it.
    woken: watch::Sender<u64>,
    server: Arc<ForkServer>,
    /// A first sign of it, which comes before it has the account.
    agent_spoke: AtomicBool,
    given: given::Given,
    /// Its agent was told to take it into use.
    taking: AtomicBool,
    /// Why its guest does not use all of that.
    unused: Mutex<Option<String>>,
    /// Of the protocol; `None`: its base does not say.
    agent_version: Option<u16>,
    /// Processes that its user may have.
    most_processes: watch::Sender<Option<u32>>,
    attached: watch::Sender<Option<Result<(), String>>>,
    ended: watch::Sender<Option<String>>,
    gone: watch::Sender<Option<String>>,
    /// Its control group, until it is gone.
    group: Mutex<Option<Arc<Group>>>,
}

/// Who waits for what.
#[derive(Default)]
struct Table {
    last_session: SessionId,
    last_stream: u64,
    last_left: u64,
    steps: sleep::Steps,
    look: work::Looking,
    copy: copying::Asked,
    processes: processes::Asked,
    sessions: HashMap<SessionId, Waiting>,
    connecting: HashMap<u64, oneshot::Sender<Result<(), String>>>,
    terminals: [TerminalState; TERMINALS as usize],
}

struct Waiting {
    started: Option<oneshot::Sender<Result<u32, String>>>,
    exited: oneshot::Sender<ExitStatus>,
}

impl Machine {
    /// Sends a request with descriptors, bounded in time.
    async fn request(
        &self,
        request: &MachineRequest,
        descriptors: &[std::os::fd::BorrowedFd<'_>],
    ) -> Result<(), SocketError> {
        timeout(REQUEST_TIMEOUT, self.control.send(request, descriptors))
            .await
            .unwrap_or(Err(SocketError::WouldBlock))
    }

    /// Tells the agent something. False if the agent is gone.
    async fn tell(&self, message: HostMessage) -> bool {
        timeout(REQUEST_TIMEOUT, self.agent.send(message)).await.is_ok_and(|sent| sent.is_ok())
    }

    /// Window changes and signals, which are not worth waiting for a guest that does not listen.
    pub fn tell_if_listening(&self, message: HostMessage) {
        if self.agent.try_send(message).is_err() {
            tracing::debug!(machine = self.label, "the agent does not keep up; message dropped");
        }
    }

    /// Attaches the serial console; the socket carries it until the machine ends.
    pub async fn console(&self) -> Result<UnixStream, OpenError> {
        let (ours, theirs) = stream_pair(true)?;
        self.request(&MachineRequest::AttachConsole, &[theirs.as_fd()])
            .await
            .map_err(|error| self.lost(error))?;
        Ok(UnixStream::from_std(ours.into())?)
    }

    /// Asks the guest to power off.
    pub async fn power_off(&self, grace: Duration) {
        // Programs that stand still for a copy of the disk could not take their leave.
        let asked = Instant::now();
        let _standing = timeout(STANDING_TIMEOUT, self.standing.lock()).await;
        let grace_ms =
            grace.saturating_sub(asked.elapsed()).as_millis().try_into().unwrap_or(u32::MAX);
        self.tell(HostMessage::PowerOff { grace_ms }).await;
    }

    /// Ends the process.
    pub async fn kill(&self) {
        self.server.kill(self.id).await;
    }

    /// Waits for the first sign of the machine's end and says why.
    pub async fn ended(&self) -> String {
        wait_for(&self.ended).await
    }

    /// Waits until the process is gone and says why.
    pub async fn gone(&self) -> String {
        wait_for(&self.gone).await
    }

    fn lost(&self, error: SocketError) -> OpenError {
        match self.ended.borrow().as_ref() {
            Some(reason) => OpenError::Ended(reason.clone()),
            None => OpenError::Ended(format!("the machine does not answer: {error}")),
        }
    }

    fn table(&self) -> MutexGuard<'_, Table> {
        self.table.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn machine_event(&self, event: MachineEvent) {
        match event {
            MachineEvent::Running { stages, .. } => {
                tracing::debug!(machine = self.label, ?stages, "running");
                self.note_stages(stages);
            }
            MachineEvent::TerminalDetached { terminal } => self.terminal_detached(terminal),
            MachineEvent::Connected { stream } => {
                if let Some(waiting) = self.table().connecting.remove(&stream) {
                    let _ = waiting.send(Ok(()));
                }
            }
            MachineEvent::ConnectFailed { stream, reason } => {
                if let Some(waiting) = self.table().connecting.remove(&stream) {
                    let _ = waiting.send(Err(reason));
                }
            }
            MachineEvent::Stats(_) | MachineEvent::Ended(_) => {}
            event @ (MachineEvent::Restored { .. }
            | MachineEvent::Saved { .. }
            | MachineEvent::SaveFailed { .. }) => self.step_event(event),
            event @ (MachineEvent::CopyBegun { .. }
            | MachineEvent::CopyProgress { .. }
            | MachineEvent::CopyDone { .. }
            | MachineEvent::CopyFailed { .. }) => self.copy_event(event),
        }
    }

    fn agent_message(&self, message: AgentMessage) {
        match message {
            AgentMessage::Awake => self.agent_spoke.store(true, Ordering::Relaxed),
            AgentMessage::Attached => {
                self.attached.send_if_modified(|attached| {
                    attached.is_none() && attached.replace(Ok(())).is_none()
                });
            }
            AgentMessage::AttachFailed { reason } => {
                self.attached.send_if_modified(|attached| {
                    attached.is_none() && attached.replace(Err(printable(&reason))).is_none()
                });
            }
            AgentMessage::Started { session, pid } => {
                if let Some(waiting) = self.table().sessions.get_mut(&session)
                    && let Some(started) = waiting.started.take()
                {
                    let _ = started.send(Ok(pid));
                }
            }
            AgentMessage::StartFailed { session, reason } => {
                if let Some(waiting) = self.table().sessions.remove(&session)
                    && let Some(started) = waiting.started
                {
                    let _ = started.send(Err(printable(&reason)));
                }
            }
            AgentMessage::Exited { session, status } => {
                let waiting = self.table().sessions.remove(&session);
                if let Some(waiting) = waiting {
                    let _ = waiting.exited.send(status);
                    self.free_left(session);
                }
            }
            AgentMessage::Ready { .. } | AgentMessage::Pong(_) => {}
            AgentMessage::Frozen => self.frozen(Ok(())),
            AgentMessage::FreezeFailed { reason } => self.frozen(Err(printable(&reason))),
            AgentMessage::Resumed { sessions } => self.resumed(&sessions),
            AgentMessage::Activity(activity) => self.looked(activity),
            AgentMessage::Took { in_use, fault } => self.took(in_use, fault),
            AgentMessage::Processes(processes) => self.counted(processes),
            AgentMessage::Ask(ask) => self.asked(ask),
        }
    }
}

async fn wait_for(reason: &watch::Sender<Option<String>>) -> String {
    let mut reason = reason.subscribe();
    // The sender is the machine's, which is borrowed here: it can't be gone.
    match reason.wait_for(Option::is_some).await {
        Ok(reason) => reason.clone().unwrap_or_default(),
        Err(_) => "the machine is gone".into(),
    }
}

/// A pair of byte sockets: ours under tokio, theirs to hand over. What is `first` waits in it for the machine; it
/// is short.
fn byte_pair(first: &[u8]) -> std::io::Result<(ByteStream, std::os::fd::OwnedFd)> {
    let (ours, theirs) = stream_pair(true)?;
    let mut ours = std::os::unix::net::UnixStream::from(ours);
    ours.write_all(first)?;
    Ok((ByteStream::new(ours)?, theirs))
}

/// A guest's words for a log or a user's terminal: bounded, and without control characters.
pub fn printable(words: &str) -> String {
    words.chars().take(300).map(|c| if c.is_control() { ' ' } else { c }).collect()
}

#[cfg(test)]
mod tests {
    use super::printable;

    #[test]
    fn a_guests_words_carry_no_escape_sequences() {
        assert_eq!(printable("no \x1b]0;x\x07 disk\n"), "no  ]0;x  disk ");
        assert_eq!(printable(&"x".repeat(5000)).len(), 300);
    }
}
