//! The size of an account's disk.

use super::context::Context;
use super::size;
use anyhow::{Context as _, bail};
use hermitage_storage::accounts::Account;
use hermitage_storage::disk::{self, DiskError};

/// Makes the account's disk larger, if it has one. The guest enlarges its file system when it mounts the
/// disk, at the next start that is not a resume.
pub fn enlarge(context: &Context, account: &Account, bytes: u64) -> anyhow::Result<()> {
    let (name, path) = (&account.name, context.state.disk(account.id));
    if !path.exists() {
        // It is made in the size on record.
        return Ok(());
    }
    let now = disk::size(&path)?;
    if bytes < now {
        bail!(
            "{name}'s disk has {} ({} of it written) and can't be made {}: what is on it only her machine \
             opens, and a disk is never cut off. Take the files out, remove the account and add it again",
            size::show(now),
            size::show(disk::allocated(&path)?),
            size::show(bytes),
        );
    }
    if bytes == now {
        return Ok(());
    }
    match disk::enlarge(&path, bytes) {
        Err(error @ DiskError::InUse(_)) => {
            return Err(error).with_context(|| {
                format!(
                    "{name}'s machine runs, and a disk is enlarged while it does not: hermitage account \
                     stop {name} saves it; nothing was changed"
                )
            });
        }
        outcome => outcome?,
    }
    if context.state.snapshot(account.id).exists() {
        context.out.note(format!(
            "{name}'s machine is saved and goes on with the file system it has; there is more room when it \
             next starts from its disk: ssh {name}+fresh@…, or hermitage account reset {name}"
        ));
    }
    Ok(())
}
