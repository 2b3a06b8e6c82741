//! One stream between a socket of the host and a port of the guest.
//!
//! Bytes for the guest are never held here: they go from the socket into the guest's buffers, as far as
//! it gives credit. Bytes of the guest go to the socket at once; what it does not take is held, and
//! the credit we gave bounds how much that can be.

use std::{collections::VecDeque, io};

use super::{
    credit::Credit,
    lull::Habit,
    packet::{Header, STREAM, op, shutdown},
};
use crate::{
    devices::virtio::{
        chain::{Segment, read_prefix, total, window},
        io as vio,
    },
    memory::GuestMemory,
    poller::{Event, Interest, Source},
};

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum State {
    /// The guest has not answered yet.
    Connecting,
    Established,
    /// The guest knows of it no more; only its last bytes are still to be delivered.
    Finished,
}

/// Packets this side owes the guest. Flags and not a list: their number can't grow.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
struct Owed {
    request: bool,
    reset: bool,
    shutdown: bool,
    credit_update: bool,
    credit_request: bool,
}

pub struct Connection {
    /// Chosen by whoever asked for the connection; 0 for one that was restored.
    pub stream: u64,
    pub host_port: u32,
    pub guest_port: u32,
    pub state: State,
    pub credit: Credit,
    /// None for one that was restored and not yet adopted, and once the host's side is over.
    source: Option<Source>,
    /// Bytes of the guest that the socket has not taken.
    held: VecDeque<u8>,
    owed: Owed,
    /// SHUTDOWN flags the guest has sent, and those we have.
    guest_closed: u32,
    host_closed: u32,
    hung_up: bool,
    pub habit: Habit,
}

/// What reading from the socket came to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Input {
    Bytes(u32),
    /// Nothing now, or never again.
    Nothing,
}

impl Connection {
    /// A connection that the guest is about to be asked for.
    pub fn requested(stream: u64, host_port: u32, guest_port: u32, source: Source) -> Self {
        let mut connection = Self::restored(host_port, guest_port, Credit::default());
        connection.stream = stream;
        connection.source = Some(source);
        connection.owed.request = true;
        connection.state = State::Connecting;
        connection
    }

    /// An established connection that waits for its socket.
    pub fn restored(host_port: u32, guest_port: u32, credit: Credit) -> Self {
        Self {
            stream: 0,
            host_port,
            guest_port,
            state: State::Established,
            credit,
            source: None,
            held: VecDeque::new(),
            owed: Owed::default(),
            guest_closed: 0,
            host_closed: 0,
            hung_up: false,
            habit: Habit::default(),
        }
    }

    #[cfg(test)]
    pub fn check_bounds(&self) {
        assert!(self.held.len() <= super::credit::BUFFER as usize);
        assert_eq!(self.held.len(), self.credit.held() as usize);
    }

    pub fn adopt(&mut self, source: Source) {
        self.source = Some(source);
    }

    pub fn is_adoptable(&self) -> bool {
        self.source.is_none() && self.state == State::Established && self.host_closed == 0
    }

    /// Whether a snapshot can hold it: nothing under way, nothing half closed.
    pub fn is_settled(&self) -> bool {
        self.state == State::Established
            && self.owed == Owed::default()
            && self.held.is_empty()
            && self.guest_closed == 0
            && self.host_closed == 0
    }

    /// Open in both directions.
    pub fn is_whole(&self) -> bool {
        self.state == State::Established && self.guest_closed == 0 && self.host_closed == 0
    }

    /// Whether the socket has bytes that were not read yet.
    pub fn has_input(&self) -> bool {
        let Some(source) = &self.source else { return false };
        rustix::io::ioctl_fionread(source.fd()).is_ok_and(|bytes| bytes > 0)
    }

    /// The host's side is over; what is left is the guest's to end.
    pub fn is_lingering(&self) -> bool {
        self.host_closed == shutdown::BOTH && self.held.is_empty()
    }

    /// Nothing is left to do for either side.
    pub fn is_over(&self) -> bool {
        self.state == State::Finished && self.held.is_empty() && self.owed == Owed::default()
    }

    /// Breaks it off: the guest is told, the host sees the end of the stream after what is held.
    pub fn break_off(&mut self) {
        self.finish();
        self.owed = Owed { reset: true, ..Owed::default() };
    }

    fn finish(&mut self) {
        self.state = State::Finished;
        self.owed = Owed::default();
    }

    /// The guest has answered the request.
    pub fn answered(&mut self) {
        self.state = State::Established;
    }

    /// The guest has broken it off.
    pub fn reset_by_guest(&mut self) {
        self.finish();
    }

    pub fn credit_requested(&mut self) {
        self.owed.credit_update = true;
    }

    /// The guest has closed one or both directions.
    pub fn closed_by_guest(&mut self, flags: u32) {
        self.guest_closed |= flags & shutdown::BOTH;
        if let Some(source) = &self.source
            && self.guest_closed & shutdown::RECEIVE != 0
        {
            vio::shutdown(source.fd(), libc::SHUT_RD);
        }
        self.pass_on_end();
        // §5.10.6.5: both directions closed is answered with a reset, so that the guest may forget
        // the connection at once.
        if self.guest_closed == shutdown::BOTH {
            self.break_off();
        }
    }

    /// Data of the guest. False if it is more than the guest had credit for.
    #[must_use]
    pub fn data(&mut self, memory: &GuestMemory, data: &[Segment]) -> bool {
        // At most one packet, which was bounded where it was read.
        let length = total(data) as u32;
        if !self.credit.received(length) {
            return false;
        }
        let mut taken = 0;
        if self.held.is_empty() {
            taken = match (&self.source, self.writes_are_lost()) {
                (Some(source), false) => match vio::send(source.fd(), memory, data) {
                    Ok(count) => count as u64,
                    Err(error) if error.kind() == io::ErrorKind::WouldBlock => 0,
                    Err(_) => {
                        self.host_stopped_reading();
                        u64::from(length)
                    }
                },
                _ => u64::from(length),
            };
        }
        let rest = window(data, taken, u64::MAX);
        self.hold(memory, &rest);
        self.took(taken as u32);
        true
    }

