//! Another account's machine of the same base: saved, and resumed now and then while the first one sleeps.
//! Each has the base's memory and pages of its own over it; neither may find the other's.

use std::{os::fd::OwnedFd, path::PathBuf};

use anyhow::Context as _;

use super::{Alive, Proof, program::Program};
use crate::{machines::server::ForkServer, progress};

/// MiB that its program holds.
const MEMORY: u64 = 2;

pub struct Neighbour {
    program: Program,
    disk: OwnedFd,
    snapshot: PathBuf,
    visits: u64,
}

impl Neighbour {
    /// Starts it, has it work, and saves it.
    pub fn start(proof: &mut Proof<'_>, server: &mut ForkServer) -> anyhow::Result<Self> {
        let mut alive = proof.fork(server, &proof.base.new_disk)?;
        let mut program = Program::start(&mut alive.machine, MEMORY)?;
        program.work(&mut alive.machine, 0)?;
        let snapshot = proof.base.scratch().join("neighbour.snap");
        let disk = alive.disk.try_clone().context("duplicate a descriptor")?;
        let mut neighbour = Self { program, disk, snapshot, visits: 0 };
        neighbour.put_to_sleep(proof, server, alive)?;
        Ok(neighbour)
    }

    /// Resumes it: everything has to be as it was. Then it works and is saved again.
    pub fn visit(&mut self, proof: &mut Proof<'_>, server: &mut ForkServer) -> anyhow::Result<()> {
        self.visits += 1;
        let disk = self.disk.try_clone().context("duplicate a descriptor")?;
        let mut alive = self.in_its_place(proof, |proof| proof.resume_stopped(server, disk))?;
        alive.machine.attach_terminal()?;
        self.program.check(&mut alive.machine)?;
        self.program.work(&mut alive.machine, self.visits)?;
        self.program.check(&mut alive.machine)?;
        self.put_to_sleep(proof, server, alive)
    }

    pub fn visits(&self) -> u64 {
        self.visits
    }

    fn put_to_sleep(
        &mut self,
        proof: &mut Proof<'_>,
        server: &mut ForkServer,
        mut alive: Alive,
    ) -> anyhow::Result<()> {
        let saved = self.in_its_place(proof, |proof| proof.save(&mut alive))?;
        progress!("another account's machine: {} pages", saved.pages);
        alive.machine.stop()?;
        server.end(alive.machine)
    }

    /// With its snapshot for the first one's, and figures that are not counted.
    fn in_its_place<T>(
        &self,
        proof: &mut Proof<'_>,
        call: impl FnOnce(&mut Proof<'_>) -> anyhow::Result<T>,
    ) -> anyhow::Result<T> {
        let snapshot = std::mem::replace(&mut proof.snapshot, self.snapshot.clone());
        let figures = std::mem::take(&mut proof.figures);
        let result = call(proof);
        (proof.snapshot, proof.figures) = (snapshot, figures);
        result
    }
}
