//! The disk's file, and whether it has anything that a sync would put on the medium.

use std::{
    fs::File,
    io,
    ops::Deref,
    sync::{
        Mutex, PoisonError,
        atomic::{AtomicBool, Ordering},
    },
    time::Duration,
};

/// How long the guest asks nothing of its disk before what it wrote is synced unasked ([`Disk::sync_at_rest`]).
pub const REST: Duration = Duration::from_secs(2);

/// A file that is changed through this alone, as long as it is behind a device.
pub struct Disk {
    file: File,
    /// Something may have been changed since the last sync that succeeded, or was before this had the file.
    unsynced: AtomicBool,
    /// Held while it is synced: who finds nothing to sync may trust in it. What is in it is the error of a sync that
    /// nobody had asked for.
    syncing: Mutex<Option<io::Error>>,
}

impl Disk {
    pub fn new(file: File) -> Self {
        Self { file, unsynced: AtomicBool::new(true), syncing: Mutex::new(None) }
    }

    /// Said after a change, whether it succeeded or not, and before the guest hears of it: a sync that ran
    /// beside the change may have missed it, the next one may not.
    pub fn changed(&self) {
        self.unsynced.store(true, Ordering::SeqCst);
    }

    pub fn is_unsynced(&self) -> bool {
        self.unsynced.load(Ordering::SeqCst)
    }

    /// fdatasync(2), if there can be anything to sync: guests flush a disk that is clean as well, and the host's
    /// medium would be told to empty its cache each time. True if it was called.
    pub fn sync(&self) -> io::Result<bool> {
        let mut failed = self.syncing.lock().unwrap_or_else(PoisonError::into_inner);
        match failed.take() {
            Some(error) => Err(error),
            None => self.sync_changes(),
        }
    }

    /// The same for a disk that is left alone: who leaves a machine that did nothing for a while shall not wait for
    /// the medium. An error is the next [`Self::sync`]'s: fdatasync tells of it once (fsync(2)), and this was not
    /// asked for.
    pub fn sync_at_rest(&self) {
        let mut failed = self.syncing.lock().unwrap_or_else(PoisonError::into_inner);
        if failed.is_none() {
            *failed = self.sync_changes().err();
        }
    }

    fn sync_changes(&self) -> io::Result<bool> {
        if !self.unsynced.swap(false, Ordering::SeqCst) {
            return Ok(false);
        }
        self.file.sync_data().inspect_err(|_| self.changed())?;
        Ok(true)
    }
}

impl Deref for Disk {
    type Target = File;

    fn deref(&self) -> &File {
        &self.file
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_synced_is_not_synced_again() {
        let disk = Disk::new(tempfile::tempfile().unwrap());
        assert!(disk.sync().unwrap(), "nothing is known of what was before");
        assert!(!disk.sync().unwrap());
        disk.changed();
        assert!(disk.sync().unwrap());
        assert!(!disk.sync().unwrap());
    }

    #[test]
    fn what_was_synced_at_rest_need_not_be_again() {
        let disk = Disk::new(tempfile::tempfile().unwrap());
        disk.sync_at_rest();
        assert!(!disk.is_unsynced() && !disk.sync().unwrap());
    }

    #[test]
    fn an_error_that_nobody_waited_for_is_told_to_who_asks_next() {
        let mut disk = Disk::new(File::options().write(true).open("/dev/null").unwrap());
        disk.sync_at_rest();
        // As if the medium were well again: the kernel has told its error, and would not tell it once more.
        disk.file = tempfile::tempfile().unwrap();
        disk.sync_at_rest();
        assert!(disk.is_unsynced(), "a second try is not one that was asked for");
        disk.sync().unwrap_err();
        assert!(disk.sync().unwrap());
    }

    #[test]
    fn what_could_not_be_synced_is_never_taken_for_synced() {
        let disk = Disk::new(File::options().write(true).open("/dev/null").unwrap());
        for _ in 0..3 {
            disk.sync().unwrap_err();
        }
    }
}
