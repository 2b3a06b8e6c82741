//! Who has which terminal of a machine.
//!
//! A shell's terminal outlives its session: when the client goes away, the program is not told, and the
//! terminal is *left*. It waits, with its screen kept in the machine's process, for the next login,
//! which takes up the terminal that was left last. Nobody else gets it as long as its program runs.

use std::{sync::Arc, time::Duration};

use hermitage_guest_proto::{ExitStatus, HostMessage, SessionId, Window};
use hermitage_vmm_proto::MachineRequest;
use tokio::{
    sync::oneshot,
    time::{Instant, timeout_at},
};

use super::{Machine, OpenError, open::Running, takeover::Holder};

/// How long a terminal that is being left right now may take: a message has to be sent.
const LEAVE_TIMEOUT: Duration = Duration::from_secs(1);

/// How long the machine's process may take to let go of a socket.
const DETACH_TIMEOUT: Duration = Duration::from_secs(30);

#[derive(Default)]
pub enum TerminalState {
    #[default]
    Free,
    /// By a shell's holder, or by something that nobody can take over.
    Used(Option<Holder>),
    /// The machine was asked to let go of it.
    Detaching(oneshot::Sender<()>),
    /// Its client has gone; in a moment it is left.
    Leaving,
    Left(Left),
}

/// A terminal whose client has gone and whose program goes on.
pub struct Left {
    session: SessionId,
    exited: oneshot::Receiver<ExitStatus>,
    /// The later it was left, the greater.
    order: u64,
}

/// A taken terminal, free again when dropped.
pub struct Slot {
    machine: Arc<Machine>,
    pub index: u8,
    pub detached: bool,
    /// False: it is somebody's still.
    freed: bool,
}

impl Slot {
    /// Takes a free terminal.
    pub fn take(machine: &Arc<Machine>) -> Result<Self, OpenError> {
        let mut table = machine.table();
        let left =
            table.terminals.iter().filter(|state| matches!(state, TerminalState::Left(_))).count();
        let (index, state) = table
            .terminals
            .iter_mut()
            .enumerate()
            .find(|(_, state)| matches!(state, TerminalState::Free))
            .ok_or(OpenError::NoTerminal { left })?;
        *state = TerminalState::Used(None);
        Ok(Self::of(machine, index as u8))
    }

    fn of(machine: &Arc<Machine>, index: u8) -> Self {
        Self { machine: machine.clone(), index, detached: false, freed: true }
    }

    /// Nobody else ever gets it.
    pub fn keep(mut self) {
        self.freed = false;
    }

    /// Its client has gone, its program stays. What is returned has to be run; who comes back meanwhile
    /// waits for it.
    pub fn leave(
        self,
        session: SessionId,
        exited: oneshot::Receiver<ExitStatus>,
    ) -> impl Future<Output = ()> + Send {
        let (machine, index) = (self.machine.clone(), self.index);
        machine.set_terminal(index, TerminalState::Leaving);
        self.keep();
        async move {
            // Sent before anybody can take it up: requests are handled in their order.
            let request = MachineRequest::DetachTerminal { terminal: index };
            if let Err(error) = machine.request(&request, &[]).await {
                tracing::debug!(machine = machine.label, index, %error, "can't leave a terminal");
            }
            machine.set_left(index, session, exited);
        }
    }
}

impl Drop for Slot {
    fn drop(&mut self) {
        if self.freed {
            self.machine.set_terminal(self.index, TerminalState::Free);
        }
    }
}

