//! TCP connections to other machines, from `/proc/net/tcp` and `tcp6` (proc_net_tcp, in the kernel's
//! Documentation/networking/proc_net_tcp.rst). A machine that is saved loses them, so one that has some is
//! not idle. What stays inside the machine is frozen with both its ends.

use std::fs::File;
use std::io::{BufRead, BufReader, Read};
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};

/// Connections that are counted at most; a line has some 150 bytes.
const MOST: u32 = 1000;
const MOST_BYTES: u64 = 1 << 20;

/// `TCP_ESTABLISHED` (linux, include/net/tcp_states.h).
const ESTABLISHED: &str = "01";

#[derive(Default)]
pub struct Connections {
    pub count: u32,
    /// The other side of one.
    pub peer: Option<SocketAddr>,
}

impl Connections {
    pub fn look() -> Self {
        let mut connections = Self::default();
        for path in ["/proc/net/tcp", "/proc/net/tcp6"] {
            // A kernel without one of them has no such connections.
            let Ok(file) = File::open(path) else { continue };
            connections.count(BufReader::new(file.take(MOST_BYTES)));
        }
        connections
    }

    fn count(&mut self, lines: impl BufRead) {
        for line in lines.lines().map_while(Result::ok).skip(1) {
            if let Some(peer) = elsewhere(&line) {
                self.count += 1;
                self.peer.get_or_insert(peer);
            }
            if self.count >= MOST {
                return;
            }
        }
    }
}

/// The other side, if the line is an established connection that leaves the machine.
fn elsewhere(line: &str) -> Option<SocketAddr> {
    let mut fields = line.split_ascii_whitespace().skip(1);
    let (local, peer, state) = (fields.next()?, fields.next()?, fields.next()?);
    if state != ESTABLISHED {
        return None;
    }
    let (local, peer) = (address(local)?, address(peer)?);
    let inside = peer.ip().is_loopback() || peer.ip() == local.ip();
    (!inside).then_some(peer)
}

/// `0100007F:1F90`: 32-bit words of the address as they lie in memory, here little endian.
fn address(text: &str) -> Option<SocketAddr> {
    let (address, port) = text.split_once(':')?;
    let port = u16::from_str_radix(port, 16).ok()?;
    let mut bytes = Vec::with_capacity(16);
    for start in (0..address.len()).step_by(8) {
        let word = u32::from_str_radix(address.get(start..start + 8)?, 16).ok()?;
        bytes.extend(word.to_le_bytes());
    }
    let ip = match bytes.len() {
        4 => IpAddr::V4(Ipv4Addr::from(<[u8; 4]>::try_from(bytes).ok()?)),
        16 => Ipv6Addr::from(<[u8; 16]>::try_from(bytes).ok()?).to_canonical(),
        _ => return None,
    };
    Some(SocketAddr::new(ip, port))
}

#[cfg(test)]
mod tests {
    use super::*;

    const HEAD: &str =
        "  sl  local_address rem_address   st tx_queue rx_queue tr tm->when retrnsmt\n";

    fn count(lines: &str) -> Connections {
        let mut connections = Connections::default();
        connections.count(format!("{HEAD}{lines}").as_bytes());
        connections
    }

    #[test]
    fn only_what_leaves_the_machine_counts() {
        let listening = "   0: 0100007F:1F90 00000000:0000 0A 00000000:00000000 00:00000000\n";
        let loopback = "   1: 0100007F:1F90 0100007F:A2C4 01 00000000:00000000 00:00000000\n";
        let closing = "   2: 0A00020F:D2A2 05060708:0016 08 00000000:00000000 00:00000000\n";
        let itself = "   3: 0F02000A:D2A2 0F02000A:0016 01 00000000:00000000 00:00000000\n";
        let mapped = "   4: 0000000000000000FFFF00000100007F:1F90 \
                      0000000000000000FFFF00000100007F:A2C4 01 00000000:00000000\n";
        let none = count(&[listening, loopback, closing, itself, mapped].concat());
        assert_eq!((none.count, none.peer), (0, None));

        let out = "   5: 0F02000A:D2A2 04030201:0016 01 00000000:00000000 00:00000000\n";
        let six = "   6: B80D0120000000000000000001000000:D2A2 \
                   B80D0120000000000000000002000000:01BB 01 00000000:00000000\n";
        let both = count(&[loopback, out, six].concat());
        assert_eq!((both.count, both.peer.unwrap().to_string().as_str()), (2, "1.2.3.4:22"));
        assert_eq!(count(six).peer.unwrap().to_string(), "[2001:db8::2]:443");
    }

    #[test]
    fn a_connection_of_this_process_is_read_and_stays_inside() {
        let listener = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
        let _there = std::net::TcpStream::connect(listener.local_addr().unwrap()).unwrap();
        let port = format!(":{:04X}", listener.local_addr().unwrap().port());
        let table = std::fs::read_to_string("/proc/net/tcp").unwrap();
        let ours: Vec<_> = table.lines().filter(|line| line.contains(&port)).collect();
        assert!(ours.len() >= 2, "{table}");
        assert!(ours.iter().all(|line| elsewhere(line).is_none()), "{ours:?}");
    }

    #[test]
    fn odd_lines_are_passed_over() {
        assert_eq!(count("\n: : :\n 9: 00:01 02:03 01\n").count, 0);
    }
}
