//! `hermitage base remove|gc`: deleting bases, and only those that nothing needs.

use super::base::find;
use super::context::Context;
use super::{size, snapshot};
use anyhow::{Context as _, bail};
use hermitage_storage::base::{self, BaseId, Removal};
use hermitage_storage::checkpoint::{self, Name};
use nix::fcntl::{Flock, FlockArg};
use serde_json::json;
use std::fs::File;

/// Who needs a base.
enum Need {
    Current,
    /// Machines that were saved on it: one of their accounts, and how many more.
    Saved(String, usize),
    /// The memory in this account's checkpoint of this name.
    Checkpoint(String, Name),
    Running,
}

impl Need {
    fn words(&self) -> String {
        match self {
            Need::Current => "it is the current one, which new machines are forked from".into(),
            Need::Saved(account, 0) => format!("{account}'s saved machine needs it"),
            Need::Saved(account, more) => {
                format!("{account}'s saved machine and {more} more need it")
            }
            Need::Checkpoint(account, name) => format!("{account}'s checkpoint {name} needs it"),
            Need::Running => "machines run on it".into(),
        }
    }

    fn way_out(&self) -> String {
        match self {
            Need::Current => "choose another first: hermitage base use ID".into(),
            Need::Saved(account, _) => format!(
                "that goes with hermitage snapshot drop {account}, or when that machine next starts \
                 from its disk"
            ),
            Need::Checkpoint(account, name) => {
                format!("that goes with hermitage checkpoint drop {account} {name}")
            }
            Need::Running => {
                "hermitage status shows which; each is on the current base when it has \
                 next started from its disk"
                    .into()
            }
        }
    }
}

/// Choosing and deleting bases, one at a time: the base that one of us deletes is not the one that the
/// other makes current.
pub fn turn(context: &Context) -> anyhow::Result<Flock<File>> {
    context.state.create().with_context(|| context.not_ours())?;
    let root = context.state.root();
    let dir = File::open(root).with_context(|| root.display().to_string())?;
    Flock::lock(dir, FlockArg::LockExclusive)
        .map_err(|(_, errno)| errno)
        .with_context(|| format!("locking {}", root.display()))
}

pub fn remove(context: &Context, id: &str) -> anyhow::Result<()> {
    let _turn = turn(context)?;
    let id = find(context, id)?;
    let removal = match unneeded(context, &id)? {
        Ok(removal) => removal,
        Err(need) => bail!("base {id} is in use: {}; {}", need.words(), need.way_out()),
    };
    removal.finish().with_context(|| format!("deleting base {id}"))?;
    let object = json!({ "id": id.as_str(), "removed": true });
    context.out.show(&object, || format!("base {id} is deleted"))
}

pub fn gc(context: &Context, keep: usize, dry_run: bool) -> anyhow::Result<()> {
    let _turn = turn(context)?;
    let mut spared = 0;
    let (mut gone, mut kept) = (vec![], vec![]);
    for listed in base::list(&context.state)? {
        let id = listed.id;
        match unneeded(context, &id)? {
            Err(need) => kept.push((id, need.words())),
            Ok(_) if spared < keep => {
                spared += 1;
                kept.push((id, "--keep".into()));
            }
            Ok(removal) => {
                if !dry_run {
                    removal.finish().with_context(|| format!("deleting base {id}"))?;
                }
                gone.push((id, listed.allocated));
            }
        }
    }
    let freed: u64 = gone.iter().map(|(_, bytes)| bytes).sum();
    let object = json!({
        "dry_run": dry_run,
        "removed": gone.iter()
            .map(|(id, bytes)| json!({ "id": id.as_str(), "allocated_bytes": bytes }))
            .collect::<Vec<_>>(),
        "kept": kept.iter()
            .map(|(id, why)| json!({ "id": id.as_str(), "why": why }))
            .collect::<Vec<_>>(),
        "freed_bytes": freed,
    });
    context.out.show(&object, || {
        let verb = if dry_run { "would be deleted" } else { "is deleted" };
        let mut lines: Vec<_> = kept.iter().map(|(id, why)| format!("{id}  kept: {why}")).collect();
        lines
            .extend(gone.iter().map(|(id, bytes)| format!("{id}  {verb}: {}", size::show(*bytes))));
        if gone.is_empty() {
            lines.push("nothing to delete".to_owned());
        }
        lines.join("\n")
    })
}

/// The base, held so that nobody begins to use it; or who needs it.
fn unneeded(context: &Context, id: &BaseId) -> anyhow::Result<Result<Removal, Need>> {
    if context.state.current_base()?.as_ref() == Some(id) {
        return Ok(Err(Need::Current));
    }
    let begun = Removal::begin(&context.state, id).with_context(|| format!("locking base {id}"))?;
    let Some(removal) = begun else { return Ok(Err(Need::Running)) };
    // After taking the lock: a machine that ended just now has its snapshot in place.
    let mut sleepers = snapshot::sleepers(context)?.into_iter().filter(|(base, _)| base == id);
    if let Some((_, first)) = sleepers.next() {
        return Ok(Err(Need::Saved(first, sleepers.count())));
    }
    for account in context.accounts()?.list(false)? {
        let mut needed = checkpoint::bases(&context.state, account.id)?.into_iter();
        if let Some((_, name)) = needed.find(|(base, _)| base == id) {
            return Ok(Err(Need::Checkpoint(account.name, name)));
        }
    }
    Ok(Ok(removal))
}