impl Machine {
    /// Takes the terminal that was left last, if there is one. Its program is left again when what is
    /// returned is dropped.
    pub(super) async fn take_left(self: &Arc<Self>) -> Option<Running> {
        let deadline = Instant::now() + LEAVE_TIMEOUT;
        loop {
            let left = self.terminal_left.notified();
            {
                let mut table = self.table();
                let states = &mut table.terminals;
                let leaving = states.iter().any(|state| matches!(state, TerminalState::Leaving));
                let last = states
                    .iter_mut()
                    .enumerate()
                    .filter_map(|(index, state)| match state {
                        TerminalState::Left(left) => Some((left.order, index)),
                        _ => None,
                    })
                    .max();
                if !leaving || Instant::now() >= deadline {
                    let (_, index) = last?;
                    let state = std::mem::replace(&mut states[index], TerminalState::Used(None));
                    let TerminalState::Left(left) = state else { return None };
                    let slot = Slot::of(self, index as u8);
                    return Some(Running::shell(self.clone(), left.session, left.exited, slot));
                }
            }
            // Somebody whose link has just dropped comes back to her terminal, not to one left before.
            let _ = timeout_at(deadline, left).await;
        }
    }

    pub(super) fn set_left(
        &self,
        index: u8,
        session: SessionId,
        mut exited: oneshot::Receiver<ExitStatus>,
    ) {
        let mut table = self.table();
        table.last_left += 1;
        let order = table.last_left;
        // The program may have ended meanwhile, or the machine.
        let state = match exited.try_recv() {
            Err(oneshot::error::TryRecvError::Empty) => {
                tracing::info!(machine = self.label, index, "a terminal waits for its user");
                TerminalState::Left(Left { session, exited, order })
            }
            _ => TerminalState::Free,
        };
        if let Some(terminal) = table.terminals.get_mut(usize::from(index)) {
            *terminal = state;
        }
        drop(table);
        self.terminal_left.notify_waiters();
    }

    /// A program has ended; the terminal it was left on is free.
    pub(super) fn free_left(&self, ended: SessionId) {
        for state in &mut self.table().terminals {
            if matches!(state, TerminalState::Left(left) if left.session == ended) {
                *state = TerminalState::Free;
            }
        }
    }

    /// Terminals that wait for their user, the one left last first.
    pub fn left_terminals(&self) -> Vec<u8> {
        let table = self.table();
        let mut left: Vec<(u64, u8)> = table
            .terminals
            .iter()
            .enumerate()
            .filter_map(|(index, state)| match state {
                TerminalState::Left(left) => Some((left.order, index as u8)),
                _ => None,
            })
            .collect();
        left.sort_unstable_by(|a, b| b.cmp(a));
        left.into_iter().map(|(_, index)| index).collect()
    }

    /// Takes the terminal's socket away; what the program still writes is dropped.
    pub(super) async fn let_go(&self, index: u8) {
        let (sender, detached) = oneshot::channel();
        self.set_terminal(index, TerminalState::Detaching(sender));
        if self.request(&MachineRequest::DetachTerminal { terminal: index }, &[]).await.is_ok() {
            let _ = tokio::time::timeout(DETACH_TIMEOUT, detached).await;
        }
    }

    pub(super) fn set_terminal(&self, index: u8, state: TerminalState) {
        if let Some(terminal) = self.table().terminals.get_mut(usize::from(index)) {
            *terminal = state;
        }
    }

    /// The machine has let go of a terminal's socket.
    pub(super) fn terminal_detached(&self, index: u8) {
        let mut table = self.table();
        if let Some(state) = table.terminals.get_mut(usize::from(index))
            && matches!(state, TerminalState::Detaching(_))
            && let TerminalState::Detaching(waiting) =
                std::mem::replace(state, TerminalState::Used(None))
        {
            let _ = waiting.send(());
        }
    }

    /// A window's size for the program and for the screen kept of it.
    pub(super) fn resize(&self, session: SessionId, terminal: Option<u8>, window: Window) {
        self.tell_if_listening(HostMessage::Resize { session, window });
        let Some(terminal) = terminal else { return };
        let Window { columns, rows, .. } = window;
        let request = MachineRequest::ResizeTerminal { terminal, columns, rows };
        if let Err(error) = self.control.try_send(&request) {
            tracing::debug!(machine = self.label, %error, "a screen's new size was dropped");
        }
    }
}
