//! What going to sleep and coming back cost: a shell that waits at its prompt, saved and resumed as
//! `hermitage serve` does it, files and all.
//!
//! The peers are measured in turns with it: a fork of the same account to its terminal's first byte, and
//! writing as many bytes as the snapshot has to a file of the same folder, synced once.

mod running;

use std::{
    fs::{self, File},
    io::{Read as _, Seek as _, Write as _},
    os::fd::{AsFd as _, OwnedFd},
    path::Path,
    time::Duration,
};

use anyhow::{Context as _, bail, ensure};
use hermitage_storage::{StateDir, disk, saved};
use uuid::Uuid;

use crate::{
    base::{Base, DISK_BYTES},
    clock,
    exits::Exits,
    fork::{self, Deaths, bring_to_prompt},
    machines::{
        self, Machine, STEP_LIMIT,
        save::Restored,
        server::{ForkServer, Parts},
    },
    progress,
    report::Section,
    stats::{Samples, Stages},
    wait::Deadline,
};

/// The goals of `docs/bench.md`, which has where the time goes.
const DIFF_GOAL: u64 = 4 << 20;
const SAVE_GOAL: f64 = 2.0;
const RESUME_GOAL: f64 = 1.2;

/// How long a shell is left alone before it is saved: longer than its file system takes to write and commit what the
/// login wrote (3 + 1 + 5 s), shorter than the usual linger.
const IDLE: Duration = Duration::from_secs(12);

/// Written at once by the peer of a save.
const CHUNK: usize = 256 * 1024;

#[derive(Default)]
struct Figures {
    bytes: Samples,
    pages: Samples,
    freeze_exits: Samples,
    freeze_faults: Samples,
    fork: Samples,
    write: Samples,
    save: Samples,
    save_stages: Stages,
    resume_stages: Stages,
    first_byte: Samples,
    prompt: Samples,
}

pub fn measure(base: &Base, server: &mut ForkServer, n: usize) -> anyhow::Result<Section> {
    let used = fork::used_disk(base, server)?;
    let home = Home::new(base, &used)?;
    let mut figures = Figures::default();
    let mut deaths = Deaths::default();
    for round in 0..n {
        if round % 10 == 0 {
            progress!("sleep: {round} of {n}");
        }
        let fork = deaths.survivor(fork::start_once(base, server, &used, round as u64))?;
        if let Some((times, _)) = fork {
            figures.fork.push(times.first_byte);
        }
        let mut one = Figures::default();
        if deaths.survivor(home.round(server, &used, &mut one))?.is_some() {
            figures.add(&one);
        }
    }
    let mut section = figures.section();
    running::measure(base, server, &used, &mut section, &mut deaths)?;
    deaths.tell(&mut section);
    Ok(section)
}

/// An account's folder, where its disk and its snapshot lie.
struct Home {
    state: StateDir,
    account: Uuid,
}

impl Home {
    fn new(base: &Base, template: &Path) -> anyhow::Result<Self> {
        let state = StateDir::new(base.scratch().join("state"));
        let account = Uuid::from_bytes([7; 16]);
        let dir = state.account_dir(account);
        fs::create_dir_all(&dir).with_context(|| format!("make {}", dir.display()))?;
        let home = Self { state, account };
        // Once is made ahead, so that the first round finds what later ones do.
        home.disk(template)?;
        Ok(home)
    }

    /// A new copy of the disk.
    fn disk(&self, template: &Path) -> anyhow::Result<OwnedFd> {
        let path = self.state.disk(self.account);
        let _ = fs::remove_file(&path);
        disk::create(template, &path, DISK_BYTES)?;
        Ok(disk::open_locked(&path)?.into())
    }

    /// Up to the prompt, left, saved, ended, resumed, taken up again.
    fn round(
        &self,
        server: &mut ForkServer,
        template: &Path,
        figures: &mut Figures,
    ) -> anyhow::Result<()> {
        let disk = self.disk(template)?;
        let for_agent = machines::attach(1, DISK_BYTES)?;
        let ours = disk.try_clone().context("duplicate a descriptor")?;
        let mut machine = server.fork(Parts { disk, for_agent })?;
        let pid = server.forked(&machine, Deadline::after(STEP_LIMIT))?;
        let result = self.sleep(&mut machine, pid, figures);
        server.end(machine)?;
        result?;
        self.write_peer(figures)?;
        let snapshot = File::open(self.state.snapshot(self.account)).context("open a snapshot")?;
        let mut machine = server.resume(ours.as_fd(), snapshot.as_fd())?;
        let result = self.wake(&mut machine, figures);
        server.end(machine)?;
        result
    }

    fn sleep(&self, machine: &mut Machine, pid: i32, figures: &mut Figures) -> anyhow::Result<()> {
        bring_to_prompt(machine)?;
        machine.keep_screen()?;
        // Something for the screen that is kept.
        machine.ask("echo \"$((6 * 7)) is\"", "42 is")?;
        machine.leave_terminal()?;
        std::thread::sleep(IDLE);
        let mut tag = [0; 16];
        getrandom::fill(&mut tag).context("get random bytes")?;
        let pagemap = format!("/proc/{pid}/pagemap");

        let before = Exits::of(pid);
        let mut laps = Laps::start();
        machine.freeze()?;
        laps.end("freeze in the guest", &mut figures.save_stages);
        let after = Exits::of(pid);
        if let (Some(before), Some(after)) = (before, after) {
            figures.freeze_exits.push(after.all - before.all);
            figures.freeze_faults.push(after.page_faults - before.page_faults);
        }
        laps.leave_out();
        let file = saved::create(&self.state, self.account).context("make a file")?;
        let pagemap = File::open(&pagemap).with_context(|| format!("open {pagemap}"))?;
        let saved = machine.save(&file, &pagemap, tag)?;
        let saved = saved.map_err(|reason| anyhow::anyhow!("the save failed: {reason}"))?;
        for stage in &saved.stages {
            figures.save_stages.push(&stage.name, stage.nanoseconds);
        }
        laps.skip();
        saved::publish(&self.state, self.account, tag).context("publish a snapshot")?;
        laps.end("publish", &mut figures.save_stages);
        figures.save.push(laps.all());
        figures.bytes.push(saved.bytes);
        figures.pages.push(saved.pages);
        machine.stop()
    }

