//! Appending to a file past the host's page cache (`O_DIRECT` of open(2)), where its file system can.
//!
//! A snapshot is read once, on another day: in the page cache it would push out what machines use, each of its
//! pages would be copied there and written from there, and the sync at the end would have to wait for all of them.

use super::PAGE;
use rustix::fs::{OFlags, fcntl_getfl, fcntl_setfl};
use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;

/// Written at once.
const BUFFER: usize = 256 * PAGE;

/// The end of a file that is written in whole pages but for the last. Nothing else writes to the file.
pub struct Appender<'f> {
    file: &'f File,
    /// The file's flags as they were, if it is written past the page cache.
    former: Option<OFlags>,
    /// [`BUFFER`] bytes from `start` on, where memory is aligned to a page.
    buffer: Vec<u8>,
    start: usize,
    filled: usize,
    /// Where the buffer goes.
    at: u64,
}

impl<'f> Appender<'f> {
    /// Appends from `at` on, which is a multiple of [`PAGE`].
    pub fn new(file: &'f File, at: u64) -> Self {
        // A file system that can't says so here, most of them; others at the first write.
        let former = fcntl_getfl(file)
            .and_then(|flags| fcntl_setfl(file, flags | OFlags::DIRECT).map(|()| flags))
            .ok();
        let buffer = vec![0; BUFFER + PAGE];
        let start = (buffer.as_ptr() as usize).wrapping_neg() % PAGE;
        Self { file, former, buffer, start, filled: 0, at }
    }

    /// Whether what is written goes past the page cache.
    pub fn is_direct(&self) -> bool {
        self.former.is_some()
    }

    /// Bytes from the file's beginning that are written.
    pub fn written(&self) -> u64 {
        self.at
    }

    /// Takes bytes as far as there is room; returns the rest. [`Self::flush`] makes room.
    pub fn take<'b>(&mut self, bytes: &'b [u8]) -> &'b [u8] {
        let (now, rest) = bytes.split_at(bytes.len().min(BUFFER - self.filled));
        let from = self.start + self.filled;
        self.buffer[from..from + now.len()].copy_from_slice(now);
        self.filled += now.len();
        rest
    }

    pub fn is_full(&self) -> bool {
        self.filled == BUFFER
    }

    /// Writes what was taken: whole pages.
    pub fn flush(&mut self) -> io::Result<()> {
        let bytes = self.start..self.start + self.filled;
        self.write(bytes, self.at)?;
        self.at += self.filled as u64;
        self.filled = 0;
        Ok(())
    }

    /// Writes the last bytes, however many; the file ends behind them.
    pub fn end(&mut self, mut bytes: &[u8]) -> io::Result<()> {
        loop {
            bytes = self.take(bytes);
            if bytes.is_empty() {
                break;
            }
            self.flush()?;
        }
        let end = self.at + self.filled as u64;
        let padded = self.filled.next_multiple_of(PAGE);
        self.buffer[self.start + self.filled..self.start + padded].fill(0);
        self.filled = padded;
        self.flush()?;
        self.file.set_len(end)
    }

    /// Writes the file's first page, when all else is written.
    pub fn first(&mut self, page: &[u8; PAGE]) -> io::Result<()> {
        let bytes = self.start..self.start + PAGE;
        self.buffer[bytes.clone()].copy_from_slice(page);
        self.write(bytes, 0)
    }

    fn write(&mut self, bytes: std::ops::Range<usize>, at: u64) -> io::Result<()> {
        let bytes = &self.buffer[bytes];
        match self.file.write_all_at(bytes, at) {
            // Larger blocks than a page, or a file system that has changed its mind.
            Err(error) if error.kind() == io::ErrorKind::InvalidInput && self.former.is_some() => {
                restore(self.file, &mut self.former)?;
                self.file.write_all_at(bytes, at)
            }
            done => done,
        }
    }
}

/// The flags are of all descriptors of the open file: whoever passed this one reads by another.
impl Drop for Appender<'_> {
    fn drop(&mut self) {
        let _ = restore(self.file, &mut self.former);
    }
}

fn restore(file: &File, former: &mut Option<OFlags>) -> io::Result<()> {
    match former.take() {
        Some(flags) => Ok(fcntl_setfl(file, flags)?),
        None => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::fs;

    /// What a file of several flushes and an odd end looks like, wherever it lies.
    fn write_in(dir: &std::path::Path) -> (bool, Vec<u8>) {
        let path = dir.join("file");
        let file = File::options().read(true).write(true).create_new(true).open(&path).unwrap();
        let flags = fcntl_getfl(&file).unwrap();
        let mut appender = Appender::new(&file, PAGE as u64);
        let direct = appender.is_direct();
        let pages: Vec<u8> = (0..2 * BUFFER + PAGE).map(|n| (n / 61) as u8).collect();
        let mut rest = &pages[..];
        while !rest.is_empty() {
            rest = appender.take(rest);
            appender.flush().unwrap();
        }
        assert_eq!(appender.written(), (PAGE + pages.len()) as u64);
        appender.end(&pages[..BUFFER + 777]).unwrap();
        appender.first(&[9; PAGE]).unwrap();
        drop(appender);
        assert_eq!(fcntl_getfl(&file).unwrap(), flags);
        let expected = [&[9; PAGE][..], &pages, &pages[..BUFFER + 777]].concat();
        let found = fs::read(&path).unwrap();
        assert!(found == expected);
        (direct, found)
    }

    #[test]
    fn a_file_is_the_same_past_the_page_cache_and_through_it() {
        let disk = tempfile::tempdir().unwrap();
        let memory = tempfile::tempdir_in("/dev/shm").unwrap();
        let (direct, one) = write_in(disk.path());
        let (_, other) = write_in(memory.path());
        assert!(one == other);
        println!("past the page cache: {direct}");
    }

    #[test]
    fn what_a_file_system_refuses_goes_through_the_page_cache() {
        let file = tempfile::tempfile().unwrap();
        let mut appender = Appender::new(&file, PAGE as u64);
        if !appender.is_direct() {
            return println!(
                "skipped: files in the folder for temporary files are not written directly"
            );
        }
        // Memory that is not aligned is what can be had refused everywhere.
        appender.start += 1;
        appender.buffer.push(0);
        appender.take(&[5; PAGE]);
        appender.flush().unwrap();
        assert!(!appender.is_direct());
        let mut found = [0; PAGE];
        file.read_exact_at(&mut found, PAGE as u64).unwrap();
        assert_eq!(found, [5; PAGE]);
    }
}
