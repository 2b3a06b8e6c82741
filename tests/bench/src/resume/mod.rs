//! Saving and resuming, proved on machines of this host: `hermitage-bench --prove-resume N`.
//!
//! A program that would notice works in a machine, which is saved, compared with its snapshot byte for
//! byte, ended and resumed, N times. Then damaged snapshots, saves that fail and one that is called off.
//! The figures that come with it are printed; the end-to-end tests run this.

mod compare;
mod neighbour;
mod program;
mod twins;

use std::{
    fs::{self, File, OpenOptions},
    os::{
        fd::{AsFd as _, OwnedFd},
        unix::fs::FileExt as _,
    },
    path::{Path, PathBuf},
};

use anyhow::{Context as _, bail, ensure};
use hermitage_guest_proto::Resources;
use hermitage_storage::snapshot::Snapshot;
use hermitage_vmm::memory::layout::Layout;
use hermitage_vmm_proto::{Shape, Stage};

use crate::{
    base::{Base, DISK_BYTES},
    clock, fork,
    machines::{
        self, Died, Machine, STEP_LIMIT,
        save::{Restored, Saved},
        server::{ForkServer, Parts},
    },
    progress,
    wait::Deadline,
};
use compare::Mapping;
use neighbour::Neighbour;
use program::Program;

/// What is to be proved.
#[derive(Clone, Copy, Debug)]
pub struct Extent {
    /// Saves and resumes of one machine.
    pub rounds: u64,
    /// MiB that the program in it holds.
    pub memory: u64,
    /// Bytes of a snapshot that are flipped, one after another.
    pub flips: u64,
    /// What the machine has, if not its base's least.
    pub size: Option<Size>,
}

/// Memory and CPUs of a machine.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Size {
    pub mib: u64,
    pub vcpus: u8,
}

impl std::str::FromStr for Size {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let parts = text.split_once(',');
        let numbers = parts.and_then(|(mib, vcpus)| Some((mib.parse().ok()?, vcpus.parse().ok()?)));
        let (mib, vcpus) = numbers.ok_or("MIB,CPUS: 1024,2")?;
        Ok(Self { mib, vcpus })
    }
}

impl Size {
    fn resources(self) -> Resources {
        Resources { memory_bytes: self.mib << 20, vcpus: self.vcpus }
    }
}

/// Rounds from one visit of another account's machine to the next. Fewer than these are for a look at a
/// large machine, whose every comparison takes long.
const NEIGHBOUR: u64 = 5;

/// Times of the saves and resumes, in nanoseconds.
#[derive(Default)]
struct Figures {
    save_times: Vec<u64>,
    resumes: Vec<Vec<Stage>>,
    resume_times: Vec<u64>,
}

pub fn prove(base: &Base, vmm: &Path, extent: Extent) -> anyhow::Result<()> {
    let mut proof = Proof {
        base,
        vmm,
        mappings: Vec::new(),
        snapshot: base.scratch().join("resume.snap"),
        figures: Figures::default(),
        size: extent.size,
        layout: match extent.size {
            None => base.layout.clone(),
            Some(size) => {
                let (most, root) = (base.layout.max_ram_bytes(), base.layout.root.length);
                Layout::new(size.mib << 20, most, root)?
            }
        },
    };
    let vcpus = extent.size.map_or(base.state.vcpus.len(), |size| size.vcpus.into());
    println!("machine: {} MiB, {vcpus} vCPUs", proof.layout.ram_bytes() >> 20);
    proof.tell(|proof, server| proof.idle_shell(server))?;
    if extent.rounds >= NEIGHBOUR {
        proof.tell(|proof, server| proof.twins(server))?;
    }
    proof.tell(|proof, server| proof.rounds(server, extent))
}

struct Proof<'a> {
    base: &'a Base,
    vmm: &'a Path,
    mappings: Vec<Mapping>,
    snapshot: PathBuf,
    figures: Figures,
    size: Option<Size>,
    /// Of the machine that is proved.
    layout: Layout,
}

/// A machine of ours and what is outside of it.
struct Alive {
    machine: Machine,
    pid: i32,
    disk: OwnedFd,
}

