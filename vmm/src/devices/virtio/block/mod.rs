//! The account's disk: virtio-blk (virtio 1.2 §5.2) over a sparse raw file.
//!
//! A machine is snapshotted without a disk, as a device of capacity 0; a fork gets its file by
//! [`Transport::attach`], which the guest sees as a change of configuration.
//!
//! Requests are checked on the vCPU's thread, worked on by one thread that starts with the first of
//! them, one after the other and without the device's lock. In order, because then *flush* needs no
//! bookkeeping: everything before it was written when its turn comes, and it is complete only after
//! fdatasync (invariant 4), or at once if nothing was changed since the last ([`disk`]). Only a write that finds no room on the host's disk steps aside until there
//! is some ([`held`]); it is not complete, so no flush covers it.

mod copy;
mod copying;
mod disk;
mod held;
mod request;
mod work;
mod worker;

pub use copying::{CopyNews, CopyOrder};
pub use worker::Which as WhichCopy;

use std::{fs::File, io, os::unix::fs::FileExt, sync::Arc};

use serde::{Deserialize, Serialize};

use super::{
    Context, Fault, StateError, Transport, VirtioDevice, queue::VirtQueue, transport::Handle,
};
use crate::memory::GuestMemory;
use disk::Disk;
use hermitage_vmm_proto::Stats;
use request::{Request, SECTOR};
use worker::{Done, Worker};

/// Feature bits (§5.2.3).
mod feature {
    pub const SIZE_MAX: u64 = 1 << 1;
    pub const SEG_MAX: u64 = 1 << 2;
    pub const BLK_SIZE: u64 = 1 << 6;
    pub const FLUSH: u64 = 1 << 9;
    pub const TOPOLOGY: u64 = 1 << 10;
    pub const DISCARD: u64 = 1 << 13;
    pub const WRITE_ZEROES: u64 = 1 << 14;
}

const QUEUE_SIZE: u16 = 128;

/// What the driver is told to keep within. Together they bound a request to 126 MiB.
const MAX_SEGMENT_BYTES: u32 = 1 << 20;
const MAX_SEGMENTS: u32 = QUEUE_SIZE as u32 - 2;
/// 4 GiB.
const MAX_DISCARD_SECTORS: u32 = 8 << 20;
const MAX_DISCARD_SEGMENTS: u32 = 16;

/// The file's blocks are 4 KiB: 2³ sectors.
const PHYSICAL_BLOCK_EXPONENT: u8 = 3;

#[derive(Default)]
pub struct Block {
    disk: Option<Arc<Disk>>,
    /// Capacity the guest is told, in sectors.
    capacity: u64,
    worker: Option<Worker>,
    handle: Option<Handle<Self>>,
    /// Requests taken and not yet given back.
    open: u16,
    stats: BlockStats,
}

/// Since the disk was attached.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct BlockStats {
    pub read_bytes: u64,
    pub written_bytes: u64,
    pub flushes: u64,
    /// Requests answered with an i/o error.
    pub errors: u64,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct BlockState {
    /// In sectors.
    capacity: u64,
}

impl BlockState {
    /// Of the disk.
    pub fn bytes(&self) -> u64 {
        self.capacity.saturating_mul(SECTOR)
    }
}

impl Block {
    /// A device without a disk.
    pub fn new() -> Self {
        Self::default()
    }

    /// Takes what the driver has made available and hands it to the worker.
    fn take_requests(&mut self, context: &mut Context<'_>) -> Result<(), Fault> {
        let memory = context.memory;
        let [queue] = &mut *context.queues else { return Ok(()) };
        let limit = queue.max_size();
        loop {
            // A driver can't have more open than the queue has entries, unless it breaks the rules;
            // then the rest waits until some are complete.
            if self.open >= limit {
                return Ok(());
            }
            let Some(chain) = queue.pop(memory)? else {
                if queue.arm(memory)? {
                    continue;
                }
                return Ok(());
            };
            let request = Request::parse(memory, &chain, self.capacity)
                .map_err(|reason| queue.broken(reason))?;
            self.open += 1;
            self.worker(memory)?.submit(request);
        }
    }

    fn worker(&mut self, memory: &GuestMemory) -> Result<&Worker, Fault> {
        let host = |source| Fault::Host { device: Self::NAME, what: "start its thread", source };
        if self.worker.is_none() {
            let handle = self.handle.clone().ok_or_else(|| host(io::Error::other("unbound")))?;
            let worker = Worker::start(memory.clone(), handle).map_err(host)?;
            if let Some(disk) = &self.disk {
                worker.set_disk(disk.clone());
            }
            self.worker = Some(worker);
        }
        self.worker.as_ref().ok_or_else(|| host(io::Error::other("no thread")))
    }

    fn put(&mut self, file: File, capacity: u64, context: &mut Context<'_>) {
        let disk = Arc::new(Disk::new(file));
        if let Some(worker) = &self.worker {
            worker.set_disk(disk.clone());
        }
        self.disk = Some(disk);
        context.config_changed |= capacity != self.capacity;
        self.capacity = capacity;
    }

    /// Gives requests back; called by the worker.
    fn finish(&mut self, done: &[Done], context: &mut Context<'_>) -> Result<(), Fault> {
        for done in done {
            self.open -= 1;
            self.stats.add(&done.stats);
            if let [queue] = &mut *context.queues {
                queue.complete(context.memory, done.head, done.written)?;
            }
        }
        self.take_requests(context)
    }
}

impl BlockStats {
    fn add(&mut self, other: &Self) {
        self.read_bytes += other.read_bytes;
        self.written_bytes += other.written_bytes;
        self.flushes += other.flushes;
        self.errors += other.errors;
    }
}

