//! Saving an account's machine: docs/lifecycle.md "Saving". Up to the moment the snapshot is published
//! the save can fail or be called off, and the machine goes on; from then on the machine is never run
//! again, and what is on the disk is what the next login gets.

use std::{
    sync::Arc,
    time::{Duration, Instant},
};

use hermitage_storage::{disk::Tag, saved};
use tokio_util::sync::CancellationToken;
use uuid::Uuid;

use super::{driver::Context, state::SaveOutcome};
use crate::machine::Machine;

/// How long a guest that stands still for something else is waited for.
pub(super) const STAND_TIMEOUT: Duration = Duration::from_secs(60);

pub(super) struct SaveOver {
    pub outcome: SaveOutcome,
    /// The terminals that wait for their user, the one left last first.
    pub left: Vec<u8>,
    pub bytes: u64,
    pub took: Duration,
    /// Names and nanoseconds.
    pub stages: Vec<(String, u64)>,
}

/// Saves a machine that has no sessions.
pub(super) async fn save(
    context: Arc<Context>,
    account: Uuid,
    machine: Arc<Machine>,
    called_off: CancellationToken,
) -> SaveOver {
    let save = Save { context, account, machine, called_off };
    // What it did to come to be was told then.
    save.machine.take_stages();
    let begun = Instant::now();
    let mut over = SaveOver {
        outcome: SaveOutcome::Done,
        left: vec![],
        bytes: 0,
        took: Duration::ZERO,
        stages: vec![],
    };
    if let Err(stop) = save.run(&mut over).await {
        over.outcome = match stop {
            Stop::CalledOff => SaveOutcome::CalledOff,
            Stop::Failed(reason) => {
                tracing::error!(account = %save.account, reason, "can't save the machine");
                SaveOutcome::Failed(reason)
            }
        };
    }
    over.took = begun.elapsed();
    over.stages.extend(save.machine.take_stages());
    over
}

struct Save {
    context: Arc<Context>,
    account: Uuid,
    machine: Arc<Machine>,
    called_off: CancellationToken,
}

/// Why the machine goes on, or is ended, instead of sleeping.
enum Stop {
    CalledOff,
    Failed(String),
}

impl Save {
    async fn run(&self, over: &mut SaveOver) -> Result<(), Stop> {
        tokio::select! {
            () = self.machine.quiet() => {}
            () = self.called_off.cancelled() => return Err(Stop::CalledOff),
        }
        let _standing = tokio::select! {
            standing = self.machine.stand() => standing,
            () = self.called_off.cancelled() => return Err(Stop::CalledOff),
            () = tokio::time::sleep(STAND_TIMEOUT) => {
                let reason = "its agent has not gone on since its disk was to be copied";
                return Err(Stop::Failed(reason.into()));
            }
        };
        let begun = Instant::now();
        if let Err(reason) = self.machine.freeze().await {
            // Whether it stands still or not: it is told to go on.
            return Err(self.go_on(Stop::Failed(reason)).await);
        }
        over.stages.push(stage("freeze the guest", begun));
        self.wanted(false).await?;
        over.left = self.machine.left_terminals();
        let created = self.blocking(|context, account| saved::create(&context.state_dir, account));
        let file = match created.await {
            Ok(file) => file,
            Err(reason) => {
                let stop = Stop::Failed(format!("no file for its memory: {reason}"));
                return Err(self.go_on(stop).await);
            }
        };
        let mut tag: Tag = [0; 16];
        if let Err(error) = getrandom::fill(&mut tag) {
            return Err(self.go_on(Stop::Failed(format!("no random numbers: {error}"))).await);
        }
        let saving = self.machine.save(&file, *self.account.as_bytes(), tag);
        over.bytes = match saving.await {
            Ok(bytes) => bytes,
            Err(reason) => return Err(self.take_back(Stop::Failed(reason), false).await),
        };
        drop(file);
        self.wanted(true).await?;
        let begun = Instant::now();
        let published =
            self.blocking(move |context, account| saved::publish(&context.state_dir, account, tag));
        if let Err(reason) = published.await {
            let stop = Stop::Failed(format!("can't put it in its place: {reason}"));
            return Err(self.take_back(stop, true).await);
        }
        over.stages.push(stage("publish", begun));
        Ok(())
    }

    /// An error if nobody wants the save any more; the machine goes on then.
    async fn wanted(&self, paused: bool) -> Result<(), Stop> {
        match (self.called_off.is_cancelled(), paused) {
            (false, _) => Ok(()),
            (true, false) => Err(self.go_on(Stop::CalledOff).await),
            (true, true) => Err(self.take_back(Stop::CalledOff, true).await),
        }
    }

    /// Removes what there is of the snapshot, then lets the machine go on. One whose snapshot can't be
    /// removed is ended where it stands: the two must not both live.
    async fn take_back(&self, stop: Stop, paused: bool) -> Stop {
        let withdrawn =
            self.blocking(|context, account| saved::withdraw(&context.state_dir, account));
        if let Err(reason) = withdrawn.await {
            return self.end(format!("its snapshot can't be taken back: {reason}")).await;
        }
        if paused && let Err(reason) = self.machine.carry_on().await {
            return self.end(reason).await;
        }
        self.go_on(stop).await
    }

    /// Wakes the guest. One that does not wake is ended.
    async fn go_on(&self, stop: Stop) -> Stop {
        match self.machine.wake().await {
            Ok(()) => stop,
            Err(reason) => self.end(format!("it did not go on after a save: {reason}")).await,
        }
    }

    async fn end(&self, reason: String) -> Stop {
        self.machine.kill().await;
        Stop::Failed(reason)
    }

    async fn blocking<T: Send + 'static>(
        &self,
        call: impl FnOnce(&Context, Uuid) -> std::io::Result<T> + Send + 'static,
    ) -> Result<T, String> {
        let (context, account) = (self.context.clone(), self.account);
        match tokio::task::spawn_blocking(move || call(&context, account)).await {
            Ok(done) => done.map_err(|error| error.to_string()),
            Err(error) => Err(error.to_string()),
        }
    }
}

fn stage(name: &str, begun: Instant) -> (String, u64) {
    (name.to_owned(), begun.elapsed().as_nanos().try_into().unwrap_or(u64::MAX))
}
