//! What an account takes on the host: blocks of its disk, its saved memory and its checkpoints, which a quota is
//! compared with.
//!
//! Counted is what is allocated (`st_blocks`, stat(2)): a disk of 10 GiB with 1 GiB written takes 1 GiB. Blocks that
//! a checkpoint shares with the disk, where the file system can do that, count for both: the account may come to
//! need them apart by writing, and what it wrote then would be over the quota at once. A memory with two names
//! (checkpoints link it) counts once.

use std::collections::HashSet;
use std::fs::{self, Metadata};
use std::os::unix::fs::MetadataExt as _;
use std::path::Path;

use uuid::Uuid;

use crate::StateDir;

/// In bytes.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Footprint {
    pub disk: u64,
    /// Of a machine that is saved.
    pub memory: u64,
    pub checkpoints: u64,
}

impl Footprint {
    /// Reads a few inodes. What is not there, or can't be looked at, takes nothing.
    pub fn of(state: &StateDir, account: Uuid) -> Self {
        Self::in_dir(&state.account_dir(account))
    }

    /// The same of such a folder, wherever it lies.
    pub fn in_dir(dir: &Path) -> Self {
        let mut seen = HashSet::new();
        let mut take = |metadata: Option<Metadata>| -> u64 {
            let counts = metadata.filter(|file| seen.insert((file.dev(), file.ino())));
            counts.map_or(0, |file| file.blocks().saturating_mul(512))
        };
        let file = |name: &str| fs::symlink_metadata(dir.join(name)).ok();
        let disk = take(file(StateDir::DISK));
        let memory = take(file(StateDir::SNAPSHOT));
        let mut checkpoints = 0u64;
        for folder in fs::read_dir(dir.join(StateDir::CHECKPOINTS)).into_iter().flatten().flatten()
        {
            for file in fs::read_dir(folder.path()).into_iter().flatten().flatten() {
                checkpoints = checkpoints.saturating_add(take(file.metadata().ok()));
            }
        }
        Self { disk, memory, checkpoints }
    }

    pub fn total(&self) -> u64 {
        self.disk.saturating_add(self.memory).saturating_add(self.checkpoints)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_written_counts_and_each_file_once() {
        let dir = tempfile::tempdir().unwrap();
        let state = StateDir::new(dir.path());
        let account = Uuid::from_u128(1);
        assert_eq!(Footprint::of(&state, account), Footprint::default());
        let home = state.account_dir(account);
        let checkpoint = state.checkpoints_dir(account).join("one");
        fs::create_dir_all(&checkpoint).unwrap();
        let write = |path: &Path, kib: usize| fs::write(path, vec![1; kib << 10]).unwrap();
        write(&home.join(StateDir::DISK), 64);
        let disk = fs::File::options().write(true).open(home.join(StateDir::DISK)).unwrap();
        disk.set_len(1 << 30).unwrap();
        write(&home.join(StateDir::SNAPSHOT), 32);
        write(&checkpoint.join(StateDir::DISK), 16);
        fs::hard_link(home.join(StateDir::SNAPSHOT), checkpoint.join(StateDir::SNAPSHOT)).unwrap();
        let found = Footprint::of(&state, account);
        assert_eq!(found, Footprint { disk: 64 << 10, memory: 32 << 10, checkpoints: 16 << 10 });
        assert_eq!(found.total(), 112 << 10);
        // Of a checkpoint alone once the machine was resumed.
        fs::remove_file(home.join(StateDir::SNAPSHOT)).unwrap();
        assert_eq!(Footprint::of(&state, account).checkpoints, 48 << 10);
    }
}
