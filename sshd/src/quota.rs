//! How much accounts may take on the host, and what becomes of one that takes more.
//!
//! The size of a disk bounds the files on it; a *quota* bounds what the host has to keep for an account: blocks of its
//! disk, its saved memory and its checkpoints together ([`Footprint`]). It can be below the disk's size, which then
//! is never reached, or above it, for checkpoints.
//!
//! Who is at the quota is not locked out: only in her machine can she delete something. Its guest is told to give no
//! new blocks, as when the host's disk is nearly full ([`crate::room`]), so that programs meet "no space left" and
//! reading, overwriting and deleting go on. A save is never refused for it, for memory would be lost: some of the
//! quota is kept free of files for that, and what a save takes beyond is made good by files that have to go.
//! Checkpoints that don't fit are refused before anything is done.

use std::time::Duration;

use hermitage_storage::{StateDir, accounts::Account, footprint::Footprint};
use tokio::sync::watch;
use uuid::Uuid;

use crate::{
    config::Config,
    limits::Limits,
    size,
    watch::{Event, Watch},
};

const MIB: u64 = 1 << 20;

/// From so many hundredths on, who logs in is told.
const WARNED: u64 = 90;

/// The most that is kept free of files for saved memory.
const MOST_RESERVED: u64 = 64 * MIB;

/// How often a running machine's account is looked at: as far away as its guest could fill what is left, writing a
/// GiB a second.
const LOOK: (Duration, Duration) = (Duration::from_millis(250), Duration::from_secs(10));
const RATE_PER_MS: u64 = MIB;

/// What an account takes, and may take.
#[derive(Clone, Copy, Debug)]
pub struct Quota {
    /// `None`: as much as its disk, memory and checkpoints can have.
    pub limit: Option<u64>,
    /// Size of its disk.
    pub disk: u64,
    pub used: Footprint,
}

impl Quota {
    /// Reads a few inodes.
    pub fn of(config: &Config, state: &StateDir, account: &Account) -> Self {
        Self {
            limit: Limits::of(config, account).quota,
            disk: account.disk_bytes,
            used: Footprint::of(state, account.id),
        }
    }

    pub fn is_over(&self) -> bool {
        self.limit.is_some_and(|limit| self.used.total() > limit)
    }

    /// Of the quota, in hundredths.
    pub fn percent(&self) -> Option<u64> {
        self.limit.map(|limit| percent(self.used.total(), limit))
    }

    /// `812 MiB of 1 GiB`.
    pub fn shown(&self) -> String {
        let used = size::show(self.used.total());
        match self.limit {
            Some(limit) => format!("{used} of {}", size::show(limit)),
            None => used,
        }
    }

    /// `disk 700 MiB, saved memory 12 MiB, checkpoints 100 MiB`.
    pub fn parts(&self) -> String {
        let Footprint { disk, memory, checkpoints } = self.used;
        let more = [("saved memory", memory), ("checkpoints", checkpoints)];
        let mut parts = format!("disk {}", size::show(disk));
        for (name, bytes) in more.into_iter().filter(|(_, bytes)| *bytes > 0) {
            parts.push_str(&format!(", {name} {}", size::show(bytes)));
        }
        parts
    }

    /// Whether so much more may be kept of the account; why not, in figures.
    pub fn fits(&self, more: u64) -> Result<(), OverQuota> {
        match self.limit {
            Some(limit) if self.used.total().saturating_add(more) > limit => {
                Err(OverQuota { more, shown: self.shown(), parts: self.parts() })
            }
            _ => Ok(()),
        }
    }

