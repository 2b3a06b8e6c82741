//! The forwarder: a program in the machine that connects and listens there
//! ([`hermitage_guest_proto::forward`]).

use std::{sync::Arc, time::Duration};

use hermitage_guest_proto::{Program, forward::ForwardEvent};
use tokio::time::timeout;

use super::{Command, Machine, OpenError, Reader, WriteHalf, open::Running};

/// How long it may take to say where it takes streams.
const READY_TIMEOUT: Duration = Duration::from_secs(30);

/// A running forwarder. It ends with its standard input, which is `to`.
pub struct Forwarder {
    /// vsock port for its streams.
    pub port: u32,
    pub events: Reader,
    pub to: WriteHalf,
    pub program: Running,
}

impl Machine {
    pub async fn forwarder(self: &Arc<Self>) -> Result<Forwarder, OpenError> {
        let Command { stdio, stderr: _, program } = self.exec(Program::Forwarder, vec![]).await?;
        let (from, to) = stdio.into_split();
        let mut events = Reader::new(from);
        let ready = timeout(READY_TIMEOUT, events.message()).await;
        match ready.map_err(|_| OpenError::Timeout(READY_TIMEOUT))? {
            Ok(ForwardEvent::Ready { port }) => Ok(Forwarder { port, events, to, program }),
            Ok(_) => Err(OpenError::Refused("its first word is not where it is".into())),
            Err(error) => Err(OpenError::Refused(format!("it said nothing: {error}"))),
        }
    }
}
