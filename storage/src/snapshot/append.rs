//! Appending to a file past the host's page cache (`O_DIRECT` of open(2)), where its file system can.
//!
//! A snapshot is read once, on another day: in the page cache it would push out what machines use, each of its
//! pages would be copied there and written from there, and the sync at the end would have to wait for all of them.

use super::PAGE;
use rustix::fs::{OFlags, fcntl_getfl, fcntl_setfl};
use rustix::io::{Errno, pwritev};
use std::fs::File;
use std::io::{self, IoSlice};

/// Most pieces of memory that are written at once (`UIO_MAXIOV`).
pub const PIECES: usize = 1024;

/// The end of a file that is written in whole pages but for the last. Nothing else writes to the file.
pub struct Appender<'f> {
    file: &'f File,
    /// The file's flags as they were, if it is written past the page cache.
    former: Option<OFlags>,
    /// Where the next bytes go.
    at: u64,
}

impl<'f> Appender<'f> {
    /// Appends behind the first page, which is for the end.
    pub fn new(file: &'f File) -> Self {
        // A file system that can't says so here, most of them; others at the first write.
        let former = fcntl_getfl(file)
            .and_then(|flags| fcntl_setfl(file, flags | OFlags::DIRECT).map(|()| flags))
            .ok();
        Self { file, former, at: PAGE as u64 }
    }

    /// Nothing is appended yet.
    pub fn is_empty(&self) -> bool {
        self.at == PAGE as u64
    }

