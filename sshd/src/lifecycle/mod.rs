//! Which accounts have a machine, and when: a pure function ([`state`]) decides, one task per account
//! ([`driver`]) carries it out, so that two logins at once can't start two machines.
//!
//! Sessions ask the [`Registry`] for a [`Lease`]; the machine stays at least as long as there are leases.

mod copy;
mod driver;
mod leftovers;
mod no_copy;
mod resume;
mod save;
mod start;
mod state;
mod words;
mod work;

use std::{
    collections::HashMap,
    sync::{
        Arc, Mutex, MutexGuard, PoisonError,
        atomic::{AtomicBool, Ordering},
    },
    time::{Duration, SystemTime},
};

use hermitage_storage::accounts::{Account, Intent, MachineState};
use tokio::{
    sync::{Notify, mpsc, oneshot, watch},
    time::timeout,
};
use uuid::Uuid;

use crate::{admin::protocol::AccountStatus, limits::Limits, machine::Machine, watch::Meter};
pub use copy::{Copies, CopyNews, discard};
pub use driver::Context;
use driver::{Driver, Request};
pub use no_copy::NoCopy;
pub use state::StopCause;

/// What a machine that a former service left behind went through.
const INTERRUPTED: &str = "the host or its service was interrupted while your machine ran";

/// Logins and stops of one account that wait to be looked at.
const MAILBOX: usize = 64;

#[derive(Clone, Debug, thiserror::Error)]
pub enum LoginError {
    /// In words for the user.
    #[error("{0}")]
    NoMachine(String),
    #[error("this account has all of its {0} sessions; close one first")]
    TooMany(u32),
    #[error("the service is stopping")]
    Stopping,
}

/// How a machine came to be, as somebody who is let in to it finds it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum How {
    /// Somebody was let in before.
    Running,
    Forked,
    Resumed,
    /// Forked, though there was memory of it.
    Cold,
}

impl How {
    pub fn as_str(self) -> &'static str {
        match self {
            How::Running => "running",
            How::Forked => "forked",
            How::Resumed => "resumed",
            How::Cold => "cold",
        }
    }
}

/// The right to use an account's machine. The machine does not go to rest while there is one.
pub struct Lease {
    pub machine: Arc<Machine>,
    pub how: How,
    arrival: Arrival,
    /// Set when the machine is taken away, with the reason.
    end: watch::Receiver<Option<String>>,
    leaves: watch::Sender<u64>,
}

/// How the machine came to be, in a few words: for the first shell that asks, once.
#[derive(Clone, Default)]
struct Arrival(Arc<Mutex<Option<String>>>);

impl Arrival {
    fn new(words: Option<String>) -> Self {
        Self(Arc::new(Mutex::new(words)))
    }

    /// Something more to say, after what nobody was told yet.
    fn add(&self, words: String) {
        let mut said = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        *said = Some(match said.take() {
            Some(before) => format!("{before}; {words}"),
            None => words,
        });
    }
}

impl Lease {
    /// How the machine came to be, if nobody was told yet.
    pub fn arrival(&self) -> Option<String> {
        self.arrival.0.lock().unwrap_or_else(PoisonError::into_inner).take()
    }

    /// Waits until the machine is taken away and says why.
    pub async fn must_end(&self) -> String {
        let mut end = self.end.clone();
        let reason = end.wait_for(Option::is_some).await.ok().and_then(|reason| reason.clone());
        match reason {
            Some(reason) => reason,
            // The driver went on to another machine; this one's own end is told by the machine.
            None => std::future::pending().await,
        }
    }
}

impl Drop for Lease {
    fn drop(&mut self) {
        self.leaves.send_modify(|count| *count += 1);
    }
}

/// All accounts' lifecycles.
#[derive(Clone)]
pub struct Registry {
    inner: Arc<Inner>,
}

struct Inner {
    context: Arc<Context>,
    accounts: Mutex<HashMap<Uuid, Handle>>,
    closing: AtomicBool,
}

#[derive(Clone)]
struct Handle {
    mailbox: mpsc::Sender<Request>,
    status: watch::Receiver<Status>,
    /// The account's row has changed: beside the mailbox, which may be full.
    changed: Arc<Notify>,
}

impl Handle {
    /// `None`: there is no machine, and nothing to tell of one.
    fn shown(&self, account: Uuid) -> Option<AccountStatus> {
        let status = self.status.borrow().clone();
        if status.state == MachineState::Stopped {
            return None;
        }
        let since = status.since.duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default();
        let machine =
            status.machine.as_ref().and_then(|machine| Some(machine.upgrade()?.0.clone()));
        Some(AccountStatus {
            account: account.to_string(),
            state: status.state.to_string(),
            since: since.as_secs().try_into().unwrap_or(i64::MAX),
            why: status.why,
            machine_pid: status.machine_pid,
            base: status.base,
            sessions: status.sessions,
            awake: status.awake,
            cgroup: machine
                .as_ref()
                .and_then(|machine| machine.group_path())
                .map(|path| path.display().to_string()),
            size: machine.as_ref().and_then(|machine| machine.size()),
            unused: machine.as_ref().and_then(|machine| machine.unused()),
        })
    }
}

