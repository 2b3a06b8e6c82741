//! Invariant 6: base + diff is the machine, byte for byte. The paused machine's memory is read from
//! outside of it (`/proc/PID/mem`), every page, and compared with what base and snapshot come to.

use std::{
    fs::{self, File},
    os::unix::fs::FileExt as _,
};

use anyhow::{Context as _, bail, ensure};
use hermitage_storage::snapshot::{Content, PAGE, Run, Snapshot};
use hermitage_vmm::memory::layout::Layout;

/// Read and compared at once.
const CHUNK: u64 = 1 << 20;

/// Where the fork server, and so each machine forked from it, has the base's memory.
#[derive(Clone, Copy, Debug)]
pub struct Mapping {
    address: u64,
    bytes: u64,
    offset: u64,
}

/// From the fork server's own mappings: a resumed machine's are in more pieces. The first one of the
/// memory file tells where each range begins, as the ranges are whole.
pub fn mappings(server: u32, layout: &Layout) -> anyhow::Result<Vec<Mapping>> {
    let path = format!("/proc/{server}/maps");
    let text = fs::read_to_string(&path).with_context(|| format!("read {path}"))?;
    let hex = |text: &str| u64::from_str_radix(text, 16).context("a number in the mappings");
    let mut pieces = Vec::new();
    for line in text.lines().filter(|line| line.ends_with("/memory.img")) {
        let mut words = line.split_ascii_whitespace();
        let (range, offset) = (words.next().unwrap_or(""), words.nth(1).unwrap_or(""));
        let (start, _) = range.split_once('-').unwrap_or_default();
        pieces.push((hex(start)?, hex(offset)?));
    }
    layout
        .ram()
        .map(|range| {
            let file = range.file_offset..range.file_offset + range.length;
            let &(start, offset) = pieces
                .iter()
                .find(|(_, offset)| file.contains(offset))
                .with_context(|| format!("{path} shows no mapping of memory.img at {file:x?}"))?;
            let address = start - (offset - range.file_offset);
            Ok(Mapping { address, bytes: range.length, offset: range.file_offset })
        })
        .collect()
}

/// Compares all of RAM. Returns its pages.
pub fn compare(
    pid: i32,
    mappings: &[Mapping],
    base: &File,
    snapshot: &Snapshot,
) -> anyhow::Result<u64> {
    let memory = File::open(format!("/proc/{pid}/mem")).context("open the machine's memory")?;
    let mut found = vec![0; CHUNK as usize];
    let mut expected = vec![0; CHUNK as usize];
    let mut pages = 0;
    for mapping in mappings {
        let mut done = 0;
        while done < mapping.bytes {
            let length = (mapping.bytes - done).min(CHUNK);
            let offset = mapping.offset + done;
            let (found, expected) =
                (&mut found[..length as usize], &mut expected[..length as usize]);
            memory
                .read_exact_at(found, mapping.address + done)
                .with_context(|| format!("read the machine's memory at {offset:#x}"))?;
            base.read_exact_at(expected, offset).context("read the base's memory")?;
            apply(expected, offset, snapshot)?;
            if found != expected {
                let at = found.iter().zip(&*expected).position(|(a, b)| a != b).unwrap_or(0) as u64;
                let page = (offset + at) / PAGE as u64;
                bail!("page {page} of base + snapshot is not the machine's");
            }
            done += length;
        }
        pages += mapping.bytes / PAGE as u64;
    }
    Ok(pages)
}

/// Puts the snapshot's pages over a piece of the base's memory.
fn apply(piece: &mut [u8], offset: u64, snapshot: &Snapshot) -> anyhow::Result<()> {
    let page = PAGE as u64;
    let (first, last) = (offset / page, (offset + piece.len() as u64) / page);
    let from = snapshot.runs.partition_point(|run| run.end() <= first);
    for run in snapshot.runs[from..].iter().take_while(|run| run.page < last) {
        let (start, end) = (run.page.max(first), run.end().min(last));
        let target = &mut piece[(start - first) as usize * PAGE..(end - first) as usize * PAGE];
        match run.content {
            Content::Zero => target.fill(0),
            Content::Data { at } => {
                let at = at + (start - run.page) * page;
                snapshot.file.read_exact_at(target, at).context("read the snapshot")?;
            }
        }
    }
    Ok(())
}

/// Every page of the snapshot is there for a reason: it differs from the base's.
pub fn is_minimal(base: &File, snapshot: &Snapshot) -> anyhow::Result<()> {
    let mut ours = [0; PAGE];
    let mut theirs = [0; PAGE];
    for run in &snapshot.runs {
        for n in 0..run.pages {
            let page = run.page + n;
            base.read_exact_at(&mut theirs, page * PAGE as u64)
                .context("read the base's memory")?;
            data(run, n, snapshot, &mut ours)?;
            ensure!(ours != theirs, "page {page} of the snapshot is the base's");
            let zero = ours == [0; PAGE];
            ensure!(zero == (run.content == Content::Zero), "page {page} is zero and has data");
        }
    }
    Ok(())
}

fn data(run: &Run, n: u64, snapshot: &Snapshot, into: &mut [u8; PAGE]) -> anyhow::Result<()> {
    match run.content {
        Content::Zero => into.fill(0),
        Content::Data { at } => {
            let at = at + n * PAGE as u64;
            snapshot.file.read_exact_at(into, at).context("read the snapshot")?;
        }
    }
    Ok(())
}
