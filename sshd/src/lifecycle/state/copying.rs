//! A copy of the disk while the machine runs, and what it has to do with the machine's rest.
//!
//! ```text
//!           Copy                    linger over
//! No ──────────────► UnderWay ───────────────────► RestWaits
//! ▲                     │  ▲        a login             │
//! └──────── CopyOver ───┘  └────────────────────────────┤
//!           CopyOver: as when the linger is over ◄──────┘
//! ```
//!
//! The machine is somebody's or lingers meanwhile, or there is no copy: what leads out of these states calls it
//! off. Both a save and a copy have the guest stand still; that only one of them does is the driver's business.

use super::{Copying, Effect, Lifecycle, State, Step};

impl Lifecycle {
    pub(super) fn copy(mut self) -> Step {
        match (&self.state, self.copying) {
            (State::Running | State::Lingering, Copying::No) => {
                // The agent forgets what it was asked about work when it is told to go on; it is asked again.
                let looking = std::mem::take(&mut self.looking);
                self.copying = if looking { Copying::RestWaits } else { Copying::UnderWay };
                (self, vec![Effect::Copy])
            }
            _ => (self, vec![]),
        }
    }

    pub(super) fn copy_over(mut self) -> Step {
        match std::mem::take(&mut self.copying) {
            Copying::RestWaits => self.linger_over(),
            Copying::UnderWay | Copying::No => (self, vec![]),
        }
    }

    /// Whether the machine may not rest yet because of a copy; when that is over it is looked at again.
    pub(super) fn rest_waits(&mut self) -> bool {
        let copying = self.copying != Copying::No;
        if copying {
            self.copying = Copying::RestWaits;
        }
        copying
    }

    /// True: there is one that is to be called off.
    pub(super) fn forget_copy(&mut self) -> bool {
        match (&self.state, self.copying) {
            (_, Copying::No) | (State::Lingering, _) => false,
            (State::Running, _) => {
                self.copying = Copying::UnderWay;
                false
            }
            _ => {
                self.copying = Copying::No;
                true
            }
        }
    }
}
