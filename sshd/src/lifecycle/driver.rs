//! The task that owns one account's machine: everything that changes its state comes through here, in
//! one order, and effects are carried out before the next event is looked at. Only the fork itself runs
//! beside it, so that a stop can be noted while it is under way.

mod copying;
mod effects;
mod record;
mod report;
mod vigil;

use std::{
    collections::VecDeque,
    sync::Arc,
    time::{Duration, SystemTime},
};

use hermitage_storage::{StateDir, accounts::MachineState};
use tokio::{
    sync::{Notify, Semaphore, mpsc, oneshot, watch},
    task::JoinHandle,
    time::Instant,
};
use tokio_util::sync::CancellationToken;
use uuid::Uuid;

use super::{
    Arrival, How, Lease, LoginError, MachineCell, Status, copy, save, start,
    state::{Event, Lifecycle, SaveOutcome, State, StopCause, Timer},
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
    /// A copy of the disk is wanted.
    Copy(copy::Asker),
}

pub(super) struct Driver {
    context: Arc<Context>,
    account: Uuid,
    lifecycle: Lifecycle,
    requests: mpsc::Receiver<Request>,
    changed: Arc<Notify>,
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
        changed: Arc<Notify>,
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
            changed,
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
                // Before the requests: a login is answered by the row as it is now.
                () = self.changed.notified() => self.reconsider(),
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
            Request::Copy(asker) => {
                self.ask(asker);
                None
            }
        }
    }

    /// The account's row is to be looked at again.
    fn reconsider(&mut self) -> Event {
        if matches!(self.lifecycle.state, State::Stopped | State::Saved | State::Failed(_)) {
            // What is kept of it may have been replaced: the database says by what.
            self.former = None;
        }
        Event::Reconsider
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
