//! What is left for a lull in the traffic, because while there is traffic it comes by itself.
//!
//! *Telling the guest that its packets were taken*: the next interrupt for whatever else tells it too.
//!
//! *Hearing of the guest's next packet.* Linux says that a program has read all there was (CREDIT_UPDATE) with a
//! packet of its own, and a moment later sends the program's answer, with another. Each would be an exit, and of
//! the first nobody wants to know. So a guest that has shown this habit on a connection is asked, with bytes for
//! it, to notify of the packet after the next. The next one is looked at with that, or with more bytes for the
//! guest, or in the lull.

use std::time::{Duration, Instant};

use super::{LULL, MAX_PAYLOAD, QUIET_TIME, TRANSMIT, Vsock};
use crate::{
    devices::virtio::{Context, Fault, VirtioDevice as _},
    poller::Key,
};

/// Since when.
#[derive(Default)]
pub struct Waiting {
    /// The guest has not heard that packets were taken.
    unsaid: Option<Instant>,
    /// The guest was asked not to notify of its next packet.
    pub(super) unasked: Option<Instant>,
}

impl Vsock {
    /// Packets of the guest were looked at, all or as many as others let it; before, it had heard of all that
    /// were taken, or not.
    pub(super) fn looked(&mut self, heard: bool, context: &Context<'_>) -> Result<(), Fault> {
        if !context.queues[TRANSMIT].is_quiet() {
            return Ok(());
        }
        if heard || self.waiting.unsaid.is_none() {
            self.waiting.unsaid = Some(Instant::now());
        }
        self.wake_in(QUIET_TIME)
    }

    /// The guest notifies of its next packet.
    pub(super) fn listens(&mut self) {
        self.waiting.unasked = None;
    }

    /// Bytes were given to the guest on this connection.
    pub(super) fn gave(&mut self, port: u32, context: &mut Context<'_>) -> Result<(), Fault> {
        let Some(connection) = self.connections.get_mut(&port) else { return Ok(()) };
        connection.habit.asked();
        // With little room left, what the guest says of it is waited for.
        if !connection.habit.is_known() || connection.room() < MAX_PAYLOAD {
            return self.listen(context);
        }
        self.waiting.unasked = Some(Instant::now());
        if context.queues[TRANSMIT].arm_for_second(context.memory)? {
            return self.take_packets(context);
        }
        self.wake_in(QUIET_TIME)
    }

    /// Lets the guest notify of its next packet, if it was asked not to.
    pub(super) fn listen(&mut self, context: &mut Context<'_>) -> Result<(), Fault> {
        if self.waiting.unasked.take().is_some() && context.queues[TRANSMIT].arm(context.memory)? {
            return self.take_packets(context);
        }
        Ok(())
    }

    /// Some of what waits may have waited long enough.
    pub(super) fn lull(&mut self, context: &mut Context<'_>) -> Result<(), Fault> {
        let now = Instant::now();
        let left = |since: Option<Instant>| {
            since.map(|since| QUIET_TIME.saturating_sub(now.saturating_duration_since(since)))
        };
        if left(self.waiting.unasked) == Some(Duration::ZERO) {
            self.listen(context)?;
        }
        if !context.queues[TRANSMIT].is_quiet() {
            self.waiting.unsaid = None;
        }
        if left(self.waiting.unsaid) == Some(Duration::ZERO) {
            self.waiting.unsaid = None;
            context.queues[TRANSMIT].say_all();
        }
        let next = [left(self.waiting.unsaid), left(self.waiting.unasked)].into_iter().flatten();
        match next.min() {
            Some(rest) => self.wake_in(rest),
            None => Ok(()),
        }
    }

    fn wake_in(&self, delay: Duration) -> Result<(), Fault> {
        let key = Key { owner: self.owner, token: LULL };
        // A timer that is set to nothing never comes.
        let delay = delay.max(Duration::from_micros(100));
        self.poller.post_after(delay, key).map_err(|source| Fault::Host {
            device: Self::NAME,
            what: "set a timer",
            source,
        })
    }
}

/// What a guest says first on a connection once it was given bytes there.
#[derive(Clone, Copy, Debug, Default)]
pub struct Habit {
    /// How often in a row it was that it has read them. Below 0: how often it has to be yet, to make up for once
    /// that it was something else, which may have waited for the lull.
    seen: i8,
    asked: bool,
}

impl Habit {
    const KNOWN: i8 = 2;
    const FORGIVEN: i8 = 30;

    fn asked(&mut self) {
        self.asked = true;
    }

    /// The guest says something; `read`: that it has read what it was given, and nothing else.
    pub fn answered(&mut self, read: bool) {
        if std::mem::take(&mut self.asked) {
            self.seen = if read { (self.seen + 1).min(Self::KNOWN) } else { -Self::FORGIVEN };
        }
    }

    fn is_known(self) -> bool {
        self.seen >= Self::KNOWN
    }
}
