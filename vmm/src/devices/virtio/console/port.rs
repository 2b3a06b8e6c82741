//! One terminal: a pair of virtqueues and, while somebody is attached, a socket.
//!
//! No bytes are kept here while a socket is attached: output goes from guest memory to the socket, and
//! what the socket does not take stays in the virtqueue, where it makes the writer in the guest sleep.
//! Input is read only into buffers the guest has made available. So neither side can make this
//! process grow. What passes is also drawn on the terminal's [`Screen`], if it has one: that is bounded
//! by the window's size.

use std::{io, sync::Arc};

use super::screen::Screen;
use crate::{
    devices::virtio::{
        Fault,
        chain::{Chain, read_prefix, window},
        io as vio,
        queue::VirtQueue,
    },
    memory::GuestMemory,
    poller::{Event, Interest, Key, Poller, Source},
};

/// Most bytes taken out of a virtqueue for a socket that is to be closed and does not take them now.
/// Linux has at most 16 times 32 KiB in a port's queue.
const FAREWELL_LIMIT: usize = 1 << 20;

/// Most bytes of one output buffer that are drawn. Linux writes at most 32 KiB at a time; a driver that
/// chains gigabytes is not its terminal's concern.
const DRAWN_LIMIT: u64 = 64 << 10;

/// Bytes drawn before others get their turn: drawing takes time, and the device is locked meanwhile.
const DRAWN_AT_ONCE: u64 = 64 << 10;

/// Somebody at a terminal.
struct Attachment {
    source: Source,
    /// The socket took no more: wait until it does.
    blocked: bool,
    /// The socket takes nothing ever again.
    output_dead: bool,
    /// The socket brings nothing ever again.
    input_ended: bool,
    /// The guest has buffers for what the socket brings.
    input_wanted: bool,
    hung_up: bool,
    /// The screen's redraw, which goes before everything else, and how much of it the socket has.
    redraw: Vec<u8>,
    redrawn: usize,
}

#[derive(Default)]
pub struct Port {
    attached: Option<Attachment>,
    /// None: nobody will want to see this terminal again.
    pub screen: Option<Box<Screen>>,
    /// Bytes drawn since others had their turn.
    drawn: u64,
    /// Bytes of the next output chain that were delivered already.
    pub delivered: u64,
    pub bytes_out: u64,
    pub bytes_in: u64,
}

/// What has to happen after a port was served.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Next {
    /// Nothing, until the guest or the socket says something.
    Wait,
    /// There is more, and this call did its share: come again soon.
    Again,
}

/// A socket whose terminal was detached, and what it still has to get.
pub struct Farewell {
    source: Source,
    bytes: Vec<u8>,
    sent: usize,
}

impl Port {
    pub fn is_attached(&self) -> bool {
        self.attached.is_some()
    }

    pub fn has_token(&self, token: u32) -> bool {
        self.attached.as_ref().is_some_and(|a| a.source.key().token == token)
    }

    /// `redraw` is what the socket gets first.
    pub fn attach(
        &mut self,
        poller: Arc<Poller>,
        socket: std::os::fd::OwnedFd,
        key: Key,
        redraw: Vec<u8>,
    ) {
        self.attached = Some(Attachment {
            source: Source::new(poller, socket, key),
            blocked: false,
            output_dead: false,
            input_ended: false,
            input_wanted: false,
            hung_up: false,
            redraw,
            redrawn: 0,
        });
    }

    /// Takes everything the guest has written so far and lets go of the socket. What comes back still
    /// has something to get.
    pub fn detach(
        &mut self,
        queue: &mut VirtQueue,
        memory: &GuestMemory,
    ) -> Result<Option<Farewell>, Fault> {
        let Some(attachment) = self.attached.take() else { return Ok(None) };
        let Attachment { source, redraw: bytes, redrawn: sent, .. } = attachment;
        let mut farewell = Farewell { source, bytes, sent };
        // A guest that goes on writing is not waited for.
        for _ in 0..queue.max_size() {
            let Some(chain) = queue.peek(memory)? else { break };
            if !attachment.output_dead {
                self.bytes_out += farewell.take(memory, &chain, self.delivered);
            }
            self.draw(memory, &chain, self.delivered, u64::MAX);
            self.finish_output(queue, memory, &chain)?;
        }
        queue.arm(memory)?;
        Ok(farewell.serve())
    }

