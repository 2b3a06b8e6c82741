//! Quotas, where commands meet them.

use super::context::Context;
use super::size;
use anyhow::bail;
use hermitage::limits::Limits;
use hermitage::quota::Quota;
use hermitage_storage::accounts::{Account, Changes};

pub fn of(context: &Context, account: &Account) -> Quota {
    Quota::of(&context.config, &context.state, account)
}

/// Refuses changes that leave the account less than it takes, where it may take more now: by a quota of its own or by
/// another class.
pub fn check(context: &Context, account: &Account, changes: &Changes) -> Result<(), String> {
    let mut wished = account.clone();
    if let Some(class) = &changes.class {
        wished.class = class.clone();
    }
    if let Some(quota) = changes.quota_bytes {
        wished.quota_bytes = quota;
    }
    let now = Limits::of(&context.config, account).quota;
    let Some(limit) = Limits::of(&context.config, &wished).quota else { return Ok(()) };
    let quota = of(context, &wished);
    if now.is_some_and(|now| now <= limit) || !quota.is_over() {
        return Ok(());
    }
    let name = &account.name;
    Err(format!(
        "{name} takes {} ({}), which is more than a quota of {}; nothing was changed. Have files deleted, drop saved \
         memory (hermitage account reset {name}) or checkpoints (hermitage checkpoint drop {name} …), or give more",
        size::show(quota.used.total()),
        quota.parts(),
        size::show(limit),
    ))
}

/// Refuses to keep so much more of the account.
pub fn refuse(context: &Context, account: &Account, more: u64, what: &str) -> anyhow::Result<()> {
    let Err(over) = of(context, account).fits(more) else { return Ok(()) };
    let name = &account.name;
    bail!(
        "{what} does not fit into {name}'s quota: {over}. Drop a checkpoint (hermitage checkpoint list {name}), or \
         raise the quota: hermitage account set {name} --quota SIZE"
    )
}
