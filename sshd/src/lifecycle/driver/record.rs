//! What is on record of an account's machine: written before each effect, and read again by the next service.

use hermitage_storage::{
    accounts::{self, MachineState},
    saved,
};

use super::Driver;
use crate::lifecycle::{
    start,
    state::{Intent, State},
};

impl Driver {
    pub(super) async fn drop_memory(&mut self) {
        self.former = Some(start::Former::default());
        let (context, account) = (self.context.clone(), self.account);
        let dropped =
            tokio::task::spawn_blocking(move || saved::withdraw(&context.state_dir, account));
        let outcome = dropped.await.map_err(std::io::Error::other).and_then(|outcome| outcome);
        if let Err(error) = outcome {
            // It is found again at the next start, which resumes it or says why not.
            tracing::error!(account = %self.account, %error, "can't drop a saved machine");
        }
    }

    /// What a service before this one recorded of the account's machine.
    pub(super) async fn look_up_former(&mut self) {
        if let Some(former) = &mut self.former {
            if let Some(lost) = &self.lifecycle.lost {
                former.lost = Some(lost.clone());
            }
            return;
        }
        let intent = match self.context.store.intent(self.account).await {
            Ok(intent) => intent,
            Err(error) => {
                tracing::error!(account = %self.account, %error, "can't look up the last machine");
                None
            }
        };
        self.former = Some(intent.map(start::Former::of).unwrap_or_default());
    }

    /// A database that can't be written does not keep anybody out: the disk's lock guards the disk.
    pub(super) async fn record(&mut self, intent: Intent) {
        if matches!(intent, Intent::Starting | Intent::Resuming) {
            self.look_up_former().await;
        }
        let left = self.former.as_ref().map(|former| former.left.as_slice()).unwrap_or_default();
        let machine = self.machine();
        let record = accounts::Intent {
            account: self.account,
            state: match (intent, &self.lifecycle.state) {
                (Intent::Stopped, State::Failed(_)) => MachineState::Failed,
                (Intent::Stopped, _) => MachineState::Stopped,
                (Intent::Starting, _) => MachineState::Starting,
                (Intent::Running, _) => MachineState::Running,
                (Intent::Saving, _) => MachineState::Saving,
                (Intent::Saved, _) => MachineState::Saved,
                (Intent::Resuming, _) => MachineState::Resuming,
                (Intent::Stopping, _) => MachineState::Stopping,
            },
            pid: machine.as_ref().map(|machine| machine.pid),
            base: machine.map(|machine| machine.base.clone()),
            detail: Some(self.why()).filter(|why| !why.is_empty()),
            paused: self.former.as_ref().and_then(|former| former.paused.clone()),
            terminals: (!left.is_empty())
                .then(|| left.iter().map(u8::to_string).collect::<Vec<_>>().join(" ")),
            since: 0,
        };
        if let Err(error) = self.context.store.record(record).await {
            tracing::error!(account = %self.account, ?intent, %error, "can't record");
        }
    }
}
