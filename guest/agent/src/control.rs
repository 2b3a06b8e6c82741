//! A control connection: frames in, frames out, without blocking. PID 1 has one with the host, and each
//! forwarder has one of its own.

use std::fmt::Debug;
use std::fs::File;
use std::io::{Read, Write};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use anyhow::{Context, Result, bail};
use hermitage_guest_proto::{Decoder, encode};
use serde::{Serialize, de::DeserializeOwned};

/// Messages the host has not read. It always reads, so more than this means that it is broken.
const UNSENT_MAX: usize = 1 << 20;

pub struct Control {
    socket: File,
    decoder: Decoder,
    unsent: Vec<u8>,
}

impl Control {
    pub fn new(socket: OwnedFd) -> Self {
        Control { socket: socket.into(), decoder: Decoder::default(), unsent: Vec::new() }
    }

    pub fn wants_to_write(&self) -> bool {
        !self.unsent.is_empty()
    }

    /// Reads once. False: the host has closed the connection.
    pub fn receive(&mut self) -> Result<bool> {
        let mut bytes = [0; 4096];
        match self.socket.read(&mut bytes) {
            Ok(0) => Ok(false),
            Ok(count) => {
                self.decoder.feed(&bytes[..count]);
                Ok(true)
            }
            Err(error) if would_block(&error) => Ok(true),
            Err(error) => Err(error).context("reading the control connection"),
        }
    }

    /// The next whole message of what was received.
    pub fn message<M: DeserializeOwned>(&mut self) -> Result<Option<M>> {
        self.decoder.message().context("the host's message")
    }

    /// Sends now what the socket takes, the rest on [`flush`](Self::flush).
    pub fn send<M: Serialize + Debug>(&mut self, message: &M) -> Result<()> {
        let frame = encode(message).with_context(|| format!("encoding {message:?}"))?;
        self.unsent.extend_from_slice(&frame);
        if self.unsent.len() > UNSENT_MAX {
            bail!("the host leaves {} bytes of messages unread", self.unsent.len());
        }
        self.flush()
    }

    pub fn flush(&mut self) -> Result<()> {
        while !self.unsent.is_empty() {
            match self.socket.write(&self.unsent) {
                Ok(count) => drop(self.unsent.drain(..count)),
                Err(error) if would_block(&error) => break,
                Err(error) => return Err(error).context("writing the control connection"),
            }
        }
        Ok(())
    }
}

impl AsFd for Control {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.socket.as_fd()
    }
}

fn would_block(error: &std::io::Error) -> bool {
    matches!(error.kind(), std::io::ErrorKind::WouldBlock | std::io::ErrorKind::Interrupted)
}

#[cfg(test)]
mod tests {
    use super::*;
    use hermitage_guest_proto::{AgentMessage, HostMessage};
    use std::os::unix::net::UnixStream;

    #[test]
    fn messages_pass_in_pieces_and_the_end_is_seen() {
        let (near, mut far) = UnixStream::pair().unwrap();
        near.set_nonblocking(true).unwrap();
        let mut control = Control::new(near.into());
        assert!(control.receive().unwrap(), "nothing there is not the end");

        let frame = encode(&HostMessage::Ping(7)).unwrap();
        far.write_all(&frame[..3]).unwrap();
        assert!(control.receive().unwrap());
        assert_eq!(control.message::<HostMessage>().unwrap(), None);
        far.write_all(&frame[3..]).unwrap();
        assert!(control.receive().unwrap());
        assert_eq!(control.message().unwrap(), Some(HostMessage::Ping(7)));

        control.send(&AgentMessage::Pong(7)).unwrap();
        let mut bytes = [0; 64];
        let count = far.read(&mut bytes).unwrap();
        assert_eq!(bytes[..count], encode(&AgentMessage::Pong(7)).unwrap());
        drop(far);
        assert!(!control.receive().unwrap());
    }

    #[test]
    fn a_host_that_never_reads_is_an_error_not_memory() {
        let (near, _far) = UnixStream::pair().unwrap();
        near.set_nonblocking(true).unwrap();
        let mut control = Control::new(near.into());
        let message = AgentMessage::AttachFailed { reason: "x".repeat(100_000) };
        let failed = (0..100).find_map(|_| control.send(&message).err());
        assert!(failed.unwrap().to_string().contains("unread"));
        assert!(control.unsent.len() < UNSENT_MAX + 200_000);
    }
}
