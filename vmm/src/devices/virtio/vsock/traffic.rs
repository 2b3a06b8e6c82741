//! Packets between the guest's queues and the connections.

use super::{
    FAIR_SHARE, GO_ON, GUEST_CID, HOST_CID, MAX_PAYLOAD, MAX_RESETS, RECEIVE, TRANSMIT, Vsock,
    VsockOutcome,
    connection::{Input, State},
    packet::{HEADER, Header, STREAM, op},
};
use crate::{
    devices::virtio::{
        Context, Fault, VirtioDevice as _,
        chain::{Chain, read_prefix, total, window, write_prefix},
    },
    memory::GuestMemory,
    poller::Key,
};

impl Vsock {
    /// Takes packets of the guest: a bounded number, then others get their turn. The guest hears of it soon.
    pub(super) fn take_packets(&mut self, context: &mut Context<'_>) -> Result<(), Fault> {
        let heard = !context.queues[TRANSMIT].is_quiet();
        self.take_some(context)?;
        self.looked(heard, context)
    }

    fn take_some(&mut self, context: &mut Context<'_>) -> Result<(), Fault> {
        let memory = context.memory;
        let queue = &mut context.queues[TRANSMIT];
        for _ in 0..2 * queue.max_size() {
            self.paused = self.resets.len() >= MAX_RESETS;
            if self.paused {
                return Ok(());
            }
            let Some(chain) = queue.peek(memory)? else {
                self.listens();
                if queue.arm(memory)? {
                    continue;
                }
                return Ok(());
            };
            let header = read_header(&chain, memory).map_err(|reason| queue.broken(reason))?;
            self.packet(&header, &chain, memory);
            queue.advance();
            queue.complete_quietly(memory, &chain)?;
        }
        let key = Key { owner: self.owner, token: GO_ON };
        self.poller.post(key).map_err(|source| Fault::Host {
            device: Self::NAME,
            what: "wake a thread",
            source,
        })
    }

    fn packet(&mut self, header: &Header, chain: &Chain, memory: &GuestMemory) {
        // §5.10.6.4.1 lets nobody else speak through this device.
        if header.src_cid != GUEST_CID || header.dst_cid != HOST_CID {
            return;
        }
        let port = header.dst_port;
        let known = header.kind == STREAM
            && self
                .connections
                .get(&port)
                .is_some_and(|c| c.guest_port == header.src_port && c.state != State::Finished);
        let Some(connection) = self.connections.get_mut(&port).filter(|_| known) else {
            if header.op != op::RST {
                self.resets.push_back(Header::reset_for(header));
            }
            return;
        };
        connection.credit.hear(header.buf_alloc, header.fwd_cnt);
        connection.habit.answered(header.op == op::CREDIT_UPDATE);
        let stream = connection.stream;
        match (header.op, connection.state) {
            (op::RESPONSE, State::Connecting) => {
                connection.answered();
                self.tell(VsockOutcome::Connected { stream });
            }
            (op::RST, State::Connecting) => {
                connection.reset_by_guest();
                let reason = format!("nobody listens on port {} of the machine", header.src_port);
                self.tell(VsockOutcome::Failed { stream, reason });
            }
            (_, State::Connecting) => {
                connection.break_off();
                let reason = "the machine answered with nonsense".into();
                self.tell(VsockOutcome::Failed { stream, reason });
            }
            (op::RST, _) => connection.reset_by_guest(),
            (op::SHUTDOWN, _) => connection.closed_by_guest(header.flags),
            (op::CREDIT_UPDATE, _) => {}
            (op::CREDIT_REQUEST, _) => connection.credit_requested(),
            (op::RW, _) => {
                let data = window(&chain.readable, HEADER as u64, header.length.into());
                if connection.data(memory, &data) {
                    self.stats.from_guest += u64::from(header.length);
                } else {
                    connection.break_off();
                }
            }
            // A second answer, a request for a connection there is, something unheard of.
            _ => connection.break_off(),
        }
        self.settle(port);
    }

