//! Terminals and commands of a machine: docs/architecture.md "One login", steps 4 and 5.

use std::{os::fd::AsFd, sync::Arc, time::Duration};

use hermitage_guest_proto::{
    Exec, ExitStatus, HostMessage, OpenTerminal, Program, STREAM_PORT, SessionId, TERMINALS, Window,
};
use hermitage_vmm_proto::{MachineRequest, SocketError};
use tokio::{sync::oneshot, time::timeout};

use super::{ByteStream, Claim, Machine, Taken, Waiting, byte_pair, terminals::Slot};

/// How long the guest may take to start a program.
const START_TIMEOUT: Duration = Duration::from_secs(30);

/// How long a hung-up program may take before it is killed.
const HANGUP_TIMEOUT: Duration = Duration::from_secs(10);

#[derive(Clone, Debug, thiserror::Error)]
pub enum OpenError {
    #[error("all {TERMINALS} terminals of this machine are in use; {}", advice(*.left))]
    NoTerminal { left: usize },
    #[error("the machine ended: {0}")]
    Ended(String),
    #[error("can't start the program: {0}")]
    Refused(String),
    #[error("the machine did not start the program within {0:?}")]
    Timeout(Duration),
    #[error("can't make sockets: {0}")]
    Sockets(String),
}

fn advice(left: usize) -> String {
    match left {
        0 => "close one first".into(),
        1 => "one of them waits for you: log in without +new to take it up".into(),
        left => format!("{left} of them wait for you: log in without +new to take one up"),
    }
}

impl From<std::io::Error> for OpenError {
    fn from(error: std::io::Error) -> Self {
        OpenError::Sockets(error.to_string())
    }
}

/// What runs on a terminal.
pub struct TerminalSpec {
    pub term: String,
    pub window: Window,
    pub modes: Vec<(u8, u32)>,
    pub env: Vec<(String, String)>,
    pub command: Option<Vec<u8>>,
    /// A line for before the message of the day.
    pub greeting: String,
}

/// A program on a terminal. Dropping it leaves a shell on its terminal; another program is hung up, and
/// the terminal is free once it has ended.
pub struct Terminal {
    pub socket: ByteStream,
    pub program: Running,
    /// When somebody else has it: this is to be dropped then.
    pub taken: Taken,
}

/// A program on streams of its own. Dropping it hangs the program up.
pub struct Command {
    pub stdio: ByteStream,
    pub stderr: ByteStream,
    pub program: Running,
}

impl Machine {
    pub async fn open_terminal(
        self: &Arc<Self>,
        spec: TerminalSpec,
        claim: &Claim,
    ) -> Result<Terminal, OpenError> {
        let slot = Slot::take(self)?;
        let (ours, theirs) = byte_pair(&[])?;
        let terminal = slot.index;
        let attach = MachineRequest::AttachTerminal { terminal, redraw: None };
        self.request(&attach, &[theirs.as_fd()]).await.map_err(|error| self.lost(error))?;
        drop(theirs);
        let shell = spec.command.is_none();
        if shell {
            // From here on the machine keeps its screen.
            let Window { columns, rows, .. } = spec.window;
            let resize = MachineRequest::ResizeTerminal { terminal, columns, rows };
            self.request(&resize, &[]).await.map_err(|error| self.lost(error))?;
        }
        let mut program = self
            .start(Some(slot), |session| {
                HostMessage::OpenTerminal(OpenTerminal {
                    session,
                    terminal,
                    term: spec.term,
                    window: spec.window,
                    modes: spec.modes,
                    env: spec.env,
                    command: spec.command,
                    greeting: spec.greeting,
                })
            })
            .await?;
        program.stays = shell;
        let taken = if shell { self.hold(terminal, claim) } else { Taken::never() };
        Ok(Terminal { socket: ours, program, taken })
    }