    /// For who logs in, when it gets tight.
    pub fn warning(&self) -> Option<String> {
        let Some(limit) = self.limit else {
            return (percent(self.used.disk, self.disk) >= WARNED).then(|| {
                let (used, disk) = (size::show(self.used.disk), size::show(self.disk));
                format!("your files take {used} of your disk's {disk}")
            });
        };
        if percent(self.used.total(), limit) < WARNED {
            return None;
        }
        let (state, effect) = match is_full(self.used.total(), limit, false) {
            true => ("used up", "programs get no new space until there is less"),
            false => ("nearly used up", "beyond it programs get no new space"),
        };
        let (shown, parts) = (self.shown(), self.parts());
        let mut words = format!("your quota is {state}: {shown} ({parts}); {effect}. Delete files");
        if self.used.checkpoints > 0 {
            words.push_str(", or have your operator drop a checkpoint");
        }
        Some(words)
    }
}

/// What would be too much, for whoever asked for it.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error(
    "it would take {} more, and {shown} of the quota are used ({parts})",
    size::show(*more)
)]
pub struct OverQuota {
    more: u64,
    shown: String,
    parts: String,
}

fn percent(used: u64, of: u64) -> u64 {
    u64::try_from(u128::from(used) * 100 / u128::from(of.max(1))).unwrap_or(u64::MAX)
}

/// Whether files get no more space. Once so, until there is some: not at every file that comes and goes.
fn is_full(used: u64, limit: u64, was: bool) -> bool {
    used >= for_files(limit) - if was { limit / 64 } else { 0 }
}

/// What of a quota files may fill, checkpoints included.
fn for_files(limit: u64) -> u64 {
    limit - (limit / 16).min(MOST_RESERVED)
}

/// How long nothing can happen.
fn pause(used: u64, limit: u64) -> Duration {
    let left = for_files(limit).saturating_sub(used);
    Duration::from_millis(left / RATE_PER_MS).clamp(LOOK.0, LOOK.1)
}

/// Looks after an account whose machine runs, for as long as somebody wants to know: whether its guest is to give
/// no new blocks, because the host's disk or its own quota is full.
pub fn keep_watch(
    state: StateDir,
    account: Uuid,
    mut host: watch::Receiver<bool>,
    mut limit: watch::Receiver<Option<u64>>,
    tell: Watch,
) -> watch::Receiver<bool> {
    let (scarce, watched) = watch::channel(*host.borrow());
    tokio::spawn(async move {
        let mut full = false;
        loop {
            let on_host = *host.borrow_and_update();
            let bound = *limit.borrow_and_update();
            let mut next = None;
            let before = full;
            let mut used = 0;
            // One without a quota is looked at when it has lost it, for what is told then.
            if bound.is_some() || full {
                let state = state.clone();
                let look = move || Footprint::of(&state, account).total();
                used = tokio::task::spawn_blocking(look).await.unwrap_or(0);
            }
            if let Some(limit) = bound {
                next = Some(pause(used, limit));
            }
            full = bound.is_some_and(|limit| is_full(used, limit, full));
            match (before, full, bound) {
                (false, true, Some(quota)) => {
                    tracing::info!(%account, used, quota, "at its quota: its guest gets no new space");
                    tell.tell(Event::QuotaReached { id: account, used, quota });
                }
                (true, false, quota) => {
                    tracing::info!(%account, used, quota, "below its quota again");
                    tell.tell(Event::QuotaFree { id: account, used, quota });
                }
                _ => {}
            }
            scarce
                .send_if_modified(|is| std::mem::replace(is, on_host || full) != (on_host || full));
            tokio::select! {
                () = scarce.closed() => return,
                () = changed(&mut host) => {}
                () = changed(&mut limit) => {}
                () = elapsed(next) => {}
            }
        }
    });
    watched
}

/// Never, once nobody is there any more to change it.
async fn changed<T>(value: &mut watch::Receiver<T>) {
    if value.changed().await.is_err() {
        std::future::pending().await
    }
}

