//! The task that owns one account's machine: everything that changes its state comes through here, in
//! one order, and effects are carried out before the next event is looked at. Only the fork itself runs
//! beside it, so that a stop can be noted while it is under way.

mod copying;
mod report;
mod vigil;

use std::{
    collections::VecDeque,
    sync::Arc,
    time::{Duration, SystemTime},
};

use hermitage_storage::{
    StateDir,
    accounts::{self, MachineState},
    saved,
};
use tokio::{
    sync::{Semaphore, mpsc, oneshot, watch},
    task::JoinHandle,
    time::Instant,
};
use tokio_util::sync::CancellationToken;
use uuid::Uuid;

use super::{
    Arrival, How, Lease, LoginError, MachineCell, Status, copy, save, start,
    state::{Effect, Event, Intent, Lifecycle, SaveOutcome, State, StopCause, Timer},
    words,
};
use crate::{
    cgroup::Cgroups,
    machine::{Asked, ForkServers, Machine},
    promises::{Promise, Promises},
    server::Settings,
    store::Store,
    watch::{Meter, Watch},
};
use vigil::Vigil;

/// How long a client may take from authentication to its session, at least.
const EXPECTED_TIMEOUT: Duration = Duration::from_secs(10);

/// How long a killed machine may take to be gone before it is killed again.
const KILL_TIMEOUT: Duration = Duration::from_secs(10);

/// Of the time a guest has to power off, what is kept back so that the process can end in time.
const POWER_OFF_MARGIN: Duration = Duration::from_secs(3);

/// What every account's task stands on.
pub struct Context {
    pub config: Settings,
    pub state_dir: StateDir,
    pub store: Store,
    pub forks: ForkServers,
    pub watch: Watch,
    pub promises: Promises,
    pub cgroups: Cgroups,
    /// Whether room for disks is scarce.
    pub scarce: watch::Receiver<bool>,
    /// Whose turn it is to have a disk copied.
    pub copies: Semaphore,
    /// Where machines have their users' questions answered.
    pub desk: mpsc::Sender<Asked>,
}

pub(super) enum Request {
    Expect,
    Login {
        max_sessions: u32,
        reply: oneshot::Sender<Result<Lease, LoginError>>,
    },
    Stop {
        cause: StopCause,
        reply: oneshot::Sender<()>,
    },
    /// The account's row has changed.
    Reconsider,
    /// A copy of the disk is wanted.
    Copy(copy::Asker),
}

pub(super) struct Driver {
    context: Arc<Context>,
    account: Uuid,
    lifecycle: Lifecycle,
    requests: mpsc::Receiver<Request>,
    leaves: watch::Sender<u64>,
    left: u64,
    waiting: Vec<oneshot::Sender<Result<Lease, LoginError>>>,
    stopping: Vec<oneshot::Sender<()>>,
    starting: Option<JoinHandle<Result<start::Started, start::StartError>>>,
    saving: Option<JoinHandle<save::SaveOver>>,
    call_off: CancellationToken,
    /// Who wants copies of the disk; they are served one after the other.
    askers: VecDeque<copy::Asker>,
    copying: Option<JoinHandle<()>>,
    call_off_copy: CancellationToken,
    /// What this service or the one before knows of the last machine; None before it was looked up.
    former: Option<start::Former>,
    /// Bytes of the last save, and why there was one.
    saved_bytes: u64,
    saved_because: String,
    machine: Option<Attached>,
    timer: Option<Instant>,
    vigil: Vigil,
    /// What the account may take on the host, as whoever watches over its machine's disk knows it.
    quota: watch::Sender<Option<u64>>,
    status: watch::Sender<Status>,
}

/// The machine the account has, and how its sessions learn that it is taken away.
struct Attached {
    machine: Arc<MachineCell>,
    _promise: Promise,
    dying: bool,
    arrival: Arrival,
    /// For the first who is let in; later ones find it running.
    how: How,
    end: watch::Sender<Option<String>>,
}

