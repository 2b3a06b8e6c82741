//! Writing a snapshot: data first, header last, in one pass.

use super::append::Appender;
use super::index::Runs;
use super::{Description, HEADER_BYTES, Header, MAX_STATE, PAGE, SnapshotError, failed};
use crate::faults::{self, Point};
use std::fs::File;
use std::io;
use twox_hash::XxHash3_128;

/// Takes a machine's pages in ascending order.
pub struct Writer<'f> {
    file: &'f File,
    runs: Runs,
    data_sum: XxHash3_128,
    /// Data of scattered pages is contiguous in the file.
    data: Appender<'f>,
}

impl<'f> Writer<'f> {
    /// `file` is empty and open for reading and writing.
    pub fn new(file: &'f File) -> Result<Self, SnapshotError> {
        let length = file.metadata().map_err(failed("read the size of the file"))?.len();
        if length != 0 {
            let source = io::Error::other(format!("it has {length} bytes already"));
            return Err(SnapshotError::Io { doing: "begin a file", source });
        }
        Ok(Self {
            file,
            runs: Runs::default(),
            data_sum: XxHash3_128::new(),
            data: Appender::new(file, HEADER_BYTES as u64),
        })
    }

    /// A page that differs from the base's. `data` is a page long.
    pub fn data(&mut self, page: u64, data: &[u8; PAGE]) -> Result<(), SnapshotError> {
        self.runs.push(page, false)?;
        self.data_sum.write(data);
        // The buffer holds whole pages.
        self.data.take(data);
        if self.data.is_full() { self.flush() } else { Ok(()) }
    }

    /// A page that is zero and in the base is not.
    pub fn zero(&mut self, page: u64) -> Result<(), SnapshotError> {
        self.runs.push(page, true)
    }

    /// Bytes from the file's beginning that wait in the host's page cache for the sync, but for the header.
    pub fn cached(&self) -> u64 {
        if self.data.is_direct() { 0 } else { self.data.written() }
    }

    fn flush(&mut self) -> Result<(), SnapshotError> {
        faults::at(Point::SavePages)
            .and_then(|()| self.data.flush())
            .map_err(failed("write page data"))
    }

    /// Adds the machine's state and the header. The file is on the medium on return.
    pub fn finish(
        mut self,
        description: Description,
        state: &[u8],
    ) -> Result<Header, SnapshotError> {
        let state_bytes = state.len() as u64;
        if state_bytes > MAX_STATE {
            let (what, value, limit) = ("bytes of state", state_bytes, MAX_STATE);
            return Err(SnapshotError::TooMuch { what, value, limit });
        }
        // What is left of the pages goes with what follows them, in as few writes.
        faults::at(Point::SavePages).map_err(failed("write page data"))?;
        let index = self.runs.encode();
        let header = Header {
            description,
            data_pages: self.runs.data_pages,
            zero_pages: self.runs.zero_pages,
            runs: self.runs.len(),
            state: state_bytes,
            data_sum: self.data_sum.finish_128(),
            index_sum: XxHash3_128::oneshot(&index),
            state_sum: XxHash3_128::oneshot(state),
        };
        header.check()?;
        faults::at(Point::SaveIndex)
            .and_then(|()| self.data.end(&[&index, state].concat()))
            .map_err(failed("write the index and the state"))?;
        faults::at(Point::SaveHeader)
            .and_then(|()| self.data.first(&header.encode()))
            .map_err(failed("write the header"))?;
        faults::at(Point::SaveSync)
            .and_then(|()| self.file.sync_all())
            .and_then(|()| faults::at(Point::SaveSynced))
            .map_err(failed("sync"))?;
        Ok(header)
    }
}
