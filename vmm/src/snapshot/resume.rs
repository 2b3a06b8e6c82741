//! Resuming: a snapshot's pages are put over the base's, in this process's mapping only.
//!
//! Long runs are mapped from the file, privately: that costs no copy, and the pages stay the page cache's
//! until the machine writes them. Short runs are copied, because each mapping costs the kernel an area,
//! and a process may have some 65,000 of them (vm.max_map_count).

use std::{fs::File, io, os::fd::AsRawFd as _};

use hermitage_storage::{
    base::{self, BaseId, Size},
    faults::{self, Point},
    snapshot::{Content, Header, PAGE, Run, Snapshot, SnapshotError},
};
use vm_memory::{Bytes as _, GuestAddress};

use crate::{
    SNAPSHOT_VERSION,
    kvm::{self, VcpuState},
    machine::{MachineError, MachineState},
    memory::{self, GuestMemory, MemoryError, RamRegion, ram_regions},
    stages::Stages,
};

/// Runs of so many pages and more are mapped. Below, a copy costs no more than a mapping.
const WORTH_MAPPING: u64 = 8;

/// Most runs that are mapped; each may cut an area in two.
const MAX_MAPPED: usize = 8192;

/// Pages copied at once.
const CHUNK: usize = 64;

#[derive(Debug, thiserror::Error)]
pub enum ResumeError {
    #[error(transparent)]
    Snapshot(#[from] SnapshotError),
    #[error("it was taken of another base ({0})")]
    Base(BaseId),
    #[error("its {what} is {found}, here it is {expected}")]
    Other { what: &'static str, found: u64, expected: u64 },
    #[error("it has {ram} bytes of RAM and {vcpus} vCPUs, which machines of its base can't have")]
    Size { ram: u64, vcpus: u32 },
    #[error(transparent)]
    Memory(#[from] MemoryError),
    #[error("its state can't be used: {0}")]
    State(#[from] MachineError),
    #[error("map {pages} pages at page {page:#x}: {source}")]
    Map { page: u64, pages: u64, source: io::Error },
    #[error("read {pages} pages of it: {source}")]
    Read { pages: u64, source: io::Error },
    #[error("write guest memory at page {0:#x}")]
    Write(u64),
}

/// What a machine is resumed from, beside the snapshot.
pub struct From<'a> {
    pub base: &'a BaseId,
    pub sizes: base::Machine,
    /// Those that its machines can have at most.
    pub vcpus: &'a [VcpuState],
    /// Of the base, as much as its machines can have; this process's alone.
    pub memory: &'a GuestMemory,
}

/// What a machine is resumed to.
pub struct Resume {
    pub state: MachineState,
    pub memory: GuestMemory,
    /// Which pages are the snapshot's.
    pub runs: Vec<Run>,
    pub header: Header,
}

/// Checks a snapshot whole and puts its pages over the base's. The machine has what it had, and what `size` has beyond
/// that: memory that it has never seen, and CPUs that wait to be started. After an error memory may be half of
/// one and half of the other.
pub fn load(
    file: File,
    from: &From<'_>,
    size: Size,
    stages: &mut Stages,
) -> Result<Resume, ResumeError> {
    let snapshot = Snapshot::open(file)?;
    let had = check_fit(&snapshot.header, from)?;
    let memory = memory::limited(from.memory, had.memory_bytes.max(size.memory_bytes))?;
    faults::at(Point::ResumeChecked)
        .map_err(|source| ResumeError::Read { pages: snapshot.header.data_pages, source })?;
    stages.done("check snapshot");
    let mut state = MachineState::decode(&snapshot.state)?;
    if state.vcpus.len() != usize::from(had.vcpus) {
        let (found, expected) = (state.vcpus.len() as u64, had.vcpus.into());
        return Err(ResumeError::Other { what: "state's number of vCPUs", found, expected });
    }
    let more = from.vcpus.get(state.vcpus.len()..size.vcpus.into()).unwrap_or_default();
    if !more.is_empty() {
        state.vcpus.extend_from_slice(more);
        kvm::align_tscs(&mut state.vcpus);
    }
    stages.done("decode state");
    let regions = ram_regions(&memory).collect();
    let pages = Pages { memory: &memory, regions, file: &snapshot.file };
    let threshold = threshold(&snapshot.runs);
    for run in &snapshot.runs {
        if run.pages >= threshold { pages.map(run)? } else { pages.copy(run)? }
    }
    stages.done("put pages in place");
    let Snapshot { header, runs, .. } = snapshot;
    Ok(Resume { state, memory, runs, header })
}

/// Returns what the machine had.
fn check_fit(header: &Header, from: &From<'_>) -> Result<Size, ResumeError> {
    let about = &header.description;
    if about.base != *from.base {
        return Err(ResumeError::Base(about.base.clone()));
    }
    let (found, expected) = (about.state_version.into(), SNAPSHOT_VERSION.into());
    if found != expected {
        return Err(ResumeError::Other { what: "state's version", found, expected });
    }
    let had = about.size();
    if !from.sizes.allows(had) {
        return Err(ResumeError::Size { ram: about.ram, vcpus: about.vcpus });
    }
    Ok(had)
}

/// From which length on runs are mapped, so that they are not too many.
fn threshold(runs: &[Run]) -> u64 {
    let mut pages = WORTH_MAPPING;
    while runs.iter().filter(|run| run.pages >= pages).count() > MAX_MAPPED {
        pages *= 2;
    }
    pages
}

struct Pages<'a> {
    memory: &'a GuestMemory,
    regions: Vec<RamRegion>,
    file: &'a File,
}

/// The part of a run that lies in one region of RAM.
struct Part {
    page: u64,
    bytes: u64,
    guest: u64,
    host: u64,
    /// Where its data is; none for zeroes.
    data: Option<u64>,
}

impl Pages<'_> {
    fn parts(&self, run: &Run) -> impl Iterator<Item = Part> {
        let page = PAGE as u64;
        let (from, to) = (run.page * page, run.end() * page);
        let content = run.content;
        self.regions.iter().filter_map(move |region| {
            let file = region.file();
            let (start, end) = (from.max(file.start), to.min(file.end));
            (start < end).then(|| Part {
                page: start / page,
                bytes: end - start,
                guest: region.guest + (start - file.start),
                host: region.host + (start - file.start),
                data: match content {
                    Content::Zero => None,
                    Content::Data { at } => Some(at + (start - from)),
                },
            })
        })
    }

    fn map(&self, run: &Run) -> Result<(), ResumeError> {
        for part in self.parts(run) {
            let (flags, fd, offset) = match part.data {
                Some(at) => (libc::MAP_NORESERVE, self.file.as_raw_fd(), at as libc::off_t),
                None => (libc::MAP_NORESERVE | libc::MAP_ANONYMOUS, -1, 0),
            };
            // SAFETY: the range is part of one region of guest memory, which is mapped for its whole
            // length and stays so: MAP_FIXED puts a private, readable and writable mapping in the place
            // of another. The file was found to be long enough, and nobody shortens it. Nobody else looks
            // at this memory yet: there is no VM, and this process has one thread.
            let mapped = unsafe {
                libc::mmap(
                    part.host as *mut libc::c_void,
                    part.bytes as usize,
                    libc::PROT_READ | libc::PROT_WRITE,
                    libc::MAP_PRIVATE | libc::MAP_FIXED | flags,
                    fd,
                    offset,
                )
            };
            if mapped == libc::MAP_FAILED {
                let (page, pages) = (part.page, part.bytes / PAGE as u64);
                return Err(ResumeError::Map { page, pages, source: io::Error::last_os_error() });
            }
        }
        Ok(())
    }

    fn copy(&self, run: &Run) -> Result<(), ResumeError> {
        use std::os::unix::fs::FileExt as _;
        for part in self.parts(run) {
            let mut done = 0;
            while done < part.bytes {
                let length = (part.bytes - done).min((CHUNK * PAGE) as u64);
                let mut bytes = vec![0; length as usize];
                if let Some(at) = part.data {
                    let pages = length / PAGE as u64;
                    self.file
                        .read_exact_at(&mut bytes, at + done)
                        .map_err(|source| ResumeError::Read { pages, source })?;
                }
                self.memory
                    .write_slice(&bytes, GuestAddress(part.guest + done))
                    .map_err(|_| ResumeError::Write(part.page))?;
                done += length;
            }
        }
        Ok(())
    }
}