impl Driver {
    pub(super) fn new(
        context: Arc<Context>,
        account: Uuid,
        requests: mpsc::Receiver<Request>,
    ) -> (Self, watch::Receiver<Status>) {
        let (status, watched) = watch::channel(Status {
            state: MachineState::Stopped,
            since: SystemTime::now(),
            why: String::new(),
            machine_pid: None,
            base: None,
            sessions: 0,
            awake: None,
            machine: None,
        });
        let vigil = Vigil::new(&context.config.machines);
        let lifecycle = match context.state_dir.snapshot(account).exists() {
            true => Lifecycle::saved(),
            false => Lifecycle::default(),
        };
        let driver = Self {
            context,
            account,
            lifecycle,
            requests,
            leaves: watch::channel(0).0,
            left: 0,
            waiting: vec![],
            stopping: vec![],
            starting: None,
            saving: None,
            call_off: CancellationToken::new(),
            askers: VecDeque::new(),
            copying: None,
            call_off_copy: CancellationToken::new(),
            former: None,
            saved_bytes: 0,
            saved_because: String::new(),
            machine: None,
            timer: None,
            vigil,
            quota: watch::channel(None).0,
            status,
        };
        (driver, watched)
    }

    pub(super) async fn run(mut self) {
        let mut leaves = self.leaves.subscribe();
        loop {
            self.serve_askers().await;
            let event = tokio::select! {
                // A login that comes with the machine's end is not let in to a dead one.
                biased;
                event = machine_end(&self.machine) => {
                    match &event {
                        Event::Dying(_) => self.machine.iter_mut().for_each(|m| m.dying = true),
                        Event::Ended(reason) => {
                            self.machine = None;
                            self.tell_of_end(reason.clone());
                        }
                        _ => self.machine = None,
                    }
                    event
                }
                outcome = finished(&mut self.starting) => {
                    self.starting = None;
                    self.forked(outcome)
                }
                outcome = finished(&mut self.saving) => {
                    self.saving = None;
                    self.save_over(outcome)
                }
                _ = finished(&mut self.copying) => {
                    self.copying = None;
                    Event::CopyOver
                }
                outcome = finished(&mut self.vigil.look) => {
                    self.vigil.look = None;
                    // One that was cut off has seen nothing.
                    Event::Looked(outcome.unwrap_or_default())
                }
                _ = leaves.changed() => {
                    let count = *leaves.borrow_and_update();
                    while self.left < count {
                        self.left += 1;
                        self.step(Event::Leave).await;
                    }
                    continue;
                }
                () = until(self.timer) => {
                    self.timer = None;
                    Event::TimerOver
                }
                request = self.requests.recv() => match request {
                    None => return,
                    Some(request) => match self.take(request) {
                        Some(event) => event,
                        None => continue,
                    },
                },
            };
            self.step(event).await;
        }
    }

    fn take(&mut self, request: Request) -> Option<Event> {
        match request {
            Request::Expect => Some(Event::Expected),
            Request::Login { max_sessions, reply } => {
                if self.lifecycle.admitted + self.lifecycle.waiting >= max_sessions {
                    let _ = reply.send(Err(LoginError::TooMany(max_sessions)));
                    return None;
                }
                self.waiting.push(reply);
                Some(Event::Login)
            }
            Request::Stop { cause, reply } => {
                self.stopping.push(reply);
                Some(Event::Stop(cause))
            }
            Request::Reconsider => {
                if matches!(self.lifecycle.state, State::Stopped | State::Saved | State::Failed(_))
                {
                    // What is kept of it may have been replaced: the database says by what.
                    self.former = None;
                }
                Some(Event::Reconsider)
            }
            Request::Copy(asker) => {
                self.ask(asker);
                None
            }
        }
    }

    fn forked(
        &mut self,
        outcome: Result<Result<start::Started, start::StartError>, tokio::task::JoinError>,
    ) -> Event {
        match outcome {
            Ok(Ok(started)) => {
                self.take_wishes(&started.account);
                self.former = Some(start::Former::default());
                let pid = started.machine.pid;
                let group = started.machine.group_path();
                let meter = Meter::new(self.context.watch.clone(), self.account, pid, group);
                self.machine = Some(Attached {
                    machine: Arc::new(MachineCell(started.machine, meter)),
                    _promise: started.promise,
                    dying: false,
                    arrival: Arrival::new(started.arrival),
                    how: started.how,
                    end: watch::channel(None).0,
                });
                Event::Forked
            }
            Ok(Err(error)) => {
                tracing::error!(account = %self.account, %error, "no machine");
                self.tell_of_failure(error.to_string());
                Event::StartFailed(error.for_user())
            }
            Err(error) => {
                tracing::error!(account = %self.account, %error, "starting a machine was cut off");
                Event::StartFailed("starting it was cut off".into())
            }
        }
    }

