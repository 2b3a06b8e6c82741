//! Accounts at rest, for commands that work on what is kept of them.

use super::admin;
use super::context::Context;
use anyhow::{Context as _, bail};
use hermitage::admin::protocol::Request;
use hermitage_storage::accounts::Account;
use hermitage_storage::disk::DiskError;
use hermitage_storage::rest::AtRest;
use nix::sys::statvfs::statvfs;
use std::thread;
use std::time::{Duration, Instant};

/// Holds the account's disk. A machine that runs is ended first if `stop`, saved if that is its policy; else
/// it is in the way.
pub fn take(context: &Context, account: &Account, stop: bool) -> anyhow::Result<AtRest> {
    let name = &account.name;
    if stop {
        admin::tell(context, &Request::StopAccount { account: name.clone() })?;
    }
    let deadline = Instant::now() + Duration::from_secs(10);
    loop {
        match AtRest::take(&context.state, account.id) {
            // It is on its way out, or somebody has logged in just then.
            Err(DiskError::InUse(_)) if stop && Instant::now() < deadline => {
                thread::sleep(Duration::from_millis(100));
            }
            Err(DiskError::InUse(_)) if stop => bail!(
                "{name}'s machine was started again by a login; close the account meanwhile: hermitage \
                 account disable {name}"
            ),
            Err(DiskError::InUse(_)) => bail!(
                "{name}'s machine runs, so its disk changes; stop it first (hermitage account stop {name}) or \
                 give --stop, which ends its sessions and saves it"
            ),
            Err(DiskError::Missing(_)) => {
                bail!("{name} has no disk yet; it is made by the first: hermitage base build")
            }
            taken => return Ok(taken?),
        }
    }
}

/// Bytes that a command may write to the state directory: what is left for the machines is not its to take.
pub fn room(context: &Context) -> anyhow::Result<u64> {
    context.state.create().with_context(|| context.not_ours())?;
    let root = context.state.root();
    let stat =
        statvfs(root).with_context(|| format!("looking at the room in {}", root.display()))?;
    let free = stat.blocks_available().saturating_mul(stat.fragment_size());
    Ok(free.saturating_sub(context.config.machines.min_free_mib << 20))
}
