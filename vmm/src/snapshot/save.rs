//! Saving: everything of a paused machine that its base does not have, into a file.

use std::{
    fs::File,
    io,
    ops::Range,
    os::unix::fs::FileExt as _,
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

use super::{
    pagemap::{Pagemap, PagemapError},
    plan::{Known, Piece, plan},
};
use crate::{
    SNAPSHOT_VERSION,
    machine::{Machine, MachineError, MachineState},
    memory::{self, GuestMemory, RamRegion, ram_regions},
    stages::Stages,
    working_set::Pristine,
};

/// Most pages of the base that are read at once.
const READ: usize = 16;

/// Most pages that are compared before they are summed, so that the CPU's caches still have them.
const ROW: usize = 64;

/// What a machine was made from: what its snapshots are the difference to.
pub struct Origin<'a> {
    pub base: &'a BaseId,
    pub pristine: &'a Pristine,
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
    let mut comparison = Comparison::new(&machine.memory, origin.pristine);
    for piece in &pieces {
        comparison.write(piece, &mut writer)?;
    }
    stages.done("write pages");
    let description = describe(origin, request, &state, &machine.memory);
    let state = postcard::to_stdvec(&state).map_err(SaveError::Encode)?;
    let header = writer.finish(description, &state)?;
    stages.done("sync snapshot");
    Ok(Saved { bytes: header.file_bytes(), pages: header.data_pages })
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

/// Tells a paused machine's pages from its base's.
struct Comparison<'a> {
    memory: &'a GuestMemory,
    regions: Vec<RamRegion>,
    pristine: &'a Pristine,
    /// For pages that are not kept in there.
    read: Vec<[u8; PAGE]>,
}

impl<'a> Comparison<'a> {
    fn new(memory: &'a GuestMemory, pristine: &'a Pristine) -> Self {
        Self { memory, regions: ram_regions(memory).collect(), pristine, read: Vec::new() }
    }

    /// Writes those pages that can differ and do.
    fn write(&mut self, piece: &Piece, writer: &mut Writer<'_, 'a>) -> Result<(), SaveError> {
        if piece.known == Known::Zero {
            return piece.pages.clone().try_for_each(|page| Ok(writer.zero(page)?));
        }
        let mut first = piece.pages.start;
        while first < piece.pages.end {
            let (address, ours) = self.ours(first..piece.pages.end)?;
            let base = match piece.known {
                Known::Nothing => Some(self.base(first, address, ours.len())?),
                _ => None,
            };
            let ours = &ours[..base.map_or(ours.len(), <[_]>::len)];
            write(first, ours, base, writer)?;
            first += ours.len() as u64;
        }
        Ok(())
    }

    /// The machine's pages and their guest address, as far as they are in one region of RAM: the next one lies
    /// elsewhere.
    fn ours(&self, numbers: Range<u64>) -> Result<(u64, Pages<'a>), SaveError> {
        let offset = numbers.start * PAGE as u64;
        let region = self.regions.iter().find(|region| region.file().contains(&offset));
        let region = region.ok_or(SaveError::Read(offset))?;
        let end = region.file().end.min(numbers.end * PAGE as u64);
        let address = region.guest + (offset - region.file_offset);
        let count = (end - offset) as usize / PAGE;
        // SAFETY: the machine is paused, its vCPUs and the disk's thread; this thread is all else that writes to
        // its memory, and does not before the snapshot is written.
        let ours = unsafe { memory::pages(self.memory, address, count) };
        Ok((address, ours.ok_or(SaveError::Read(address))?))
    }

    /// Some of the base's pages: `most` at most, and at least one.
    fn base(&mut self, first: u64, address: u64, most: usize) -> Result<Pages<'_>, SaveError> {
        let kept = self.pristine.pages(address, most);
        if !kept.is_empty() {
            return Ok(kept);
        }
        // All regions are one memory file's.
        let file = self.regions.first().and_then(|region| region.base.as_ref());
        let file = file.ok_or(SaveError::NoBase)?;
        let offset = first * PAGE as u64;
        self.read.resize(READ, [0; PAGE]);
        let pages = &mut self.read[..most.min(READ)];
        file.read_exact_at(pages.as_flattened_mut(), offset)
            .map_err(|source| SaveError::Base { offset, source })?;
        Ok(pages)
    }
}

/// Neighbouring pages.
type Pages<'a> = &'a [[u8; PAGE]];

/// What a save does with a page.
#[derive(Clone, Copy, PartialEq)]
enum Kind {
    /// Nothing: the base has it.
    Base,
    Zero,
    Data,
}

/// Writes those of the pages that are not the base's, if that is given.
fn write<'a>(
    first: u64,
    ours: Pages<'a>,
    base: Option<Pages<'_>>,
    writer: &mut Writer<'_, 'a>,
) -> Result<(), SaveError> {
    let kind = |n: usize| match ours.get(n) {
        Some(page) if base.is_none_or(|base| *page != base[n]) => {
            if *page == [0; PAGE] {
                Kind::Zero
            } else {
                Kind::Data
            }
        }
        // The end as well.
        _ => Kind::Base,
    };
    // From here on there is data that the writer does not have yet.
    let mut begin = 0;
    for n in 0..=ours.len() {
        let kind = kind(n);
        if kind == Kind::Data && n - begin < ROW {
            continue;
        }
        if begin < n {
            writer.data(first + begin as u64, &ours[begin..n])?;
        }
        begin = if kind == Kind::Data { n } else { n + 1 };
        if kind == Kind::Zero {
            writer.zero(first + n as u64)?;
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use hermitage_storage::snapshot::{Content, Snapshot};
    use proptest::prelude::*;

    use super::*;

    fn description() -> Description {
        Description {
            base: BaseId::parse("00112233445566778899aabbccddeeff").unwrap(),
            account: Uuid::from_u128(7),
            disk_tag: [0; 16],
            created: 0,
            ram: 2 << 20,
            vcpus: 1,
            state_version: 1,
        }
    }

    /// The pages of a snapshot by number, with their first byte.
    fn read(file: File) -> Vec<(u64, u8)> {
        let snapshot = Snapshot::open(file).unwrap();
        let mut found = Vec::new();
        for run in &snapshot.runs {
            for n in 0..run.pages {
                let mut byte = [0];
                if let Content::Data { at } = run.content {
                    snapshot.file.read_exact_at(&mut byte, at + n * PAGE as u64).unwrap();
                }
                found.push((run.page + n, byte[0]));
            }
        }
        found
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(100))]

        /// Three kinds of pages in any order: what is the base's is left out, what is zero has no data.
        #[test]
        fn what_differs_is_written_and_nothing_else(
            pages in proptest::collection::vec((0u8..3, 0u8..3), 0..4 * ROW),
            known in any::<bool>(),
        ) {
            let of = |side: fn(&(u8, u8)) -> u8| -> Vec<[u8; PAGE]> {
                pages.iter().map(|page| [side(page); PAGE]).collect()
            };
            let (ours, base) = (of(|page| page.0), of(|page| page.1));
            let file = tempfile::tempfile().unwrap();
            let mut writer = Writer::new(&file).unwrap();
            write(5, &ours, Some(&base[..]).filter(|_| known), &mut writer).unwrap();
            writer.finish(description(), &[]).unwrap();
            let expected: Vec<(u64, u8)> = (5..)
                .zip(&pages)
                .filter(|(_, (ours, base))| !known || ours != base)
                .map(|(n, (ours, _))| (n, *ours))
                .collect();
            prop_assert_eq!(read(file), expected);
        }
    }
}
