//! What an idle logged-in machine costs in memory, with many alive.
//!
//! `Anonymous` of smaps_rollup, not `Private_Dirty`: the latter also counts pages of shared files that
//! nobody else happens to map, and comes out wrong with one machine alive.

use std::{fs, path::Path, thread, time::Duration};

use anyhow::Context as _;
use hermitage_storage::base::MEMORY;

use crate::{
    base::{Base, DISK_BYTES},
    cgroup::{Cgroup, Usage},
    fork::{Times, bring_to_prompt, used_disk},
    host::{kib_field, meminfo, parse_kib},
    machines::{
        self, Died, Machine, STEP_LIMIT,
        server::{ForkServer, Parts},
    },
    progress,
    report::Section,
    stats::Samples,
    wait::Deadline,
};

/// What the first issue asks for; `docs/bench.md` has where this goes.
const GOAL: u64 = 6 << 20;

/// Forking stops when no more than this is left to the host.
const RESERVE: u64 = 192 << 20;

/// After the last prompt, before looking: shells and kernels finish what they began.
const SETTLE: Duration = Duration::from_secs(5);

/// Machines whose own figures are told.
const TOLD: [usize; 4] = [1, 10, 50, 100];

struct Alive {
    machine: Machine,
    pid: i32,
    times: Times,
}

/// What the host has in use, all in all.
struct Totals {
    available: u64,
    group: Option<Usage>,
}

impl Totals {
    fn look(group: Option<&Cgroup>) -> anyhow::Result<Self> {
        let group = group.map(Cgroup::usage).transpose()?;
        Ok(Self { available: meminfo("MemAvailable")?, group })
    }
}

/// Starts `n` machines with `server` and looks at them; ends all, the server as well.
pub fn measure(base: &Base, mut server: ForkServer, n: usize) -> anyhow::Result<Section> {
    let group = Cgroup::around(server.pid());
    let result = measure_in(base, &mut server, group.as_ref().ok(), n);
    // The server first: a group can only be removed when nobody is in it.
    drop(server);
    let mut section = result?;
    if let Err(e) = &group {
        section.note(format!("no figures by cgroup: {e:#}"));
    }
    Ok(section)
}

fn measure_in(
    base: &Base,
    server: &mut ForkServer,
    group: Option<&Cgroup>,
    n: usize,
) -> anyhow::Result<Section> {
    let template = used_disk(base, server)?;
    let before = Totals::look(group)?;
    let mut alive = Vec::with_capacity(n);
    let mut notes = Vec::new();
    let grown = grow(base, server, &template, n, &mut alive, &mut notes);
    let result = grown.and_then(|()| {
        progress!("memory: {} machines are alive; settling", alive.len());
        thread::sleep(SETTLE);
        look(&alive, server, &before, group)
    });
    for one in alive {
        server.end(one.machine)?;
    }
    let mut section = result?;
    section.notes.extend(notes);
    Ok(section)
}

fn start(base: &Base, server: &mut ForkServer, template: &Path, k: usize) -> anyhow::Result<Alive> {
    let disk = base.disk(template)?;
    let parts = Parts { disk, for_agent: machines::attach(k as u64, DISK_BYTES)? };
    let mut machine = server.fork(parts)?;
    let started = server
        .forked(&machine, Deadline::after(STEP_LIMIT))
        .and_then(|pid| Ok((pid, bring_to_prompt(&mut machine)?)));
    match started {
        Ok((pid, times)) => Ok(Alive { machine, pid, times }),
        Err(e) => {
            server.end(machine)?;
            Err(e)
        }
    }
}

fn grow(
    base: &Base,
    server: &mut ForkServer,
    template: &Path,
    n: usize,
    alive: &mut Vec<Alive>,
    notes: &mut Vec<String>,
) -> anyhow::Result<()> {
    let mut deaths = 0;
    while alive.len() < n {
        let available = meminfo("MemAvailable")?;
        if available < RESERVE {
            notes.push(format!(
                "stopped at {} of {n} machines: the host has {} MiB left",
                alive.len(),
                available >> 20
            ));
            return Ok(());
        }
        if alive.len().is_multiple_of(10) {
            progress!("memory: {} of {n} machines, {} MiB left", alive.len(), available >> 20);
        }
        match start(base, server, template, alive.len() + 1) {
            Ok(one) => alive.push(one),
            Err(e) if e.is::<Died>() && deaths <= n / 100 => {
                deaths += 1;
                notes.push(format!("made again: {e:#}"));
            }
            Err(e) => return Err(e.context(format!("machine {}", alive.len() + 1))),
        }
    }
    Ok(())
}

