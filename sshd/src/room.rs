//! Room on the file system that accounts' disks are on.
//!
//! Disks are sparse: together they promise more than there is. When it gets scarce each guest is told to
//! give no new blocks to its programs, so that they meet "no space left" as on any full disk, and not
//! writes that don't end. What a guest had promised to write already fits into the rest, or waits in the
//! machine's process until there is room (docs/devices.md).

use std::{path::PathBuf, time::Duration};

use tokio::sync::watch;

const MIB: u64 = 1 << 20;

/// How often the room is looked at; more often when it might be gone before the next look.
const INTERVAL: Duration = Duration::from_secs(1);
const CLOSE_INTERVAL: Duration = Duration::from_millis(250);

/// Below `low` bytes it is scarce, until there are `high`: not at every file that comes and goes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Floor {
    low: u64,
    high: u64,
}

impl Floor {
    /// 0: never scarce.
    pub fn new(low: u64) -> Self {
        Self { low, high: low.saturating_add((low / 4).max(MIB)) }
    }

    fn is_scarce(self, was: bool, free: u64) -> bool {
        free < if was && self.low > 0 { self.high } else { self.low }
    }

    fn interval(self, free: u64) -> Duration {
        if free < self.low.saturating_mul(4) { CLOSE_INTERVAL } else { INTERVAL }
    }
}

/// Bytes free for anybody.
pub fn free(path: &std::path::Path) -> nix::Result<u64> {
    let stat = nix::sys::statvfs::statvfs(path)?;
    Ok(stat.blocks_available().saturating_mul(stat.fragment_size()))
}

/// Looks for ever and says over `scarce` what it sees.
pub async fn keep_watch(path: PathBuf, floor: Floor, scarce: watch::Sender<bool>) {
    let mut failing = false;
    loop {
        let looked = path.clone();
        // A file system that hangs must not hang the service.
        let seen = tokio::task::spawn_blocking(move || free(&looked)).await;
        let pause = match seen {
            Ok(Ok(free)) => {
                failing = false;
                let was = *scarce.borrow();
                let is = floor.is_scarce(was, free);
                if is != was {
                    tell_operator(&path, is, free, floor);
                    scarce.send_replace(is);
                }
                floor.interval(free)
            }
            failure => {
                if !std::mem::replace(&mut failing, true) {
                    tracing::error!(path = %path.display(), ?failure, "can't tell how much room there is");
                }
                INTERVAL
            }
        };
        tokio::time::sleep(pause).await;
    }
}

fn tell_operator(path: &std::path::Path, scarce: bool, free: u64, floor: Floor) {
    let (path, free_mib) = (path.display(), free / MIB);
    if scarce {
        let floor_mib = floor.low / MIB;
        tracing::error!(%path, free_mib, floor_mib,
            "the disk is nearly full: guests get no more space until there is room there");
    } else {
        tracing::warn!(%path, free_mib, "there is room again: guests may write");
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn scarce_begins_below_the_floor_and_ends_well_above() {
        let floor = Floor::new(256 * MIB);
        let mut scarce = false;
        let seen = [300, 256, 255, 256, 300, 319, 320, 300, 256, 200].map(|free| {
            scarce = floor.is_scarce(scarce, free * MIB);
            scarce
        });
        assert_eq!(seen, [false, false, true, true, true, true, false, false, false, true]);
    }

    #[test]
    fn a_floor_of_nothing_is_none() {
        let floor = Floor::new(0);
        assert!(!floor.is_scarce(false, 0));
        assert!(!floor.is_scarce(true, 0));
        assert_eq!(floor.interval(0), INTERVAL);
        assert!(Floor::new(u64::MAX).is_scarce(false, 1));
    }

    #[tokio::test]
    async fn what_changes_is_said() {
        let (sender, mut scarce) = watch::channel(false);
        let dir = tempfile::tempdir().unwrap();
        let watching = keep_watch(dir.path().into(), Floor::new(u64::MAX), sender);
        let watching = tokio::spawn(watching);
        tokio::time::timeout(Duration::from_secs(10), scarce.changed()).await.unwrap().unwrap();
        assert!(*scarce.borrow());
        watching.abort();
    }
}
