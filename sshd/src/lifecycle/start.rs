//! Starting an account's machine: room, disk, then what was saved of it, or identity and a fork.

use std::{
    fs::File,
    path::{Path, PathBuf},
    sync::Arc,
    time::Duration,
};

use hermitage_guest_proto::Attach;
use hermitage_storage::{
    accounts::{Account, Closed, Intent, MachineState},
    disk::{self, DiskError},
    snapshot,
};
use tokio::{
    sync::watch,
    time::{Instant, sleep},
};
use uuid::Uuid;

use super::{
    How,
    driver::Context,
    resume::{self, Attempt},
    words,
};
use crate::{
    cgroup::Admission,
    closing,
    limits::Limits,
    machine::{ForkError, LaunchError, Line, Machine, Spec, clock, launch},
    promises::{Full, Promise},
    quota, room,
    store::StoreError,
    time,
    watch::Event,
};

/// How often a disk that is still held is tried again.
const DISK_RETRY: Duration = Duration::from_millis(100);

/// Bytes of the host's random numbers that a guest's generator starts from.
const ENTROPY: usize = 64;

/// What is known of the account's last machine.
#[derive(Clone, Default)]
pub(super) struct Former {
    /// The terminals that wait for their user, the one left last first.
    pub left: Vec<u8>,
    /// Why its memory is gone, if somebody might miss it.
    pub lost: Option<String>,
    /// What was at work in it when it was saved.
    pub paused: Option<String>,
}

impl Former {
    /// What its last record says to the next start.
    pub fn of(intent: Intent) -> Self {
        let left = intent.terminals.as_deref().unwrap_or_default();
        let left = left.split(' ').filter_map(|terminal| terminal.parse().ok()).collect();
        let lost = match intent.state {
            MachineState::Saved => None,
            // Told as it was recorded, if there was something to tell.
            MachineState::Stopped | MachineState::Failed => intent.detail,
            _ => Some(super::INTERRUPTED.into()),
        };
        Self { left, lost, paused: intent.paused }
    }
}

pub(super) struct Started {
    pub machine: Arc<Machine>,
    pub account: Account,
    /// What it was promised of the host, as long as it runs.
    pub promise: Promise,
    /// How the machine came to be, for who logs in.
    pub arrival: Option<String>,
    pub how: How,
}