    /// Gives the guest what it is owed, as far as it has buffers.
    pub(super) fn pay(&mut self, context: &mut Context<'_>) -> Result<(), Fault> {
        while !self.resets.is_empty() || !self.owing.is_empty() {
            let Some(chain) = self.buffer(context)? else { return Ok(()) };
            let header = match self.resets.pop_front() {
                Some(header) => Some(header),
                None => self.next_owed(),
            };
            if let Some(header) = header {
                self.put(&header, &chain, context)?;
            }
        }
        Ok(())
    }

    fn next_owed(&mut self) -> Option<Header> {
        let port = self.owing.pop_front()?;
        let header = self.connections.get_mut(&port)?.pay();
        // Lines it up again if it owes more, forgets it if that was the last of it.
        self.settle(port);
        header
    }

    /// The guest's next receive buffer, which stays next until `put`.
    fn buffer(&mut self, context: &mut Context<'_>) -> Result<Option<Chain>, Fault> {
        let queue = &mut context.queues[RECEIVE];
        loop {
            if let Some(chain) = queue.peek(context.memory)? {
                if !chain.readable.is_empty() || chain.writable_bytes() <= HEADER as u64 {
                    let length = chain.writable_bytes();
                    return Err(queue.broken(format!("a receive buffer of {length} bytes")));
                }
                return Ok(Some(chain));
            }
            if !queue.arm(context.memory)? {
                self.starved = true;
                return Ok(None);
            }
        }
    }

    /// Completes a receive buffer whose data, if any, is in its place already.
    fn put(
        &mut self,
        header: &Header,
        chain: &Chain,
        context: &mut Context<'_>,
    ) -> Result<(), Fault> {
        // Its length was checked in `buffer`.
        write_prefix(context.memory, &chain.writable, &header.encode());
        let queue = &mut context.queues[RECEIVE];
        queue.advance();
        queue.complete(context.memory, chain.head, HEADER as u32 + header.length)
    }

    /// Bytes from a connection's socket to the guest, up to its share.
    pub(super) fn pump_input(&mut self, port: u32, context: &mut Context<'_>) -> Result<(), Fault> {
        // What is owed comes first: the request before the first byte.
        self.pay(context)?;
        let before = self.stats.to_guest;
        for _ in 0..FAIR_SHARE {
            let Some(connection) = self.connections.get(&port) else { break };
            let room = connection.room().min(MAX_PAYLOAD);
            if room == 0 {
                break;
            }
            let Some(chain) = self.buffer(context)? else { break };
            let Some(connection) = self.connections.get_mut(&port) else { break };
            let into = window(&chain.writable, HEADER as u64, room.into());
            let Input::Bytes(count) = connection.input(context.memory, &into) else { break };
            let header = connection.header(op::RW, 0, count);
            self.stats.to_guest += u64::from(count);
            self.put(&header, &chain, context)?;
            if u64::from(count) < total(&into) {
                // That was all; of an end behind it the poller tells again.
                break;
            }
        }
        if self.stats.to_guest != before {
            self.gave(port, context)?;
        }
        self.settle(port);
        self.pay(context)
    }

    /// The guest has new receive buffers.
    pub(super) fn fed(&mut self, context: &mut Context<'_>) -> Result<(), Fault> {
        let was_starved = std::mem::take(&mut self.starved);
        self.pay(context)?;
        if was_starved && !self.starved {
            let ports: Vec<u32> = self.connections.keys().copied().collect();
            ports.into_iter().for_each(|port| self.settle(port));
            self.pay(context)?;
        }
        if self.paused {
            self.take_packets(context)?;
            self.pay(context)?;
        }
        Ok(())
    }
}

/// A packet's header, and that its payload is all there. The error is one no reset can answer.
fn read_header(chain: &Chain, memory: &GuestMemory) -> Result<Header, String> {
    let mut raw = [0; HEADER];
    if !read_prefix(memory, &chain.readable, &mut raw) {
        return Err(format!("a packet of {} bytes", chain.readable_bytes()));
    }
    let header = Header::decode(&raw);
    let room = chain.readable_bytes() - HEADER as u64;
    let payload = if header.op == op::RW { header.length } else { 0 };
    if u64::from(payload) > room || payload > MAX_PAYLOAD {
        return Err(format!("a packet says {payload} bytes and has {room}"));
    }
    Ok(header)
}
