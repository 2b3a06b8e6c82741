//! The other side of the vsock device: a driver with sockets, as Linux behaves.

use std::{
    collections::{HashMap, HashSet},
    io::Read,
    num::Wrapping,
    os::unix::net::UnixStream,
    sync::Arc,
    time::Duration,
};

use hermitage_vmm_proto::stream_pair;

use crate::devices::virtio::testing::Driver;

use super::super::{packet::HEADER, *};

pub const OWNER: u8 = 9;
const BUFFER: u32 = 3776;
const SLOT: u32 = HEADER as u32 + MAX_PAYLOAD;

/// A socket in the guest, by the host's port.
#[derive(Clone, Default)]
pub struct Socket {
    pub guest_port: u32,
    /// Bytes received and not read by the program.
    pub unread: Vec<u8>,
    pub room: u32,
    received: Wrapping<u32>,
    read: Wrapping<u32>,
    sent: Wrapping<u32>,
    peer_room: u32,
    peer_read: Wrapping<u32>,
    /// SHUTDOWN flags from the host.
    pub closed: u32,
    pub reset: bool,
}

pub struct Guest {
    pub driver: Driver<Vsock>,
    pub poller: Arc<Poller>,
    buffers: HashMap<u16, u64>,
    /// Receive buffers not given to the device.
    kept: Vec<u64>,
    pub refill: bool,
    transmit: Vec<u64>,
    pub listening: HashSet<u32>,
    pub sockets: HashMap<u32, Socket>,
    /// Room new sockets offer.
    pub room: u32,
    /// Every packet received, in order.
    pub log: Vec<Header>,
}

pub fn vsock() -> (Vsock, Arc<Poller>) {
    let poller = Arc::new(Poller::new().unwrap());
    (Vsock::new(poller.clone(), OWNER), poller)
}

impl Guest {
    /// As machines have it: registers on a page, interrupts by edges.
    pub fn start() -> Self {
        Self::start_on(Driver::start_shown)
    }

    /// As machines of older bases have it.
    pub fn start_level() -> Self {
        Self::start_on(Driver::start)
    }

    fn start_on(start: impl FnOnce(Vsock) -> Driver<Vsock>) -> Self {
        let (vsock, poller) = vsock();
        let mut driver = start(vsock);
        let transmit = (0..QUEUES[TRANSMIT]).map(|_| driver.allocate(SLOT)).collect();
        let kept = (0..QUEUES[RECEIVE]).map(|_| driver.allocate(4096)).collect();
        let mut guest = Self {
            driver,
            poller,
            buffers: HashMap::new(),
            kept,
            refill: true,
            transmit,
            listening: HashSet::from([1024, 1025]),
            sockets: HashMap::new(),
            room: 256 * 1024,
            log: Vec::new(),
        };
        guest.give_buffers(usize::MAX);
        guest
    }

    /// The same guest on a forked device.
    pub fn fork(&self) -> Self {
        let (vsock, poller) = vsock();
        Self {
            driver: self.driver.fork(vsock),
            poller,
            buffers: self.buffers.clone(),
            kept: self.kept.clone(),
            transmit: self.transmit.clone(),
            listening: self.listening.clone(),
            sockets: self.sockets.clone(),
            log: Vec::new(),
            ..*self
        }
    }

    pub fn give_buffers(&mut self, count: usize) {
        for _ in 0..count {
            let Some(address) = self.kept.pop() else { return };
            let head = self.driver.submit(RECEIVE, &[(address, BUFFER, true)]).unwrap();
            self.buffers.insert(head, address);
        }
    }

    /// Host, device and guest kernel do what they can, until all of them rest.
    pub fn run(&mut self) {
        let mut events = Vec::new();
        for _ in 0..10_000 {
            self.poller.wait(&mut events, Some(Duration::ZERO)).unwrap();
            for event in &events {
                assert_eq!(event.key.owner, OWNER);
                self.driver.device.ready(event).unwrap();
            }
            if self.receive() == 0 && events.is_empty() {
                return;
            }
        }
        panic!("host and guest never come to rest");
    }

    /// Handles the packets that arrived.
    fn receive(&mut self) -> usize {
        let used = self.driver.used(RECEIVE);
        let mut packets = Vec::new();
        for (head, length) in &used {
            let address = self.buffers.remove(head).unwrap();
            let raw = self.driver.bytes(address, *length as usize);
            let (header, data) = raw.split_at(HEADER);
            let header = Header::decode(header.try_into().unwrap());
            assert_eq!(header.length as usize, data.len());
            assert_eq!((header.src_cid, header.dst_cid), (HOST_CID, GUEST_CID));
            packets.push((header, data.to_vec()));
            self.kept.push(address);
        }
        if self.refill {
            self.give_buffers(usize::MAX);
        }
        for (header, data) in packets {
            self.packet(header, &data);
        }
        self.driver.used_quietly(TRANSMIT);
        used.len()
    }

    fn packet(&mut self, header: Header, data: &[u8]) {
        self.log.push(header);
        let port = header.src_port;
        if header.op == op::REQUEST {
            let listening = self.listening.contains(&header.dst_port);
            let op = if listening { op::RESPONSE } else { op::RST };
            let fresh =
                Socket { guest_port: header.dst_port, room: self.room, ..Socket::default() };
            assert!(self.sockets.insert(port, fresh).is_none_or(|old| old.reset));
            self.hear(&header);
            self.send_packet(port, op, 0, &[]);
            if !listening {
                self.sockets.remove(&port);
            }
            return;
        }
        self.hear(&header);
        let Some(socket) = self.sockets.get_mut(&port) else { return };
        assert_eq!(header.dst_port, socket.guest_port);
        match header.op {
            op::RW => {
                socket.received += header.length;
                let held = (socket.received - socket.read).0;
                assert!(held <= socket.room, "{held} bytes in a room of {}", socket.room);
                socket.unread.extend(data);
            }
            op::SHUTDOWN => {
                socket.closed |= header.flags;
                self.end_if_over(port);
            }
            op::RST => socket.reset = true,
            op::CREDIT_REQUEST => self.send_packet(port, op::CREDIT_UPDATE, 0, &[]),
            op::CREDIT_UPDATE => {}
            other => panic!("operation {other}"),
        }
    }