#[derive(Debug, thiserror::Error)]
pub(super) enum StartError {
    #[error("{0}")]
    Closed(String),
    #[error(transparent)]
    Store(#[from] StoreError),
    #[error("{path} has {free} MiB free, less than machines.min_free_mib = {floor}; make room there", path = path.display())]
    NoRoom { path: PathBuf, free: u64, floor: u64 },
    #[error(transparent)]
    Full(#[from] Full),
    #[error("can't tell how much room {path} has: {source}", path = path.display())]
    Room { path: PathBuf, source: std::io::Error },
    #[error(transparent)]
    Disk(#[from] DiskError),
    #[error("can't look at the disk {path}: {source}", path = path.display())]
    DiskSize { path: PathBuf, source: std::io::Error },
    #[error("no random numbers: {0}")]
    Entropy(String),
    #[error(transparent)]
    Launch(#[from] LaunchError),
    #[error("can't mark the saved memory in {path} as unusable: {source}", path = .folder.display())]
    SetAside { folder: PathBuf, source: std::io::Error },
    #[error("starting was cut off: {0}")]
    Interrupted(String),
}

impl StartError {
    /// What the person logging in is told: what she can do something about, and no paths of the host.
    pub(super) fn for_user(&self) -> String {
        match self {
            StartError::Closed(words) => words.clone(),
            StartError::NoRoom { .. } => {
                "the host's disk is nearly full, so no machine can be started; \
                 your files are safe, try again later"
                    .into()
            }
            StartError::Full(_) => {
                "the host has no room for one more machine at the moment; your files are safe, try again \
                 later"
                    .into()
            }
            StartError::Disk(DiskError::InUse(_)) => {
                "your former machine has not ended yet; try again in a minute".into()
            }
            StartError::Launch(LaunchError::Fork(ForkError::NoBase)) => {
                "this host has no base image yet; tell its operator".into()
            }
            StartError::Launch(error @ (LaunchError::AttachFailed(_) | LaunchError::Ended(_))) => {
                error.to_string()
            }
            _ => "the host could not start your machine; its operator finds the reason in the log"
                .into(),
        }
    }
}

pub(super) async fn start(
    context: Arc<Context>,
    account: Uuid,
    former: Former,
    quota: watch::Sender<Option<u64>>,
) -> Result<Started, StartError> {
    let account = context.store.by_id(account).await?;
    if let Some(closed) = closing::closed(account.as_ref()) {
        return Err(StartError::Closed(closing::words(closed)));
    }
    let account = account.ok_or(StartError::Closed(closing::words(Closed::Removed)))?;
    let machines = &context.config.machines;
    let promise = promise(&context, &account).await?;
    quota.send_replace(Limits::of(&context.config, &account).quota);
    let shared = context.clone();
    let scarce = || {
        let Context { state_dir, scarce, watch, .. } = &*shared;
        let (dir, host, tell) = (state_dir.clone(), scarce.clone(), watch.clone());
        quota::keep_watch(dir, account.id, host, quota.subscribe(), tell)
    };

    let path = context.state_dir.disk(account.id);
    let (disk, waited) = open_disk(&path, machines.stale_timeout()).await?;
    let begun = Instant::now();
    let anew = if waited { replaced(&context, account.id).await } else { None };
    let Former { left, lost, paused } = anew.unwrap_or(former);
    let (machine, how, arrival) = match resume::resume(&context, &account, &disk, left, &scarce)
        .await?
    {
        Attempt::Resumed(machine, age, bytes) => {
            let resumed = words::resumed(age, bytes, begun.elapsed());
            let paused = paused.as_deref().map(words::paused);
            let words = [resumed].into_iter().chain(paused).collect::<Vec<_>>().join("; ");
            (machine, How::Resumed, Some(words))
        }
        Attempt::Unusable(reason) => {
            tracing::warn!(account = account.name, reason, "the saved machine can't be resumed");
            let machine = cold_start(&context, &account, disk, &scarce).await?;
            (machine, How::Cold, Some(words::cold(&reason)))
        }
        Attempt::Nothing => {
            let how = if lost.is_some() { How::Cold } else { How::Forked };
            let machine = cold_start(&context, &account, disk, &scarce).await?;
            (machine, how, lost.as_deref().map(words::cold))
        }
    };
    tracing::info!(
        account = account.name,
        pid = machine.pid,
        base = machine.base,
        ms = time::ms(begun.elapsed()),
        how = arrival.as_deref().unwrap_or("cold start"),
        "machine started"
    );
    context.watch.tell(Event::MachineStarted {
        account: account.name.clone(),
        id: account.id,
        pid: machine.pid,
        base: machine.base.clone(),
        how: how.as_str(),
        milliseconds: time::ms(begun.elapsed()),
        detail: arrival.clone(),
        stages: machine.take_stages(),
    });
    Ok(Started { machine, account, promise, arrival, how })
}

/// A machine of the current base and the disk alone. One whose guest was lost before it had the account is
/// forked once more: nobody was in it, and its disk is as after a power cut.
async fn cold_start(
    context: &Context,
    account: &Account,
    disk: File,
    scarce: &impl Fn() -> watch::Receiver<bool>,
) -> Result<Arc<Machine>, StartError> {
    let interrupted = |error: std::io::Error| StartError::Interrupted(error.to_string());
    let kept = disk.try_clone().map_err(interrupted)?;
    let error = match fork(context, account, disk, scarce()).await {
        Err(StartError::Launch(error)) if error.is_of_the_guest() => error,
        outcome => return outcome,
    };
    tracing::warn!(account = account.name, %error, "no machine yet; forking another");
    context.watch.tell(Event::MachineRetried { id: account.id, reason: error.to_string() });
    fork(context, account, kept, scarce()).await
}

async fn fork(
    context: &Context,
    account: &Account,
    disk: File,
    scarce: watch::Receiver<bool>,
) -> Result<Arc<Machine>, StartError> {
    let path = context.state_dir.disk(account.id);
    let disk_size = disk.metadata().map_err(|source| StartError::DiskSize { path, source })?.len();
    let mut entropy = vec![0; ENTROPY];
    getrandom::fill(&mut entropy).map_err(|error| StartError::Entropy(error.to_string()))?;
    let attach = Attach {
        account: account.guest_name().to_owned(),
        uid: account.uid,
        hostname: account.hostname.clone(),
        machine_id: account.machine_id,
        entropy,
        clock: clock(),
        disk_size,
    };
    let spec = Spec {
        attach,
        disk: disk.into(),
        timeout: context.config.machines.start_timeout(),
        scarce,
        admission: admission(context, account),
        line: Line::new(account.id, context.desk.clone()),
    };
    Ok(launch(&context.forks, &context.cgroups, spec).await?)
}

/// What the host lets its machine take.
pub(super) fn admission(context: &Context, account: &Account) -> Admission {
    let limits = Limits::of(&context.config, account);
    Admission {
        account: account.id,
        resources: limits.resources,
        share: limits.share,
        processes: limits.processes,
        required: context.config.machines.require_limits,
    }
}

/// What is on record of the memory and files that took the place of the former ones while this start waited for them.
/// None: they are those that it was to start from.
async fn replaced(context: &Context, account: Uuid) -> Option<Former> {
    match context.store.intent(account).await {
        // Of this start's own there is another state.
        Ok(Some(now)) if matches!(now.state, MachineState::Saved | MachineState::Stopped) => {
            Some(Former::of(now))
        }
        Ok(_) => None,
        Err(error) => {
            tracing::error!(%account, %error, "can't look up the last machine");
            None
        }
    }
}

/// Opens and locks an account's disk, and says whether somebody else had it. A machine that a former service left
/// behind still has it until it has powered off, and so has who goes back to a checkpoint: that is waited for.
pub(super) async fn open_disk(path: &Path, patience: Duration) -> Result<(File, bool), StartError> {
    let (deadline, mut waited) = (Instant::now() + patience, false);
    loop {
        let owned = path.to_owned();
        let opened = tokio::task::spawn_blocking(move || disk::open_locked(&owned))
            .await
            .map_err(|error| StartError::Interrupted(error.to_string()))?;
        match opened {
            Err(DiskError::InUse(_)) if Instant::now() < deadline => {
                waited = true;
                sleep(DISK_RETRY).await;
            }
            outcome => return Ok((outcome?, waited)),
        }
    }
}

/// Whether the host has room for one more machine, which counts from then on.
async fn promise(context: &Arc<Context>, account: &Account) -> Result<Promise, StartError> {
    let (context, id) = (context.clone(), account.id);
    let wanted = Limits::of(&context.config, account).resources;
    let judged = tokio::task::spawn_blocking(move || {
        let (path, limits) = (context.state_dir.root(), &context.config.machines);
        let free = room::free(path)
            .map_err(|errno| StartError::Room { path: path.into(), source: errno.into() })?;
        let floor = limits.min_free_mib;
        if free >> 20 < floor {
            return Err(StartError::NoRoom { path: path.into(), free: free >> 20, floor });
        }
        // One that was saved with more than its account may have now still has it.
        let had = File::open(context.state_dir.snapshot(id)).ok();
        let had = had.and_then(|file| snapshot::read_header(&file).ok());
        let had = had.map(|header| (header.description.base, header.description.ram));
        Ok(context.promises.make(&context.state_dir, limits, wanted.memory, had, free)?)
    });
    judged.await.map_err(|error| StartError::Interrupted(error.to_string()))?
}
