//! Putting a machine to sleep and waking one up, as docs/lifecycle.md orders it. The steps are here; who
//! decides on them, and what is written to the disk between them, is the lifecycle's.

use std::{
    fs::File,
    os::fd::AsFd,
    sync::Arc,
    time::{Duration, SystemTime},
};

use hermitage_guest_proto::{HostMessage, LiveSession, Resume, SessionId, TERMINALS, WallClock};
use hermitage_vmm_proto::{MachineEvent, MachineRequest, Stage};
use tokio::{
    sync::oneshot,
    time::{sleep, timeout},
};

use super::{Machine, Waiting, printable, terminals::TerminalState};

/// How long a guest may take to stop its processes and sync its disk.
const FREEZE_TIMEOUT: Duration = Duration::from_secs(30);

/// How long writing the snapshot may take, beside the time that a slow medium needs for as much as there is memory.
const SAVE_TIMEOUT: Duration = Duration::from_secs(180);

/// How long a guest may take to go on after a save.
const WAKE_TIMEOUT: Duration = Duration::from_secs(30);

/// How long programs whose client has gone may take to be hung up: longer than being killed takes.
const QUIET_TIMEOUT: Duration = Duration::from_secs(25);

/// Bytes of the host's random numbers that a guest's generator starts from.
const ENTROPY: usize = 64;

/// Sessions of a resumed machine that are looked at: more than it can have.
const MOST_SESSIONS: usize = 1024;

/// Stages of a fork, a resume or a save that are kept.
const MOST_STAGES: usize = 64;

/// Largest session id that a machine can have been given.
const MOST_SESSION_ID: SessionId = 1 << 48;

/// Who waits for the next step's answer.
#[derive(Default)]
pub struct Steps {
    frozen: Option<oneshot::Sender<Result<(), String>>>,
    saved: Option<oneshot::Sender<Result<u64, String>>>,
    resumed: Option<oneshot::Sender<()>>,
    left: Option<Vec<u8>>,
    restored: Option<oneshot::Sender<Result<(), String>>>,
    /// Names and nanoseconds of what the machine's process did since they were asked for.
    stages: Vec<(String, u64)>,
}

impl Steps {
    /// The process may say anything: few are kept.
    fn note(&mut self, stages: Vec<Stage>) {
        let room = MOST_STAGES.saturating_sub(self.stages.len());
        let stages = stages.into_iter().take(room);
        self.stages.extend(stages.map(|stage| (stage.name, stage.nanoseconds)));
    }
}

/// The right to have a guest stand still.
pub type Standing = tokio::sync::OwnedMutexGuard<()>;

impl Machine {
    /// Waits until no client's program is on its way out: what is saved has left terminals only. A
    /// program that does not go is saved with the rest.
    pub async fn quiet(&self) {
        let moving =
            |state: &TerminalState| !matches!(state, TerminalState::Free | TerminalState::Left(_));
        let settled = async {
            while self.table().terminals.iter().any(moving) {
                sleep(Duration::from_millis(20)).await;
            }
        };
        let _ = timeout(QUIET_TIMEOUT, settled).await;
    }

    /// Makes the guest stand still, its disk clean.
    pub async fn freeze(&self) -> Result<(), String> {
        let (sender, frozen) = oneshot::channel();
        self.table().steps.frozen = Some(sender);
        if !self.tell(HostMessage::Freeze).await {
            return Err("its agent is gone".into());
        }
        self.step(frozen, FREEZE_TIMEOUT, "its agent did not stand still").await?
    }

    /// Writes the snapshot; the machine is paused afterwards, or runs on after an error. How many bytes
    /// it has.
    pub async fn save(
        &self,
        file: &File,
        account: [u8; 16],
        disk_tag: [u8; 16],
    ) -> Result<u64, String> {
        // Which pages are its own: its process has no /proc in its jail.
        let path = format!("/proc/{}/pagemap", self.pid);
        let pagemap = File::open(&path).map_err(|error| format!("can't open {path}: {error}"))?;
        let (sender, saved) = oneshot::channel();
        self.table().steps.saved = Some(sender);
        let request = MachineRequest::Save { account, disk_tag };
        self.request(&request, &[file.as_fd(), pagemap.as_fd()])
            .await
            .map_err(|error| format!("the machine does not answer: {error}"))?;
        let limit = SAVE_TIMEOUT + self.time_to_save();
        self.step(saved, limit, "its memory was not written").await?
    }

    /// A save that was called off: the paused machine runs on.
    pub async fn carry_on(&self) -> Result<(), String> {
        self.request(&MachineRequest::Continue, &[])
            .await
            .map_err(|error| format!("the machine does not answer: {error}"))
    }

    /// Ends a machine that was saved.
    pub async fn release(&self) {
        if let Err(error) = self.request(&MachineRequest::Stop, &[]).await {
            tracing::warn!(machine = self.label, %error, "can't end the saved machine");
            self.kill().await;
        }
    }

    /// Whether the machine was made of its snapshot, once it is known.
    pub(super) fn when_restored(&self) -> oneshot::Receiver<Result<(), String>> {
        let (sender, restored) = oneshot::channel();
        self.table().steps.restored = Some(sender);
        restored
    }

    pub(super) async fn run_restored(&self) -> Result<(), String> {
        self.request(&MachineRequest::Go, &[])
            .await
            .map_err(|error| format!("the machine does not answer: {error}"))
    }

