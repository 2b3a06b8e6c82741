//! Copies of the disk of a machine that runs: who wants one, and when it is made.

use tokio_util::sync::CancellationToken;

use super::Driver;
use crate::lifecycle::{
    copy::{self, Asker, CopyNews},
    no_copy::NoCopy,
    state::{Event, State},
};

/// Who may wait for a copy at once.
const MOST_ASKERS: usize = 16;

impl Driver {
    pub(super) fn ask(&mut self, asker: Asker) {
        self.askers.retain(|asker| !asker.news.is_closed());
        if self.askers.len() < MOST_ASKERS {
            let for_another = self.copying.is_some() || !self.askers.is_empty();
            let _ = asker.news.try_send(CopyNews::Waiting { for_another });
            return self.askers.push_back(asker);
        }
        let _ = asker.news.try_send(CopyNews::Over(Err(NoCopy::Queue(MOST_ASKERS))));
    }

    /// Begins the next copy if the machine's state allows it. One that is just starting, or on its way out, is
    /// waited for: it will be one or the other.
    pub(super) async fn serve_askers(&mut self) {
        if self.askers.is_empty() {
            return;
        }
        self.askers.retain(|asker| !asker.news.is_closed());
        match self.lifecycle.state {
            State::Stopped | State::Saved | State::Failed(_) => {
                for asker in self.askers.drain(..) {
                    let _ = asker.news.try_send(CopyNews::NotRunning);
                }
            }
            State::Running | State::Lingering
                if self.copying.is_none() && !self.askers.is_empty() =>
            {
                self.step(Event::Copy).await;
            }
            _ => {}
        }
    }

    pub(super) fn copy(&mut self) {
        let (context, account, machine) = (self.context.clone(), self.account, self.machine());
        self.call_off_copy = CancellationToken::new();
        let (called_off, asker) = (self.call_off_copy.clone(), self.askers.pop_front());
        self.copying = Some(tokio::spawn(async move {
            if let (Some(machine), Some(asker)) = (machine, asker) {
                copy::copy(context, account, machine, called_off, asker).await;
            }
        }));
    }
}