    fn hear(&mut self, header: &Header) {
        if let Some(socket) = self.sockets.get_mut(&header.src_port) {
            socket.peer_room = header.buf_alloc;
            socket.peer_read = Wrapping(header.fwd_cnt);
        }
    }

    /// Linux: both directions closed by the peer and nothing left to read is answered with a reset.
    fn end_if_over(&mut self, port: u32) {
        let socket = &self.sockets[&port];
        if socket.closed == packet::shutdown::BOTH && socket.unread.is_empty() && !socket.reset {
            self.send_packet(port, op::RST, 0, &[]);
            self.sockets.get_mut(&port).unwrap().reset = true;
        }
    }

    fn header(&self, port: u32, op: u16, flags: u32, length: u32) -> Header {
        let socket = &self.sockets[&port];
        Header {
            src_cid: GUEST_CID,
            dst_cid: HOST_CID,
            src_port: socket.guest_port,
            dst_port: port,
            length,
            kind: STREAM,
            op,
            flags,
            buf_alloc: socket.room,
            fwd_cnt: socket.read.0,
        }
    }

    pub fn send_packet(&mut self, port: u32, op: u16, flags: u32, data: &[u8]) {
        let header = self.header(port, op, flags, data.len() as u32);
        self.send_raw(&header, data).unwrap();
    }

    /// Sends any packet at all.
    pub fn send_raw(&mut self, header: &Header, data: &[u8]) -> Result<(), Fault> {
        self.driver.used_quietly(TRANSMIT);
        self.put_packet(header, data)
    }

    /// The same, without looking what has come back.
    pub fn put_packet(&mut self, header: &Header, data: &[u8]) -> Result<(), Fault> {
        let slot = self.driver.next_descriptor(TRANSMIT);
        let address = self.transmit[usize::from(slot)];
        self.driver.put(address, &header.encode());
        self.driver.put(address + HEADER as u64, data);
        let mut chain = vec![(address, HEADER as u32, false)];
        if !data.is_empty() {
            chain.push((address + HEADER as u64, data.len() as u32, false));
        }
        self.driver.submit(TRANSMIT, &chain).map(drop)
    }

    /// A program writes: as much as there is credit and room in the queue for.
    pub fn write(&mut self, port: u32, bytes: &[u8]) -> usize {
        let mut written = 0;
        while written < bytes.len() {
            self.driver.used_quietly(TRANSMIT);
            let socket = &self.sockets[&port];
            let credit = socket.peer_room.saturating_sub((socket.sent - socket.peer_read).0);
            let count = (bytes.len() - written).min(credit as usize).min(MAX_PAYLOAD as usize);
            if count == 0 || self.driver.free_descriptors(TRANSMIT) < 4 {
                break;
            }
            self.sockets.get_mut(&port).unwrap().sent += count as u32;
            let chunk = bytes[written..written + count].to_vec();
            self.send_packet(port, op::RW, 0, &chunk);
            written += count;
        }
        written
    }

    /// Writes until nothing more is taken; how many bytes were.
    pub fn fill(&mut self, port: u32, bytes: &[u8]) -> usize {
        let mut written = 0;
        loop {
            let count = self.write(port, &bytes[written..]);
            self.run();
            written += count;
            if count == 0 {
                return written;
            }
        }
    }

    /// A program reads.
    pub fn read(&mut self, port: u32, count: usize) -> Vec<u8> {
        let socket = self.sockets.get_mut(&port).unwrap();
        let count = count.min(socket.unread.len());
        let bytes: Vec<u8> = socket.unread.drain(..count).collect();
        socket.read += count as u32;
        if count > 0 && !socket.reset {
            self.send_packet(port, op::CREDIT_UPDATE, 0, &[]);
            self.end_if_over(port);
        }
        bytes
    }

    pub fn outcomes(&self) -> Vec<VsockOutcome> {
        self.driver.device.take_outcomes()
    }

    /// Connects; the host's end and its port. The guest must accept.
    pub fn connect(&mut self, stream: u64, guest_port: u32) -> (UnixStream, u32) {
        let peer = self.ask(stream, guest_port);
        self.run();
        assert_eq!(self.outcomes(), [VsockOutcome::Connected { stream }]);
        let request = self.log.iter().rfind(|header| header.op == op::REQUEST).unwrap();
        (peer, request.src_port)
    }

    pub fn ask(&mut self, stream: u64, guest_port: u32) -> UnixStream {
        let (ours, theirs) = stream_pair(true).unwrap();
        self.driver.device.connect(stream, guest_port, theirs).unwrap();
        UnixStream::from(ours)
    }

    pub fn open(&self) -> u32 {
        self.driver.device.stats().open
    }
}

/// Reads what there is; true at the end of the stream.
pub fn drain(peer: &mut UnixStream, into: &mut Vec<u8>) -> bool {
    let mut buffer = [0; 8192];
    loop {
        match peer.read(&mut buffer) {
            Ok(0) => return true,
            Ok(count) => into.extend(&buffer[..count]),
            Err(error) if error.kind() == std::io::ErrorKind::WouldBlock => return false,
            Err(error) => panic!("{error}"),
        }
    }
}
