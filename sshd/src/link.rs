//! Whether anybody is still there at the other end of a TCP connection.
//!
//! A client whose network is cut says no goodbye. TCP notices by itself, but late: by keepalives after
//! minutes, with data on its way after a quarter of an hour. Somebody who comes back before that wants
//! her terminal. So the kernel is asked to knock at once (its keepalive probe, RFC 1122 §4.2.3.6, which
//! any live peer's kernel answers, whatever its programs do and however full its windows are), and the
//! kernel's own count of what is unanswered is read from `/proc/net/tcp` (linux,
//! Documentation/networking/proc_net_tcp.rst). Nothing is decided by a program that does not read.

use std::{
    io,
    net::{IpAddr, SocketAddr},
    time::Duration,
};

use socket2::{SockRef, Socket, TcpKeepalive};
use tokio::{
    net::TcpStream,
    time::{Instant, sleep},
};

/// When the kernel knocks by itself: a peer that vanished is noticed after 60 + 6 × 15 s of silence.
const IDLE: Duration = Duration::from_secs(60);
const INTERVAL: Duration = Duration::from_secs(15);
const RETRIES: u32 = 6;

/// While somebody waits for the answer. Who was heard of more recently is there (the kernel counts in
/// seconds).
const URGENT: Duration = Duration::from_secs(1);

/// The kernel's timer has gone off by then, and a near peer has answered.
const FIRST_LOOK: Duration = Duration::from_millis(50);
const NEXT_LOOK: Duration = Duration::from_millis(100);

/// How long a peer may take to answer: three or four knocks, or retransmissions, on a bad link.
const PATIENCE: Duration = Duration::from_secs(4);

/// A connection, for as long as it is open.
pub struct Link {
    socket: Socket,
    local: SocketAddr,
    peer: SocketAddr,
}

impl Link {
    pub fn new(tcp: &TcpStream) -> io::Result<Self> {
        let socket = SockRef::from(tcp).try_clone()?;
        let link = Self { socket, local: tcp.local_addr()?, peer: tcp.peer_addr()? };
        link.knock_after(IDLE, INTERVAL)?;
        Ok(link)
    }

    /// True if the peer's kernel leaves everything unanswered for some seconds. One that answers is found
    /// out in a round trip.
    pub async fn is_silent(&self) -> bool {
        // Without an answer from our own kernel nobody is taken for gone.
        let silent = self.knock().await.unwrap_or(false);
        let _ = self.knock_after(IDLE, INTERVAL);
        silent
    }

    async fn knock(&self) -> io::Result<bool> {
        let begun = Instant::now();
        self.knock_after(URGENT, URGENT)?;
        let mut pause = FIRST_LOOK;
        loop {
            sleep(pause).await;
            pause = NEXT_LOOK;
            let (local, peer) = (self.local, self.peer);
            let table = tokio::task::spawn_blocking(move || table(local)).await;
            let table = table.map_err(io::Error::other)??;
            // The kernel has given it up, or is just closing it.
            let Some(open) = unanswered(&table, local, peer) else { return Ok(true) };
            let waited = begun.elapsed();
            match open.times {
                0 if !open.sent => return Ok(false),
                // Data is on its way all the time, and arrives.
                0 if waited > URGENT => return Ok(false),
                0 => {}
                _ if waited > PATIENCE => return Ok(true),
                _ => {}
            }
        }
    }

    fn knock_after(&self, idle: Duration, interval: Duration) -> io::Result<()> {
        let often = TcpKeepalive::new().with_time(idle).with_interval(interval);
        self.socket.set_tcp_keepalive(&often.with_retries(RETRIES))
    }
}

fn table(local: SocketAddr) -> io::Result<String> {
    std::fs::read_to_string(if local.is_ipv4() { "/proc/net/tcp" } else { "/proc/net/tcp6" })
}

/// What the peer has not acknowledged.
#[derive(Debug, PartialEq)]
struct Unanswered {
    /// There is data on its way.
    sent: bool,
    /// Retransmissions and probes in a row.
    times: u32,
}