fn look(
    alive: &[Alive],
    server: &ForkServer,
    before: &Totals,
    group: Option<&Cgroup>,
) -> anyhow::Result<Section> {
    let after = Totals::look(group)?;
    let own: Vec<Process> =
        alive.iter().map(|one| process(one.pid)).collect::<anyhow::Result<_>>()?;
    let count = own.len() as u64;
    anyhow::ensure!(count > 0, "no machine could be started");
    let all = |of: &dyn Fn(&Process) -> u64| own.iter().map(of).collect::<Samples>();
    let each = |before: u64, after: u64| Samples::from_iter([after.saturating_sub(before) / count]);

    let mut section = Section::new(
        "memory",
        format!("Memory of an idle logged-in machine, {count} alive (bash at its prompt)"),
    );
    section.size("process: anonymous", &all(&|p| p.anonymous)).goal(GOAL);
    section.size("of that, the guest's RAM", &all(&|p| p.guest_ram));
    section.size("process: anonymous, shared pages divided", &all(&|p| p.proportional));
    section.size("process: page tables", &all(&|p| p.page_tables));
    section.size("process: anonymous and page tables", &all(&Process::sum)).goal(GOAL);
    if let (Some(then), Some(now)) = (before.group, after.group) {
        section.size("cgroup / machines: anonymous", &each(then.anonymous, now.anonymous));
        section.size("cgroup / machines: kernel memory", &each(then.kernel, now.kernel));
        section.size(
            "cgroup / machines: of that, KVM's page tables",
            &each(then.secondary_page_tables, now.secondary_page_tables),
        );
    }
    section.size("host / machines: less available", &each(after.available, before.available));
    let server = process(i32::try_from(server.pid()).context("a process id")?)?;
    section.size("fork server, once: anonymous", &Samples::from_iter([server.anonymous]));
    for k in TOLD.into_iter().filter(|&k| k <= alive.len()) {
        let times = &alive[k - 1].times;
        let one = |value: u64| Samples::from_iter([value]);
        section.size(format!("machine {k}: anonymous and page tables"), &one(own[k - 1].sum()));
        section.time(format!("machine {k}: request to running"), &one(times.running));
        section.time(format!("machine {k}: request to prompt"), &one(times.prompt));
    }
    Ok(section)
}

struct Process {
    anonymous: u64,
    /// Pages of the base's memory file that the guest wrote.
    guest_ram: u64,
    /// Pages shared with the fork server divided among those who share them.
    proportional: u64,
    page_tables: u64,
}

impl Process {
    fn sum(&self) -> u64 {
        self.anonymous + self.page_tables
    }
}

fn process(pid: i32) -> anyhow::Result<Process> {
    let rollup = format!("/proc/{pid}/smaps_rollup");
    // What was swapped out is still the machine's.
    let swap = kib_field(&rollup, "Swap")?;
    Ok(Process {
        anonymous: kib_field(&rollup, "Anonymous")? + swap,
        guest_ram: anonymous_of(&format!("/proc/{pid}/smaps"), MEMORY)?,
        proportional: kib_field(&rollup, "Pss_Anon")? + swap,
        page_tables: kib_field(&format!("/proc/{pid}/status"), "VmPTE")?,
    })
}

/// Anonymous memory of the mappings of a file called `name`, out of a process's smaps (proc(5)).
fn anonymous_of(smaps: &str, name: &str) -> anyhow::Result<u64> {
    let text = fs::read_to_string(smaps).with_context(|| format!("read {smaps}"))?;
    Ok(sum_anonymous(&text, name))
}

fn sum_anonymous(smaps: &str, name: &str) -> u64 {
    let mut inside = false;
    let mut sum = 0;
    for line in smaps.lines() {
        // A mapping begins with its range of addresses; its fields end their names with a colon.
        let first = line.split_ascii_whitespace().next().unwrap_or_default();
        if !first.ends_with(':') {
            inside = line.rsplit('/').next() == Some(name);
        } else if inside && first == "Anonymous:" {
            sum += parse_kib(line, "Anonymous").unwrap_or(0);
        }
    }
    sum
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_the_named_mappings_count() {
        let smaps = "7f00-7f10 rw-p 00000000 fe:10 12    /var/lib/hermitage/bases/1/memory.img\n\
                     Size:             524288 kB\n\
                     Anonymous:            40 kB\n\
                     VmFlags: rd wr mr mw me nr\n\
                     7f10-7f20 rw-p 00000000 00:00 0 \n\
                     Anonymous:          4108 kB\n\
                     7f20-7f30 rw-p c0000000 fe:10 12    /var/lib/hermitage/bases/1/memory.img\n\
                     Anonymous:             4 kB\n\
                     7f30-7f40 rw-p 00000000 fe:10 13    /var/lib/hermitage/bases/1/root.erofs\n\
                     Anonymous:            16 kB\n";
        assert_eq!(sum_anonymous(smaps, MEMORY), 44 * 1024);
    }
}
