//! What a machine has of memory and processors: docs/limits.md, "Memory and processors".

use std::{
    sync::{PoisonError, atomic::Ordering},
    time::Duration,
};

use hermitage_guest_proto::{self as guest, HostMessage};
use hermitage_storage::base::{self, Size};

use super::{Machine, printable};
use crate::cgroup::Admission;

/// What a machine was given when it was made.
#[derive(Clone, Copy, Debug)]
pub struct Given {
    /// `None`: its base does not say what its machines have.
    pub size: Option<Size>,
    /// It is more than its guest has taken into use by itself.
    is_more: bool,
    /// Bytes a second to reckon with on the way between its memory and its disk.
    pace: u64,
}

/// What a disk that is slow, or shared by many, gives one machine a second.
const PACE: u64 = 20 << 20;

impl Given {
    /// What the account may have, as far as the base has it, and no less than the machine had when it was saved.
    pub fn of(sizes: Option<base::Machine>, admission: &Admission, had: Option<Size>) -> Self {
        let wanted = admission.resources;
        let fit = sizes.map(|sizes| sizes.fit(wanted.memory, wanted.vcpus));
        let size = match (fit, had) {
            (Some(fit), Some(had)) => Some(Size {
                memory_bytes: fit.memory_bytes.max(had.memory_bytes),
                vcpus: fit.vcpus.max(had.vcpus),
            }),
            (fit, had) => fit.or(had),
        };
        let is_more = sizes.is_some_and(|sizes| size.is_some_and(|s| s != sizes.least()));
        Self { size, is_more, pace: admission.share.io_rate.unwrap_or(PACE).clamp(1, PACE) }
    }

    /// For an agent that has something to take. Others may be too old to be told.
    pub fn message(&self) -> Option<HostMessage> {
        let size = self.size.filter(|_| self.is_more)?;
        let (memory_bytes, vcpus) = (size.memory_bytes, size.vcpus);
        Some(HostMessage::Take(guest::Resources { memory_bytes, vcpus }))
    }

    /// How long so many bytes may take on their way between its memory and its disk.
    pub fn time_for(&self, bytes: u64) -> Duration {
        Duration::from_secs(bytes / self.pace)
    }
}

impl Machine {
    /// How long saving it may take, beside what it takes a small one.
    pub(super) fn time_to_save(&self) -> Duration {
        self.given.time_for(self.given.size.map_or(0, |size| size.memory_bytes))
    }

    /// What it has.
    pub fn size(&self) -> Option<Size> {
        self.given.size
    }

    /// Why its guest does not use all of that.
    pub fn unused(&self) -> Option<String> {
        self.unused.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// An answer to nothing is ignored, as there may be any number of them.
    pub(super) fn took(&self, in_use: guest::Resources, fault: Option<String>) {
        if !self.taking.swap(false, Ordering::Relaxed) {
            return;
        }
        let fault = fault.map(|fault| printable(&fault)).or_else(|| {
            let has = self.given.size?;
            let less = in_use.memory_bytes < has.memory_bytes || in_use.vcpus < has.vcpus;
            less.then(|| "its kernel does not know of it".into())
        });
        let memory = in_use.memory_bytes >> 20;
        match &fault {
            None => tracing::debug!(machine = self.label, memory, in_use.vcpus, "resources taken"),
            Some(fault) => tracing::warn!(
                machine = self.label,
                memory,
                in_use.vcpus,
                fault,
                "the guest could not take into use all that its account may have"
            ),
        }
        *self.unused.lock().unwrap_or_else(PoisonError::into_inner) = fault;
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::limits::{Resources, Share};

    fn admission(resources: Resources) -> Admission {
        let share = Share::default();
        Admission { account: uuid::Uuid::nil(), resources, share, processes: None, required: false }
    }

    fn size(mib: u64, vcpus: u8) -> Size {
        Size { memory_bytes: mib << 20, vcpus }
    }

    #[test]
    fn a_machine_gets_what_its_account_may_have_and_keeps_what_it_had() {
        let sizes = base::Machine::new(size(512, 1), size(4096, 4));
        let wanted = |mib: u64, vcpus| Resources { memory: Some(mib << 20), vcpus: Some(vcpus) };
        let of = |wanted, had| Given::of(Some(sizes), &admission(wanted), had);
        assert_eq!(of(wanted(1024, 2), None).size, Some(size(1024, 2)));
        assert_eq!(of(wanted(1024, 2), Some(size(2048, 1))).size, Some(size(2048, 2)));
        let unknown = |had| Given::of(None, &admission(wanted(1024, 2)), had).size;
        assert_eq!(unknown(None), None);
        assert_eq!(unknown(Some(size(512, 1))), Some(size(512, 1)));
    }

    #[test]
    fn only_an_agent_that_has_something_to_take_is_told() {
        let sizes = base::Machine::new(size(512, 1), size(4096, 4));
        let message = |sizes, wanted| Given::of(Some(sizes), &admission(wanted), None).message();
        assert_eq!(message(sizes, Resources::default()), None);
        let more = Resources { memory: None, vcpus: Some(2) };
        let take = guest::Resources { memory_bytes: 512 << 20, vcpus: 2 };
        assert_eq!(message(sizes, more), Some(HostMessage::Take(take)));
        let fixed = base::Machine::new(size(512, 1), size(512, 1));
        assert_eq!(message(fixed, more), None);
    }

    #[test]
    fn much_memory_on_a_slow_disk_has_its_time() {
        let sizes = base::Machine::new(size(512, 1), size(4096, 4));
        let mut admission = admission(Resources::default());
        let seconds = |admission: &Admission| {
            Given::of(Some(sizes), admission, None).time_for(4 << 30).as_secs()
        };
        assert_eq!(seconds(&admission), 204);
        admission.share.io_rate = Some(1 << 20);
        assert_eq!(seconds(&admission), 4096);
        admission.share.io_rate = Some(1 << 30);
        assert_eq!(seconds(&admission), 204, "a cap is no promise");
    }
}