    /// The socket has something to say.
    pub fn hear(&mut self, event: &Event) {
        let Some(attachment) = &mut self.attached else { return };
        if event.writable || event.hangup {
            attachment.blocked = false;
        }
        if event.hangup {
            attachment.hung_up = true;
            attachment.output_dead = true;
        }
    }

    /// Output: from the guest to the socket, or to nowhere.
    pub fn pump_output(
        &mut self,
        queue: &mut VirtQueue,
        memory: &GuestMemory,
    ) -> Result<Next, Fault> {
        let next = self.move_output(queue, memory)?;
        Ok(self.watch(next))
    }

    fn move_output(&mut self, queue: &mut VirtQueue, memory: &GuestMemory) -> Result<Next, Fault> {
        self.drawn = 0;
        for _ in 0..queue.max_size() {
            if self.attached.as_mut().is_some_and(|a| !a.redraw()) {
                return Ok(Next::Wait);
            }
            if self.drawn > DRAWN_AT_ONCE {
                return Ok(Next::Again);
            }
            let Some(chain) = queue.peek(memory)? else {
                if queue.arm(memory)? {
                    continue;
                }
                return Ok(Next::Wait);
            };
            if !chain.writable.is_empty() {
                return Err(queue.broken("an output buffer is for writing"));
            }
            if self.deliver(memory, &chain) {
                self.finish_output(queue, memory, &chain)?;
            }
        }
        Ok(Next::Again)
    }

    /// True when the chain needs nothing more.
    fn deliver(&mut self, memory: &GuestMemory, chain: &Chain) -> bool {
        let from = self.delivered;
        let over = self.send(memory, chain);
        // What goes to nobody is on the screen all the same.
        self.draw(memory, chain, from, if over { u64::MAX } else { self.delivered - from });
        over
    }

    /// Draws `count` bytes of a chain, from `skip` on.
    fn draw(&mut self, memory: &GuestMemory, chain: &Chain, skip: u64, count: u64) {
        let Some(screen) = &mut self.screen else { return };
        let part = window(&chain.readable, skip, count.min(DRAWN_LIMIT));
        let mut bytes = vec![0; part.iter().map(|segment| segment.length as usize).sum()];
        if read_prefix(memory, &part, &mut bytes) && !screen.write(&bytes) {
            tracing::debug!("a terminal's output takes too long to draw; a part was left out");
        }
        self.drawn += bytes.len() as u64;
    }

    fn send(&mut self, memory: &GuestMemory, chain: &Chain) -> bool {
        let Some(attachment) = &mut self.attached else { return true };
        if attachment.output_dead {
            return true;
        }
        let rest = window(&chain.readable, self.delivered, u64::MAX);
        if rest.is_empty() {
            return true;
        }
        match vio::send(attachment.source.fd(), memory, &rest) {
            Ok(count) => {
                self.delivered += count as u64;
                self.bytes_out += count as u64;
                self.delivered >= chain.readable_bytes()
            }
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => {
                attachment.blocked = true;
                false
            }
            Err(_) => {
                attachment.output_dead = true;
                true
            }
        }
    }

    fn finish_output(
        &mut self,
        queue: &mut VirtQueue,
        memory: &GuestMemory,
        chain: &Chain,
    ) -> Result<(), Fault> {
        self.delivered = 0;
        queue.advance();
        queue.complete_quietly(memory, chain)
    }

    /// Input: from the socket into the buffers the guest has made available.
    pub fn pump_input(
        &mut self,
        queue: &mut VirtQueue,
        memory: &GuestMemory,
    ) -> Result<Next, Fault> {
        self.move_input(queue, memory)?;
        Ok(self.watch(Next::Wait))
    }

