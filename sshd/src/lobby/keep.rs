//! A user's checkpoints: docs/formats/checkpoint.md. Each costs her host as much as her disk may, so of those that she
//! has made there are few.

use std::time::Duration;

use hermitage_storage::{
    accounts::Account,
    checkpoint::{self, About, Checkpoint, CheckpointError, InUse, Known, Name, RolledBack},
    disk::{self, DiskError},
    publish::NewFile,
    rest::AtRest,
};
use tokio::time::sleep;
use tokio_util::sync::CancellationToken;

use super::Desk;
use crate::{
    checkpoints,
    lifecycle::{Copies, CopyNews, StopCause},
    room, time,
    watch::{Copied, CopyNote},
};

/// With so many there, a user takes no more: each may be a whole copy of her disk.
const USERS: usize = 2;

/// What is asked of them.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Wish<'a> {
    List,
    Take(&'a str),
    Restore {
        name: &'a str,
        /// She has said that she wants it.
        sure: bool,
    },
    Drop(&'a str),
}

impl<'a> Wish<'a> {
    pub fn parse(argument: Option<&'a str>) -> Result<Self, String> {
        let words: Vec<&str> = argument.unwrap_or_default().split_whitespace().collect();
        Ok(match *words.as_slice() {
            [] => Self::List,
            ["restore" | "drop"] => {
                return Err("which one? Without an argument they are listed".into());
            }
            [name] => Self::Take(name),
            ["restore", name] => Self::Restore { name, sure: false },
            ["restore", name, "yes"] => Self::Restore { name, sure: true },
            ["drop", name] => Self::Drop(name),
            _ => {
                return Err("it takes NAME, which is kept under that name, \"restore NAME\" or \"drop NAME\"".into());
            }
        })
    }
}

/// How long a machine that is on its way out may take to be gone.
const TRIES: u32 = 50;
const PAUSE: Duration = Duration::from_millis(100);

pub async fn list(desk: &Desk, account: &Account) -> Result<String, String> {
    let all = all(desk, account).await?;
    if all.is_empty() {
        return Ok("No checkpoints. With a name as the argument one is taken.\n".into());
    }
    let line = |one: &Checkpoint| match &one.about {
        Ok(about) => {
            format!("{:<32} {} UTC  {}\n", one.name, time::short(about.created), holds(about))
        }
        Err(_) => format!("{:<32} can't be used\n", one.name),
    };
    Ok(all.iter().map(line).collect())
}

pub(super) async fn create(desk: &Desk, account: &Account, name: &str) -> Result<String, String> {
    let name = Name::parse(name).map_err(|error| error.to_string())?;
    let (desk, account, named) = (desk.clone(), account.clone(), name.clone());
    let waits = CancellationToken::new();
    let unwanted = waits.clone();
    let _waits = waits.drop_guard();
    let about = to_its_end(async move {
        let note = note(&account, Copied::Checkpoint, &named);
        let taken = take(&desk, &account, &named, &unwanted).await;
        desk.watch.tell(note.over(taken.as_ref().map(|(_, bytes)| *bytes)));
        let (about, _) = taken?;
        tracing::info!(account = account.name, checkpoint = %named, "has taken a checkpoint");
        Ok(about)
    });
    Ok(format!("{name} has your {} as they are now.\n", holds(&about.await?)))
}

/// Makes her files and memory what they were then. What they are now is kept.
pub(super) async fn restore(desk: &Desk, account: &Account, name: &str) -> Result<String, String> {
    let name = Name::parse(name).map_err(|error| error.to_string())?;
    let source = find(desk, account, &name).await?;
    let (desk, account) = (desk.clone(), account.clone());
    let done = to_its_end(async move {
        let note = note(&account, Copied::GoBack, &source.name);
        let done = go_back(&desk, &account, &source).await;
        desk.watch.tell(note.over(done.as_ref().map(|_| source.allocated)));
        let RolledBack { about, kept, .. } = done?;
        let to = &source.name;
        tracing::info!(account = account.name, checkpoint = %to, "has gone back to a checkpoint");
        Ok((about, kept))
    });
    let (about, kept) = done.await?;
    Ok(format!(
        "Your {} are as they were in {name}. What they were before is the checkpoint {kept}.\n",
        holds(&about),
    ))
}

async fn go_back(
    desk: &Desk,
    account: &Account,
    source: &Checkpoint,
) -> Result<RolledBack, String> {
    let all = all(desk, account).await?;
    let others = all.iter().filter(|one| one.name != source.name);
    let kept = others.filter(|one| one.about.as_ref().is_ok_and(|about| about.kept));
    if kept.count() >= USERS {
        return Err(format!(
            "{USERS} states that you went back from are kept already; \"drop NAME\" deletes one"
        ));
    }
    // Before her sessions are ended for nothing; and again with what was saved then.
    let fits = async || {
        let quota = desk.quota(account).await?;
        quota.fits(source.allocated).map_err(|over| format!("your quota does not allow it: {over}"))
    };
    fits().await?;
    desk.registry.stop(account.id, StopCause::Admin).await;
    let at_rest = rest(desk, account).await?;
    fits().await?;
    let known = known(desk, account).await;
    let (state, floor) = (desk.state_dir.clone(), desk.config.machines.min_free_mib << 20);
    let (owner, name) = (account.clone(), source.name.clone());
    let done = blocking(move || {
        let keep =
            checkpoints::dated(&state, &owner, "before-").map_err(|error| trouble(&error))?;
        let room = room::free(state.root()).unwrap_or(0).saturating_sub(floor);
        checkpoint::rollback(&state, at_rest, &name, &keep, known, time::now(), room)
            .map_err(|error| trouble(&error))
    })
    .await??;
    let intent = checkpoints::gone_back(account, &source.name, &done.about);
    if let Err(error) = desk.store.record(intent).await {
        // It is so all the same: she is told less at her next login.
        tracing::error!(account = account.name, %error, "can't record a return to a checkpoint");
    }
    // What the service remembers of her last machine is of another.
    desk.registry.reconsider(account.id);
    Ok(done)
}

pub(super) async fn drop(desk: &Desk, account: &Account, name: &str) -> Result<String, String> {
    let name = Name::parse(name).map_err(|error| error.to_string())?;
    let one = find(desk, account, &name).await?;
    let note = note(account, Copied::DropCheckpoint, &name);
    let (desk, id) = (desk.clone(), account.id);
    to_its_end(async move {
        let state = desk.state_dir.clone();
        let removed = blocking(move || checkpoint::remove(&state, id, &one.name));
        let removed = removed.await.and_then(|removed| removed.map_err(|error| trouble(&error)));
        desk.watch.tell(note.over(removed.as_ref().map(|()| one.allocated)));
        removed
    })
    .await?;
    Ok(format!("{name} is deleted.\n"))
}

/// Does all of it, also when the link is cut over which it was asked for: what is done to her files is told in the
/// audit log, and to her at her next login.
async fn to_its_end<T: Send + 'static>(
    work: impl Future<Output = Result<T, String>> + Send + 'static,
) -> Result<T, String> {
    tokio::spawn(work).await.map_err(|error| error.to_string())?
}

