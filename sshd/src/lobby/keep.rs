//! Checkpoints that a user takes: docs/formats/checkpoint.md. Going back to one is her operator's.

use std::{
    os::unix::fs::MetadataExt as _,
    time::{Duration, Instant},
};

use hermitage_storage::{
    accounts::Account,
    checkpoint::{self, About, CheckpointError, InUse, Known, Name},
    disk::DiskError,
    publish::NewFile,
    rest::AtRest,
};
use tokio::time::sleep;

use super::Desk;
use crate::{
    lifecycle::{Copies, CopyNews},
    room, time,
    watch::{Copied, Event},
};

/// With so many there, a user takes no more: each may be a whole copy of her disk.
const USERS: usize = 2;

/// How long a machine that is on its way out may take to be gone.
const TRIES: u32 = 50;
const PAUSE: Duration = Duration::from_millis(100);

pub async fn list(desk: &Desk, account: &Account) -> Result<String, String> {
    let (state, id) = (desk.state_dir.clone(), account.id);
    let all = blocking(move || checkpoint::list(&state, id)).await?.map_err(|e| trouble(&e))?;
    if all.is_empty() {
        return Ok("No checkpoints. With a name as the argument one is taken.\n".into());
    }
    let line = |one: &checkpoint::Checkpoint| match &one.about {
        Ok(about) => {
            format!("{:<32} {} UTC  {}\n", one.name, time::short(about.created), holds(about))
        }
        Err(_) => format!("{:<32} can't be used\n", one.name),
    };
    Ok(all.iter().map(line).collect())
}

pub(super) async fn create(desk: &Desk, account: &Account, name: &str) -> Result<String, String> {
    let name = Name::parse(name).map_err(|error| error.to_string())?;
    let begun = Instant::now();
    let taken = take(desk, account, &name).await;
    desk.watch.tell(Event::Copy {
        who: None,
        what: Copied::Checkpoint,
        account: account.name.clone(),
        id: Some(account.id),
        place: Some(name.to_string()),
        bytes: taken.as_ref().ok().map(|(_, bytes)| *bytes),
        milliseconds: begun.elapsed().as_millis().try_into().unwrap_or(u64::MAX),
        error: taken.as_ref().err().cloned(),
    });
    let (about, _) = taken?;
    tracing::info!(account = account.name, checkpoint = %name, "has taken a checkpoint");
    Ok(format!("{name} has your {} as they are now.\n", holds(&about)))
}

/// What it has, and the bytes that it takes.
async fn take(desk: &Desk, account: &Account, name: &Name) -> Result<(About, u64), String> {
    let (state, id) = (desk.state_dir.clone(), account.id);
    let there = blocking(move || checkpoint::list(&state, id)).await?.map_err(|e| trouble(&e))?;
    // Before her machine stands still for nothing.
    if there.iter().any(|one| one.name == *name) {
        return Err(CheckpointError::Taken(name.clone()).to_string());
    }
    if there.len() >= USERS {
        return Err(format!(
            "there are {} checkpoints of yours already, and you take {USERS} at most; your operator can drop one",
            there.len()
        ));
    }
    let quota = desk.quota(account).await?;
    quota.fits(quota.used.disk).map_err(|over| format!("your quota does not allow it: {over}"))?;
    let about = match in_use(desk, account).await? {
        Some(copies) => of_copies(desk, account, name, copies).await,
        None => at_rest(desk, account, name).await,
    }?;
    let (state, id, name) = (desk.state_dir.clone(), account.id, name.clone());
    blocking(move || {
        let all = checkpoint::list(&state, id).map_err(|error| trouble(&error))?;
        Ok((about, all.iter().find(|one| one.name == name).map_or(0, |one| one.allocated)))
    })
    .await?
}