/// An account's lifecycle as it shows from outside.
#[derive(Clone, Debug)]
pub(crate) struct Status {
    pub state: MachineState,
    pub since: SystemTime,
    pub why: String,
    pub machine_pid: Option<i32>,
    pub base: Option<String>,
    pub sessions: u32,
    /// What keeps the machine awake that nobody is logged in to.
    pub awake: Option<String>,
    pub machine: Option<std::sync::Weak<MachineCell>>,
}

/// Keeps `Debug` off the machine.
pub(crate) struct MachineCell(pub Arc<Machine>, pub Meter);

impl std::fmt::Debug for MachineCell {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "machine {}", self.0.id)
    }
}

impl Registry {
    pub fn new(context: Context) -> Self {
        let inner = Inner {
            context: Arc::new(context),
            accounts: Mutex::default(),
            closing: AtomicBool::new(false),
        };
        Self { inner: Arc::new(inner) }
    }

    /// Somebody has authenticated: the machine is started while the client still makes up its mind.
    pub fn expect(&self, account: &Account) {
        if !self.inner.closing.load(Ordering::Acquire) {
            // With a full mailbox there are logins enough.
            let _ = self.handle(account).mailbox.try_send(Request::Expect);
        }
    }

    /// A lease on the account's machine, which is started if it has none.
    pub async fn login(&self, account: &Account) -> Result<Lease, LoginError> {
        if self.inner.closing.load(Ordering::Acquire) {
            return Err(LoginError::Stopping);
        }
        let (reply, answer) = oneshot::channel();
        let max_sessions = Limits::of(&self.inner.context.config, account).max_sessions;
        let request = Request::Login { max_sessions, reply };
        let mailbox = self.handle(account).mailbox;
        mailbox.send(request).await.map_err(|_| LoginError::Stopping)?;
        answer.await.unwrap_or(Err(LoginError::Stopping))
    }

    /// Starts the account's machine, or resumes it; returns when it runs.
    pub async fn start(&self, account: &Account) -> Result<(), LoginError> {
        self.login(account).await.map(drop)
    }

    /// Drops what there is of the memory of the account's machine, running or saved.
    pub async fn reset(&self, account: &Account) {
        // Also of an account that this service has not seen yet.
        self.handle(account);
        self.stop(account.id, StopCause::Reset).await;
    }

    /// The account's row has changed; what it says of idle machines counts at once.
    pub fn reconsider(&self, account: Uuid) {
        let handle = self.accounts().get(&account).cloned();
        if let Some(handle) = handle {
            handle.changed.notify_one();
        }
    }

    /// Sessions that the account has now.
    pub fn sessions(&self, account: Uuid) -> u32 {
        self.accounts().get(&account).map_or(0, |handle| handle.status.borrow().sessions)
    }

    /// A copy of the account's disk as it is now, if a machine runs on it, and of that one's memory if `memory`. What
    /// it comes to is told over the channel; dropping that gives the copy up.
    pub async fn copy(&self, account: &Account, memory: bool) -> mpsc::Receiver<CopyNews> {
        let (sender, news) = mpsc::channel(copy::NEWS);
        let asker = copy::Asker { memory, news: sender };
        if self.inner.closing.load(Ordering::Acquire) {
            let _ = asker.news.try_send(CopyNews::Over(Err(NoCopy::Stopping)));
            return news;
        }
        let mailbox = self.handle(account).mailbox;
        // One that takes no more is gone, and so is the other end of the channel then.
        let _ = mailbox.send(Request::Copy(asker)).await;
        news
    }

    /// Ends the account's sessions and machine, whose memory is saved if that is its policy; returns
    /// when the machine is gone.
    pub async fn stop(&self, account: Uuid, cause: StopCause) {
        let Some(handle) = self.accounts().get(&account).cloned() else { return };
        let (reply, answer) = oneshot::channel();
        if handle.mailbox.send(Request::Stop { cause, reply }).await.is_ok() {
            let _ = answer.await;
        }
    }

    /// Keeps nothing more of an account that was removed, unless it has a machine even now.
    pub fn forget(&self, account: Uuid) {
        self.accounts().retain(|id, handle| *id != account || has_machine(handle));
    }

    /// Stops every machine at once, and starts no more. What is not saved within `saving` is powered off,
    /// for which there is `stopping`. Returns how many were not gone by then.
    pub async fn shutdown(&self, saving: Duration, stopping: Duration) -> usize {
        self.inner.closing.store(true, Ordering::Release);
        let accounts: Vec<Uuid> = self.accounts().keys().copied().collect();
        let mut left = tokio::task::JoinSet::new();
        for account in accounts {
            let registry = self.clone();
            left.spawn(async move { registry.stop(account, StopCause::Shutdown).await });
        }
        let all = async { while left.join_next().await.is_some() {} };
        if timeout(saving, all).await.is_ok() {
            return 0;
        }
        let mut late = tokio::task::JoinSet::new();
        for account in self.running() {
            tracing::warn!(%account, "no time left to save this machine; powering it off");
            let registry = self.clone();
            late.spawn(async move { registry.stop(account, StopCause::OutOfTime).await });
        }
        let all = async {
            while late.join_next().await.is_some() {}
            while left.join_next().await.is_some() {}
        };
        let _ = timeout(stopping, all).await;
        left.len().max(late.len())
    }

