//! Making a machine of what was saved of it: docs/lifecycle.md "Resuming".
//!
//! A snapshot is used at most once, and only with the disk it was taken with (invariants 2 and 3). One
//! that can't be used is set aside, and the machine starts from its disk: that is never in danger.

use std::{
    fs::File,
    io,
    sync::Arc,
    time::{Duration, SystemTime},
};

use hermitage_storage::{
    accounts::Account,
    saved::{self, Found},
};

use tokio::sync::watch;

use super::{
    driver::Context,
    start::{StartError, admission},
};
use crate::machine::{ForkError, LaunchError, Line, Machine, ResumeError, Sleeper, resume as wake};

pub(super) enum Attempt {
    /// How long it slept, and how many bytes were saved of it.
    Resumed(Arc<Machine>, Duration, u64),
    /// In words for the user.
    Unusable(String),
    Nothing,
}

/// An error only if the snapshot may still be used later.
pub(super) async fn resume(
    context: &Arc<Context>,
    account: &Account,
    disk: &File,
    left: Vec<u8>,
    scarce: &impl Fn() -> watch::Receiver<bool>,
) -> Result<Attempt, StartError> {
    let interrupted = |error: io::Error| StartError::Interrupted(error.to_string());
    let disk_of_check = disk.try_clone().map_err(interrupted)?;
    let (shared, id) = (context.clone(), account.id);
    let look = blocking(move || {
        let found = saved::find(&shared.state_dir, id, &disk_of_check);
        let forgotten = match found {
            Found::Nothing => saved::forget(&shared.state_dir, id, &disk_of_check),
            _ => Ok(()),
        };
        Ok((found, forgotten))
    });
    let (found, forgotten) = look.await.map_err(interrupted)?;
    forgotten.map_err(|source| StartError::SetAside {
        folder: context.state_dir.account_dir(account.id),
        source,
    })?;
    let (file, header) = match found {
        Found::Usable(file, header) => (file, header),
        Found::Unusable(reason) => return set_aside(context, account, reason).await,
        Found::Nothing => return Ok(Attempt::Nothing),
    };
    let age = age(header.description.created);
    let bytes = header.file_bytes();
    let used = file.try_clone().map_err(interrupted)?;
    let sleeper = Sleeper {
        label: account.name.clone(),
        base: header.description.base.as_str().to_owned(),
        // Ours stays open for a start from the disk, should that be necessary.
        disk: disk.try_clone().map_err(interrupted)?.into(),
        snapshot: file.into(),
        bytes,
        had: header.description.size(),
        left,
        timeout: context.config.machines.start_timeout(),
        scarce: scarce(),
        admission: admission(context, account),
        line: Line::new(account.id, context.desk.clone()),
    };
    let (shared, id) = (context.clone(), account.id);
    let consume = blocking(move || saved::consume(&shared.state_dir, id));
    match wake(&context.forks, &context.cgroups, sleeper, consume).await {
        Ok(machine) => {
            let (shared, id) = (context.clone(), account.id);
            // Nobody waits for it: without its tag it is worth nothing.
            tokio::task::spawn_blocking(move || {
                if let Err(error) = saved::remove_used(&shared.state_dir, id, &used) {
                    tracing::warn!(account = %id, %error, "can't remove a used snapshot");
                }
            });
            Ok(Attempt::Resumed(machine, age, bytes))
        }
        Err(ResumeError::Refused(reason)) => set_aside(context, account, reason).await,
        // A machine that starts from its disk has another base. If it is this one it can't start either: the
        // memory waits until the operator has done something.
        Err(ResumeError::Launch(LaunchError::Fork(ForkError::Refused { base, reason })))
            if context
                .forks
                .current_base()
                .is_ok_and(|current| current.as_ref() != Some(&base)) =>
        {
            set_aside(context, account, format!("the base it needs can't be used: {reason}")).await
        }
        // The host's trouble, not the snapshot's.
        Err(ResumeError::Launch(
            error @ (LaunchError::Fork(_)
            | LaunchError::Unread { .. }
            | LaunchError::Sockets(_)
            | LaunchError::Attach(_)
            | LaunchError::Cgroup(_)),
        )) => Err(error.into()),
        Err(ResumeError::Launch(error)) => {
            set_aside(context, account, format!("the saved machine did not come back: {error}"))
                .await
        }
    }
}

async fn set_aside(
    context: &Arc<Context>,
    account: &Account,
    reason: String,
) -> Result<Attempt, StartError> {
    let (shared, id) = (context.clone(), account.id);
    let done = blocking(move || saved::set_aside(&shared.state_dir, id));
    done.await.map_err(|source| StartError::SetAside {
        folder: context.state_dir.account_dir(account.id),
        source,
    })?;
    Ok(Attempt::Unusable(reason))
}

async fn blocking<T: Send + 'static>(
    call: impl FnOnce() -> io::Result<T> + Send + 'static,
) -> io::Result<T> {
    tokio::task::spawn_blocking(call).await.map_err(io::Error::other)?
}

/// How long ago that was; a clock that was set back makes it no time at all.
fn age(created: i64) -> Duration {
    let now = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default();
    let created = Duration::from_secs(created.try_into().unwrap_or(0));
    now.saturating_sub(created)
}
