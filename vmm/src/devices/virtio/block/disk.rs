//! The disk's file, and whether it has anything that a sync would put on the medium.

use std::{
    fs::File,
    io,
    ops::Deref,
    sync::atomic::{AtomicBool, Ordering},
};

/// A file that is changed through this alone, as long as it is behind a device.
pub struct Disk {
    file: File,
    /// Something may have been changed since the last sync that succeeded, or was before this had the file.
    unsynced: AtomicBool,
}

impl Disk {
    pub fn new(file: File) -> Self {
        Self { file, unsynced: AtomicBool::new(true) }
    }

    /// Said after a change, whether it succeeded or not, and before the guest hears of it: a sync that ran
    /// beside the change may have missed it, the next one may not.
    pub fn changed(&self) {
        self.unsynced.store(true, Ordering::SeqCst);
    }

    /// fdatasync(2), if there can be anything to sync: guests flush a disk that is clean as well, and the host's
    /// medium would be told to empty its cache each time. True if it was called.
    pub fn sync(&self) -> io::Result<bool> {
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
    fn what_could_not_be_synced_is_never_taken_for_synced() {
        let disk = Disk::new(File::options().write(true).open("/dev/null").unwrap());
        for _ in 0..3 {
            disk.sync().unwrap_err();
        }
    }
}
