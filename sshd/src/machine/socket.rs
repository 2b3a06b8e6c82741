//! The message sockets of `hermitage-vmm-proto` under tokio.

use std::{
    io::ErrorKind,
    os::{
        fd::{BorrowedFd, OwnedFd},
        unix::net::UnixStream as StdStream,
    },
};

use hermitage_vmm_proto::{Packet, SocketError, receive, send};
use serde::{Serialize, de::DeserializeOwned};
use tokio::{io::Interest, net::UnixStream};

pub struct MessageSocket {
    /// For its readiness only: the socket is one for messages, which are sent and received whole.
    socket: UnixStream,
}

impl MessageSocket {
    /// Takes one end of a message pair and makes it non-blocking (the other end stays as it is).
    pub fn new(fd: OwnedFd) -> std::io::Result<Self> {
        let socket = StdStream::from(fd);
        socket.set_nonblocking(true)?;
        Ok(Self { socket: UnixStream::from_std(socket)? })
    }

    pub async fn send<M: Serialize>(
        &self,
        message: &M,
        descriptors: &[BorrowedFd<'_>],
    ) -> Result<(), SocketError> {
        self.when(Interest::WRITABLE, || send(&self.socket, message, descriptors)).await
    }

    /// Sends what is not worth waiting for.
    pub fn try_send<M: Serialize>(&self, message: &M) -> Result<(), SocketError> {
        send(&self.socket, message, &[])
    }

    pub async fn receive<M: DeserializeOwned>(&self) -> Result<Packet<M>, SocketError> {
        self.when(Interest::READABLE, || receive(&self.socket)).await
    }

    /// Tries `call` whenever the socket may be ready, until it was. Cancellation-safe.
    async fn when<T>(
        &self,
        interest: Interest,
        mut call: impl FnMut() -> Result<T, SocketError>,
    ) -> Result<T, SocketError> {
        let outcome = self.socket.async_io(interest, || match call() {
            Err(SocketError::WouldBlock) => Err(ErrorKind::WouldBlock.into()),
            outcome => Ok(outcome),
        });
        outcome.await.map_err(SocketError::Io)?
    }
}
