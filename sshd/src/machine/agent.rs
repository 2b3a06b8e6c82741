//! The agent's side of a machine: a writer for what the service says, a reader that trusts nothing. A
//! forwarder's words are read alike.

use hermitage_guest_proto::{Decoder, FrameError, HostMessage, encode};
use serde::de::DeserializeOwned;
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::unix::{OwnedReadHalf, OwnedWriteHalf},
    sync::mpsc,
};

/// Why the conversation ended.
#[derive(Debug, thiserror::Error)]
pub enum AgentError {
    #[error("it closed its connection")]
    Closed,
    #[error("the connection to it broke: {0}")]
    Io(#[from] std::io::Error),
    #[error("it sent what is no message: {0}")]
    Frame(#[from] FrameError),
}

/// Sends what comes over `messages` until either side is gone.
pub async fn write(mut socket: OwnedWriteHalf, mut messages: mpsc::Receiver<HostMessage>) {
    while let Some(message) = messages.recv().await {
        let frame = match encode(&message) {
            Ok(frame) => frame,
            Err(error) => {
                tracing::warn!(%error, "a message for the agent is too long; dropped");
                continue;
            }
        };
        if socket.write_all(&frame).await.is_err() {
            return;
        }
    }
}

/// Reads messages; cancellation-safe.
pub struct Reader {
    socket: OwnedReadHalf,
    decoder: Decoder,
    chunk: Box<[u8]>,
}

impl Reader {
    pub fn new(socket: OwnedReadHalf) -> Self {
        Self { socket, decoder: Decoder::default(), chunk: vec![0; 8 * 1024].into() }
    }

    pub async fn message<M: DeserializeOwned>(&mut self) -> Result<M, AgentError> {
        loop {
            if let Some(message) = self.decoder.message()? {
                return Ok(message);
            }
            let count = self.socket.read(&mut self.chunk).await?;
            if count == 0 {
                return Err(AgentError::Closed);
            }
            self.decoder.feed(&self.chunk[..count]);
        }
    }
}