/// Copies of her machine, which goes on. None: it does not run.
async fn in_use(desk: &Desk, account: &Account) -> Result<Option<Copies>, String> {
    let mut news = desk.registry.copy(account, true).await;
    loop {
        match news.recv().await {
            Some(CopyNews::Waiting { .. } | CopyNews::Copying { .. }) => {}
            Some(CopyNews::NotRunning) => return Ok(None),
            Some(CopyNews::Over(Ok(copies))) => return Ok(Some(copies)),
            Some(CopyNews::Over(Err(reason))) => {
                tracing::warn!(account = account.name, reason, "no checkpoint");
                return Err("your machine could not be copied; try again in a moment".into());
            }
            None => return Err("copying your machine was cut off; try again".into()),
        }
    }
}

async fn of_copies(
    desk: &Desk,
    account: &Account,
    name: &Name,
    copies: Copies,
) -> Result<About, String> {
    let quota = desk.quota(account).await?;
    let (state, id, name) = (desk.state_dir.clone(), account.id, name.clone());
    blocking(move || {
        let memory = copies.memory.as_ref();
        let taken = |file: &NewFile| file.file().metadata().map_or(0, |meta| meta.blocks() * 512);
        let more = taken(&copies.disk) + memory.map_or(0, taken);
        quota.fits(more).map_err(|over| format!("your quota does not allow it: {over}"))?;
        let files = InUse { disk: copies.disk.path(), memory: memory.map(NewFile::path) };
        // In which order she left her terminals is not known while she is there.
        let known = Known::default();
        checkpoint::create_in_use(&state, id, &files, &name, known, time::now())
            .map_err(|error| trouble(&error))
    })
    .await?
}

async fn at_rest(desk: &Desk, account: &Account, name: &Name) -> Result<About, String> {
    let intent = desk.store.intent(account.id).await.ok().flatten();
    let known = intent.map_or_else(Known::default, |intent| Known {
        terminals: intent.terminals,
        paused: intent.paused,
    });
    let at_rest = rest(desk, account).await?;
    // What is saved of her memory is linked, and takes nothing more.
    let quota = desk.quota(account).await?;
    let (state, floor) = (desk.state_dir.clone(), desk.config.machines.min_free_mib << 20);
    let name = name.clone();
    blocking(move || {
        let fits = quota.fits(quota.used.disk);
        fits.map_err(|over| format!("your quota does not allow it: {over}"))?;
        let free = room::free(state.root()).unwrap_or(0);
        let room = free.saturating_sub(floor);
        let made = checkpoint::create(&state, &at_rest, &name, known, time::now(), room);
        made.map_err(|error| trouble(&error))
    })
    .await?
}

/// Holds the disk once the machine is gone.
async fn rest(desk: &Desk, account: &Account) -> Result<AtRest, String> {
    for _ in 0..TRIES {
        let (state, id) = (desk.state_dir.clone(), account.id);
        match blocking(move || AtRest::take(&state, id)).await? {
            Ok(at_rest) => return Ok(at_rest),
            Err(DiskError::InUse(_)) => sleep(PAUSE).await,
            Err(DiskError::Missing(_)) => return Err("you have no disk yet".into()),
            Err(error) => {
                tracing::error!(account = account.name, %error, "can't take a checkpoint");
                return Err("your disk can't be read at the moment".into());
            }
        }
    }
    Err("your machine is in use; try again when it is not".into())
}

fn holds(about: &About) -> &'static str {
    if about.memory.is_some() { "files and memory" } else { "files" }
}

/// What a user is told: no paths of the host.
fn trouble(error: &CheckpointError) -> String {
    match error {
        CheckpointError::Io { .. } | CheckpointError::Memory(_) => {
            tracing::error!(%error, "checkpoints");
            "the host could not do it; its operator finds the reason in the log".into()
        }
        CheckpointError::NoRoom { .. } => "there is no room for a copy of your files".into(),
        error => error.to_string(),
    }
}

async fn blocking<T: Send + 'static>(
    call: impl FnOnce() -> T + Send + 'static,
) -> Result<T, String> {
    tokio::task::spawn_blocking(call).await.map_err(|error| error.to_string())
}
