//! Writing a snapshot in one pass: data first, header last, and a small one all at once.

use super::append::{Appender, PIECES};
use super::index::Runs;
use super::{Description, Header, MAX_STATE, PAGE, SnapshotError, failed};
use crate::faults::{self, Point};
use std::fs::File;
use std::io::{self, IoSlice};
use twox_hash::XxHash3_128;

/// Bytes of pages that are written at once, about.
const BATCH: usize = 16 << 20;

/// Takes a machine's pages in ascending order, and writes them from where they lie.
pub struct Writer<'f, 'm> {
    file: &'f File,
    runs: Runs,
    data_sum: XxHash3_128,
    /// Data of scattered pages is contiguous in the file.
    data: Appender<'f>,
    /// What is summed and not written.
    pieces: Vec<IoSlice<'m>>,
    bytes: usize,
}

impl<'f, 'm> Writer<'f, 'm> {
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
            data: Appender::new(file),
            pieces: Vec::new(),
            bytes: 0,
        })
    }

    /// Neighbouring pages that differ from the base's, from `first` on. They are written when there are many, or
    /// at the end. Where they lie aligned to pages, nothing is copied on the way.
    pub fn data(&mut self, first: u64, pages: &'m [[u8; PAGE]]) -> Result<(), SnapshotError> {
        for (page, _) in (first..).zip(pages) {
            self.runs.push(page, false)?;
        }
        let bytes = pages.as_flattened();
        self.data_sum.write(bytes);
        self.pieces.push(IoSlice::new(bytes));
        self.bytes += bytes.len();
        if self.pieces.len() < PIECES && self.bytes < BATCH {
            return Ok(());
        }
        self.bytes = 0;
        faults::at(Point::SavePages)
            .and_then(|()| self.data.append(&mut std::mem::take(&mut self.pieces)))
            .map_err(failed("write page data"))
    }

    /// A page that is zero and in the base is not.
    pub fn zero(&mut self, page: u64) -> Result<(), SnapshotError> {
        self.runs.push(page, true)
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
        let tail = [&index, state].concat();
        let first = header.encode();
        let last = "write the last pages, the index and the state";
        faults::at(Point::SaveIndex).map_err(failed(last))?;
        if self.data.is_empty() {
            faults::at(Point::SaveHeader)
                .and_then(|()| self.data.whole(&first, self.pieces, &tail))
                .map_err(failed("write pages, index, state and header"))?;
        } else {
            self.data.end(self.pieces, &tail).map_err(failed(last))?;
            faults::at(Point::SaveHeader)
                .and_then(|()| self.data.first(&first))
                .map_err(failed("write the header"))?;
        }
        faults::at(Point::SaveSync)
            .and_then(|()| self.file.sync_all())
            .and_then(|()| faults::at(Point::SaveSynced))
            .map_err(failed("sync"))?;
        Ok(header)
    }
}