    /// Accounts that have a machine.
    fn running(&self) -> Vec<Uuid> {
        self.accounts()
            .iter()
            .filter(|(_, handle)| has_machine(handle))
            .map(|(id, _)| *id)
            .collect()
    }

    /// The account's running machine, if it has one.
    pub fn machine(&self, account: Uuid) -> Option<Arc<Machine>> {
        let handle = self.accounts().get(&account).cloned()?;
        let cell = handle.status.borrow().machine.as_ref()?.upgrade()?;
        Some(cell.0.clone())
    }

    /// Puts what all machines have used up to now into the ledger and the metrics. Reads two small files for each.
    pub fn settle(&self) {
        let cells: Vec<_> = self
            .accounts()
            .values()
            .filter_map(|handle| handle.status.borrow().machine.as_ref()?.upgrade())
            .collect();
        cells.iter().for_each(|cell| cell.1.settle());
    }

    /// Accounts with a machine, or that failed to get one, by id.
    pub fn status(&self) -> Vec<(Uuid, AccountStatus)> {
        let handles: Vec<(Uuid, Handle)> =
            self.accounts().iter().map(|(id, handle)| (*id, handle.clone())).collect();
        let shown = |(id, handle): (Uuid, Handle)| Some((id, handle.shown(id)?));
        handles.into_iter().filter_map(shown).collect()
    }

    /// The same of one account.
    pub fn status_of(&self, account: Uuid) -> Option<AccountStatus> {
        let handle = self.accounts().get(&account).cloned()?;
        handle.shown(account)
    }

    /// Starts the current base's fork server, so that the first login does not wait for it.
    pub fn warm_up(&self) {
        let context = self.inner.context.clone();
        tokio::spawn(async move {
            if let Err(error) = context.forks.server().await {
                tracing::error!(%error, "machines can't be started");
            }
        });
    }

    /// Accounts that have had a machine since the service started.
    pub fn known(&self) -> Vec<Uuid> {
        self.accounts().keys().copied().collect()
    }

    /// Looks at what a former service left on record. Its machines power off by themselves; their
    /// accounts are noted as stopped as soon as their disks are free.
    pub async fn reconcile(&self) {
        let context = &self.inner.context;
        match context.store.end_open_sessions("the service ended").await {
            Ok(0) => {}
            Ok(count) => tracing::warn!(count, "sessions were cut off when the service ended"),
            Err(error) => tracing::error!(%error, "can't close the sessions log"),
        }
        tokio::spawn(leftovers::sweep(context.state_dir.clone()));
        let unfinished = match context.store.unfinished().await {
            Ok(unfinished) => unfinished,
            Err(error) => {
                tracing::error!(%error, "can't read what the former service left behind");
                return;
            }
        };
        for intent in unfinished {
            tracing::warn!(account = %intent.account, state = %intent.state, pid = intent.pid,
                "a former service left this machine");
            let context = context.clone();
            tokio::spawn(async move { settle(&context, intent).await });
        }
    }

    fn handle(&self, account: &Account) -> Handle {
        let mut accounts = self.accounts();
        accounts
            .entry(account.id)
            .or_insert_with(|| {
                let (mailbox, requests) = mpsc::channel(MAILBOX);
                let changed = Arc::new(Notify::new());
                let context = self.inner.context.clone();
                let (driver, status) = Driver::new(context, account.id, requests, changed.clone());
                tokio::spawn(driver.run());
                Handle { mailbox, status, changed }
            })
            .clone()
    }

    fn accounts(&self) -> MutexGuard<'_, HashMap<Uuid, Handle>> {
        self.inner.accounts.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

fn has_machine(handle: &Handle) -> bool {
    let state = handle.status.borrow().state;
    !matches!(state, MachineState::Stopped | MachineState::Saved | MachineState::Failed)
}

/// Waits until nobody holds the account's disk, then notes it as stopped, unless somebody logged in
/// meanwhile.
async fn settle(context: &Context, left: Intent) {
    let disk = context.state_dir.disk(left.account);
    if start::open_disk(&disk, context.config.machines.stale_timeout()).await.is_err() {
        tracing::warn!(account = %left.account, pid = left.pid, "still not stopped");
        return;
    }
    leftovers::sweep_account(context.state_dir.clone(), left.account).await;
    let unchanged = match context.store.unfinished().await {
        Ok(now) => now.contains(&left),
        Err(_) => false,
    };
    if unchanged {
        let saved = context.state_dir.snapshot(left.account).exists();
        let (state, detail) = match saved {
            true => (MachineState::Saved, None),
            false => (MachineState::Stopped, Some(INTERRUPTED.to_owned())),
        };
        let settled = Intent { state, pid: None, detail, ..left };
        if let Err(error) = context.store.record(settled).await {
            tracing::error!(%error, "can't note what became of a machine");
        }
    }
}
