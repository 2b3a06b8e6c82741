//! Copying the machine's disk on request, beside everything else: the work is the block device's.

use std::{
    fs::File,
    os::fd::OwnedFd,
    sync::{Arc, Mutex},
};

use hermitage_vmm_proto::MachineEvent;

use super::{Saving, Server};
use crate::{
    devices::virtio::{CopyNews, CopyOrder},
    machine::vcpus::lock,
};

/// What the disk's thread says of a copy, until the main thread passes it on.
#[derive(Default)]
pub struct Copies(Arc<Mutex<Latest>>);

/// The last word of each kind: there is no more of it, however long nobody looks.
#[derive(Default)]
struct Latest {
    begun: Option<u64>,
    copied: Option<u64>,
    over: Option<Result<u64, String>>,
}

impl Latest {
    fn take(&mut self, news: CopyNews) {
        match news {
            CopyNews::Begun(bytes) => self.begun = Some(bytes),
            CopyNews::Copied(bytes) => self.copied = Some(bytes),
            CopyNews::Over(outcome) => self.over = Some(outcome),
        }
    }

    fn events(self) -> impl Iterator<Item = MachineEvent> {
        let begun = self.begun.map(|bytes| MachineEvent::CopyBegun { bytes });
        let copied = self.copied.map(|bytes| MachineEvent::CopyProgress { bytes });
        let over = self.over.map(|outcome| match outcome {
            Ok(bytes) => MachineEvent::CopyDone { bytes },
            Err(reason) => MachineEvent::CopyFailed { reason },
        });
        begun.into_iter().chain(copied).chain(over)
    }
}

impl Server<'_> {
    pub(super) fn copy_disk(&mut self, side: Option<OwnedFd>, room: u64) {
        let refuse = |reason: &str| MachineEvent::CopyFailed { reason: reason.into() };
        if !matches!(self.saving, Saving::No) {
            return self.tell(&refuse("the machine is being saved"));
        }
        let Some(side) = side else {
            return self.tell(&refuse("a copy needs a descriptor, an empty file"));
        };
        let (latest, wake) = (self.copies.0.clone(), self.machine.waker());
        let tell = Box::new(move |news| {
            lock(&latest).take(news);
            wake();
        });
        let order = CopyOrder { side: File::from(side), room, tell };
        if let Err(fault) = self.machine.devices.block.copy(order) {
            self.tell(&refuse(&fault.to_string()));
        }
    }

    pub(super) fn report_copy(&mut self) {
        let latest = std::mem::take(&mut *lock(&self.copies.0));
        for event in latest.events() {
            self.tell(&event);
        }
    }
}
