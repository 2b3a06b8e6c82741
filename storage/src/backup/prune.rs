//! Letting go of old runs.

use std::collections::HashSet;
use std::fs;

use super::{Backup, BackupError, failed, named};
use crate::publish::{self, sync_dir};

#[derive(Debug, PartialEq, Eq)]
pub struct Pruned {
    pub removed: Vec<String>,
    pub kept: usize,
    pub freed: u64,
}

/// Keeps the last `keep` runs, and what they name.
pub fn prune(backup: &Backup, keep: usize) -> Result<Pruned, BackupError> {
    let mut removed = backup.runs()?;
    let kept = removed.split_off(removed.len().saturating_sub(keep));
    let mut needed = HashSet::new();
    // Read before anything is deleted: a run that can't be read must not lose what it names.
    for id in &kept {
        let run = backup.run(Some(id))?;
        needed.extend(run.content.database.chunks.iter().copied());
        for listed in &run.content.accounts {
            if needed.insert(listed.object) {
                needed.extend(named(&backup.object(&listed.object)?).copied());
            }
        }
    }
    let dir = backup.runs_dir();
    for id in &removed {
        fs::remove_file(dir.join(id)).map_err(failed(&dir, "deleting a run"))?;
    }
    publish::sweep(&dir).and_then(|_| sync_dir(&dir)).map_err(failed(&dir, "deleting runs"))?;
    let freed = backup.chunks.retain(|hash| needed.contains(hash))?
        + backup.objects.retain(|hash| needed.contains(hash))?;
    Ok(Pruned { removed, kept: kept.len(), freed })
}
