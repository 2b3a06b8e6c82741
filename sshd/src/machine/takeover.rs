//! A terminal that changes hands while somebody is still attached to it.
//!
//! Each shell's terminal that is attached knows its *holder*. Who logs in takes up a terminal that was
//! left, or one whose holder's link is dead and has not noticed yet; with `+take`, the one that was
//! attached last, dead or alive. The holder is told and lets go; from there on it is a terminal that was
//! left. So there is at no time more than one attached to a terminal, and only one way to come back.

use std::{sync::Weak, time::Duration};

use tokio::{
    sync::oneshot,
    task::JoinSet,
    time::{Instant, timeout},
};

use super::{Machine, terminals::TerminalState};
use crate::link::Link;

/// How long a session may take to let go of its terminal: a message to the machine has to be sent.
const LET_GO_TIMEOUT: Duration = Duration::from_secs(5);

const LOOK_AGAIN: Duration = Duration::from_millis(50);

/// Who wants a terminal.
#[derive(Clone)]
pub struct Claim {
    /// Whoever has it now.
    pub take: bool,
    /// Where she comes from, for whom it is taken from.
    pub source: String,
    pub link: Weak<Link>,
}

/// The session that is attached to a terminal.
pub struct Holder {
    /// The later it was attached, the greater.
    order: u64,
    link: Weak<Link>,
    taken: oneshot::Sender<String>,
}

/// For the holder: resolves when its terminal is taken over.
pub struct Taken(oneshot::Receiver<String>);

impl Taken {
    /// For a terminal that nobody can take over.
    pub fn never() -> Self {
        Self(oneshot::channel().1)
    }

    /// In words for the user.
    pub async fn words(self) -> String {
        match self.0.await {
            Ok(words) => words,
            Err(_) => std::future::pending().await,
        }
    }
}

impl Machine {
    /// Notes who is attached to a terminal.
    pub(super) fn hold(&self, terminal: u8, claim: &Claim) -> Taken {
        let (taken, receiver) = oneshot::channel();
        let mut table = self.table();
        table.last_left += 1;
        let holder = Holder { order: table.last_left, link: claim.link.clone(), taken };
        if let Some(state) = table.terminals.get_mut(usize::from(terminal)) {
            *state = TerminalState::Used(Some(holder));
        }
        Taken(receiver)
    }

    /// Has a holder let go of the terminal it was attached to, if one of them must. The terminal is left
    /// then.
    pub(super) async fn reclaim(&self, claim: &Claim) {
        let held = self.held();
        let victim = match claim.take {
            true => held.into_iter().map(|(order, ..)| order).max(),
            false => silent(held).await,
        };
        let Some(victim) = victim else { return };
        let words = format!("this terminal was taken over by a login from {}", claim.source);
        let deadline = Instant::now() + LET_GO_TIMEOUT;
        let Some(index) = self.tell_holder(victim, words) else { return };
        loop {
            let left = self.terminal_left.notified();
            let used = matches!(
                self.table().terminals.get(usize::from(index)),
                Some(TerminalState::Used(_) | TerminalState::Leaving)
            );
            if !used || Instant::now() >= deadline {
                return;
            }
            // Its program may end just now: then it is free, and nobody says so.
            let _ = timeout(LOOK_AGAIN, left).await;
        }
    }

    fn held(&self) -> Vec<(u64, Weak<Link>)> {
        let table = self.table();
        let holders = table.terminals.iter().filter_map(|state| match state {
            TerminalState::Used(Some(holder)) => Some((holder.order, holder.link.clone())),
            _ => None,
        });
        holders.collect()
    }

    /// Which terminal it was attached to, if it still is.
    fn tell_holder(&self, order: u64, words: String) -> Option<u8> {
        let mut table = self.table();
        let (index, state) = table.terminals.iter_mut().enumerate().find(
            |(_, state)| matches!(state, TerminalState::Used(Some(holder)) if holder.order == order),
        )?;
        let TerminalState::Used(holder) = state else { return None };
        let holder = holder.take()?;
        drop(table);
        tracing::info!(machine = self.label, index, words, "taking over");
        let _ = holder.taken.send(words);
        Some(index as u8)
    }
}

/// The one that was attached last of those whose link is dead.
async fn silent(held: Vec<(u64, Weak<Link>)>) -> Option<u64> {
    let mut looks = JoinSet::new();
    for (order, link) in held {
        let Some(link) = link.upgrade() else { continue };
        looks.spawn(async move { link.is_silent().await.then_some(order) });
    }
    let mut last = None;
    while let Some(look) = looks.join_next().await {
        last = last.max(look.ok().flatten());
    }
    last
}