async fn elapsed(pause: Option<Duration>) {
    match pause {
        Some(pause) => tokio::time::sleep(pause).await,
        None => std::future::pending().await,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const GIB: u64 = 1 << 30;

    fn quota(limit: Option<u64>, disk: u64, memory: u64, checkpoints: u64) -> Quota {
        Quota { limit, disk: 10 * GIB, used: Footprint { disk, memory, checkpoints } }
    }

    #[test]
    fn who_is_at_ninety_of_a_hundred_is_told_what_it_is_made_of() {
        assert_eq!(quota(Some(GIB), 900 * MIB, 0, 0).warning(), None);
        let near = quota(Some(GIB), 900 * MIB, 30 * MIB, 0).warning().unwrap();
        assert!(near.starts_with("your quota is nearly used up: 930 MiB of 1 GiB"), "{near}");
        assert!(near.contains("(disk 900 MiB, saved memory 30 MiB)"), "{near}");
        let full = quota(Some(GIB), 900 * MIB, 0, 200 * MIB).warning().unwrap();
        assert!(
            full.contains("used up: 1.1 GiB of 1 GiB") && full.contains("drop a checkpoint"),
            "{full}"
        );
        // Without one the disk is what there is.
        assert_eq!(quota(None, 8 * GIB, 8 * GIB, 8 * GIB).warning(), None);
        let disk = quota(None, 9 * GIB, 0, 0).warning().unwrap();
        assert_eq!(disk, "your files take 9 GiB of your disk's 10 GiB");
    }

    #[test]
    fn what_does_not_fit_is_refused_with_figures() {
        let some = quota(Some(GIB), 500 * MIB, 0, 0);
        assert_eq!(some.fits(524 * MIB), Ok(()));
        let words = some.fits(525 * MIB).unwrap_err().to_string();
        assert_eq!(
            words,
            "it would take 525 MiB more, and 500 MiB of 1 GiB of the quota are used (disk 500 MiB)"
        );
        assert_eq!(quota(None, 500 * GIB, 0, 0).fits(u64::MAX), Ok(()));
        assert!(!some.is_over() && quota(Some(GIB), GIB, 1, 0).is_over());
        assert_eq!((some.percent(), quota(Some(0), 1, 0, 0).percent()), (Some(48), Some(100)));
    }

    #[test]
    fn files_leave_room_for_a_save_and_full_ends_well_below() {
        let limit = GIB;
        assert!(!is_full(GIB - 65 * MIB, limit, false));
        assert!(is_full(GIB - 64 * MIB, limit, false));
        assert!(is_full(GIB - 79 * MIB, limit, true));
        assert!(!is_full(GIB - 81 * MIB, limit, true));
        for tiny in [0, 1, 15, 16, u64::MAX] {
            assert!(is_full(tiny, tiny, true), "{tiny}");
        }
        assert_eq!(pause(0, 100 * GIB), LOOK.1);
        assert_eq!(pause(GIB, GIB), LOOK.0);
        assert_eq!(pause(0, GIB + 64 * MIB), Duration::from_millis(1024));
    }

    #[tokio::test]
    async fn a_guest_is_told_of_either_reason_until_both_are_gone() {
        let dir = tempfile::tempdir().unwrap();
        let state = StateDir::new(dir.path());
        let account = Uuid::from_u128(7);
        std::fs::create_dir_all(state.account_dir(account)).unwrap();
        let write = |kib: usize| std::fs::write(state.disk(account), vec![1; kib << 10]).unwrap();
        write(900);
        let (host, hosts) = watch::channel(false);
        let (limit, limits) = watch::channel(None);
        let mut scarce = keep_watch(state.clone(), account, hosts, limits, Watch::new(None));
        let mut wait = async |is: bool| {
            let waited = scarce.wait_for(|now| *now == is);
            drop(tokio::time::timeout(Duration::from_secs(10), waited).await.unwrap().unwrap());
        };
        limit.send_replace(Some(MIB));
        wait(false).await;
        write(1000);
        wait(true).await;
        host.send_replace(true);
        write(10);
        tokio::time::sleep(LOOK.0 * 2).await;
        wait(true).await;
        host.send_replace(false);
        wait(false).await;
        write(1000);
        wait(true).await;
        limit.send_replace(None);
        wait(false).await;
    }
}
