//! Saving the machine on request, and going on when the save is called off.

use std::{
    fs::File,
    os::fd::OwnedFd,
    time::{Duration, Instant},
};

use hermitage_storage::faults::{self, Point};
use hermitage_vmm_proto::MachineEvent;

use super::Server;
use crate::{
    devices::virtio::WhichCopy,
    snapshot::{SaveRequest, save},
    stages::Stages,
};

/// How long to try again when something is under way that a snapshot can't hold.
const PATIENCE: Duration = Duration::from_secs(2);

/// Between two attempts: the machine runs, and its devices are served.
pub const PAUSE: Duration = Duration::from_millis(5);

/// Where a save stands.
#[derive(Default)]
pub enum Saving {
    #[default]
    No,
    /// It is to be tried again.
    Wanted(Wanted),
    /// The vCPUs are paused and the snapshot is whole.
    Saved,
}

pub struct Wanted {
    request: SaveRequest,
    deadline: Instant,
    stages: Stages,
}

impl Server<'_> {
    pub(super) fn save(&mut self, descriptors: Vec<OwnedFd>, account: [u8; 16], tag: [u8; 16]) {
        let refuse = |reason: &str| MachineEvent::SaveFailed { reason: reason.into() };
        if !matches!(self.saving, Saving::No) {
            return self.tell(&refuse("the machine is being saved already"));
        }
        let Ok([file, pagemap]) = <[OwnedFd; 2]>::try_from(descriptors) else {
            return self.tell(&refuse("a save needs two descriptors, a file and a page map"));
        };
        // Its thread has to come to rest, and a copy may take longer than a save may wait.
        self.machine.devices.block.no_copy(WhichCopy::Any, "the machine is being saved");
        let (file, pagemap) = (File::from(file), File::from(pagemap));
        let request = SaveRequest { file, pagemap, account, disk_tag: tag };
        let now = Instant::now();
        self.attempt(Wanted { request, deadline: now + PATIENCE, stages: Stages::since(now) });
    }

    /// Tries again, if that is wanted.
    pub(super) fn save_again(&mut self) {
        match std::mem::take(&mut self.saving) {
            Saving::Wanted(wanted) => self.attempt(wanted),
            other => self.saving = other,
        }
    }

    fn attempt(&mut self, mut wanted: Wanted) {
        match save(self.machine, self.origin, &wanted.request, &mut wanted.stages) {
            Ok(saved) => {
                self.saving = Saving::Saved;
                let stages = wanted.stages.list;
                let event = MachineEvent::Saved { bytes: saved.bytes, pages: saved.pages, stages };
                self.tell(&event);
                // There is nothing left here that could fail.
                let _ = faults::at(Point::SaveTold);
            }
            Err(error) => {
                self.machine.go_on();
                if error.is_passing() && Instant::now() < wanted.deadline {
                    wanted.stages.list.clear();
                    self.saving = Saving::Wanted(wanted);
                } else {
                    let reason = error.to_string();
                    self.tell(&MachineEvent::SaveFailed { reason });
                }
            }
        }
    }

    /// The save was called off.
    pub(super) fn go_on(&mut self) {
        if let Saving::Saved = self.saving {
            self.saving = Saving::No;
            self.machine.go_on();
        }
    }
}