    /// Writes whole pages. Those that lie aligned in memory go past the page cache.
    pub fn append(&mut self, pieces: &mut [IoSlice<'_>]) -> io::Result<()> {
        self.at = self.write(pieces, self.at)?;
        Ok(())
    }

    /// Writes whole pages, and bytes behind them, however many; the file ends there.
    pub fn end(&mut self, pages: Vec<IoSlice<'_>>, bytes: &[u8]) -> io::Result<()> {
        let padded = Aligned::padded(bytes);
        let mut pieces = pages;
        pieces.push(IoSlice::new(padded.bytes()));
        self.append(&mut pieces)?;
        self.file.set_len(self.at - padded.padding(bytes))
    }

    /// The same where nothing is appended yet, with the file's first page, in as few writes.
    pub fn whole(
        &mut self,
        first: &[u8; PAGE],
        pages: Vec<IoSlice<'_>>,
        bytes: &[u8],
    ) -> io::Result<()> {
        let first = Aligned::padded(first);
        let mut pieces = pages;
        pieces.insert(0, IoSlice::new(first.bytes()));
        self.at = 0;
        self.end(pieces, bytes)
    }

    /// Writes the file's first page, when all else is written.
    pub fn first(&mut self, page: &[u8; PAGE]) -> io::Result<()> {
        let page = Aligned::padded(page);
        self.write(&mut [IoSlice::new(page.bytes())], 0).map(drop)
    }

    /// Returns where what was written ends.
    fn write(&mut self, mut pieces: &mut [IoSlice<'_>], mut at: u64) -> io::Result<u64> {
        IoSlice::advance_slices(&mut pieces, 0);
        while !pieces.is_empty() {
            let now = pieces.len().min(PIECES);
            match pwritev(self.file, &pieces[..now], at) {
                Ok(0) => return Err(io::ErrorKind::WriteZero.into()),
                Ok(written) => {
                    at += written as u64;
                    IoSlice::advance_slices(&mut pieces, written);
                }
                Err(Errno::INTR) => {}
                // Larger blocks than a page, memory that is not aligned, or a file system that has changed its mind.
                Err(Errno::INVAL) if self.former.is_some() => restore(self.file, &mut self.former)?,
                Err(error) => return Err(error.into()),
            }
        }
        Ok(at)
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

/// Bytes in memory that is aligned to a page, with zeroes up to a whole page.
struct Aligned {
    memory: Vec<u8>,
    start: usize,
    length: usize,
}

impl Aligned {
    fn padded(bytes: &[u8]) -> Self {
        let length = bytes.len().next_multiple_of(PAGE);
        let mut memory = vec![0; length + PAGE];
        let start = (memory.as_ptr() as usize).wrapping_neg() % PAGE;
        memory[start..start + bytes.len()].copy_from_slice(bytes);
        Self { memory, start, length }
    }

    /// How many bytes more it is than `bytes`, which it was made of.
    fn padding(&self, bytes: &[u8]) -> u64 {
        (self.length - bytes.len()) as u64
    }

    fn bytes(&self) -> &[u8] {
        &self.memory[self.start..self.start + self.length]
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::fs;
    use std::os::unix::fs::FileExt as _;

    /// More pieces than are written at once.
    const MANY: usize = 2 * PIECES + 3;

    /// What a file of many pieces and an odd end looks like, wherever it lies. Whether it was written directly.
    fn write_in(dir: &std::path::Path) -> (bool, Vec<u8>) {
        let path = dir.join("file");
        let file = File::options().read(true).write(true).create_new(true).open(&path).unwrap();
        let flags = fcntl_getfl(&file).unwrap();
        let mut appender = Appender::new(&file);
        let content: Vec<u8> = (0..MANY * PAGE).map(|n| (n / 61) as u8).collect();
        let pages = Aligned::padded(&content);
        let pieces = || pages.bytes().chunks(PAGE).map(IoSlice::new).collect::<Vec<_>>();
        appender.append(&mut pieces()).unwrap();
        appender.append(&mut []).unwrap();
        assert_eq!(appender.at, (PAGE + content.len()) as u64);
        appender.end(pieces()[..5].to_vec(), &content[..PAGE + 777]).unwrap();
        appender.first(&[9; PAGE]).unwrap();
        let direct = appender.former.is_some();
        drop(appender);
        assert_eq!(fcntl_getfl(&file).unwrap(), flags);
        let (five, odd) = (&content[..5 * PAGE], &content[..PAGE + 777]);
        let expected = [&[9; PAGE][..], &content, five, odd].concat();
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
        let mut appender = Appender::new(&file);
        if appender.former.is_none() {
            return println!(
                "skipped: files in the folder for temporary files are not written directly"
            );
        }
        // Memory that is not aligned is what can be had refused everywhere.
        let page = Aligned::padded(&[5; PAGE + 1]);
        appender.append(&mut [IoSlice::new(&page.memory[page.start + 1..][..PAGE])]).unwrap();
        assert!(appender.former.is_none());
        let mut found = [0; PAGE];
        file.read_exact_at(&mut found, PAGE as u64).unwrap();
        assert_eq!(found, [5; PAGE]);
    }

    #[test]
    fn a_file_that_is_written_at_once_is_the_same() {
        let content: Vec<u8> = (0..5 * PAGE + 777).map(|n| (n / 61) as u8).collect();
        let (pages, bytes) = content.split_at(4 * PAGE);
        let pages = Aligned::padded(pages);
        let pieces: Vec<_> = pages.bytes().chunks(PAGE).map(IoSlice::new).collect();
        let found = [false, true].map(|whole| {
            let file = tempfile::tempfile().unwrap();
            let mut appender = Appender::new(&file);
            if whole {
                appender.whole(&[9; PAGE], pieces.clone(), bytes).unwrap();
            } else {
                appender.end(pieces.clone(), bytes).unwrap();
                appender.first(&[9; PAGE]).unwrap();
            }
            drop(appender);
            let mut found = vec![0; file.metadata().unwrap().len() as usize];
            file.read_exact_at(&mut found, 0).unwrap();
            found
        });
        assert!(found[0] == [&[9; PAGE][..], &content].concat());
        assert!(found[0] == found[1]);
    }

    #[test]
    fn an_end_without_bytes_is_the_pages_end() {
        let file = tempfile::tempfile().unwrap();
        let mut appender = Appender::new(&file);
        let page = Aligned::padded(&[5; PAGE]);
        appender.end(vec![IoSlice::new(page.bytes())], &[]).unwrap();
        assert_eq!(file.metadata().unwrap().len(), 2 * PAGE as u64);
    }
}
