//! Saving: everything of a paused machine that its base does not have, into a file.

use std::{
    fs::File,
    io,
    ops::Range,
    os::{fd::AsRawFd as _, unix::fs::FileExt as _},
    time::{SystemTime, UNIX_EPOCH},
};

use hermitage_storage::{
    base::BaseId,
    disk::Tag,
    faults::{self, Point},
    snapshot::{Description, PAGE, Run, SnapshotError, Writer},
};
use kvm_bindings::kvm_msr_entry;
use uuid::Uuid;
use vm_memory::{Bytes as _, GuestAddress};

use super::{
    pagemap::{Pagemap, PagemapError},
    plan::{Known, Piece, plan},
};
use crate::{
    SNAPSHOT_VERSION,
    machine::{Machine, MachineError, MachineState},
    memory::{GuestMemory, RamRegion, ram_regions},
    stages::Stages,
};

/// Pages read at once.
const CHUNK: usize = 64;

/// Bytes after which the medium is given something to do.
const WRITE_OUT: u64 = 1 << 20;

/// What a machine was made from: what its snapshots are the difference to.
pub struct Origin<'a> {
    pub base: &'a BaseId,
    /// What its vCPUs' registers were before they ran.
    pub fresh_msrs: &'a [kvm_msr_entry],
    /// The pages that it was resumed with; none for a fork.
    pub resumed_with: Vec<Run>,
}

pub struct SaveRequest {
    /// Empty, open for reading and writing.
    pub file: File,
    /// This process's `/proc/PID/pagemap`.
    pub pagemap: File,
    pub account: [u8; 16],
    pub disk_tag: Tag,
}

pub struct Saved {
    /// Of the file.
    pub bytes: u64,
    /// With data in it.
    pub pages: u64,
}