impl Proof<'_> {
    /// One part, with a fork server of its own. An emulated CPU's guests die by themselves now and then:
    /// once is forgiven, and told.
    fn tell(
        &mut self,
        part: impl Fn(&mut Self, &mut ForkServer) -> anyhow::Result<()>,
    ) -> anyhow::Result<()> {
        let mut told = false;
        loop {
            let mut server = ForkServer::start(self.vmm, &self.base.dir)?;
            server.shape =
                self.size.map(|size| Shape { memory_bytes: size.mib << 20, vcpus: size.vcpus });
            self.mappings = compare::mappings(server.pid(), &self.layout)?;
            self.figures = Figures::default();
            match part(self, &mut server) {
                Err(error) if !told && error.downcast_ref::<Died>().is_some() => {
                    println!("once more: {error:#}");
                    told = true;
                }
                result => return result,
            }
        }
    }

    /// The snapshot of a shell that waits at its prompt.
    fn idle_shell(&mut self, server: &mut ForkServer) -> anyhow::Result<()> {
        let template = fork::used_disk(self.base, server)?;
        let mut alive = self.fork(server, &template)?;
        alive.machine.open_terminal()?;
        for what in ["saved", "saved again after a resume"] {
            let saved = self.save(&mut alive)?;
            println!("idle shell, {what}: {} bytes, {} pages", saved.bytes, saved.pages);
            println!("  save:   {}", stages(&saved.stages));
            alive = self.resume(server, alive)?;
            println!("  resume: {}", stages(self.figures.resumes.last().unwrap_or(&Vec::new())));
            alive.machine.attach_terminal()?;
            let answer = alive.machine.ask("stty -echo; echo \"$((6 * 7)) is\"", "42 is")?;
            ensure!(answer == "42 is", "the shell answers {answer:?}");
        }
        server.end(alive.machine)
    }

    fn rounds(&mut self, server: &mut ForkServer, extent: Extent) -> anyhow::Result<()> {
        let mut alive = self.fork(server, &self.base.new_disk)?;
        let mut program = Program::start(&mut alive.machine, extent.memory)?;
        let mut neighbour = match extent.rounds >= NEIGHBOUR {
            true => Some(Neighbour::start(self, server)?),
            false => None,
        };
        let mut sizes = Vec::new();
        for round in 0..extent.rounds {
            program.work(&mut alive.machine, round)?;
            program.check(&mut alive.machine)?;
            if round == 0 {
                self.failed_saves(&mut alive)?;
                program.check(&mut alive.machine)?;
                program.set_timer(&mut alive.machine)?;
            }
            let saved = self.save(&mut alive)?;
            progress!("round {round}: {} bytes, {} pages", saved.bytes, saved.pages);
            sizes.push(saved.bytes);
            if round % NEIGHBOUR == 1
                && let Some(neighbour) = &mut neighbour
            {
                neighbour.visit(self, server)?;
            }
            if round + 1 == extent.rounds && extent.flips > 0 {
                alive.machine.stop()?;
                server.end(alive.machine)?;
                self.damaged(server, &alive.disk, extent.flips)?;
                alive = self.resume_stopped(server, alive.disk)?;
            } else {
                alive = self.resume(server, alive)?;
            }
            alive.machine.attach_terminal()?;
            program.check(&mut alive.machine)?;
        }
        program.timer_fired(&mut alive.machine)?;
        self.print(extent);
        let visits = neighbour.map_or(0, |neighbour| neighbour.visits());
        println!("  another account's machine resumed in between {visits} times");
        print_sizes(&sizes)?;
        alive.machine.power_off()?;
        server.end(alive.machine)
    }

    /// A machine that runs and has its account, and all that it may have.
    fn fork(&self, server: &mut ForkServer, template: &Path) -> anyhow::Result<Alive> {
        let disk = self.base.disk(template)?;
        let ours = disk.try_clone().context("duplicate a descriptor")?;
        let mut for_agent = machines::attach(1, DISK_BYTES)?;
        if let Some(size) = self.size {
            for_agent.extend(machines::take(size.resources())?);
        }
        let mut machine = server.fork(Parts { disk, for_agent })?;
        let pid = server.forked(&machine, Deadline::after(STEP_LIMIT))?;
        machine.running()?;
        machine.attached()?;
        if let Some(size) = self.size {
            machine.took(size.resources())?;
        }
        Ok(Alive { machine, pid, disk: ours })
    }

    /// Saves, and compares every byte. The machine stays paused.
    fn save(&mut self, alive: &mut Alive) -> anyhow::Result<Saved> {
        let file = new_file(&self.snapshot)?;
        let before = clock::now();
        alive.machine.freeze()?;
        let saved = alive.machine.save(&file, &pagemap(alive.pid)?, [9; 16])?;
        let saved = saved.map_err(|reason| anyhow::anyhow!("the save failed: {reason}"))?;
        self.figures.save_times.push(clock::now() - before);
        let snapshot = Snapshot::open(file).context("the snapshot that was just written")?;
        ensure!(snapshot.header.file_bytes() == saved.bytes, "the sizes differ: {saved:?}");
        let memory = &self.base.memory;
        let pages = compare::compare(alive.pid, &self.mappings, memory, &snapshot)?;
        ensure!(pages * 4096 == self.layout.ram_bytes(), "only {pages} pages were compared");
        compare::is_minimal(memory, &snapshot)?;
        Ok(saved)
    }

    /// Ends the saved machine and makes another of its snapshot.
    fn resume(&mut self, server: &mut ForkServer, mut alive: Alive) -> anyhow::Result<Alive> {
        alive.machine.stop()?;
        server.end(alive.machine)?;
        self.resume_stopped(server, alive.disk)
    }

    fn resume_stopped(&mut self, server: &mut ForkServer, disk: OwnedFd) -> anyhow::Result<Alive> {
        let before = clock::now();
        let mut alive = self.begin(server, &disk)?;
        let mut steps = match alive.machine.restored()? {
            Restored::Whole(steps) => steps,
            Restored::Refused(reason) => bail!("the snapshot is refused: {reason}"),
        };
        fs::remove_file(&self.snapshot).context("remove the snapshot")?;
        alive.machine.go()?;
        let (_, more) = alive.machine.running()?;
        let sessions = alive.machine.resume_agent()?;
        self.figures.resume_times.push(clock::now() - before);
        steps.extend(more);
        self.figures.resumes.push(steps);
        ensure!(
            matches!(sessions[..], [one] if one.terminal == Some(0) && one.session == 1),
            "the agent tells of these sessions: {sessions:?}"
        );
        Ok(alive)
    }

    fn begin(&self, server: &mut ForkServer, disk: &OwnedFd) -> anyhow::Result<Alive> {
        let snapshot = File::open(&self.snapshot).context("open the snapshot")?;
        let ours = disk.try_clone().context("duplicate a descriptor")?;
        let machine = server.resume(disk.as_fd(), snapshot.as_fd())?;
        let pid = server.forked(&machine, Deadline::after(STEP_LIMIT))?;
        Ok(Alive { machine, pid, disk: ours })
    }

    /// Saves that can't be made leave the machine running, and so does one that is called off.
    fn failed_saves(&mut self, alive: &mut Alive) -> anyhow::Result<()> {
        let full = OpenOptions::new().read(true).write(true).open("/dev/full")?;
        let spare = new_file(&self.snapshot)?;
        let occupied = new_file(&self.snapshot)?;
        occupied.write_all_at(b"x", 0)?;
        let mine = File::open("/proc/self/pagemap").context("open our own page map")?;
        let its = pagemap(alive.pid)?;
        for (file, map, words) in [
            (&full, &its, "No space"),
            (&spare, &mine, "another process"),
            (&occupied, &its, "already"),
        ] {
            alive.machine.freeze()?;
            match alive.machine.save(file, map, [1; 16])? {
                Err(reason) if reason.contains(words) => {}
                Err(reason) => bail!("the save failed for another reason: {reason}"),
                Ok(saved) => bail!("this should have failed ({words}): {saved:?}"),
            }
            alive.machine.resume_agent()?;
        }
        // Its time goes on meanwhile, as it should: it was only stopped. So nothing else is done here.
        let file = new_file(&self.snapshot)?;
        alive.machine.freeze()?;
        let saved = alive.machine.save(&file, &its, [1; 16])?;
        saved.map_err(|reason| anyhow::anyhow!("the save failed: {reason}"))?;
        alive.machine.call_off()?;
        alive.machine.resume_agent()?;
        println!("saves that fail, and one that is called off: the machine runs on");
        Ok(())
    }

    /// Flips bytes of the snapshot, one at a time, and cuts it: it is refused before the machine is
    /// whole, and so before it can run.
    fn damaged(
        &mut self,
        server: &mut ForkServer,
        disk: &OwnedFd,
        flips: u64,
    ) -> anyhow::Result<()> {
        let file = OpenOptions::new().read(true).write(true).open(&self.snapshot)?;
        let length = file.metadata()?.len();
        let mut random = vec![0; flips as usize * 9];
        getrandom::fill(&mut random).context("get random bytes")?;
        let (random, _) = random.as_chunks::<9>();
        for (n, &[a, b, c, d, e, f, g, h, mask]) in random.iter().enumerate() {
            // Half of them in what is not page data, which is a small part of the file.
            let anywhere = u64::from_le_bytes([a, b, c, d, e, f, g, h]);
            let at = match n % 4 {
                0 => anywhere % 4096,
                1 => length - 1 - anywhere % 8192.min(length),
                _ => anywhere % length,
            };
            let mut byte = [0];
            file.read_exact_at(&mut byte, at)?;
            file.write_all_at(&[byte[0] ^ (mask | 1)], at)?;
            self.refused(server, disk).with_context(|| format!("byte {at} of {length} flipped"))?;
            file.write_all_at(&byte, at)?;
        }
        for shorter in [length - 1, length - 4096, 4096, 4095, 0] {
            let whole = fs::read(&self.snapshot)?;
            file.set_len(shorter)?;
            self.refused(server, disk).with_context(|| format!("cut to {shorter} bytes"))?;
            file.write_all_at(&whole, 0)?;
        }
        println!("{flips} flipped bytes and 5 cuts of {length} bytes: all refused");
        Ok(())
    }

    fn refused(&self, server: &mut ForkServer, disk: &OwnedFd) -> anyhow::Result<()> {
        let mut alive = self.begin(server, disk)?;
        let result = alive.machine.restored()?;
        server.end(alive.machine)?;
        match result {
            Restored::Refused(_) => Ok(()),
            Restored::Whole(_) => bail!("it was not refused"),
        }
    }

    fn print(&self, extent: Extent) {
        let Figures { save_times, resumes, resume_times } = &self.figures;
        let milliseconds = |times: &[u64]| {
            let mut times = times.to_vec();
            times.sort_unstable();
            let at = |part: usize| times.get(times.len() * part / 100).map_or(0, |&t| t / 1000);
            format!("p50 {} us, p99 {} us, n {}", at(50), at(99), times.len())
        };
        println!("{} rounds with a program of {} MiB:", extent.rounds, extent.memory);
        println!("  Freeze to Saved:   {}", milliseconds(save_times));
        println!("  Resume to Resumed: {}", milliseconds(resume_times));
        if let Some(last) = resumes.last() {
            println!("  the last resume:   {}", stages(last));
        }
    }
}

