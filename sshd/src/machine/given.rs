//! What a machine has of memory and processors: docs/limits.md, "Memory and processors".

use std::sync::PoisonError;

use hermitage_guest_proto::{self as guest, HostMessage};
use hermitage_storage::base::{self, Size};

use super::{Machine, printable};
use crate::limits::Resources;

/// What a machine was given when it was made.
#[derive(Clone, Copy, Debug)]
pub struct Given {
    /// `None`: its base does not say what its machines have.
    pub size: Option<Size>,
    /// It is more than its guest has taken into use by itself.
    is_more: bool,
}

impl Given {
    /// What the account may have, as far as the base has it, and no less than the machine had when it was saved.
    pub fn of(sizes: Option<base::Machine>, wanted: Resources, had: Option<Size>) -> Self {
        let fit = sizes.map(|sizes| sizes.fit(wanted.memory, wanted.vcpus));
        let size = match (fit, had) {
            (Some(fit), Some(had)) => Some(Size {
                memory_bytes: fit.memory_bytes.max(had.memory_bytes),
                vcpus: fit.vcpus.max(had.vcpus),
            }),
            (fit, had) => fit.or(had),
        };
        Self { size, is_more: sizes.is_some_and(|sizes| size.is_some_and(|s| s != sizes.least())) }
    }

    /// For an agent that has something to take. Others may be too old to be told.
    pub fn message(&self) -> Option<HostMessage> {
        let size = self.size.filter(|_| self.is_more)?;
        let (memory_bytes, vcpus) = (size.memory_bytes, size.vcpus);
        Some(HostMessage::Take(guest::Resources { memory_bytes, vcpus }))
    }
}

impl Machine {
    /// What it has.
    pub fn size(&self) -> Option<Size> {
        self.given.size
    }

    /// Why its guest does not use all of that.
    pub fn unused(&self) -> Option<String> {
        self.unused.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    pub(super) fn took(&self, in_use: guest::Resources, fault: Option<String>) {
        let fault = fault.map(|fault| printable(&fault));
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

    fn size(mib: u64, vcpus: u8) -> Size {
        Size { memory_bytes: mib << 20, vcpus }
    }

    #[test]
    fn a_machine_gets_what_its_account_may_have_and_keeps_what_it_had() {
        let sizes = base::Machine::new(size(512, 1), size(4096, 4));
        let wanted = |mib: u64, vcpus| Resources { memory: Some(mib << 20), vcpus: Some(vcpus) };
        let of = |wanted, had| Given::of(Some(sizes), wanted, had);
        assert_eq!(of(wanted(1024, 2), None).size, Some(size(1024, 2)));
        assert_eq!(of(wanted(1024, 2), Some(size(2048, 1))).size, Some(size(2048, 2)));
        assert_eq!(Given::of(None, wanted(1024, 2), None).size, None);
        assert_eq!(Given::of(None, wanted(1024, 2), Some(size(512, 1))).size, Some(size(512, 1)));
    }

    #[test]
    fn only_an_agent_that_has_something_to_take_is_told() {
        let sizes = base::Machine::new(size(512, 1), size(4096, 4));
        assert_eq!(Given::of(Some(sizes), Resources::default(), None).message(), None);
        let more = Resources { memory: None, vcpus: Some(2) };
        let take = guest::Resources { memory_bytes: 512 << 20, vcpus: 2 };
        assert_eq!(Given::of(Some(sizes), more, None).message(), Some(HostMessage::Take(take)));
        let fixed = base::Machine::new(size(512, 1), size(512, 1));
        assert_eq!(Given::of(Some(fixed), more, None).message(), None);
    }
}
