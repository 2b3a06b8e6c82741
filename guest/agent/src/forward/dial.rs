//! Connecting to an address in the machine, without blocking.

use std::net::{IpAddr, SocketAddr};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};

use hermitage_guest_proto::forward::Place;
use nix::errno::Errno;
use nix::sys::socket::{
    self, AddressFamily, SockFlag, SockType, SockaddrStorage, UnixAddr, getsockopt, setsockopt,
    sockopt,
};

use super::names;

pub struct Dial {
    /// What is being connected to, for messages.
    name: String,
    /// Addresses not tried yet, in reverse.
    left: Vec<SocketAddr>,
    state: State,
}

enum State {
    Connecting(OwnedFd),
    Over(Result<OwnedFd, String>),
    /// Its outcome was taken.
    Taken,
}

impl Dial {
    /// Begins. An error needs no waiting for.
    pub fn start(to: &Place) -> Result<Self, String> {
        match to {
            Place::Tcp { host, port } => {
                let addresses = names::resolve(host)?;
                let mut left: Vec<SocketAddr> =
                    addresses.into_iter().map(|ip| SocketAddr::new(ip, *port)).collect();
                left.reverse();
                let name = format!("{host} port {port}");
                let mut dial = Self { name, left, state: State::Taken };
                dial.next("it has no address".into());
                Ok(dial)
            }
            Place::Unix { path } => {
                let failed = |error: Errno| format!("{path}: {}", error.desc());
                let address = UnixAddr::new(path.as_str()).map_err(failed)?;
                let socket = new_socket(AddressFamily::Unix).map_err(failed)?;
                socket::connect(socket.as_raw_fd(), &address).map_err(failed)?;
                let state = State::Over(Ok(socket));
                Ok(Self { name: path.clone(), left: Vec::new(), state })
            }
            Place::Private => Err("a private socket is for listening".into()),
        }
    }

    /// To be polled for writing.
    pub fn socket(&self) -> Option<BorrowedFd<'_>> {
        match &self.state {
            State::Connecting(socket) => Some(socket.as_fd()),
            State::Over(_) | State::Taken => None,
        }
    }

    /// The socket is ready, one way or the other.
    pub fn go_on(&mut self) {
        match std::mem::replace(&mut self.state, State::Taken) {
            State::Connecting(socket) => match getsockopt(&socket, sockopt::SocketError) {
                Ok(0) => self.state = State::Over(Ok(socket)),
                Ok(error) => self.next(Errno::from_raw(error).desc().into()),
                Err(error) => self.next(error.desc().into()),
            },
            state => self.state = state,
        }
    }

    /// How it ended, once.
    pub fn outcome(&mut self) -> Option<Result<OwnedFd, String>> {
        match std::mem::replace(&mut self.state, State::Taken) {
            State::Over(outcome) => Some(outcome),
            state => {
                self.state = state;
                None
            }
        }
    }

    /// Tries the next address; when there is none, the last one's trouble is the outcome.
    fn next(&mut self, trouble: String) {
        let mut trouble = trouble;
        while let Some(address) = self.left.pop() {
            match connect(address) {
                Ok((socket, true)) => return self.state = State::Over(Ok(socket)),
                Ok((socket, false)) => return self.state = State::Connecting(socket),
                Err(error) => trouble = error.desc().into(),
            }
        }
        self.state = State::Over(Err(format!("{}: {trouble}", self.name)));
    }
}

/// A socket that is connected, or will be.
fn connect(address: SocketAddr) -> nix::Result<(OwnedFd, bool)> {
    let family = match address.ip() {
        IpAddr::V4(_) => AddressFamily::Inet,
        IpAddr::V6(_) => AddressFamily::Inet6,
    };
    let socket = new_socket(family)?;
    // Keystrokes are small and wait for nobody.
    setsockopt(&socket, sockopt::TcpNoDelay, &true)?;
    match socket::connect(socket.as_raw_fd(), &SockaddrStorage::from(address)) {
        Ok(()) => Ok((socket, true)),
        Err(Errno::EINPROGRESS) => Ok((socket, false)),
        Err(error) => Err(error),
    }
}

pub fn new_socket(family: AddressFamily) -> nix::Result<OwnedFd> {
    let flags = SockFlag::SOCK_CLOEXEC | SockFlag::SOCK_NONBLOCK;
    socket::socket(family, SockType::Stream, flags, None)
}

#[cfg(test)]
mod tests {
    use std::net::TcpListener;
    use std::time::Duration;

    use super::*;
    use crate::sys::Poller;

    fn outcome(mut dial: Dial) -> Result<OwnedFd, String> {
        loop {
            if let Some(outcome) = dial.outcome() {
                assert!(dial.outcome().is_none(), "told twice");
                return outcome;
            }
            let mut poller = Poller::new();
            poller.add(dial.socket().unwrap(), (), false, true);
            poller.wait(Some(Duration::from_secs(10))).unwrap();
            dial.go_on();
        }
    }

    #[test]
    fn a_listening_port_is_reached_by_whichever_address_it_has() {
        let listener = TcpListener::bind("[::1]:0").unwrap();
        let port = listener.local_addr().unwrap().port();
        let to = Place::Tcp { host: "localhost".into(), port };
        outcome(Dial::start(&to).unwrap()).unwrap();
        drop(listener);
        let refused = outcome(Dial::start(&to).unwrap()).unwrap_err();
        assert_eq!(refused, format!("localhost port {port}: Connection refused"));
    }

    #[test]
    fn what_is_no_socket_is_refused_with_its_name() {
        let to = Place::Unix { path: "/nowhere/at/all".into() };
        let refused = Dial::start(&to).err().unwrap();
        assert_eq!(refused, "/nowhere/at/all: No such file or directory");
        let to = Place::Unix { path: "x".repeat(1000) };
        assert!(Dial::start(&to).is_err());
    }
}
