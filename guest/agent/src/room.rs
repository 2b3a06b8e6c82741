//! When the host's disk is nearly full, programs here are to meet "no space left" as on any full disk.
//!
//! What they would meet otherwise is worse: ext4 promises space it believes to have and writes later;
//! the host, without room, lets those writes wait, and whoever waits for them. So ext4 is told to keep
//! all of its free clusters for itself (`reserved_clusters`, the kernel's documentation of ext4 in
//! sysfs): no new block is promised, not to root either, while overwriting, deleting and what was
//! promised before go on.

use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result};
use nix::sys::statvfs::statvfs;

use crate::log;

const RESERVED: &str = "/sys/fs/ext4/vda/reserved_clusters";

pub struct DiskRoom {
    file: PathBuf,
    /// What the file said before it was made scarce.
    former: Option<u64>,
}

impl DiskRoom {
    pub fn new() -> Self {
        Self { file: RESERVED.into(), former: None }
    }

    /// Follows what the host says; the disk is mounted. A failure costs programs a clear error, nothing
    /// else, so it is only logged.
    pub fn set(&mut self, scarce: bool) {
        let result = match (scarce, self.former) {
            (true, None) => self.reserve_all(),
            (false, Some(former)) => self.give_back(former),
            _ => return,
        };
        match result {
            Ok(()) if scarce => {
                log::warn(format_args!(
                    "no space for new files: the host's disk is nearly full, or your quota is used up"
                ));
            }
            Ok(()) => log::warn(format_args!("the host's disk has room again")),
            Err(error) => log::error(format_args!("following the host's room: {error:#}")),
        }
    }

    fn reserve_all(&mut self) -> Result<()> {
        let former = self.read()?;
        // The overlay answers for its upper layer, the disk: blocks without ext4's own tables, so fewer
        // than the file takes and never fewer than are free.
        let blocks = statvfs("/").context("the size of the file system")?.blocks();
        self.write(blocks.saturating_sub(1))?;
        self.former = Some(former);
        Ok(())
    }

    fn give_back(&mut self, former: u64) -> Result<()> {
        self.write(former)?;
        self.former = None;
        Ok(())
    }

    fn read(&self) -> Result<u64> {
        let path = self.file.display();
        let text = fs::read_to_string(&self.file).with_context(|| format!("reading {path}"))?;
        text.trim().parse().with_context(|| format!("{path} says {text:?}"))
    }

    fn write(&self, clusters: u64) -> Result<()> {
        let file: &Path = &self.file;
        fs::write(file, format!("{clusters}\n"))
            .with_context(|| format!("writing {clusters} to {}", file.display()))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn all_is_reserved_while_scarce_and_the_former_value_comes_back() {
        let name = format!("hermitage-agent-room-{}", std::process::id());
        let file = std::env::temp_dir().join(name);
        fs::write(&file, "4096\n").unwrap();
        let mut room = DiskRoom { file: file.clone(), former: None };
        let says = || fs::read_to_string(&file).unwrap().trim().parse::<u64>().unwrap();
        room.set(false);
        assert_eq!(says(), 4096);
        room.set(true);
        let stat = statvfs("/").unwrap();
        assert!(says() >= stat.blocks_free() && says() < stat.blocks(), "{}", says());
        room.set(true);
        room.set(false);
        assert_eq!(says(), 4096, "the value from before, not that of the second time");
        fs::remove_file(&file).unwrap();
        room.set(true);
        assert_eq!(room.former, None);
    }
}
