//! The task that owns one account's machine: everything that changes its state comes through here, in
//! one order, and effects are carried out before the next event is looked at. Only the fork itself runs
//! beside it, so that a stop can be noted while it is under way.

use std::{
    sync::Arc,
    time::{Duration, SystemTime},
};

use hermitage_storage::{
    StateDir,
    accounts::{self, MachineState},
};
use tokio::{
    sync::{mpsc, oneshot, watch},
    task::JoinHandle,
    time::Instant,
};
use uuid::Uuid;

use super::{
    Lease, LoginError, MachineCell, Status, start,
    state::{Effect, Event, Intent, Lifecycle, State, StopCause, Timer},
};
use crate::{
    config::Config,
    machine::{ForkServers, Machine},
    store::Store,
};

/// How long a client may take from authentication to its session, at least.
const EXPECTED_TIMEOUT: Duration = Duration::from_secs(10);

/// How long a killed machine may take to be gone before it is killed again.
const KILL_TIMEOUT: Duration = Duration::from_secs(10);

/// Of the time a guest has to power off, what is kept back so that the process can end in time.
const POWER_OFF_MARGIN: Duration = Duration::from_secs(3);

/// What every account's task stands on.
pub struct Context {
    pub config: Arc<Config>,
    pub state_dir: StateDir,
    pub store: Store,
    pub forks: ForkServers,
    /// Whether room for disks is scarce.
    pub scarce: watch::Receiver<bool>,
}

pub(super) enum Request {
    Expect,
    Login { max_sessions: u32, reply: oneshot::Sender<Result<Lease, LoginError>> },
    Stop { cause: StopCause, reply: oneshot::Sender<()> },
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
    machine: Option<Attached>,
    timer: Option<Instant>,
    linger: Duration,
    status: watch::Sender<Status>,
}

