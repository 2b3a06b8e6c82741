//! Copying the machine's disk on request, beside everything else: the work is the block device's.

use std::{
    collections::BTreeMap,
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

/// What the disk's thread says of copies, until the main thread passes it on.
#[derive(Default)]
pub struct Copies(Arc<Mutex<Latest>>);

/// By number: one that was refused, or was given up a moment ago, may have a word left when the next is begun.
#[derive(Default)]
struct Latest(BTreeMap<u64, Words>);

/// The last word of each kind: there is no more of it, however long nobody looks.
#[derive(Default)]
struct Words {
    begun: Option<u64>,
    copied: Option<u64>,
    over: Option<Result<u64, String>>,
}

impl Latest {
    fn take(&mut self, copy: u64, news: CopyNews) {
        let words = self.0.entry(copy).or_default();
        match news {
            CopyNews::Begun(bytes) => words.begun = Some(bytes),
            CopyNews::Copied(bytes) => words.copied = Some(bytes),
            CopyNews::Over(outcome) => words.over = Some(outcome),
        }
    }

    fn events(self) -> impl Iterator<Item = MachineEvent> {
        self.0.into_iter().flat_map(|(copy, words)| words.events(copy))
    }
}

impl Words {
    fn events(self, copy: u64) -> impl Iterator<Item = MachineEvent> {
        let begun = self.begun.map(|bytes| MachineEvent::CopyBegun { copy, bytes });
        let copied = self.copied.map(|bytes| MachineEvent::CopyProgress { copy, bytes });
        let over = self.over.map(|outcome| match outcome {
            Ok(bytes) => MachineEvent::CopyDone { copy, bytes },
            Err(reason) => MachineEvent::CopyFailed { copy, reason },
        });
        begun.into_iter().chain(copied).chain(over)
    }
}

impl Server<'_> {
    pub(super) fn copy_disk(&mut self, copy: u64, side: Option<OwnedFd>, room: u64) {
        let refuse = |reason: &str| MachineEvent::CopyFailed { copy, reason: reason.into() };
        // One that is saved stands still until it goes on: its disk is as it was when its memory was saved.
        if matches!(self.saving, Saving::Wanted(_)) {
            return self.tell(&refuse("the machine is being saved"));
        }
        let Some(side) = side else {
            return self.tell(&refuse("a copy needs a descriptor, an empty file"));
        };
        let (latest, wake) = (self.copies.0.clone(), self.machine.waker());
        let tell = Box::new(move |news| {
            lock(&latest).take(copy, news);
            wake();
        });
        let order = CopyOrder { number: copy, side: File::from(side), room, tell };
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_said_of_two_copies_is_told_apart() {
        let mut latest = Latest::default();
        latest.take(7, CopyNews::Over(Err("it was called off".into())));
        latest.take(8, CopyNews::Begun(4096));
        latest.take(8, CopyNews::Copied(1));
        latest.take(8, CopyNews::Copied(2));
        let told: Vec<_> = latest.events().collect();
        let wanted = [
            MachineEvent::CopyFailed { copy: 7, reason: "it was called off".into() },
            MachineEvent::CopyBegun { copy: 8, bytes: 4096 },
            MachineEvent::CopyProgress { copy: 8, bytes: 2 },
        ];
        assert_eq!(told, wanted);
    }
}
