//! The index: which guest pages the snapshot has, as runs in the order of the guest's memory.

use super::{HEADER_BYTES, PAGE, SnapshotError};

/// Bytes of a run in the file.
pub const RECORD: usize = 16;

/// Most runs: 64 MiB of index. Memory in which every other page differs has as many at 32 GiB.
pub const MAX_RUNS: u64 = 4 << 20;

const ZERO: u32 = 0;
const DATA: u32 = 1;

/// What the pages of a run are.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Content {
    /// Zero, without data in the file.
    Zero,
    /// In the file from this offset on, page after page; a multiple of the page size.
    Data { at: u64 },
}

/// Neighbouring pages of one kind.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Run {
    pub page: u64,
    pub pages: u64,
    pub content: Content,
}

impl Run {
    pub fn end(&self) -> u64 {
        self.page + self.pages
    }
}

/// Collects runs while a snapshot is written; neighbours become one.
#[derive(Debug, Default)]
pub struct Runs {
    runs: Vec<Run>,
    pub data_pages: u64,
    pub zero_pages: u64,
}

impl Runs {
    /// The next page. Pages come in ascending order.
    pub fn push(&mut self, page: u64, zero: bool) -> Result<(), SnapshotError> {
        let content = match zero {
            true => Content::Zero,
            false => Content::Data { at: (HEADER_BYTES as u64) + self.data_pages * PAGE as u64 },
        };
        if zero {
            self.zero_pages += 1;
        } else {
            self.data_pages += 1;
        }
        let count = self.runs.len() as u64;
        match self.runs.last_mut() {
            Some(last) if page < last.end() => {
                return Err(SnapshotError::Order { page, last: last.end() - 1 });
            }
            Some(last)
                if page == last.end()
                    && zero == (last.content == Content::Zero)
                    && last.pages < u64::from(u32::MAX) =>
            {
                last.pages += 1;
            }
            _ if count == MAX_RUNS => {
                let (what, value, limit) = ("runs of pages", MAX_RUNS + 1, MAX_RUNS);
                return Err(SnapshotError::TooMuch { what, value, limit });
            }
            _ => self.runs.push(Run { page, pages: 1, content }),
        }
        Ok(())
    }

    pub fn len(&self) -> u64 {
        self.runs.len() as u64
    }

    pub fn encode(&self) -> Vec<u8> {
        let mut raw = Vec::with_capacity(self.runs.len() * RECORD);
        for run in &self.runs {
            let kind = if run.content == Content::Zero { ZERO } else { DATA };
            raw.extend_from_slice(&run.page.to_le_bytes());
            // `push` keeps it within 32 bits.
            raw.extend_from_slice(&(run.pages as u32).to_le_bytes());
            raw.extend_from_slice(&kind.to_le_bytes());
        }
        raw
    }
}

/// What the header says the index comes to.
pub struct Expected {
    pub ram_pages: u64,
    pub data_pages: u64,
    pub zero_pages: u64,
}

/// Reads an index: ascending, without overlaps, within RAM, each run as long as it can be, and as many
/// pages of each kind as the header says. There is one index for a set of pages, no other.
pub fn decode(raw: &[u8], expected: &Expected) -> Result<Vec<Run>, SnapshotError> {
    let (records, rest) = raw.as_chunks::<RECORD>();
    let wrong = |index: usize, reason| Err(SnapshotError::Run { index: index as u64, reason });
    if !rest.is_empty() {
        return wrong(records.len(), "is cut short");
    }
    let mut runs: Vec<Run> = Vec::with_capacity(records.len());
    let (mut data_pages, mut zero_pages) = (0, 0);
    for (i, record) in records.iter().enumerate() {
        let [p0, p1, p2, p3, p4, p5, p6, p7, n0, n1, n2, n3, k0, k1, k2, k3] = *record;
        let page = u64::from_le_bytes([p0, p1, p2, p3, p4, p5, p6, p7]);
        let pages = u64::from(u32::from_le_bytes([n0, n1, n2, n3]));
        if pages == 0 {
            return wrong(i, "is empty");
        }
        if page.checked_add(pages).is_none_or(|end| end > expected.ram_pages) {
            return wrong(i, "reaches behind the end of RAM");
        }
        let content = match u32::from_le_bytes([k0, k1, k2, k3]) {
            ZERO => {
                zero_pages += pages;
                Content::Zero
            }
            DATA => {
                let at = HEADER_BYTES as u64 + data_pages * PAGE as u64;
                data_pages += pages;
                Content::Data { at }
            }
            _ => return wrong(i, "is of an unknown kind"),
        };
        if let Some(last) = runs.last() {
            if page < last.end() {
                return wrong(i, "begins before the end of the one before");
            }
            let same = (content == Content::Zero) == (last.content == Content::Zero);
            if page == last.end() && same && last.pages < u64::from(u32::MAX) {
                return wrong(i, "goes on where the one before ends");
            }
        }
        runs.push(Run { page, pages, content });
    }
    if data_pages != expected.data_pages || zero_pages != expected.zero_pages {
        return wrong(records.len(), "is missing, or there are too many pages");
    }
    Ok(runs)
}
