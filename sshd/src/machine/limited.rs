//! What the host lets a machine take, while it runs: docs/limits.md.

use std::{
    path::PathBuf,
    sync::{Arc, MutexGuard, PoisonError},
};

use super::Machine;
use crate::{cgroup::Group, limits::Share};

impl Machine {
    /// The folder of its control group. `None`: there is none, or it is gone.
    pub fn group_path(&self) -> Option<PathBuf> {
        self.group().as_ref().map(|group| group.path().to_owned())
    }

    /// What it may take from now on. Done beside the caller: the kernel may take its time.
    pub fn limit(&self, share: Share) {
        let Some(group) = self.group().clone() else { return };
        let machine = self.label.clone();
        tokio::task::spawn_blocking(move || {
            if let Err(error) = group.change(share) {
                tracing::error!(machine, %error, "a limit of a running machine is not enforced");
            }
        });
    }

    pub(super) fn leave_group(&self) {
        drop(self.group().take());
    }

    fn group(&self) -> MutexGuard<'_, Option<Arc<Group>>> {
        self.group.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
