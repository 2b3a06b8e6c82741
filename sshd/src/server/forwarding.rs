//! The handler's part in forwarding: which channel, which request, and no more of each than may be.
//!
//! Channels are answered by a task of their own. Global requests (RFC 4254 §7.1) can't be: russh has
//! no way to answer them but by the callback's return, so a client that asks to listen waits with its
//! whole connection until its machine runs. It is the only one that does, and bounded.

use std::{sync::Arc, time::Duration};

use hermitage_guest_proto::forward::Place;
use russh::{
    Channel,
    server::{ChannelOpenHandle, Msg, Session as Connection},
};
use tokio::time::timeout;

use super::{channels::ChannelState, handler::ClientHandler, permits, words::shortage};
use crate::{
    forward::{Client, Direct, Forwards, Listener},
    limits::Limits,
    session::InputQueue,
};

/// Longest name of an address or a socket, in bytes. What the machine is asked has to fit a frame.
const MAX_NAME: usize = 1024;

/// How long a connection may be held up for a socket to be listened on: a machine may have to start.
const LISTEN_TIMEOUT: Duration = Duration::from_secs(45);

/// An address as a client says it (RFC 4254 §7.2).
pub fn tcp(host: &str, port: u32) -> Result<Place, String> {
    match u16::try_from(port) {
        Ok(port) if host.len() <= MAX_NAME => Ok(Place::Tcp { host: host.to_owned(), port }),
        Ok(_) => Err("that name is too long".into()),
        Err(_) => Err(format!("there is no port {port}")),
    }
}

impl ClientHandler {
    pub(super) fn forwards(&mut self, connection: &Connection) -> Option<Forwards> {
        let account = self.account.clone()?;
        let forwards = self.forwards.get_or_insert_with(|| {
            let client = Client {
                registry: self.server.registry.clone(),
                store: self.server.store.clone(),
                watch: self.server.watch.clone(),
                account,
                wishes: self.wishes.clone(),
                source: self.peer.to_string(),
                login: self.by.clone(),
                connection: connection.handle(),
                inflow: self.inflow.clone(),
                entry: self.entry.clone(),
                gone: self.gone.token().clone(),
            };
            let streams = Limits::of(&self.server.config, &client.account).max_streams;
            Forwards::new(client, streams, &self.server.config.ssh)
        });
        Some(forwards.clone())
    }

    pub(super) async fn open_direct(
        &mut self,
        to: Result<Place, String>,
        channel: Channel<Msg>,
        reply: ChannelOpenHandle,
        connection: &mut Connection,
    ) {
        self.forget_ended(connection);
        if let Ok(to) = &to
            && let Err(reason) = permits::connect(&self.options, to)
        {
            tracing::info!(peer = %self.peer, ?to, reason, "does not forward");
            return reply.reject(permits::prohibited(reason)).await;
        }
        let Some(forwards) = self.forwards(connection) else { return };
        let (to, permit) = match (to, forwards.permit()) {
            (Ok(to), Ok(permit)) => (to, permit),
            (Err(reason), _) | (_, Err(reason)) => return reply.reject(shortage(reason)).await,
        };
        // The read half is dropped: data comes through the handler's callbacks, which can count it.
        let (_, write) = channel.split();
        let input = Arc::new(InputQueue::new(self.inflow.clone()));
        let closed = self.gone.token().child_token();
        let state = ChannelState::Stream { input: input.clone(), closed: closed.clone() };
        self.channels.insert(write.id(), state);
        let direct = Direct { to, channel: write, input, closed, reply };
        tokio::spawn(forwards.direct(permit, direct));
    }

    pub(super) async fn listen_tcp(
        &mut self,
        address: &str,
        port: &mut u32,
        connection: &mut Connection,
    ) -> Result<bool, russh::Error> {
        let listener = Listener::Tcp { address: address.to_owned(), port: *port };
        match tcp(address, *port) {
            Ok(at) => self.listen(at, listener, Some(port), connection).await,
            Err(reason) => self.refuse_to_listen(&reason, connection),
        }
    }

    pub(super) async fn listen_unix(
        &mut self,
        path: &str,
        connection: &mut Connection,
    ) -> Result<bool, russh::Error> {
        if path.len() > MAX_NAME {
            return self.refuse_to_listen("that path is too long", connection);
        }
        let at = Place::Unix { path: path.to_owned() };
        let listener = Listener::Unix { path: path.to_owned() };
        self.listen(at, listener, None, connection).await
    }

    async fn listen(
        &mut self,
        at: Place,
        mut listener: Listener,
        port: Option<&mut u32>,
        connection: &mut Connection,
    ) -> Result<bool, russh::Error> {
        if let Err(reason) = permits::listen(&self.options, &at) {
            return self.refuse_to_listen(&reason, connection);
        }
        let Some(forwards) = self.forwards(connection) else { return Ok(false) };
        let asked = timeout(LISTEN_TIMEOUT, forwards.listen(at, listener.clone())).await;
        let listening = match asked.unwrap_or_else(|_| Err("the machine takes too long".into())) {
            Ok(listening) => listening,
            Err(reason) => return self.refuse_to_listen(&reason, connection),
        };
        if let (Some(asked), Place::Tcp { port: bound, .. }) = (port, listening.place()) {
            *asked = u32::from(*bound);
            if let Listener::Tcp { port, .. } = &mut listener {
                *port = *asked;
            }
        }
        tracing::info!(peer = %self.peer, ?listener, "listens in its machine");
        self.listening.insert(listener, listening);
        Ok(true)
    }

    /// A global request is refused without a word; who runs `ssh -v` finds it in a debug message.
    fn refuse_to_listen(
        &self,
        reason: &str,
        connection: &mut Connection,
    ) -> Result<bool, russh::Error> {
        tracing::info!(peer = %self.peer, reason, "does not listen");
        connection.debug(true, &format!("hermitage: {reason}"), "en")?;
        Ok(false)
    }

    pub(super) fn stop_listening(&mut self, listener: &Listener) -> bool {
        self.listening.remove(listener).is_some()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_address_has_a_port_that_there_is() {
        let place = tcp("localhost", 80).unwrap();
        assert_eq!(place, Place::Tcp { host: "localhost".into(), port: 80 });
        assert!(tcp("localhost", 65536).unwrap_err().contains("65536"));
        assert!(tcp(&"x".repeat(5000), 80).is_err());
    }
}
