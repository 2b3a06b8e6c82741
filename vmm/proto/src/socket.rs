//! Packets with descriptors over `SOCK_SEQPACKET` (unix(7), `SCM_RIGHTS`).

use std::{
    io::{IoSlice, IoSliceMut},
    mem::MaybeUninit,
    os::fd::{AsFd, BorrowedFd, OwnedFd},
};

use rustix::{
    io::Errno,
    net::{
        AddressFamily, RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, ReturnFlags,
        SendAncillaryBuffer, SendAncillaryMessage, SendFlags, SocketFlags, SocketType, recvmsg,
        sendmsg, socketpair,
    },
};
use serde::{Serialize, de::DeserializeOwned};

use crate::{MAX_DESCRIPTORS, MAX_MESSAGE};

#[derive(Debug, thiserror::Error)]
pub enum SocketError {
    #[error("the other side closed its socket")]
    Closed,
    /// The socket is non-blocking and not ready.
    #[error("the socket is not ready")]
    WouldBlock,
    #[error("a message of {0} bytes is over the limit of {MAX_MESSAGE}")]
    TooLong(usize),
    #[error("a message was cut short")]
    Truncated,
    #[error("a message does not decode: {0}")]
    Malformed(#[from] postcard::Error),
    #[error("socket: {0}")]
    Io(std::io::Error),
}

impl From<Errno> for SocketError {
    fn from(errno: Errno) -> Self {
        match errno {
            Errno::WOULDBLOCK => Self::WouldBlock,
            Errno::PIPE | Errno::CONNRESET | Errno::NOTCONN => Self::Closed,
            other => Self::Io(other.into()),
        }
    }
}

/// A message and the descriptors that came with it (close-on-exec).
#[derive(Debug)]
pub struct Packet<M> {
    pub message: M,
    pub descriptors: Vec<OwnedFd>,
}

/// Sends one message. Works on blocking and non-blocking sockets.
pub fn send<M: Serialize>(
    socket: impl AsFd,
    message: &M,
    descriptors: &[BorrowedFd<'_>],
) -> Result<(), SocketError> {
    let bytes = postcard::to_stdvec(message)?;
    if bytes.len() > MAX_MESSAGE || descriptors.len() > MAX_DESCRIPTORS {
        return Err(SocketError::TooLong(bytes.len()));
    }
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(MAX_DESCRIPTORS))];
    let mut ancillary = SendAncillaryBuffer::new(&mut space);
    if !descriptors.is_empty() {
        ancillary.push(SendAncillaryMessage::ScmRights(descriptors));
    }
    loop {
        match sendmsg(&socket, &[IoSlice::new(&bytes)], &mut ancillary, SendFlags::NOSIGNAL) {
            Err(Errno::INTR) => continue,
            result => return result.map(drop).map_err(Into::into),
        }
    }
}

/// Receives one message. `Closed` once the other side is gone.
pub fn receive<M: DeserializeOwned>(socket: impl AsFd) -> Result<Packet<M>, SocketError> {
    let mut bytes = vec![0; MAX_MESSAGE];
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(MAX_DESCRIPTORS))];
    let mut ancillary = RecvAncillaryBuffer::new(&mut space);
    let received = loop {
        let mut iov = [IoSliceMut::new(&mut bytes)];
        match recvmsg(&socket, &mut iov, &mut ancillary, RecvFlags::CMSG_CLOEXEC) {
            Err(Errno::INTR) => continue,
            result => break result?,
        }
    };
    let mut descriptors = Vec::new();
    for message in ancillary.drain() {
        if let RecvAncillaryMessage::ScmRights(fds) = message {
            descriptors.extend(fds);
        }
    }
    if received.flags.intersects(ReturnFlags::TRUNC | ReturnFlags::CTRUNC) {
        return Err(SocketError::Truncated);
    }
    // Messages are never empty (an enum takes at least its tag), so 0 bytes is the end.
    if received.bytes == 0 {
        return Err(SocketError::Closed);
    }
    let message = postcard::from_bytes(&bytes[..received.bytes])?;
    Ok(Packet { message, descriptors })
}

/// A connected pair of sockets for bytes (terminals, streams, consoles), close-on-exec. Both ends are
/// non-blocking when `nonblocking`.
pub fn stream_pair(nonblocking: bool) -> std::io::Result<(OwnedFd, OwnedFd)> {
    pair(SocketType::STREAM, nonblocking)
}

/// A connected pair of sockets for messages, close-on-exec.
pub fn message_pair(nonblocking: bool) -> std::io::Result<(OwnedFd, OwnedFd)> {
    pair(SocketType::SEQPACKET, nonblocking)
}

fn pair(kind: SocketType, nonblocking: bool) -> std::io::Result<(OwnedFd, OwnedFd)> {
    let mut flags = SocketFlags::CLOEXEC;
    if nonblocking {
        flags |= SocketFlags::NONBLOCK;
    }
    Ok(socketpair(AddressFamily::UNIX, kind, flags, None)?)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{ForkRequest, MachineRequest, Shape};

    fn fork(label: String) -> ForkRequest {
        let shape = Shape { memory_bytes: 512 << 20, vcpus: 1 };
        ForkRequest::Fork { machine: 4, label, shape: Some(shape), cgroup: false }
    }

    #[test]
    fn a_message_brings_its_descriptors() {
        let (a, b) = message_pair(false).unwrap();
        let (c, _d) = stream_pair(true).unwrap();
        let sent = fork("alice".into());
        send(&a, &sent, &[c.as_fd(), c.as_fd()]).unwrap();
        let got = receive::<ForkRequest>(&b).unwrap();
        assert_eq!(got.message, sent);
        assert_eq!(got.descriptors.len(), 2);
    }

    #[test]
    fn the_end_of_the_peer_is_told_apart_from_not_ready() {
        let (a, b) = message_pair(true).unwrap();
        assert!(matches!(receive::<MachineRequest>(&b), Err(SocketError::WouldBlock)));
        drop(a);
        assert!(matches!(receive::<MachineRequest>(&b), Err(SocketError::Closed)));
        assert!(matches!(send(&b, &MachineRequest::Stats, &[]), Err(SocketError::Closed)));
    }

    #[test]
    fn an_oversized_message_is_refused_at_the_sender() {
        let (a, _b) = message_pair(true).unwrap();
        let label = "x".repeat(MAX_MESSAGE + 1);
        let result = send(&a, &fork(label), &[]);
        assert!(matches!(result, Err(SocketError::TooLong(_))));
    }
}