#[derive(Debug, thiserror::Error)]
pub enum SaveError {
    #[error(transparent)]
    Machine(#[from] MachineError),
    #[error(transparent)]
    Pagemap(#[from] PagemapError),
    #[error("write the snapshot: {0}")]
    Snapshot(#[from] SnapshotError),
    #[error("sync the disk: {0}")]
    Disk(#[source] io::Error),
    #[error("encode the machine's state: {0}")]
    Encode(#[source] postcard::Error),
    #[error("read guest memory at {0:#x}")]
    Read(u64),
    #[error("read the base's memory at {offset:#x}: {source}")]
    Base { offset: u64, source: io::Error },
    #[error("this machine's memory is no file's")]
    NoBase,
}

impl SaveError {
    /// Something was under way that will be over in a moment.
    pub fn is_passing(&self) -> bool {
        matches!(self, Self::Machine(MachineError::State(state)) if state.is_busy())
    }
}

/// Pauses the machine and saves it. It stays paused, whether this succeeds or not.
pub fn save(
    machine: &Machine,
    origin: &Origin<'_>,
    request: &SaveRequest,
    stages: &mut Stages,
) -> Result<Saved, SaveError> {
    let pagemap = Pagemap::new(request.pagemap.try_clone().map_err(PagemapError::Read)?)?;
    let fresh = origin.fresh_msrs;
    let state = machine.pause_and_save(fresh, &mut |stage| stages.done(stage))?;
    faults::at(Point::SaveDisk)
        .and_then(|()| machine.devices.block.sync())
        .map_err(SaveError::Disk)?;
    stages.done("sync disk");
    let former = machine.devices.balloon.left_of(&origin.resumed_with);
    let pieces = pieces(&machine.memory, &pagemap, &former)?;
    stages.done("find pages");
    let mut writer = Writer::new(&request.file)?;
    let mut copier = Copier::new(&machine.memory);
    let mut written_out = 0;
    for piece in &pieces {
        copier.copy(piece, &mut writer)?;
        if writer.cached() > written_out + WRITE_OUT {
            write_out(&request.file, written_out..writer.cached());
            written_out = writer.cached();
        }
    }
    stages.done("write pages");
    let description = describe(origin, request, &state, &machine.memory);
    let state = postcard::to_stdvec(&state).map_err(SaveError::Encode)?;
    let header = writer.finish(description, &state)?;
    stages.done("sync snapshot");
    Ok(Saved { bytes: header.file_bytes(), pages: header.data_pages })
}

/// Has the kernel begin to write a part of the file to the medium, so that the sync at the end finds most of
/// it there (sync_file_range(2)). It promises nothing and may fail: the sync tells.
fn write_out(file: &File, range: Range<u64>) {
    let (Ok(from), Ok(length)) =
        (i64::try_from(range.start), i64::try_from(range.end - range.start))
    else {
        return;
    };
    // SAFETY: takes a descriptor, which is open, and numbers.
    let _ = unsafe {
        libc::sync_file_range(file.as_raw_fd(), from, length, libc::SYNC_FILE_RANGE_WRITE)
    };
}

fn describe(
    origin: &Origin<'_>,
    request: &SaveRequest,
    state: &MachineState,
    memory: &GuestMemory,
) -> Description {
    let since_1970 = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    Description {
        base: origin.base.clone(),
        account: Uuid::from_bytes(request.account),
        disk_tag: request.disk_tag,
        created: i64::try_from(since_1970.as_secs()).unwrap_or(i64::MAX),
        ram: ram_regions(memory).map(|region| region.length).sum(),
        // At most a few dozen.
        vcpus: state.vcpus.len() as u32,
        state_version: SNAPSHOT_VERSION,
    }
}

/// The pages that can differ, by their numbers in the base's memory file, in order.
fn pieces(
    memory: &GuestMemory,
    pagemap: &Pagemap,
    former: &[Run],
) -> Result<Vec<Piece>, SaveError> {
    let page = PAGE as u64;
    let mut written = Vec::new();
    for region in ram_regions(memory) {
        let found = pagemap.own_pages(region.host..region.host + region.length)?;
        written.extend(found.into_iter().map(|range| {
            let number = |address| (region.file_offset + (address - region.host)) / page;
            number(range.start)..number(range.end)
        }));
    }
    Ok(plan(&written, former))
}

/// Moves pages from the guest's memory to the file, leaving out what the base has.
struct Copier {
    memory: GuestMemory,
    regions: Vec<RamRegion>,
    ours: Vec<u8>,
    base: Vec<u8>,
}

impl Copier {
    fn new(memory: &GuestMemory) -> Self {
        Self {
            memory: memory.clone(),
            regions: ram_regions(memory).collect(),
            ours: vec![0; CHUNK * PAGE],
            base: vec![0; CHUNK * PAGE],
        }
    }

    fn copy(&mut self, piece: &Piece, writer: &mut Writer<'_>) -> Result<(), SaveError> {
        if piece.known == Known::Zero {
            return piece.pages.clone().try_for_each(|page| Ok(writer.zero(page)?));
        }
        let mut page = piece.pages.start;
        while page < piece.pages.end {
            page += self.chunk(page, piece, writer)?;
        }
        Ok(())
    }

    /// Copies some pages from `first` on; returns how many.
    fn chunk(
        &mut self,
        first: u64,
        piece: &Piece,
        writer: &mut Writer<'_>,
    ) -> Result<u64, SaveError> {
        let offset = first * PAGE as u64;
        // A piece may go from one region of RAM into the next, which lies elsewhere.
        let region = self
            .regions
            .iter()
            .find(|region| region.file().contains(&offset))
            .ok_or(SaveError::Read(offset))?;
        let most = (region.file().end - offset) / PAGE as u64;
        let count = (piece.pages.end - first).min(most).min(CHUNK as u64);
        let length = count as usize * PAGE;
        let address = region.guest + (offset - region.file_offset);
        self.memory
            .read_slice(&mut self.ours[..length], GuestAddress(address))
            .map_err(|_| SaveError::Read(address))?;
        let compare = piece.known == Known::Nothing;
        if compare {
            let file = region.base.as_ref().ok_or(SaveError::NoBase)?;
            file.read_exact_at(&mut self.base[..length], offset)
                .map_err(|source| SaveError::Base { offset, source })?;
        }
        let (ours, _) = self.ours[..length].as_chunks::<PAGE>();
        let (base, _) = self.base[..length].as_chunks::<PAGE>();
        for (page, (ours, base)) in (first..).zip(ours.iter().zip(base)) {
            if compare && ours == base {
                continue;
            }
            match *ours == [0; PAGE] {
                true => writer.zero(page)?,
                false => writer.data(page, ours)?,
            }
        }
        Ok(count)
    }
}