/// What is to be told in the audit log of something under way.
fn note(account: &Account, what: Copied, name: &Name) -> CopyNote {
    CopyNote::new(what, &account.name, Some(account.id)).at(name.to_string())
}

async fn all(desk: &Desk, account: &Account) -> Result<Vec<Checkpoint>, String> {
    let (state, id) = (desk.state_dir.clone(), account.id);
    blocking(move || checkpoint::list(&state, id)).await?.map_err(|error| trouble(&error))
}

async fn find(desk: &Desk, account: &Account, name: &Name) -> Result<Checkpoint, String> {
    let (state, id, name) = (desk.state_dir.clone(), account.id, name.clone());
    blocking(move || checkpoint::find(&state, id, &name)).await?.map_err(|error| trouble(&error))
}

/// What the database knows of the machine at rest.
async fn known(desk: &Desk, account: &Account) -> Known {
    checkpoints::known(desk.store.intent(account.id).await.ok().flatten())
}

/// What it has, and the bytes that it takes.
async fn take(
    desk: &Desk,
    account: &Account,
    name: &Name,
    unwanted: &CancellationToken,
) -> Result<(About, u64), String> {
    let there = all(desk, account).await?;
    // Before her machine stands still for nothing.
    if there.iter().any(|one| one.name == *name) {
        return Err(CheckpointError::Taken(name.clone()).to_string());
    }
    if there.len() >= USERS {
        return Err(format!(
            "there are {} checkpoints of yours already, and you take {USERS} at most; \"drop NAME\" deletes one",
            there.len()
        ));
    }
    let quota = desk.quota(account).await?;
    quota.fits(quota.used.disk).map_err(|over| format!("your quota does not allow it: {over}"))?;
    let about = match in_use(desk, account, unwanted).await? {
        Some(copies) => of_copies(desk, account, name, copies).await,
        None => at_rest(desk, account, name).await,
    }?;
    // Somebody may have dropped it already.
    let allocated = find(desk, account, name).await.map_or(0, |one| one.allocated);
    Ok((about, allocated))
}

/// Copies of her machine, which goes on. None: it does not run.
async fn in_use(
    desk: &Desk,
    account: &Account,
    unwanted: &CancellationToken,
) -> Result<Option<Copies>, String> {
    let mut news = desk.registry.copy(account, true).await;
    loop {
        let one = tokio::select! {
            one = news.recv() => one,
            // Dropping the channel gives the copy up.
            () = unwanted.cancelled() => return Err("nobody waits for it any more".into()),
        };
        match one {
            Some(CopyNews::Waiting { .. } | CopyNews::Copying { .. }) => {}
            Some(CopyNews::NotRunning) => return Ok(None),
            Some(CopyNews::Over(Ok(copies))) => return Ok(Some(copies)),
            Some(CopyNews::Over(Err(reason))) => {
                tracing::warn!(account = account.name, %reason, "no checkpoint");
                return Err(format!("your machine could not be copied: {}", reason.for_user()));
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
        let taken = |file: &NewFile| disk::allocated(file.path()).unwrap_or(0);
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
    let known = known(desk, account).await;
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
