//! A copy of the disk as it was at one instant, made while the guest goes on writing.
//!
//! The disk is cut into clusters. Whatever is to change a cluster that the copy does not have yet copies it
//! first (*copy before write*); what nobody changes is copied in small steps by and by. So a cluster that is
//! not copied yet holds what it held at the instant, and one that is copied is never looked at again: the copy
//! is the disk of that instant, byte for byte, whatever the order. Holes stay holes.
//!
//! All of it happens in the disk's one thread, between requests: nothing else writes to the disk (invariant 1),
//! so there is nothing to lock. Where the file system can share blocks between files (XFS, Btrfs), the copy is
//! whole at once.

use std::{fs::File, io, os::unix::fs::FileExt as _, sync::Arc};

use hermitage_storage::sparse::{self, next_data};

use super::{
    disk::Disk,
    request::{Range, Work},
};
use crate::devices::virtio::chain::total;

/// Smallest cluster: what a small write may have to copy first.
const CLUSTER: u64 = 64 << 10;

/// Most clusters: half a MiB of bits. Disks of more than 256 GiB have larger ones.
const MOST_CLUSTERS: u64 = 4 << 20;

/// Read and written at once.
const BUFFER: usize = 256 << 10;

pub struct DiskCopy {
    disk: Arc<Disk>,
    /// Becomes the copy.
    side: File,
    length: u64,
    cluster: u64,
    /// A bit for each cluster that is copied.
    done: Vec<u64>,
    /// All clusters below it are.
    next: u64,
    /// Bytes of data.
    copied: u64,
    /// Data up to a hole, as last looked for: to find where data ends the file system goes through all of its
    /// extents, of which a guest can make millions. True of clusters that are not copied for as long as the copy
    /// takes, as nothing has changed them.
    run: Span,
    buffer: Vec<u8>,
}

/// How a copy begins.
pub enum Begun {
    /// It is whole: the files share their blocks.
    Whole,
    /// So many bytes of data are to be copied.
    Copying(Box<DiskCopy>, u64),
}

impl DiskCopy {
    /// From here on the copy is of this instant. `side` is an empty file, and may get `room` bytes.
    pub fn begin(disk: Arc<Disk>, side: File, room: u64) -> io::Result<Begun> {
        let length = disk.metadata()?.len();
        if side.metadata()?.len() != 0 {
            return Err(io::Error::other("the file for the copy is not empty"));
        }
        if sparse::share(&disk, &side)? {
            return Ok(Begun::Whole);
        }
        let data = sparse::data_bytes(&disk)?;
        if data > room {
            return Err(io::Error::other(format!(
                "a copy of the disk takes {data} bytes, and there is room for {room}"
            )));
        }
        side.set_len(length)?;
        let cluster = cluster_for(length);
        let words = length.div_ceil(cluster).div_ceil(64);
        let done = vec![0; usize::try_from(words).map_err(io::Error::other)?];
        let buffer = vec![0; BUFFER];
        let copy =
            Self { disk, side, length, cluster, done, next: 0, copied: 0, run: 0..0, buffer };
        Ok(Begun::Copying(Box::new(copy), data))
    }

    pub fn is_of(&self, disk: &Arc<Disk>) -> bool {
        Arc::ptr_eq(&self.disk, disk)
    }

    /// Bytes of data that were copied.
    pub fn copied(&self) -> u64 {
        self.copied
    }

    /// Whether more than `bytes` may have to be copied before this may be done.
    pub fn owes_more_than(&self, bytes: u64, work: &Work) -> bool {
        let most = usize::try_from(bytes / self.cluster).unwrap_or(usize::MAX);
        let all = spans(work);
        let owed = all.iter().flat_map(|range| self.clusters(range)).filter(|n| !self.is_done(*n));
        owed.take(most.saturating_add(1)).count() > most
    }

    /// Copies what this would change.
    pub fn protect(&mut self, work: &Work) -> io::Result<()> {
        for range in spans(work) {
            for cluster in self.clusters(&range) {
                self.copy(cluster)?;
            }
        }
        Ok(())
    }

