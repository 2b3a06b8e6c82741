//! That being savable costs a running machine nothing: what a save needs to know is asked of the kernel
//! when it comes (`vmm/src/snapshot/pagemap.rs`), nobody keeps a log of what the guest writes.
//!
//! A log would show. KVM keeps one by taking away the right to write from every page and noticing the
//! first write to it after each look, which is an exit of the guest per page. So a program in the guest
//! writes to pages that it has written to before, and the exits are counted: before there was any save,
//! and after one that was called off.

use std::{fs::File, path::Path};

use anyhow::Context as _;

use super::machines::attach;
use crate::{
    base::{Base, DISK_BYTES},
    exits::Exits,
    fork::Deaths,
    machines::{
        Machine, STEP_LIMIT,
        server::{ForkServer, Parts},
    },
    report::Section,
    stats::Samples,
    wait::Deadline,
};

/// Pages that the program writes to, each once a pass.
const PAGES: u64 = 4096;
const PASSES: u64 = 20;

/// Exits by page faults that a pass may have: the program's own and its kernel's odd ones.
const GOAL: u64 = PAGES / 20;

/// Says after each line how long a pass took, in nanoseconds.
const PROGRAM: &str = r#"
import mmap, sys, time
pages = int(sys.argv[1])
memory = mmap.mmap(-1, pages * 4096)
def work():
    begun = time.monotonic_ns()
    for page in range(pages):
        memory[page * 4096] = (memory[page * 4096] + 1) % 256
    return time.monotonic_ns() - begun
for _ in range(3):
    work()
print("@@ ready", flush=True)
for line in sys.stdin:
    print("@@ took", work(), flush=True)
"#;

#[derive(Default)]
struct Passes {
    time: Samples,
    faults: Samples,
}

pub fn measure(
    base: &Base,
    server: &mut ForkServer,
    disk: &Path,
    section: &mut Section,
    deaths: &mut Deaths,
) -> anyhow::Result<()> {
    let disk = base.disk(disk)?;
    let mut machine = server.fork(Parts { disk, for_agent: attach(1, DISK_BYTES)? })?;
    let pid = server.forked(&machine, Deadline::after(STEP_LIMIT))?;
    let found = compare(base, &mut machine, pid);
    server.end(machine)?;
    let Some([before, after]) = deaths.survivor(found)? else { return Ok(()) };
    let peer = Some(before.time.p50());
    for (when, passes) in [("before any save", &before), ("after a save called off", &after)] {
        let row =
            section.time(format!("running, {when}: {PAGES} pages written again"), &passes.time);
        row.over(peer, "before");
        if passes.faults.count() > 0 {
            let row = section.count(format!("running, {when}: their exits"), &passes.faults);
            row.goal(GOAL);
        }
    }
    Ok(())
}

fn compare(base: &Base, machine: &mut Machine, pid: i32) -> anyhow::Result<[Passes; 2]> {
    machine.running()?;
    machine.attached()?;
    let command = format!("stty -echo; exec python3 -c '{PROGRAM}' {PAGES}");
    machine.run_on_terminal(command.into_bytes())?;
    machine.ask("", "@@ ready")?;
    let before = passes(machine, pid)?;
    let path = base.scratch().join("called-off.snap");
    let _ = std::fs::remove_file(&path);
    let file = File::options().read(true).write(true).create_new(true).open(&path);
    let file = file.with_context(|| format!("make {}", path.display()))?;
    let pagemap = File::open(format!("/proc/{pid}/pagemap")).context("open a page map")?;
    machine.freeze()?;
    let saved = machine.save(&file, &pagemap, [1; 16])?;
    saved.map_err(|reason| anyhow::anyhow!("the save failed: {reason}"))?;
    machine.call_off()?;
    machine.resume_agent()?;
    let after = passes(machine, pid)?;
    Ok([before, after])
}

fn passes(machine: &mut Machine, pid: i32) -> anyhow::Result<Passes> {
    let mut passes = Passes::default();
    for _ in 0..PASSES {
        let before = Exits::of(pid);
        let line = machine.ask("again", "@@ took")?;
        let time = line.rsplit(' ').next().and_then(|word| word.parse().ok());
        passes.time.push(time.with_context(|| format!("the program said {line:?}"))?);
        if let (Some(before), Some(after)) = (before, Exits::of(pid)) {
            passes.faults.push(after.page_faults.saturating_sub(before.page_faults));
        }
    }
    Ok(passes)
}