/// Rounds alone must not make snapshots larger. The first rounds do: what the guest's kernel reads and
/// frees for the first time is in the second snapshot for the first time.
fn print_sizes(sizes: &[u64]) -> anyhow::Result<()> {
    let middle = |part: &[u64]| {
        let mut part = part.to_vec();
        part.sort_unstable();
        part.get(part.len() / 2).copied().unwrap_or_default()
    };
    let least = sizes.iter().min().copied().unwrap_or_default();
    println!(
        "  snapshots of {} to {} bytes",
        least,
        sizes.iter().max().copied().unwrap_or_default()
    );
    let (early, late) = (sizes.len() / 4..sizes.len() / 2, sizes.len() * 3 / 4..sizes.len());
    let (early, late) = (middle(&sizes[early]), middle(&sizes[late]));
    if sizes.len() >= 20 {
        println!("  the second quarter's middle {early} bytes, the last quarter's {late} bytes");
        ensure!(late < early + early / 8, "snapshots grow from round to round");
    }
    Ok(())
}

fn new_file(path: &Path) -> anyhow::Result<File> {
    let _ = fs::remove_file(path);
    OpenOptions::new()
        .read(true)
        .write(true)
        .create_new(true)
        .open(path)
        .with_context(|| format!("make {}", path.display()))
}

fn pagemap(pid: i32) -> anyhow::Result<File> {
    let path = format!("/proc/{pid}/pagemap");
    File::open(&path).with_context(|| format!("open {path}"))
}

fn stages(stages: &[Stage]) -> String {
    let one = |stage: &Stage| format!("{} {} us", stage.name, stage.nanoseconds / 1000);
    stages.iter().map(one).collect::<Vec<_>>().join(", ")
}