    /// Copies a little of what this would change. True: nothing of it is left to be copied.
    pub fn step_for(&mut self, work: &Work) -> io::Result<bool> {
        let before = self.copied;
        for range in spans(work) {
            let mut clusters = self.clusters(&range);
            while let Some(cluster) = clusters.next() {
                // Long holes are passed in one look.
                if !self.is_done(cluster) {
                    let to = clusters.end.min(self.data_from(cluster)?);
                    (cluster..to).for_each(|hole| self.set_done(hole));
                    self.copy(cluster)?;
                    clusters.start = clusters.start.max(to);
                }
                if self.copied - before >= BUFFER as u64 {
                    return Ok(false);
                }
            }
        }
        Ok(true)
    }

    /// Copies a little of what is left. True: the copy is whole.
    pub fn step(&mut self) -> io::Result<bool> {
        let before = self.copied;
        while self.copied - before < BUFFER as u64 {
            let end = self.length.div_ceil(self.cluster);
            // What was no data at the instant is none now, and is none in the copy.
            self.next = self.data_from(self.next)?;
            if self.next >= end {
                return Ok(true);
            }
            self.copy(self.next)?;
            self.next += 1;
        }
        Ok(false)
    }

    /// The first cluster from this one on that has data, or their number.
    fn data_from(&mut self, cluster: u64) -> io::Result<u64> {
        let data = self.data(cluster.saturating_mul(self.cluster), self.length)?;
        Ok(match data {
            Some(data) => data.start / self.cluster,
            None => self.length.div_ceil(self.cluster),
        })
    }

    /// The first data in that range.
    fn data(&mut self, start: u64, end: u64) -> io::Result<Option<Span>> {
        if !self.run.contains(&start) {
            match next_data(&self.disk, start, self.length)? {
                Some((data, hole)) => self.run = data..hole,
                None => return Ok(None),
            }
        }
        let data = start.max(self.run.start)..end.min(self.run.end);
        Ok(Some(data).filter(|data| !data.is_empty()))
    }

    fn copy(&mut self, cluster: u64) -> io::Result<()> {
        if self.is_done(cluster) {
            return Ok(());
        }
        let start = cluster * self.cluster;
        let end = self.length.min(start + self.cluster);
        let mut at = start;
        while let Some(data) = self.data(at, end)? {
            at = data.start;
            while at < data.end {
                let part = &mut self.buffer[..((data.end - at) as usize).min(BUFFER)];
                self.disk.read_exact_at(part, at)?;
                self.side.write_all_at(part, at)?;
                at += part.len() as u64;
                self.copied += part.len() as u64;
            }
        }
        self.set_done(cluster);
        Ok(())
    }

    /// Those that a range touches.
    fn clusters(&self, range: &Span) -> std::ops::Range<u64> {
        let end = range.end.min(self.length);
        if range.start >= end {
            return 0..0;
        }
        range.start / self.cluster..end.div_ceil(self.cluster)
    }

    fn is_done(&self, cluster: u64) -> bool {
        let word = self.done.get((cluster / 64) as usize);
        // Behind the end there is nothing to copy.
        word.is_none_or(|word| word & (1 << (cluster % 64)) != 0)
    }

    fn set_done(&mut self, cluster: u64) {
        if let Some(word) = self.done.get_mut((cluster / 64) as usize) {
            *word |= 1 << (cluster % 64);
        }
    }
}

pub fn cluster_for(length: u64) -> u64 {
    CLUSTER.max(length.div_ceil(MOST_CLUSTERS).next_power_of_two())
}

type Span = std::ops::Range<u64>;

/// What a request changes of the disk.
fn spans(work: &Work) -> Vec<Span> {
    let span = |offset: u64, length: u64| offset..offset.saturating_add(length);
    match work {
        Work::Write { offset, from } => vec![span(*offset, total(from))],
        Work::Discard(ranges) | Work::WriteZeroes(ranges) => {
            ranges.iter().map(|Range { offset, length, .. }| span(*offset, *length)).collect()
        }
        Work::Read { .. } | Work::Flush | Work::Identify { .. } | Work::Refuse(_) => vec![],
    }
}