/// None: there is no such connection.
fn unanswered(table: &str, local: SocketAddr, peer: SocketAddr) -> Option<Unanswered> {
    let (local, peer) = (written(local), written(peer));
    let row = table.lines().find_map(|line| {
        let mut fields = line.split_ascii_whitespace().skip(1);
        (fields.next()? == local && fields.next()? == peer).then_some(fields)
    })?;
    // After state and queues: the timer that runs, retransmissions, user, probes.
    let mut fields = row.skip(2);
    let sent = fields.next()?.starts_with("01:");
    let retransmissions = u32::from_str_radix(fields.next()?, 16).ok()?;
    let probes: u32 = fields.nth(1)?.parse().ok()?;
    Some(Unanswered { sent, times: retransmissions.saturating_add(probes) })
}

/// An address as the table has it: 32-bit words as they lie in memory, then the port.
fn written(address: SocketAddr) -> String {
    let octets = match address.ip() {
        IpAddr::V4(ip) => ip.octets().to_vec(),
        IpAddr::V6(ip) => ip.octets().to_vec(),
    };
    let (words, _) = octets.as_chunks::<4>();
    let words: String =
        words.iter().map(|word| format!("{:08X}", u32::from_ne_bytes(*word))).collect();
    format!("{words}:{:04X}", address.port())
}

#[cfg(test)]
mod tests {
    use tokio::{io::AsyncWriteExt, net::TcpListener};

    use super::*;

    const TABLE: &str = "\
  sl  local_address rem_address   st tx_queue rx_queue tr tm->when retrnsmt   uid  timeout inode
   0: 0100007F:08AE 00000000:0000 0A 00000000:00000000 00:00000000 00000000     0        0 1 1 0 1
   1: 0100007F:08AE 0100007F:D2F0 01 00000000:00000000 02:0000004C 00000000     0        3 2 2 0 1
   2: 0100007F:08AE 0100007F:D2F1 01 00000024:00000000 01:00000020 00000002     0        0 3 2 0 1
";

    fn at(text: &str) -> SocketAddr {
        text.parse().unwrap()
    }

    #[test]
    fn the_kernels_count_is_read() {
        let local = at("127.0.0.1:2222");
        let count = |peer| unanswered(TABLE, local, at(peer));
        assert_eq!(count("127.0.0.1:54000"), Some(Unanswered { sent: false, times: 3 }));
        assert_eq!(count("127.0.0.1:54001"), Some(Unanswered { sent: true, times: 2 }));
        assert_eq!(count("127.0.0.1:54002"), None);
        let six = written(at("[2001:db8::1]:22"));
        assert_eq!(six, "B80D0120000000000000000001000000:0016");
    }

    /// Nothing that arrives at this socket reaches it any more, as behind a cut wire.
    fn cut(client: &TcpStream) {
        let drop_all = [socket2::SockFilter::new(0x06, 0, 0, 0)];
        SockRef::from(client).attach_filter(&drop_all).unwrap();
    }

    async fn pair() -> (TcpStream, TcpStream) {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let client = TcpStream::connect(listener.local_addr().unwrap());
        let (client, accepted) = tokio::join!(client, listener.accept());
        (client.unwrap(), accepted.unwrap().0)
    }

    #[tokio::test]
    async fn a_peer_that_does_not_read_is_there_and_one_behind_a_cut_wire_is_not() {
        let (client, server) = pair().await;
        let link = Link::new(&server).unwrap();
        let begun = Instant::now();
        // Its program reads nothing, and everything on the way is full.
        while server.try_write(&[0; 65536]).is_ok() {}
        assert!(!link.is_silent().await);
        assert!(begun.elapsed() < Duration::from_secs(2), "{:?}", begun.elapsed());

        let (idle, server) = pair().await;
        let quiet = Link::new(&server).unwrap();
        sleep(URGENT + NEXT_LOOK).await;
        assert!(!quiet.is_silent().await);
        cut(&idle);
        let (busy, mut server) = pair().await;
        let talking = Link::new(&server).unwrap();
        cut(&busy);
        server.write_all(b"is anybody there?").await.unwrap();
        sleep(URGENT + NEXT_LOOK).await;
        let (quiet, talking) = tokio::join!(quiet.is_silent(), talking.is_silent());
        assert!(quiet && talking, "{quiet} {talking}");
        drop(client);
    }
}