    /// The shell whose terminal was left last, if there is one, or is to be left now, with its screen
    /// redrawn in that window.
    pub async fn take_up(
        self: &Arc<Self>,
        window: Window,
        claim: &Claim,
    ) -> Result<Option<Terminal>, OpenError> {
        let (ours, theirs) = byte_pair(&[])?;
        self.reclaim(claim).await;
        let Some(program) = self.take_left().await else { return Ok(None) };
        let Some(terminal) = program.slot.as_ref().map(|slot| slot.index) else { return Ok(None) };
        self.tell(HostMessage::Resize { session: program.session, window }).await;
        let redraw = Some((window.columns, window.rows));
        let attach = MachineRequest::AttachTerminal { terminal, redraw };
        self.request(&attach, &[theirs.as_fd()]).await.map_err(|error| self.lost(error))?;
        let taken = self.hold(terminal, claim);
        Ok(Some(Terminal { socket: ours, program, taken }))
    }

    pub async fn exec(
        self: &Arc<Self>,
        program: Program,
        env: Vec<(String, String)>,
    ) -> Result<Command, OpenError> {
        let ((stdio, stdio_token), (stderr, stderr_token)) =
            tokio::try_join!(self.connect(STREAM_PORT, None), self.connect(STREAM_PORT, None))?;
        let program = self
            .start(None, |session| {
                HostMessage::Exec(Exec {
                    session,
                    program,
                    env,
                    stdio: stdio_token,
                    stderr: stderr_token,
                })
            })
            .await?;
        Ok(Command { stdio, stderr, program })
    }

    /// A stream to a program that listens in the guest, with the token that it knows it by.
    pub async fn stream_to(&self, port: u32, token: u64) -> Result<ByteStream, OpenError> {
        self.connect(port, Some(token)).await.map(|(stream, _)| stream)
    }

    /// A stream into the guest and the token that names it there: its own number, if none is given.
    async fn connect(&self, port: u32, token: Option<u64>) -> Result<(ByteStream, u64), OpenError> {
        let (sender, connected) = oneshot::channel();
        let stream = {
            let mut table = self.table();
            table.last_stream += 1;
            let stream = table.last_stream;
            table.connecting.insert(stream, sender);
            stream
        };
        // The token goes first whatever happens: it waits in the socket.
        let token = token.unwrap_or(stream);
        let (ours, theirs) = byte_pair(&token.to_le_bytes())?;
        let request = MachineRequest::Connect { stream, port };
        let outcome = match self.request(&request, &[theirs.as_fd()]).await {
            Ok(()) => {
                drop(theirs);
                self.wait(connected).await?
            }
            Err(error) => return Err(self.lost(error)),
        };
        outcome.map_err(|reason| {
            OpenError::Refused(format!("no stream into the machine: {}", super::printable(&reason)))
        })?;
        Ok((ours, token))
    }

    /// Sends a start message and waits for its answer.
    async fn start(
        self: &Arc<Self>,
        slot: Option<Slot>,
        message: impl FnOnce(SessionId) -> HostMessage,
    ) -> Result<Running, OpenError> {
        let (started_sender, started) = oneshot::channel();
        let (exited_sender, exited) = oneshot::channel();
        let session = {
            let mut table = self.table();
            table.last_session += 1;
            let session = table.last_session;
            table
                .sessions
                .insert(session, Waiting { started: Some(started_sender), exited: exited_sender });
            session
        };
        // From here on dropping it tells the guest to hang up whatever it has started.
        let running =
            Running { machine: self.clone(), session, exited: Some(exited), slot, stays: false };
        if !self.tell(message(session)).await {
            return Err(self.lost(SocketError::Closed));
        }
        match self.wait(started).await? {
            Ok(pid) => {
                tracing::debug!(machine = self.label, session, pid, "started");
                Ok(running)
            }
            Err(reason) => {
                let mut running = running;
                running.exited = None;
                Err(OpenError::Refused(reason))
            }
        }
    }

    async fn wait<T>(&self, answer: oneshot::Receiver<T>) -> Result<T, OpenError> {
        match timeout(START_TIMEOUT, answer).await {
            Ok(Ok(answer)) => Ok(answer),
            // Dropped without an answer: only the machine's end does that.
            Ok(Err(_)) => Err(OpenError::Ended(
                timeout(Duration::from_secs(1), self.ended())
                    .await
                    .unwrap_or_else(|_| "no answer".into()),
            )),
            Err(_) => Err(OpenError::Timeout(START_TIMEOUT)),
        }
    }
}