    fn save_over(&mut self, outcome: Result<save::SaveOver, tokio::task::JoinError>) -> Event {
        let over = match outcome {
            Ok(over) => over,
            Err(error) => {
                tracing::error!(account = %self.account, %error, "saving a machine was cut off");
                // Whether it is paused, and what is on the disk, is not known.
                if let Some(machine) = self.machine() {
                    tokio::spawn(async move { machine.kill().await });
                }
                return Event::SaveOver(SaveOutcome::Failed("it was cut off".into()));
            }
        };
        self.tell_of_save(&over);
        if over.outcome == SaveOutcome::Done {
            tracing::info!(account = %self.account, bytes = over.bytes, "machine saved");
            let paused = self.lifecycle.paused.as_ref().map(|work| work.who.clone());
            self.former = Some(start::Former { left: over.left, lost: None, paused });
            self.saved_bytes = over.bytes;
        }
        Event::SaveOver(over.outcome)
    }

    async fn step(&mut self, event: Event) {
        // After a start: what was changed meanwhile counts as well.
        if matches!(
            event,
            Event::TimerOver
                | Event::Looked(_)
                | Event::Stop(_)
                | Event::Reconsider
                | Event::Forked
                | Event::CopyOver
        ) {
            let changed = self.look_up_wishes().await;
            if event == Event::Reconsider && !changed {
                return;
            }
        }
        tracing::debug!(account = %self.account, ?event, state = ?self.lifecycle.state, "event");
        let (lifecycle, effects) = std::mem::take(&mut self.lifecycle).step(event);
        self.lifecycle = lifecycle;
        if !self.lifecycle.looking {
            self.vigil.give_up();
        }
        self.publish();
        for effect in effects {
            self.carry_out(effect).await;
        }
        self.publish();
    }

    async fn carry_out(&mut self, effect: Effect) {
        if matches!(effect, Effect::Release | Effect::PowerOff | Effect::Kill)
            && let Some(attached) = &self.machine
        {
            // Of what is gone the kernel counts nothing any more.
            attached.machine.1.settle();
        }
        match effect {
            Effect::Record(intent) => self.record(intent).await,
            Effect::Start => {
                let (context, account) = (self.context.clone(), self.account);
                let former = self.former.clone().unwrap_or_default();
                let quota = self.quota.clone();
                let task = start::start(context, account, former, quota);
                self.starting = Some(tokio::spawn(task));
            }
            Effect::Save => {
                self.saved_because = self.rest_cause();
                if let Some(machine) = self.machine() {
                    let (context, account) = (self.context.clone(), self.account);
                    self.call_off = CancellationToken::new();
                    let called_off = self.call_off.clone();
                    let task = save::save(context, account, machine, called_off);
                    self.saving = Some(tokio::spawn(task));
                }
            }
            Effect::CallOff => self.call_off.cancel(),
            Effect::Copy => self.copy(),
            Effect::CallOffCopy => self.call_off_copy.cancel(),
            Effect::Release => {
                if let Some(machine) = self.machine() {
                    tokio::spawn(async move { machine.release().await });
                }
            }
            Effect::Drop => self.drop_memory().await,
            Effect::Admit => self.admit(),
            Effect::Refuse(reason) => {
                for reply in self.waiting.drain(..) {
                    let _ = reply.send(Err(LoginError::NoMachine(reason.clone())));
                }
            }
            Effect::EndSessions(reason) => {
                if let Some(attached) = &self.machine {
                    attached.end.send_replace(Some(reason));
                }
            }
            Effect::PowerOff => {
                if let Some(machine) = self.machine() {
                    let grace = self.context.config.machines.stop_timeout();
                    let grace = grace.saturating_sub(POWER_OFF_MARGIN).max(grace / 2);
                    // Beside this task: a guest that does not read must not hold it up.
                    tokio::spawn(async move { machine.power_off(grace).await });
                }
            }
            Effect::Kill => {
                if let Some(machine) = self.machine() {
                    tracing::warn!(account = %self.account, pid = machine.pid, "killing the machine");
                    tokio::spawn(async move { machine.kill().await });
                }
            }
            Effect::Look => self.look(),
            Effect::Greet(awake) => {
                if let Some(attached) = &self.machine {
                    attached.arrival.add(words::still_running(&awake));
                }
            }
            Effect::SetTimer(timer) => {
                if matches!(timer, Timer::Linger | Timer::Expected) {
                    self.vigil.begin();
                }
                self.timer = Some(Instant::now() + self.length(timer));
            }
            Effect::CancelTimer => self.timer = None,
            Effect::Gone => {
                for reply in self.stopping.drain(..) {
                    let _ = reply.send(());
                }
            }
        }
    }

