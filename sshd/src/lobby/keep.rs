//! Checkpoints that a user takes: docs/formats/checkpoint.md. Going back to one is her operator's.

use std::time::Duration;

use hermitage_storage::{
    accounts::Account,
    checkpoint::{self, About, CheckpointError, Known, Name},
    disk::DiskError,
    rest::AtRest,
};
use tokio::time::sleep;

use super::{Desk, Way};
use crate::{lifecycle::StopCause, room, time};

/// With so many there, a user takes no more: each may be a whole copy of her disk.
const USERS: usize = 2;

/// How long a machine that was put to rest may take to be gone.
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

pub(super) async fn create(
    desk: &Desk,
    account: &Account,
    name: &str,
    way: Way,
) -> Result<String, String> {
    let name = Name::parse(name).map_err(|error| error.to_string())?;
    let (state, id) = (desk.state_dir.clone(), account.id);
    let there = blocking(move || checkpoint::list(&state, id)).await?.map_err(|e| trouble(&e))?;
    // Before her machine is put to rest for nothing.
    if there.iter().any(|one| one.name == name) {
        return Err(CheckpointError::Taken(name).to_string());
    }
    if there.len() >= USERS {
        return Err(format!(
            "there are {} checkpoints of yours already, and you take {USERS} at most; your operator can drop one",
            there.len()
        ));
    }
    // Of what is on the disk now; what is saved of her memory is linked, and takes nothing more.
    let quota = desk.quota(account).await?;
    quota.fits(quota.used.disk).map_err(|over| format!("your quota does not allow it: {over}"))?;
    let ran = desk.registry.status_of(id).is_some_and(|machine| machine.machine_pid.is_some());
    match (desk.registry.sessions(id), way) {
        (0, _) => desk.registry.stop(id, StopCause::Admin).await,
        (1, Way::Ssh) => return Err("log out of your other session first".into()),
        (count, Way::Ssh) => return Err(format!("log out of your {count} other sessions first")),
        (_, Way::Inside) => {
            return Err(format!(
                "your machine is in use; log out of it and take one over ssh: ssh {}+checkpoint@… {name}",
                account.name
            ));
        }
    }
    let intent = desk.store.intent(id).await.ok().flatten();
    let known = intent.map_or_else(Known::default, |intent| Known {
        terminals: intent.terminals,
        paused: intent.paused,
    });
    let at_rest = rest(desk, account).await?;
    // Her memory was saved meanwhile.
    let quota = desk.quota(account).await?;
    let fits = quota.fits(quota.used.disk);
    let (state, floor) = (desk.state_dir.clone(), desk.config.machines.min_free_mib << 20);
    let taken = name.clone();
    let made = blocking(move || {
        fits.map_err(|over| format!("your quota does not allow it: {over}"))?;
        let free = room::free(state.root()).unwrap_or(0);
        let room = free.saturating_sub(floor);
        let made = checkpoint::create(&state, &at_rest, &taken, known, time::now(), room);
        made.map_err(|error| trouble(&error))
    });
    let made = made.await;
    if ran {
        // What works in it, or is to stay awake, goes on.
        desk.registry.expect(account);
    }
    let about = made??;
    tracing::info!(account = account.name, checkpoint = %name, "has taken a checkpoint");
    Ok(format!("{name} has your {} as they are now.\n", holds(&about)))
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
