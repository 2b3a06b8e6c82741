//! The agent's side of a machine: a writer for what the service says, a reader that trusts nothing. A
//! forwarder's words are read alike.

use hermitage_guest_proto::{Decoder, FrameError, HostMessage, encode};
use serde::de::DeserializeOwned;
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    sync::mpsc,
};

use super::{ReadHalf, WriteHalf};

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

/// Messages that are kept for an agent that stands still: more than its sessions can have to say, unless they
/// make a point of it.
const MOST_HELD: usize = 256;

/// Sends what comes over `messages` until either side is gone.
pub async fn write(mut socket: WriteHalf, mut messages: mpsc::Receiver<HostMessage>) {
    let mut order = Order::default();
    while let Some(message) = messages.recv().await {
        for message in order.take(message) {
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
}

/// From `Freeze` to `Resume` an agent ignores all else. While its disk is copied there are sessions, and what they
/// say meanwhile is not to be lost: it follows.
#[derive(Default)]
struct Order {
    still: bool,
    held: Vec<HostMessage>,
}

impl Order {
    /// What may be sent now.
    fn take(&mut self, message: HostMessage) -> Vec<HostMessage> {
        match message {
            HostMessage::Freeze => {
                self.still = true;
                vec![message]
            }
            HostMessage::Resume(_) | HostMessage::PowerOff { .. } => {
                self.still = false;
                let held = std::mem::take(&mut self.held);
                [message].into_iter().chain(held).collect()
            }
            message if !self.still => vec![message],
            message if self.held.len() < MOST_HELD => {
                self.held.push(message);
                vec![]
            }
            _ => {
                tracing::warn!("an agent that stands still was told too much; dropped");
                vec![]
            }
        }
    }
}

/// Reads messages; cancellation-safe.
pub struct Reader {
    socket: ReadHalf,
    decoder: Decoder,
    chunk: Box<[u8]>,
}

impl Reader {
    pub fn new(socket: ReadHalf) -> Self {
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_sessions_say_to_an_agent_that_stands_still_follows() {
        let mut order = Order::default();
        let ping = HostMessage::Ping;
        let resume = || {
            HostMessage::Resume(hermitage_guest_proto::Resume {
                entropy: vec![],
                clock: crate::machine::clock(),
            })
        };
        assert_eq!(order.take(ping(1)), [ping(1)]);
        assert_eq!(order.take(HostMessage::Freeze), [HostMessage::Freeze]);
        assert_eq!(order.take(ping(2)), []);
        assert_eq!(order.take(ping(3)), []);
        let told = order.take(resume());
        assert!(matches!(told[0], HostMessage::Resume(_)));
        assert_eq!(told[1..], [ping(2), ping(3)]);
        assert_eq!(order.take(ping(4)), [ping(4)]);
        // And no more than so much of it.
        order.take(HostMessage::Freeze);
        (0..2 * MOST_HELD as u64).for_each(|n| drop(order.take(ping(n))));
        assert_eq!(order.take(HostMessage::PowerOff { grace_ms: 1 }).len(), 1 + MOST_HELD);
    }
}