/// A started program. Dropped before it has exited, a shell on a terminal stays there; another is hung
/// up, and if that does not end it, killed. Its terminal, if it has one, is free only then.
pub struct Running {
    machine: Arc<Machine>,
    session: SessionId,
    exited: Option<oneshot::Receiver<ExitStatus>>,
    slot: Option<Slot>,
    /// It stays on its terminal when its client goes away.
    stays: bool,
}

impl Running {
    pub(super) fn shell(
        machine: Arc<Machine>,
        session: SessionId,
        exited: oneshot::Receiver<ExitStatus>,
        slot: Slot,
    ) -> Self {
        Self { machine, session, exited: Some(exited), slot: Some(slot), stays: true }
    }

    /// Its exit status; None if the machine ended first. Cancellation-safe; once it has been
    /// returned, waits for ever.
    pub async fn exited(&mut self) -> Option<ExitStatus> {
        let Some(exited) = self.exited.as_mut() else {
            return std::future::pending().await;
        };
        let status = exited.await.ok();
        self.exited = None;
        status
    }

    /// After the exit of a program on a terminal: the machine delivers what is left on the socket, then
    /// closes it.
    pub async fn detach(&mut self) -> Result<(), OpenError> {
        let Some(slot) = self.slot.as_mut() else { return Ok(()) };
        slot.detached = true;
        let request = MachineRequest::DetachTerminal { terminal: slot.index };
        self.machine.request(&request, &[]).await.map_err(|error| self.machine.lost(error))
    }

    pub fn remote(&self) -> Remote {
        let terminal = self.slot.as_ref().filter(|_| self.stays).map(|slot| slot.index);
        Remote { machine: self.machine.clone(), session: self.session, terminal }
    }
}

/// What a program is told from outside.
pub struct Remote {
    machine: Arc<Machine>,
    session: SessionId,
    /// Whose screen is kept.
    terminal: Option<u8>,
}

impl Remote {
    pub fn resize(&self, window: Window) {
        self.machine.resize(self.session, self.terminal, window);
    }

    pub fn signal(&self, name: String) {
        self.machine.tell_if_listening(HostMessage::Signal { session: self.session, name });
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        let (exited, slot) = (self.exited.take(), self.slot.take());
        if exited.is_none() && slot.is_none() {
            return;
        }
        let (machine, session) = (self.machine.clone(), self.session);
        // Without a runtime the service is ending, and the machine with it.
        let Ok(runtime) = tokio::runtime::Handle::try_current() else { return };
        if self.stays && exited.is_some() {
            if let (Some(exited), Some(slot)) = (exited, slot) {
                runtime.spawn(slot.leave(session, exited));
            }
            return;
        }
        runtime.spawn(async move {
            if let Some(slot) = slot.as_ref().filter(|slot| !slot.detached) {
                machine.let_go(slot.index).await;
            }
            if let Some(exited) = exited
                && !hang_up(&machine, session, exited).await
            {
                // The guest may still use the terminal: nobody else gets it.
                slot.into_iter().for_each(Slot::keep);
                tracing::debug!(machine = machine.label, session, "survived hang-up and kill");
            }
        });
    }
}

/// Hangs a program up, then kills it. False if even that did not end it.
async fn hang_up(
    machine: &Machine,
    session: SessionId,
    mut exited: oneshot::Receiver<ExitStatus>,
) -> bool {
    machine.tell(HostMessage::Hangup { session }).await;
    if timeout(HANGUP_TIMEOUT, &mut exited).await.is_ok() {
        return true;
    }
    machine.tell(HostMessage::Signal { session, name: "KILL".into() }).await;
    let ended = timeout(HANGUP_TIMEOUT, &mut exited).await.is_ok();
    machine.table().sessions.remove(&session);
    ended
}