/// The machine the account has, and how its sessions learn that it is taken away.
struct Attached {
    machine: Arc<MachineCell>,
    dying: bool,
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
            machine: None,
        });
        let linger = context.config.machines.linger();
        let driver = Self {
            context,
            account,
            lifecycle: Lifecycle::default(),
            requests,
            leaves: watch::channel(0).0,
            left: 0,
            waiting: vec![],
            stopping: vec![],
            starting: None,
            machine: None,
            timer: None,
            linger,
            status,
        };
        (driver, watched)
    }

    pub(super) async fn run(mut self) {
        let mut leaves = self.leaves.subscribe();
        loop {
            let event = tokio::select! {
                // A login that comes with the machine's end is not let in to a dead one.
                biased;
                event = machine_end(&self.machine) => {
                    match &event {
                        Event::Dying(_) => self.machine.iter_mut().for_each(|m| m.dying = true),
                        _ => self.machine = None,
                    }
                    event
                }
                outcome = started(&mut self.starting) => {
                    self.starting = None;
                    self.forked(outcome)
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
        }
    }

    fn forked(
        &mut self,
        outcome: Result<Result<start::Started, start::StartError>, tokio::task::JoinError>,
    ) -> Event {
        match outcome {
            Ok(Ok(started)) => {
                self.linger = started.linger;
                self.machine = Some(Attached {
                    machine: Arc::new(MachineCell(started.machine)),
                    dying: false,
                    end: watch::channel(None).0,
                });
                Event::Forked
            }
            Ok(Err(error)) => {
                tracing::error!(account = %self.account, %error, "no machine");
                Event::StartFailed(error.for_user())
            }
            Err(error) => {
                tracing::error!(account = %self.account, %error, "starting a machine was cut off");
                Event::StartFailed("starting it was cut off".into())
            }
        }
    }

    async fn step(&mut self, event: Event) {
        tracing::debug!(account = %self.account, ?event, state = ?self.lifecycle.state, "event");
        let (lifecycle, effects) = std::mem::take(&mut self.lifecycle).step(event);
        self.lifecycle = lifecycle;
        self.publish();
        for effect in effects {
            self.carry_out(effect).await;
        }
        self.publish();
    }

    async fn carry_out(&mut self, effect: Effect) {
        match effect {
            Effect::Record(intent) => self.record(intent).await,
            Effect::Start => {
                let (context, account) = (self.context.clone(), self.account);
                self.starting = Some(tokio::spawn(start::start(context, account)));
            }
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
            Effect::SetTimer(timer) => {
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

    fn admit(&mut self) {
        let Some(attached) = &self.machine else { return };
        for reply in self.waiting.drain(..) {
            let lease = Lease {
                machine: attached.machine.0.clone(),
                end: attached.end.subscribe(),
                leaves: self.leaves.clone(),
            };
            // Somebody who did not wait leaves at once, by the lease's drop.
            let _ = reply.send(Ok(lease));
        }
    }

    /// A database that can't be written does not keep anybody out: the disk's lock guards the disk.
    async fn record(&self, intent: Intent) {
        let machine = self.machine();
        let record = accounts::Intent {
            account: self.account,
            state: match (intent, &self.lifecycle.state) {
                (Intent::Stopped, State::Failed(_)) => MachineState::Failed,
                (Intent::Stopped, _) => MachineState::Stopped,
                (Intent::Starting, _) => MachineState::Starting,
                (Intent::Running, _) => MachineState::Running,
                (Intent::Stopping, _) => MachineState::Stopping,
            },
            pid: machine.as_ref().map(|machine| machine.pid),
            base: machine.map(|machine| machine.base.clone()),
            detail: Some(self.why()).filter(|why| !why.is_empty()),
            since: 0,
        };
        if let Err(error) = self.context.store.record(record).await {
            tracing::error!(account = %self.account, ?intent, %error, "can't record");
        }
    }

    fn length(&self, timer: Timer) -> Duration {
        match timer {
            Timer::Linger => self.linger,
            Timer::Expected => self.linger.max(EXPECTED_TIMEOUT),
            Timer::Grace => self.context.config.machines.stop_timeout(),
            Timer::Kill => KILL_TIMEOUT,
        }
    }

    fn machine(&self) -> Option<Arc<Machine>> {
        self.machine.as_ref().map(|attached| attached.machine.0.clone())
    }

    fn publish(&self) {
        let state = match &self.lifecycle.state {
            State::Stopped => MachineState::Stopped,
            State::Starting => MachineState::Starting,
            State::Running => MachineState::Running,
            State::Lingering => MachineState::Lingering,
            State::Stopping(_) => MachineState::Stopping,
            State::Failed(_) => MachineState::Failed,
        };
        self.status.send_modify(|status| {
            if status.state != state {
                status.since = SystemTime::now();
            }
            status.state = state;
            status.why = self.why();
            status.machine_pid = self.machine().map(|machine| machine.pid);
            status.base = self.machine().map(|machine| machine.base.clone());
            status.sessions = self.lifecycle.admitted;
            status.machine =
                self.machine.as_ref().map(|attached| Arc::downgrade(&attached.machine));
        });
    }

    fn why(&self) -> String {
        match &self.lifecycle.state {
            State::Stopped => String::new(),
            State::Starting => match self.lifecycle.waiting {
                0 => "somebody has just authenticated".into(),
                1 => "1 login waits".into(),
                waiting => format!("{waiting} logins wait"),
            },
            State::Running => match self.lifecycle.admitted {
                1 => "1 session".into(),
                admitted => format!("{admitted} sessions"),
            },
            State::Lingering => {
                format!("nobody is logged in; stops after {} s", self.linger.as_secs())
            }
            State::Stopping(stopping) if stopping.killed => {
                format!("{}; the guest did not power off and is killed", stopping.cause)
            }
            State::Stopping(stopping) => stopping.cause.to_string(),
            State::Failed(reason) => reason.clone(),
        }
    }
}

async fn started(
    starting: &mut Option<JoinHandle<Result<start::Started, start::StartError>>>,
) -> Result<Result<start::Started, start::StartError>, tokio::task::JoinError> {
    match starting {
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