    /// Lets the guest's processes go on, with the time and random numbers of now.
    pub async fn wake(&self) -> Result<(), String> {
        let mut entropy = vec![0; ENTROPY];
        getrandom::fill(&mut entropy).map_err(|error| format!("no random numbers: {error}"))?;
        let (sender, resumed) = oneshot::channel();
        self.table().steps.resumed = Some(sender);
        let resume = Resume { entropy, clock: clock() };
        if !self.tell(HostMessage::Resume(resume)).await {
            return Err("its agent is gone".into());
        }
        self.step(resumed, WAKE_TIMEOUT, "its agent did not go on").await?;
        self.woken.send_modify(|times| *times += 1);
        Ok(())
    }

    /// Nobody else has the guest stand still, or lets it go on, as long as this is held.
    pub async fn stand(&self) -> Standing {
        self.standing.clone().lock_owned().await
    }

    /// For a guest that did not go on in time, and may yet: it is told again until it has. Its answers come in the
    /// order of the questions, so until then nobody else may have it stand still: what it says to an
    /// older question would be taken for the answer to a newer one.
    pub fn keep_waking(self: &Arc<Self>, standing: Standing) {
        let machine = self.clone();
        tokio::spawn(async move {
            let woken = async {
                while machine.wake().await.is_err() {
                    sleep(Duration::from_secs(1)).await;
                }
            };
            tokio::select! {
                biased;
                _ = machine.ended() => {}
                () = woken => {}
            }
            drop(standing);
        });
    }

    /// Whose sessions the next [`wake`](Self::wake) finds: those of a machine that was resumed, whose
    /// terminals were left in this order, last first.
    pub(super) fn expect_sessions(&self, left: Vec<u8>) {
        self.table().steps.left = Some(left);
    }

    /// Takes over the sessions of a machine that was resumed: shells wait on their terminals, the rest
    /// has no client any more. Before the next message of the agent is looked at: it may tell of an end.
    fn adopt(&self, sessions: &[LiveSession], left: &[u8]) {
        let order = |terminal: u8| left.iter().position(|known| *known == terminal);
        let mut shells: [Option<SessionId>; TERMINALS as usize] = Default::default();
        for live in sessions.iter().take(MOST_SESSIONS) {
            // A guest's words: ours are counted from 1, and a terminal has one program.
            if live.session > MOST_SESSION_ID {
                continue;
            }
            let mut table = self.table();
            table.last_session = table.last_session.max(live.session);
            drop(table);
            let place = live.terminal.and_then(|terminal| shells.get_mut(usize::from(terminal)));
            match place {
                Some(place @ None) => *place = Some(live.session),
                _ => self.tell_if_listening(HostMessage::Hangup { session: live.session }),
            }
        }
        let mut terminals: Vec<u8> = (0..TERMINALS).collect();
        // The one left last is set last; one that is not known to have been left, before all others.
        terminals.sort_by_key(|terminal| std::cmp::Reverse(order(*terminal).unwrap_or(usize::MAX)));
        for terminal in terminals {
            if let Some(session) = shells[usize::from(terminal)] {
                let (exited, ended) = oneshot::channel();
                self.table().sessions.insert(session, Waiting { started: None, exited });
                self.set_left(terminal, session, ended);
            }
        }
    }

    pub(super) fn note_stages(&self, stages: Vec<Stage>) {
        self.table().steps.note(stages);
    }

    /// The stages of what the machine's process did since this was asked last.
    pub fn take_stages(&self) -> Vec<(String, u64)> {
        std::mem::take(&mut self.table().steps.stages)
    }

    pub(super) fn step_event(&self, event: MachineEvent) {
        let steps = &mut self.table().steps;
        match event {
            MachineEvent::Saved { bytes, pages, stages } => {
                tracing::debug!(machine = self.label, bytes, pages, ?stages, "saved");
                steps.note(stages);
                answer(&mut steps.saved, Ok(bytes));
            }
            MachineEvent::SaveFailed { reason } => {
                answer(&mut steps.saved, Err(printable(&reason)))
            }
            MachineEvent::Restored { stages } => {
                tracing::debug!(machine = self.label, ?stages, "restored");
                steps.note(stages);
                answer(&mut steps.restored, Ok(()));
            }
            _ => {}
        }
    }

    /// The snapshot can't be used.
    pub(super) fn refused(&self, reason: &str) {
        answer(&mut self.table().steps.restored, Err(printable(reason)));
    }

    pub(super) fn frozen(&self, outcome: Result<(), String>) {
        answer(&mut self.table().steps.frozen, outcome);
    }

    pub(super) fn resumed(&self, sessions: &[LiveSession]) {
        let left = self.table().steps.left.take();
        if let Some(left) = left {
            self.adopt(sessions, &left);
        }
        answer(&mut self.table().steps.resumed, ());
    }

    pub(super) async fn step<T>(
        &self,
        answer: oneshot::Receiver<T>,
        limit: Duration,
        late: &str,
    ) -> Result<T, String> {
        tokio::select! {
            answer = answer => answer.map_err(|_| "the machine ended".to_owned()),
            reason = self.ended() => Err(reason),
            () = sleep(limit) => Err(format!("{late} within {} s", limit.as_secs())),
        }
    }
}

/// An answer to nothing that was asked is ignored: guests and their processes may say anything.
fn answer<T>(waiting: &mut Option<oneshot::Sender<T>>, with: T) {
    if let Some(waiting) = waiting.take() {
        let _ = waiting.send(with);
    }
}

pub fn clock() -> WallClock {
    let now = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default();
    WallClock {
        seconds: now.as_secs().try_into().unwrap_or(i64::MAX),
        nanoseconds: now.subsec_nanos(),
    }
}