    fn move_input(&mut self, queue: &mut VirtQueue, memory: &GuestMemory) -> Result<(), Fault> {
        let Some(attachment) = &mut self.attached else { return Ok(()) };
        for _ in 0..queue.max_size() {
            if attachment.input_ended {
                return Ok(());
            }
            let Some(chain) = queue.peek(memory)? else {
                if queue.arm(memory)? {
                    continue;
                }
                attachment.input_wanted = false;
                return Ok(());
            };
            if chain.writable.is_empty() || !chain.readable.is_empty() {
                return Err(queue.broken("an input buffer is not for writing"));
            }
            attachment.input_wanted = true;
            match vio::receive(attachment.source.fd(), memory, &chain.writable) {
                Ok(0) => attachment.input_ended = true,
                Ok(count) => {
                    self.bytes_in += count as u64;
                    queue.advance();
                    // A socket's buffer is far below 4 GiB.
                    queue.complete(memory, chain.head, count as u32)?;
                }
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => return Ok(()),
                Err(_) => attachment.input_ended = true,
            }
        }
        // There may be more: the socket is still readable then, and its event comes again.
        Ok(())
    }

    /// The guest has new input buffers: look at the socket again, on the I/O thread.
    pub fn want_input(&mut self) -> Next {
        if let Some(attachment) = &mut self.attached {
            attachment.input_wanted = true;
        }
        self.watch(Next::Wait)
    }

    /// Watches the socket for what can be served now, or lets go of it. `next` is what is to happen
    /// otherwise.
    fn watch(&mut self, next: Next) -> Next {
        let Some(attachment) = &mut self.attached else { return next };
        let over = attachment.input_ended && attachment.hung_up;
        let read = attachment.input_wanted && !attachment.input_ended;
        let interest = Interest { read, write: attachment.blocked };
        // A hang-up is told once; from then on the socket is watched only for what it still brings.
        let interest = (!attachment.hung_up || read).then_some(interest);
        if over || attachment.source.set(interest).is_err() {
            self.attached = None;
            // Output that waited for the socket goes nowhere now.
            return Next::Again;
        }
        next
    }
}

impl Attachment {
    /// Sends what is left of the redraw. False while the socket takes nothing.
    fn redraw(&mut self) -> bool {
        while !self.blocked && !self.output_dead && self.redrawn < self.redraw.len() {
            match vio::send_bytes(self.source.fd(), &self.redraw[self.redrawn..]) {
                Ok(count) => self.redrawn += count,
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => self.blocked = true,
                Err(_) => self.output_dead = true,
            }
        }
        if self.redrawn == self.redraw.len() {
            (self.redraw, self.redrawn) = (Vec::new(), 0);
        }
        !self.blocked
    }
}

impl Farewell {
    pub fn has_token(&self, token: u32) -> bool {
        self.source.key().token == token
    }

    /// Delivers a chain from `skip` on, now or later. Returns how many bytes that is.
    fn take(&mut self, memory: &GuestMemory, chain: &Chain, skip: u64) -> u64 {
        let mut rest = window(&chain.readable, skip, u64::MAX);
        let mut taken = 0;
        if self.sent == self.bytes.len() {
            taken = vio::send(self.source.fd(), memory, &rest).unwrap_or(0) as u64;
            rest = window(&rest, taken, u64::MAX);
        }
        let room = FAREWELL_LIMIT.saturating_sub(self.bytes.len());
        let rest = window(&rest, 0, room as u64);
        let count = rest.iter().map(|segment| segment.length as usize).sum::<usize>();
        let start = self.bytes.len();
        self.bytes.resize(start + count, 0);
        read_prefix(memory, &rest, &mut self.bytes[start..]);
        taken + count as u64
    }

    /// Sends what the socket takes. None when nothing is left: the socket is closed then.
    pub fn serve(mut self) -> Option<Self> {
        while self.sent < self.bytes.len() {
            match vio::send_bytes(self.source.fd(), &self.bytes[self.sent..]) {
                Ok(count) => self.sent += count,
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {
                    return self.source.set(Some(Interest::WRITE)).is_ok().then_some(self);
                }
                Err(_) => return None,
            }
        }
        None
    }
}

impl Drop for Farewell {
    fn drop(&mut self) {
        vio::close_in_order(self.source.fd());
    }
}
