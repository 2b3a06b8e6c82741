//! Copying the disk of a machine that runs, and its memory if that is wanted: docs/lifecycle.md "Copying". The guest
//! stands still, with all that its programs have written on the disk, only until the machine's process has written
//! the memory and noted the instant; it copies the disk while the guest goes on.

use std::{
    fs::File,
    path::Path,
    sync::Arc,
    time::{Duration, Instant},
};

use hermitage_storage::{
    disk::{self, Tag},
    publish::{self, NewFile},
};
use tokio::{
    sync::mpsc,
    time::{sleep, timeout},
};
use tokio_util::sync::CancellationToken;
use uuid::Uuid;

use super::{
    driver::Context,
    no_copy::{NoCopy, Part},
    save::STAND_TIMEOUT,
};
use crate::{
    machine::{DiskCopy, Machine},
    room, time,
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
    /// The copies, or why there are none.
    Over(Result<Copies, NoCopy>),
}

/// The state of one moment, in files that are deleted when this is dropped.
#[derive(Debug)]
pub struct Copies {
    pub disk: NewFile,
    /// A snapshot (docs/formats/diff.md) for exactly this disk, which does not have its tag yet.
    pub memory: Option<NewFile>,
}

/// Who wants copies, and of what.
pub struct Asker {
    /// The memory as well.
    pub memory: bool,
    /// Closed when nobody wants them any more.
    pub news: mpsc::Sender<CopyNews>,
}

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
        Ok(_) => {
            tracing::info!(%account, ms = time::ms(begun.elapsed()), "disk copied while in use")
        }
        Err(reason) => tracing::warn!(%account, %reason, "no copy of the machine"),
    }
    if let Err(unsent) = copy.asker.news.send(CopyNews::Over(outcome)).await
        && let CopyNews::Over(Ok(copies)) = unsent.0
    {
        discard(copies);
    }
}

/// Deletes copies. That of a large disk takes the file system seconds, which is nothing for a thread that others
/// wait for.
pub fn discard(copies: Copies) {
    tokio::task::spawn_blocking(move || drop(copies));
}

struct Copy {
    context: Arc<Context>,
    account: Uuid,
    machine: Arc<Machine>,
    called_off: CancellationToken,
    asker: Asker,
}

impl Copy {
    async fn run(&self) -> Result<Copies, NoCopy> {
        // One at a time on this host: each takes as much room as there is, and reads as fast as it can.
        let _turn = match self.context.copies.try_acquire() {
            Ok(turn) => turn,
            Err(_) => {
                let _ = self.asker.news.try_send(CopyNews::Waiting { for_another: true });
                tokio::select! {
                    turn = self.context.copies.acquire() => {
                        turn.map_err(|error| NoCopy::Host(error.to_string()))?
                    }
                    reason = self.unwanted() => return Err(reason),
                }
            }
        };
        let _ = self.asker.news.try_send(CopyNews::Waiting { for_another: false });
        let (copies, room) = self.files().await?;
        match self.copy_into(&copies, room).await {
            Ok(()) => Ok(copies),
            Err(reason) => {
                discard(copies);
                Err(self.explained(reason, room).await)
            }
        }
    }

    /// What came of a machine's end was that, and what came of too little room may have been that.
    async fn explained(&self, reason: NoCopy, room: u64) -> NoCopy {
        let NoCopy::Part { what, reason, .. } = reason else { return reason };
        if let Ok(reason) = timeout(Duration::ZERO, self.machine.ended()).await {
            return NoCopy::Ended(reason);
        }
        let (disk, dir) =
            (self.context.state_dir.disk(self.account), self.context.state_dir.clone());
        let floor = self.floor();
        let looked = tokio::task::spawn_blocking(move || {
            let left = room::free(dir.root()).map_or(room, |free| free.saturating_sub(floor));
            disk::allocated(&disk).is_ok_and(|takes| takes > room.min(left))
        });
        NoCopy::Part { what, reason, tight: looked.await.unwrap_or(false) }
    }

    async fn copy_into(&self, copies: &Copies, room: u64) -> Result<(), NoCopy> {
        let mut copying = self.begin(copies, room).await?;
        let of = copying.bytes;
        let mut copied = 0;
        loop {
            // Where it goes too fast for who asked, the next figure is as good.
            let _ = self.asker.news.try_send(CopyNews::Copying { copied, of });
            let reason = tokio::select! {
                progress = timeout(STALLED, copying.progress()) => match progress {
                    Ok(Ok(bytes)) => {
                        copied = bytes;
                        continue;
                    }
                    Ok(Err(Ok(_))) => return Ok(()),
                    Ok(Err(Err(reason))) => return Err(part(Part::Disk)(reason)),
                    Err(_) => NoCopy::Stalled(STALLED.as_secs()),
                },
                reason = self.unwanted() => reason,
            };
            copying.give_up().await;
            return Err(reason);
        }
    }