    fn hold(&mut self, memory: &GuestMemory, data: &[Segment]) {
        let mut bytes = vec![0; total(data) as usize];
        read_prefix(memory, data, &mut bytes);
        self.held.extend(bytes);
    }

    /// Gives the socket what is held, as far as it takes it.
    pub fn flush(&mut self) {
        while !self.held.is_empty() {
            let Some(source) = &self.source else { break };
            match vio::send_bytes(source.fd(), self.held.as_slices().0) {
                Ok(count) => {
                    self.held.drain(..count);
                    self.took(count as u32);
                }
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => return,
                Err(_) => self.host_stopped_reading(),
            }
        }
        // A burst is over; its room is not kept.
        if self.held.capacity() > 0 {
            self.held = VecDeque::new();
        }
        self.pass_on_end();
    }

    fn took(&mut self, count: u32) {
        self.credit.forwarded(count);
        if self.credit.report_due() && self.state == State::Established {
            self.owed.credit_update = true;
        }
    }

    /// The guest sends no more, and everything it sent is delivered: so the host sees the end.
    fn pass_on_end(&mut self) {
        if self.guest_closed & shutdown::SEND != 0
            && self.held.is_empty()
            && let Some(source) = &self.source
        {
            vio::shutdown(source.fd(), libc::SHUT_WR);
        }
    }

    fn writes_are_lost(&self) -> bool {
        self.host_closed & shutdown::RECEIVE != 0
    }

    fn host_stopped_reading(&mut self) {
        let lost = self.held.len();
        self.held.clear();
        self.took(lost as u32);
        self.close_host(shutdown::RECEIVE);
    }

    fn close_host(&mut self, flags: u32) {
        if self.host_closed & flags != flags {
            self.host_closed |= flags;
            self.owed.shutdown = self.state == State::Established;
        }
    }

    /// The socket has something to say, apart from bytes.
    pub fn hear(&mut self, event: &Event) {
        if event.hangup && !self.hung_up {
            self.hung_up = true;
            self.host_stopped_reading();
        }
        if event.writable {
            self.flush();
        }
    }

    /// How many bytes of the socket may be given to the guest now.
    pub fn room(&self) -> u32 {
        let open = self.state == State::Established
            && self.guest_closed & shutdown::RECEIVE == 0
            && self.host_closed & shutdown::SEND == 0
            && self.source.is_some();
        if open { self.credit.guest_room() } else { 0 }
    }

    /// Reads from the socket into `into`, which has no more than `room` bytes.
    pub fn input(&mut self, memory: &GuestMemory, into: &[Segment]) -> Input {
        let Some(source) = &self.source else { return Input::Nothing };
        match vio::receive(source.fd(), memory, into) {
            Ok(count @ 1..) => {
                // Bounded by `into`.
                let count = count as u32;
                self.credit.sent(count);
                self.owed.credit_request |= self.credit.guest_room() == 0;
                Input::Bytes(count)
            }
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => Input::Nothing,
            // The end, or an error that comes to the same.
            Ok(_) | Err(_) => {
                self.close_host(shutdown::SEND);
                Input::Nothing
            }
        }
    }

    /// Watches the socket for what can be served now. `guest_ready`: the guest has buffers for more.
    pub fn watch(&mut self, guest_ready: bool) -> io::Result<()> {
        let read = guest_ready && self.room() > 0;
        let write = !self.held.is_empty();
        let hung_up = self.hung_up;
        // Over for the host: the descriptor need not wait for the guest's last word.
        if hung_up && self.host_closed == shutdown::BOTH {
            self.source = None;
        }
        let Some(source) = &mut self.source else { return Ok(()) };
        // A hang-up is told once; from then on the socket is watched only for what it still brings.
        let interest = (!hung_up || read).then_some(Interest { read, write });
        source.set(interest)
    }

    pub fn owes(&self) -> bool {
        self.owed != Owed::default()
    }

    /// The next packet owed to the guest. A header that reports credit comes for nothing with any.
    pub fn pay(&mut self) -> Option<Header> {
        let owed = &mut self.owed;
        let (op, flags) = if std::mem::take(&mut owed.request) {
            (op::REQUEST, 0)
        } else if std::mem::take(&mut owed.reset) {
            (op::RST, 0)
        } else if std::mem::take(&mut owed.shutdown) {
            (op::SHUTDOWN, self.host_closed)
        } else if std::mem::take(&mut owed.credit_update) {
            (op::CREDIT_UPDATE, 0)
        } else if std::mem::take(&mut owed.credit_request) {
            (op::CREDIT_REQUEST, 0)
        } else {
            return None;
        };
        Some(self.header(op, flags, 0))
    }

    /// A header of this connection, for the guest.
    pub fn header(&mut self, op: u16, flags: u32, length: u32) -> Header {
        let (buf_alloc, fwd_cnt) = self.credit.report();
        self.owed.credit_update = false;
        Header {
            src_cid: super::HOST_CID,
            dst_cid: super::GUEST_CID,
            src_port: self.host_port,
            dst_port: self.guest_port,
            length,
            kind: STREAM,
            op,
            flags,
            buf_alloc,
            fwd_cnt,
        }
    }
}

impl Drop for Connection {
    fn drop(&mut self) {
        if let Some(source) = &self.source {
            vio::close_in_order(source.fd());
        }
    }
}
