//! Copying the disk of a machine that runs: docs/lifecycle.md "Copying". The guest stands still, with all that its
//! programs have written on the disk, only until the machine's process has noted the instant; it makes the copy
//! while the guest goes on. Nothing that happens here ends the machine.

use std::{
    fs::File,
    path::Path,
    sync::Arc,
    time::{Duration, Instant},
};

use hermitage_storage::publish::{self, NewFile};
use tokio::{
    sync::mpsc,
    time::{sleep, timeout},
};
use tokio_util::sync::CancellationToken;
use uuid::Uuid;

use super::{driver::Context, save::STAND_TIMEOUT};
use crate::{
    machine::{DiskCopy, Machine},
    room,
};

/// How a copy stands.
#[derive(Debug)]
pub enum CopyNews {
    /// It has not begun: another one comes first, or the machine is not ready yet.
    Waiting { for_another: bool },
    /// Bytes, of how many.
    Copying { copied: u64, of: u64 },
    /// The account has no machine that would be in the way.
    NotRunning,
    /// The copy, which is deleted when this is dropped; or why there is none.
    Over(Result<NewFile, String>),
}

/// Gone when nobody wants the copy any more.
pub type Asker = mpsc::Sender<CopyNews>;

/// Words that may wait for whoever asked.
pub const NEWS: usize = 4;

/// How long a copy may get nowhere: others wait for their turn.
const STALLED: Duration = Duration::from_secs(600);

pub(super) async fn copy(
    context: Arc<Context>,
    account: Uuid,
    machine: Arc<Machine>,
    called_off: CancellationToken,
    asker: Asker,
) {
    let copy = Copy { context, account, machine, called_off, asker };
    let begun = Instant::now();
    let outcome = copy.run().await;
    match &outcome {
        Ok(_) => tracing::info!(%account, ms = millis(begun), "disk copied while in use"),
        Err(reason) => tracing::warn!(%account, reason, "no copy of the disk"),
    }
    if let Err(unsent) = copy.asker.send(CopyNews::Over(outcome)).await
        && let CopyNews::Over(Ok(file)) = unsent.0
    {
        discard(file);
    }
}

/// Deletes a copy. That of a large disk takes the file system seconds, which is nothing for a thread that others
/// wait for.
pub fn discard(copy: NewFile) {
    tokio::task::spawn_blocking(move || drop(copy));
}

struct Copy {
    context: Arc<Context>,
    account: Uuid,
    machine: Arc<Machine>,
    called_off: CancellationToken,
    asker: Asker,
}

impl Copy {
    async fn run(&self) -> Result<NewFile, String> {
        // One at a time on this host: each takes as much room as there is, and reads as fast as it can.
        let _turn = match self.context.copies.try_acquire() {
            Ok(turn) => turn,
            Err(_) => {
                let _ = self.asker.try_send(CopyNews::Waiting { for_another: true });
                tokio::select! {
                    turn = self.context.copies.acquire() => {
                        turn.map_err(|error| error.to_string())?
                    }
                    reason = self.unwanted() => return Err(reason),
                }
            }
        };
        let _ = self.asker.try_send(CopyNews::Waiting { for_another: false });
        let (file, room) = self.file().await?;
        match self.copy_into(file.file(), room).await {
            Ok(()) => Ok(file),
            Err(reason) => {
                discard(file);
                Err(reason)
            }
        }
    }

    async fn copy_into(&self, file: &File, room: u64) -> Result<(), String> {
        let mut copying = self.begin(file, room).await?;
        let of = copying.bytes;
        let mut copied = 0;
        loop {
            // Where it goes too fast for who asked, the next figure is as good.
            let _ = self.asker.try_send(CopyNews::Copying { copied, of });
            let reason = tokio::select! {
                progress = timeout(STALLED, copying.progress()) => match progress {
                    Ok(Ok(bytes)) => {
                        copied = bytes;
                        continue;
                    }
                    Ok(Err(Ok(_))) => return Ok(()),
                    Ok(Err(Err(reason))) => return Err(reason),
                    Err(_) => format!(
                        "nothing was copied for {} s; look at the host's disk, or give --stop",
                        STALLED.as_secs()
                    ),
                },
                reason = self.unwanted() => reason,
            };
            copying.give_up().await;
            return Err(reason);
        }
    }

    /// From its return on the guest goes on, and what it writes is not in the copy.
    async fn begin(&self, file: &File, room: u64) -> Result<DiskCopy<'_>, String> {
        let standing = tokio::select! {
            standing = self.machine.stand() => standing,
            reason = self.unwanted() => return Err(reason),
            () = sleep(STAND_TIMEOUT) => {
                return Err("its agent has not gone on since the last time it was to stand still; stop the machine, or give --stop".into());
            }
        };
        let begun = Instant::now();
        if let Err(reason) = self.machine.freeze().await {
            // Whether it stands still or not: it is told to go on, and heeds that when it can.
            self.machine.keep_waking(standing);
            return Err(reason);
        }
        let copying = self.machine.copy_disk(file, room).await;
        let woken = self.machine.wake().await;
        tracing::info!(account = %self.account, ms = millis(begun), "stood still for a copy of the disk");
        match (copying, woken) {
            (copying, Ok(())) => copying,
            (copying, Err(reason)) => {
                self.machine.keep_waking(standing);
                if let Ok(copying) = copying {
                    copying.give_up().await;
                }
                Err(reason)
            }
        }
    }

    /// Why the copy is to be given up, when it is.
    async fn unwanted(&self) -> String {
        let mut scarce = self.context.scarce.clone();
        let scarce = async {
            // A service that is about to end looks no more.
            if scarce.wait_for(|scarce| *scarce).await.is_err() {
                std::future::pending::<()>().await;
            }
        };
        tokio::select! {
            () = self.called_off.cancelled() => {
                "the machine was put to rest or stopped meanwhile; try again".into()
            }
            () = self.asker.closed() => "nobody wants it any more".into(),
            () = scarce => "the host's disk is nearly full".into(),
        }
    }

    /// Where it goes, and how much there is room for.
    async fn file(&self) -> Result<(NewFile, u64), String> {
        let dir = self.context.state_dir.account_dir(self.account);
        let floor = self.context.config.machines.min_free_mib << 20;
        let made = tokio::task::spawn_blocking(move || new_file(&dir, floor)).await;
        made.map_err(|error| error.to_string())?
            .map_err(|error| format!("no file for a copy of the disk: {error}"))
    }
}

/// Beside the disk, so that the two can share blocks; under a name that is swept if nobody holds it.
fn new_file(dir: &Path, floor: u64) -> std::io::Result<(NewFile, u64)> {
    publish::sweep(dir)?;
    let file = NewFile::create(&dir.join("export"), 0o600)?;
    Ok((file, room::free(dir)?.saturating_sub(floor)))
}

fn millis(since: Instant) -> u64 {
    since.elapsed().as_millis().try_into().unwrap_or(u64::MAX)
}
