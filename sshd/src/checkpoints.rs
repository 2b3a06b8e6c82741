//! What commands and the service do alike about checkpoints.

use hermitage_storage::{
    StateDir,
    accounts::{Account, Intent, MachineState},
    checkpoint::{self, About, CheckpointError, Known, Name},
    publish,
};

use crate::time;

/// `20261121-101530`, UTC, behind something; `…-2` for the second of one second.
pub fn dated(state: &StateDir, account: &Account, before: &str) -> Result<Name, CheckpointError> {
    let taken = checkpoint::list(state, account.id)?;
    let name = format!("{before}{}", time::name(time::now()));
    Name::parse(&publish::unused(&name, |name| taken.iter().any(|one| one.name.as_str() == name)))
}

/// What the database knows of a machine at rest.
pub fn known(intent: Option<Intent>) -> Known {
    intent.map_or_else(Known::default, |intent| Known {
        terminals: intent.terminals,
        paused: intent.paused,
    })
}

/// What the service is to tell who logs in next to an account that has gone back to a checkpoint.
pub fn gone_back(account: &Account, to: &Name, now: &About) -> Intent {
    let memory = now.memory.as_ref();
    Intent {
        account: account.id,
        state: if memory.is_some() { MachineState::Saved } else { MachineState::Stopped },
        pid: None,
        base: memory.map(|memory| memory.base.clone()),
        detail: memory.is_none().then(|| format!("you are back at the checkpoint {to}")),
        terminals: memory.and_then(|memory| memory.terminals.clone()),
        paused: memory.and_then(|memory| memory.paused.clone()),
        since: 0,
    }
}