    /// From its return on the guest goes on, and what it writes is not in the copy.
    async fn begin(&self, copies: &Copies, room: u64) -> Result<DiskCopy<'_>, NoCopy> {
        let standing = tokio::select! {
            standing = self.machine.stand() => standing,
            reason = self.unwanted() => return Err(reason),
            () = sleep(STAND_TIMEOUT) => {
                return Err(NoCopy::Standing);
            }
        };
        let begun = Instant::now();
        if let Err(reason) = self.machine.freeze().await {
            // Whether it stands still or not: it is told to go on, and heeds that when it can.
            self.machine.keep_waking(standing);
            return Err(NoCopy::Guest(reason));
        }
        let copying = match &copies.memory {
            Some(memory) => self.with_memory(memory.file(), copies.disk.file(), room).await,
            None => {
                let copying = self.machine.copy_disk(copies.disk.file(), room).await;
                copying.map_err(part(Part::Disk))
            }
        };
        let woken = self.machine.wake().await;
        tracing::info!(account = %self.account, ms = time::ms(begun.elapsed()), "stood still to be copied");
        match (copying, woken) {
            (copying, Ok(())) => copying,
            (copying, Err(reason)) => {
                self.machine.keep_waking(standing);
                if let Ok(copying) = copying {
                    copying.give_up().await;
                }
                Err(NoCopy::Guest(reason))
            }
        }
    }

    /// The machine stands still in its process, too, until its memory is written and the instant noted.
    async fn with_memory(
        &self,
        memory: &File,
        disk: &File,
        room: u64,
    ) -> Result<DiskCopy<'_>, NoCopy> {
        // The live disk never gets this tag: its own machine's memory is another matter.
        let mut tag: Tag = [0; 16];
        let unfilled = |error| NoCopy::Host(format!("no random numbers: {error}"));
        getrandom::fill(&mut tag).map_err(unfilled)?;
        let copying = match self.machine.save(memory, *self.account.as_bytes(), tag).await {
            Ok(bytes) => {
                let copying = self.machine.copy_disk(disk, room.saturating_sub(bytes)).await;
                copying.map_err(part(Part::Disk))
            }
            Err(reason) => Err(part(Part::Memory)(reason)),
        };
        // Those of a machine that is put to rest are told elsewhere.
        self.machine.take_stages();
        // Whether it was saved, in time or at all: a machine that runs ignores this.
        match (copying, self.machine.carry_on().await) {
            (copying, Ok(())) => copying,
            (_, Err(reason)) => Err(part(Part::Memory)(reason)),
        }
    }

    /// Why the copy is to be given up, when it is.
    async fn unwanted(&self) -> NoCopy {
        let mut scarce = self.context.scarce.clone();
        let scarce = async {
            // A service that is about to end looks no more.
            if scarce.wait_for(|scarce| *scarce).await.is_err() {
                std::future::pending::<()>().await;
            }
        };
        tokio::select! {
            () = self.called_off.cancelled() => NoCopy::PutToRest,
            () = self.asker.news.closed() => NoCopy::Unwanted,
            () = scarce => NoCopy::Scarce,
        }
    }

    /// Where they go, and how much there is room for.
    async fn files(&self) -> Result<(Copies, u64), NoCopy> {
        let dir = self.context.state_dir.account_dir(self.account);
        let floor = self.floor();
        let memory = self.asker.memory;
        let made = tokio::task::spawn_blocking(move || new_files(&dir, memory, floor)).await;
        made.map_err(|error| NoCopy::Host(error.to_string()))?
            .map_err(|error| NoCopy::Host(format!("no file for a copy of the disk: {error}")))
    }

    /// Bytes that copies leave free on the host.
    fn floor(&self) -> u64 {
        self.context.config.machines.min_free_mib << 20
    }
}

fn part(what: Part) -> impl FnOnce(String) -> NoCopy {
    move |reason| NoCopy::Part { what, reason, tight: false }
}

/// Beside the disk, so that the two can share blocks; under names that are swept if nobody holds them.
fn new_files(dir: &Path, memory: bool, floor: u64) -> std::io::Result<(Copies, u64)> {
    publish::sweep(dir)?;
    let new = |name: &str| NewFile::create(&dir.join(name), 0o600);
    let memory = memory.then(|| new("export-memory")).transpose()?;
    let copies = Copies { disk: new("export")?, memory };
    Ok((copies, room::free(dir)?.saturating_sub(floor)))
}