    async fn drop_memory(&mut self) {
        self.former = Some(start::Former::default());
        let (context, account) = (self.context.clone(), self.account);
        let dropped =
            tokio::task::spawn_blocking(move || saved::withdraw(&context.state_dir, account));
        let outcome = dropped.await.map_err(std::io::Error::other).and_then(|outcome| outcome);
        if let Err(error) = outcome {
            // It is found again at the next start, which resumes it or says why not.
            tracing::error!(account = %self.account, %error, "can't drop a saved machine");
        }
    }

    /// What a service before this one recorded of the account's machine.
    async fn look_up_former(&mut self) {
        if let Some(former) = &mut self.former {
            if let Some(lost) = &self.lifecycle.lost {
                former.lost = Some(lost.clone());
            }
            return;
        }
        let intent = match self.context.store.intent(self.account).await {
            Ok(intent) => intent,
            Err(error) => {
                tracing::error!(account = %self.account, %error, "can't look up the last machine");
                None
            }
        };
        self.former = Some(intent.map(start::Former::of).unwrap_or_default());
    }

    fn admit(&mut self) {
        let Some(attached) = &mut self.machine else { return };
        for reply in self.waiting.drain(..) {
            let lease = Lease {
                arrival: attached.arrival.clone(),
                machine: attached.machine.0.clone(),
                how: std::mem::replace(&mut attached.how, How::Running),
                end: attached.end.subscribe(),
                leaves: self.leaves.clone(),
            };
            // Somebody who did not wait leaves at once, by the lease's drop.
            let _ = reply.send(Ok(lease));
        }
    }

    /// A database that can't be written does not keep anybody out: the disk's lock guards the disk.
    async fn record(&mut self, intent: Intent) {
        if matches!(intent, Intent::Starting | Intent::Resuming) {
            self.look_up_former().await;
        }
        let left = self.former.as_ref().map(|former| former.left.as_slice()).unwrap_or_default();
        let machine = self.machine();
        let record = accounts::Intent {
            account: self.account,
            state: match (intent, &self.lifecycle.state) {
                (Intent::Stopped, State::Failed(_)) => MachineState::Failed,
                (Intent::Stopped, _) => MachineState::Stopped,
                (Intent::Starting, _) => MachineState::Starting,
                (Intent::Running, _) => MachineState::Running,
                (Intent::Saving, _) => MachineState::Saving,
                (Intent::Saved, _) => MachineState::Saved,
                (Intent::Resuming, _) => MachineState::Resuming,
                (Intent::Stopping, _) => MachineState::Stopping,
            },
            pid: machine.as_ref().map(|machine| machine.pid),
            base: machine.map(|machine| machine.base.clone()),
            detail: Some(self.why()).filter(|why| !why.is_empty()),
            paused: self.former.as_ref().and_then(|former| former.paused.clone()),
            terminals: (!left.is_empty())
                .then(|| left.iter().map(u8::to_string).collect::<Vec<_>>().join(" ")),
            since: 0,
        };
        if let Err(error) = self.context.store.record(record).await {
            tracing::error!(account = %self.account, ?intent, %error, "can't record");
        }
    }

    fn length(&self, timer: Timer) -> Duration {
        match timer {
            Timer::Linger => self.vigil.linger,
            Timer::Expected => self.vigil.linger.max(EXPECTED_TIMEOUT),
            Timer::Recheck => self.vigil.recheck(self.lifecycle.held),
            Timer::Grace => self.context.config.machines.stop_timeout(),
            Timer::Kill => KILL_TIMEOUT,
        }
    }

    fn machine(&self) -> Option<Arc<Machine>> {
        self.machine.as_ref().map(|attached| attached.machine.0.clone())
    }
}

async fn finished<T>(task: &mut Option<JoinHandle<T>>) -> Result<T, tokio::task::JoinError> {
    match task {
        Some(task) => task.await,
        None => std::future::pending().await,
    }
}

async fn machine_end(attached: &Option<Attached>) -> Event {
    match attached {
        None => std::future::pending().await,
        Some(Attached { machine, dying: false, .. }) => Event::Dying(machine.0.ended().await),
        Some(Attached { machine, .. }) => Event::Ended(machine.0.gone().await),
    }
}

async fn until(timer: Option<Instant>) {
    match timer {
        Some(at) => tokio::time::sleep_until(at).await,
        None => std::future::pending().await,
    }
}