impl VirtioDevice for Block {
    const NAME: &'static str = "block";
    const ID: u32 = 2;
    const QUEUES: &'static [u16] = &[QUEUE_SIZE];
    const FEATURES: u64 = feature::SIZE_MAX
        | feature::SEG_MAX
        | feature::BLK_SIZE
        | feature::FLUSH
        | feature::TOPOLOGY
        | feature::DISCARD
        | feature::WRITE_ZEROES
        | super::transport::feature::INDIRECT_DESC;
    type State = BlockState;

    /// §5.2.4.
    fn config(&self) -> Vec<u8> {
        let mut config = vec![0; 60];
        let mut put = |at: usize, value: &[u8]| config[at..at + value.len()].copy_from_slice(value);
        put(0, &self.capacity.to_le_bytes());
        put(8, &MAX_SEGMENT_BYTES.to_le_bytes());
        put(12, &MAX_SEGMENTS.to_le_bytes());
        put(20, &(SECTOR as u32).to_le_bytes());
        put(24, &[PHYSICAL_BLOCK_EXPONENT]);
        // max_discard_sectors, max_discard_seg, discard_sector_alignment
        put(36, &MAX_DISCARD_SECTORS.to_le_bytes());
        put(40, &MAX_DISCARD_SEGMENTS.to_le_bytes());
        put(44, &(1u32 << PHYSICAL_BLOCK_EXPONENT).to_le_bytes());
        // max_write_zeroes_sectors, max_write_zeroes_seg, write_zeroes_may_unmap
        put(48, &MAX_DISCARD_SECTORS.to_le_bytes());
        put(52, &MAX_DISCARD_SEGMENTS.to_le_bytes());
        put(56, &[1]);
        config
    }

    fn activate(&mut self, context: &mut Context<'_>) -> Result<(), Fault> {
        self.take_requests(context)
    }

    fn notify(&mut self, _queue: usize, context: &mut Context<'_>) -> Result<(), Fault> {
        self.take_requests(context)
    }

    fn give_up(&mut self) {
        if let Some(worker) = &self.worker {
            worker.set_impatient(true);
        }
    }

    fn reset(&mut self) {
        if let Some(worker) = &self.worker {
            worker.set_impatient(false);
        }
    }

    fn save(&self) -> Result<BlockState, StateError> {
        Ok(BlockState { capacity: self.capacity })
    }

    fn load(&mut self, state: BlockState) -> Result<(), StateError> {
        // Requests are checked against it, and no file is larger.
        if state.capacity.checked_mul(SECTOR).is_none_or(|bytes| bytes > i64::MAX as u64) {
            let reason = format!("a capacity of {} sectors", state.capacity);
            return Err(StateError::invalid(Self::NAME, reason));
        }
        self.capacity = state.capacity;
        Ok(())
    }

    fn resume(&mut self, context: &mut Context<'_>) -> Result<(), Fault> {
        let pending = context.queues.iter_mut().any(VirtQueue::take_pending);
        if pending { self.take_requests(context) } else { Ok(()) }
    }

    fn busy(&self) -> bool {
        self.open > 0
    }

    fn bind(&mut self, handle: Handle<Self>) {
        self.handle = Some(handle);
    }
}

/// For the control thread.
impl Transport<Block> {
    /// Puts a file behind the device, in place of none or another. Its length, rounded down to whole
    /// sectors, is the capacity; if that is news to the guest, it is told. Returns the capacity in
    /// bytes. Nothing may be under way with a former file (see [`drain`](Self::drain)).
    pub fn attach(&self, file: File) -> Result<u64, Fault> {
        self.with(|block, context| {
            let host = |what| move |source| Fault::Host { device: Block::NAME, what, source };
            let length = file.metadata().map_err(host("read the size of its disk"))?.len();
            // A file that can't be read is to be refused now, not at the guest's first request.
            file.read_at(&mut [0; 1], 0).map_err(host("read its disk"))?;
            let capacity = length / SECTOR;
            block.put(file, capacity, context);
            Ok(capacity * SECTOR)
        })
    }

    /// Puts everything the guest has written on the medium, whether it asked for that or not.
    pub fn sync(&self) -> io::Result<()> {
        let disk = self.look(|block| block.disk.clone());
        disk.map_or(Ok(()), |disk| disk.sync().map(drop))
    }

    /// Has a copy made of the disk as it is now, beside the guest's requests (docs/devices.md).
    pub fn copy(&self, order: CopyOrder) -> Result<(), Fault> {
        self.with(|block, context| {
            block.worker(context.memory)?.copy(order);
            Ok(())
        })
    }

    /// Gives up the copy that is being made, if it is such a one.
    pub fn no_copy(&self, which: WhichCopy, reason: &str) {
        self.look(|block| {
            if let Some(worker) = &block.worker {
                worker.no_copy(which, reason.to_owned());
            }
        });
    }

    pub fn add_stats(&self, stats: &mut Stats) {
        let BlockStats { read_bytes, written_bytes, flushes, .. } = self.stats();
        stats.disk_read_bytes += read_bytes;
        stats.disk_written_bytes += written_bytes;
        stats.disk_flushes += flushes;
    }

    pub fn stats(&self) -> BlockStats {
        self.look(|block| block.stats)
    }

    /// Writes that wait for room on the host's disk.
    pub fn held_writes(&self) -> usize {
        self.look(|block| block.worker.as_ref().map_or(0, Worker::held))
    }
}

#[cfg(test)]
mod tests;
