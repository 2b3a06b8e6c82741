//! Accounts at rest, for commands that work on what is kept of them.

use super::admin::{self, Copied, InUse};
use super::context::Context;
use anyhow::{Context as _, bail};
use hermitage::admin::protocol::Request;
use hermitage_storage::accounts::Account;
use hermitage_storage::disk::DiskError;
use hermitage_storage::rest::{AtRest, Kept};
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

/// What a command that puts an account away works on.
pub enum Held {
    Rest(AtRest),
    /// The disk as its running machine had it at one moment, and its memory if that was wanted.
    Copy(InUse),
}

impl Held {
    pub fn kept(&self) -> Kept<'_> {
        match self {
            Held::Rest(at_rest) => at_rest.kept(),
            Held::Copy(InUse { disk, memory, .. }) => {
                let memory = memory.as_ref().map(|memory| (&memory.file, memory.header.as_ref()));
                Kept { disk, memory }
            }
        }
    }

    pub fn is_in_use(&self) -> bool {
        matches!(self, Held::Copy(_))
    }
}

/// The account as it is: at rest, or else a copy of the disk that its machine goes on with, and of that machine's
/// memory if `memory`.
pub fn take_or_copy(context: &Context, account: &Account, memory: bool) -> anyhow::Result<Held> {
    let name = &account.name;
    let mut deadline = None;
    loop {
        match AtRest::take(&context.state, account.id) {
            Ok(at_rest) => return Ok(Held::Rest(at_rest)),
            Err(DiskError::InUse(_)) => {}
            // In its words.
            Err(_) => return take(context, account, false).map(Held::Rest),
        }
        match admin::copy_disk(context, name, memory)? {
            Copied::Copy(copies) => return Ok(Held::Copy(copies)),
            // It is on its way out, or a former service's. The answer may have taken as long as a save.
            Copied::NotRunning
                if Instant::now()
                    < *deadline.get_or_insert_with(|| Instant::now() + Duration::from_secs(10)) =>
            {
                thread::sleep(Duration::from_millis(100));
            }
            Copied::NotRunning => bail!(
                "{name}'s disk is in use, and not by a machine of this service; if it has just been started, machines \
                 of the former one end within half a minute: try again"
            ),
            Copied::NoService => bail!(
                "{name}'s disk is in use, and no service runs that could copy it meanwhile or end the machine for \
                 --stop; if it has just been killed, its machines end within half a minute: try again"
            ),
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