    /// As many bytes as the snapshot has, and no more to it than that.
    fn write_peer(&self, figures: &mut Figures) -> anyhow::Result<()> {
        let mut snapshot =
            File::open(self.state.snapshot(self.account)).context("open a snapshot")?;
        let mut bytes = Vec::new();
        snapshot.read_to_end(&mut bytes).context("read a snapshot")?;
        // It was written past the page cache: what is measured next finds it as it was.
        rustix::fs::fadvise(&snapshot, 0, None, rustix::fs::Advice::DontNeed)
            .context("drop a snapshot from the page cache")?;
        let path = self.state.account_dir(self.account).join("peer");
        let laps = Laps::start();
        let mut file = File::create(&path).with_context(|| format!("make {}", path.display()))?;
        for chunk in bytes.chunks(CHUNK) {
            file.write_all(chunk).context("write the peer of a snapshot")?;
        }
        file.sync_all().context("sync the peer of a snapshot")?;
        figures.write.push(laps.all());
        ensure!(file.stream_position()? == bytes.len() as u64, "the peer is not as long");
        fs::remove_file(&path).with_context(|| format!("remove {}", path.display()))
    }

    fn wake(&self, machine: &mut Machine, figures: &mut Figures) -> anyhow::Result<()> {
        let start = machine.asked_at;
        let stages = &mut figures.resume_stages;
        let mut laps = Laps { begun: start, last: start };
        match machine.restored()? {
            Restored::Whole(steps) => {
                steps.iter().for_each(|step| stages.push(&step.name, step.nanoseconds));
            }
            Restored::Refused(reason) => bail!("the snapshot is refused: {reason}"),
        }
        laps.skip();
        saved::consume(&self.state, self.account).context("mark a snapshot as used")?;
        laps.end("mark as used", stages);
        machine.go()?;
        let (_, steps) = machine.running()?;
        steps.iter().for_each(|step| stages.push(&step.name, step.nanoseconds));
        laps.skip();
        let sessions = machine.resume_agent()?;
        laps.end("wake the guest", stages);
        ensure!(sessions.len() == 1, "the agent tells of these sessions: {sessions:?}");
        let back = machine.come_back()?;
        figures.first_byte.push(back.first_byte - start);
        figures.prompt.push(back.prompt - start);
        fs::remove_file(self.state.snapshot(self.account)).context("remove a snapshot")
    }
}

impl Figures {
    fn add(&mut self, one: &Self) {
        for (all, new) in [
            (&mut self.bytes, &one.bytes),
            (&mut self.pages, &one.pages),
            (&mut self.freeze_exits, &one.freeze_exits),
            (&mut self.freeze_faults, &one.freeze_faults),
            (&mut self.write, &one.write),
            (&mut self.save, &one.save),
            (&mut self.first_byte, &one.first_byte),
            (&mut self.prompt, &one.prompt),
        ] {
            all.extend(new);
        }
        self.save_stages.extend(&one.save_stages);
        self.resume_stages.extend(&one.resume_stages);
    }

    fn section(&self) -> Section {
        let mut section =
            Section::new("sleep", "Sleep: a shell at its prompt, saved and resumed with its files");
        section.size("diff of the idle shell", &self.bytes).goal(DIFF_GOAL);
        section.count("of that, pages with data", &self.pages);
        let write = Some(self.write.p50());
        section.time("as many bytes written and synced", &self.write);
        for (name, samples) in self.save_stages.iter() {
            section.time(format!("save: {name}"), samples).over(write, "write");
        }
        if self.freeze_exits.count() > 0 {
            section.count("exits of the guest while it freezes", &self.freeze_exits);
            section.count("of that, page faults", &self.freeze_faults);
        }
        section.time("save, from the word to freeze", &self.save).over(write, "write");
        let fork = Some(self.fork.p50());
        section.time("fork to the terminal's first byte", &self.fork);
        for (name, samples) in self.resume_stages.iter() {
            section.time(format!("resume: {name}"), samples).over(fork, "fork");
        }
        let first = section.time("resume to the terminal's first byte", &self.first_byte);
        first.over(fork, "fork").ratio_goal(RESUME_GOAL);
        section.time("resume to the shell's answer", &self.prompt).over(fork, "fork");
        for row in &mut section.rows {
            if row.name.starts_with("save, ") {
                row.ratio_goal(SAVE_GOAL);
            }
        }
        section
    }
}

/// Time between things, in nanoseconds.
struct Laps {
    begun: u64,
    last: u64,
}

impl Laps {
    fn start() -> Self {
        let now = clock::now();
        Self { begun: now, last: now }
    }

    fn end(&mut self, name: &str, stages: &mut Stages) {
        let now = clock::now();
        stages.push(name, now - self.last);
        self.last = now;
    }

    /// The time since the last is somebody else's.
    fn skip(&mut self) {
        self.last = clock::now();
    }

    /// The time since the last is nobody's.
    fn leave_out(&mut self) {
        let now = clock::now();
        self.begun += now - self.last;
        self.last = now;
    }

    fn all(&self) -> u64 {
        clock::now() - self.begun
    }
}
