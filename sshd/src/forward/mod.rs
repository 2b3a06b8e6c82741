//! What one SSH connection forwards into its account's machine and out of it (RFC 4254 §7, OpenSSH's
//! PROTOCOL §2.4): ports, sockets, and the client's key agent.
//!
//! The service itself connects to nothing and listens on nothing. Addresses mean the machine's: a
//! *forwarder* there, a program of the account's user ([`hermitage_guest_proto::forward`]), resolves
//! them, connects and listens. Each stream comes as a vsock connection of its own; here it is a socket
//! whose bytes are passed on as the client's window and the guest's credit permit.
//!
//! A connection starts its forwarder with the first thing it forwards, and holds the machine from then
//! on until a moment after the last one is over: an idle `ssh -N -L` holds nothing and wakes the machine
//! when somebody connects; `ssh -N -R` listens, and holds it as long as it lives.

mod channel;
mod link;

use std::sync::Arc;

use hermitage_guest_proto::forward::Place;
use hermitage_storage::accounts::Account;
use russh::{
    ChannelOpenFailure, ChannelWriteHalf,
    server::{ChannelOpenHandle, Handle, Msg},
};
use tokio::sync::{Mutex, OwnedSemaphorePermit, Semaphore};
use tokio_util::sync::CancellationToken;

pub use link::Listening;
use link::{Link, Use};

use crate::{
    config::Ssh,
    lifecycle::Registry,
    server::{Entry, Wishes},
    session::{Inflow, InputQueue},
    store::Store,
    watch::Watch,
};

/// One connection's forwarding.
#[derive(Clone)]
pub struct Forwards {
    inner: Arc<Inner>,
}

struct Inner {
    client: Client,
    /// The forwarder, while there is use for it.
    link: Mutex<Option<Arc<Link>>>,
    streams: Arc<Semaphore>,
    listeners: Arc<Semaphore>,
    most_streams: usize,
    most_listeners: usize,
    most_ended: usize,
}

/// Whose connection it is, and what it stands on.
pub struct Client {
    pub registry: Registry,
    pub store: Store,
    pub watch: Watch,
    pub account: Account,
    pub wishes: Result<Wishes, String>,
    /// Address and port of the client.
    pub source: String,
    /// What the login was by.
    pub login: String,
    pub connection: Handle,
    pub inflow: Arc<Inflow>,
    pub entry: Arc<Entry>,
    /// The connection is gone.
    pub gone: CancellationToken,
}

/// A socket that is listened on in the machine, and what its connections are called.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub enum Listener {
    /// The address as the client said it: that is how it knows its own request again.
    Tcp {
        address: String,
        port: u32,
    },
    Unix {
        path: String,
    },
    /// The client's key agent.
    Agent,
}

/// The right to one more stream.
pub struct Permit {
    _permit: OwnedSemaphorePermit,
}

/// A channel that the client has opened for a stream.
pub struct Direct {
    pub to: Place,
    pub channel: ChannelWriteHalf<Msg>,
    pub input: Arc<InputQueue>,
    pub closed: CancellationToken,
    pub reply: ChannelOpenHandle,
}

impl Forwards {
    pub fn new(client: Client, most_streams: usize, ssh: &Ssh) -> Self {
        let most_listeners = ssh.max_listeners;
        let inner = Inner {
            client,
            link: Mutex::default(),
            streams: Arc::new(Semaphore::new(most_streams)),
            listeners: Arc::new(Semaphore::new(most_listeners)),
            most_streams,
            most_listeners,
            most_ended: ssh.max_ended_channels,
        };
        Self { inner: Arc::new(inner) }
    }

    /// Room for one more stream, or why there is none.
    pub fn permit(&self) -> Result<Permit, String> {
        self.inner.permit()
    }

    /// Connects a channel to an address in the machine; returns when it is over.
    pub async fn direct(self, permit: Permit, direct: Direct) {
        let Direct { to, channel, input, closed, reply } = direct;
        let name = name_of(&to);
        let connected = async {
            let link = self.inner.link().await?;
            let dialled = link.dial(to).await?;
            Ok::<_, String>((link, dialled))
        };
        let connected = tokio::select! {
            connected = connected => connected,
            () = self.inner.client.gone.cancelled() => return,
        };
        match connected {
            Ok((link, (id, stream))) => {
                tracing::debug!(account = self.inner.client.account.name, name, "forwarding");
                reply.accept().await;
                let ended = &self.inner.client.entry.ended;
                channel::relay(&link, id, stream, &channel, &input, &closed, ended).await;
            }
            Err(reason) => {
                tracing::debug!(account = self.inner.client.account.name, name, reason, "refused");
                closed.cancel();
                reply.reject(connect_failed(reason)).await;
            }
        }
        drop(permit);
    }

    /// Listens in the machine for the client, until what is returned is dropped.
    pub async fn listen(&self, at: Place, listener: Listener) -> Result<Listening, String> {
        let inner = &self.inner;
        let permit = inner.listeners.clone().try_acquire_owned().map_err(|_| {
            let most = inner.most_listeners;
            format!("a connection listens on at most {most} sockets here (ssh.max_listeners)")
        })?;
        inner.link().await?.listen(at, listener, permit).await
    }

    /// A socket in the machine for the client's key agent, and its path.
    pub async fn agent(&self) -> Result<(Listening, String), String> {
        let listening = self.listen(Place::Private, Listener::Agent).await?;
        match listening.place() {
            Place::Unix { path } => {
                let path = path.clone();
                Ok((listening, path))
            }
            _ => Err("the machine made no socket for it".into()),
        }
    }
}

impl Inner {
    fn permit(&self) -> Result<Permit, String> {
        self.client.entry.ended.room(self.most_ended)?;
        self.streams.clone().try_acquire_owned().map(|_permit| Permit { _permit }).map_err(|_| {
            let most = self.most_streams;
            format!("a connection forwards at most {most} streams here (ssh.max_streams, or its class' limit)")
        })
    }

    /// The forwarder, started if there is none.
    async fn link(self: &Arc<Self>) -> Result<Use, String> {
        match &self.client.wishes {
            Ok(wishes) if wishes.fresh_machine => {
                return Err(
                    "a login with +fresh forwards nothing: the machine that it is about to \
                            drop is the one that would listen"
                        .into(),
                );
            }
            Ok(wishes) => {
                if let Some(word) = wishes.lobby {
                    return Err(format!("a login with +{} has no machine", word.name()));
                }
            }
            Err(reason) => return Err(reason.clone()),
        }
        let mut current = self.link.lock().await;
        if let Some(link) = current.as_ref().filter(|link| !link.has_ended()) {
            return Ok(Use::of(link));
        }
        let link = Link::open(self).await?;
        let using = Use::of(&link);
        *current = Some(link);
        Ok(using)
    }

    /// Somebody has connected to a listening socket.
    async fn accepted(self: Arc<Self>, link: Use, accepted: link::Accepted, permit: Permit) {
        let link::Accepted { listener, id, host, port } = accepted;
        let connection = &self.client.connection;
        // Not to be given up while the connection lives: russh ends it when a refusal meets nobody.
        let opened = match listener {
            Listener::Tcp { address, port: bound } => {
                connection.channel_open_forwarded_tcpip(address, bound, host, port.into()).await
            }
            Listener::Unix { path } => connection.channel_open_forwarded_streamlocal(path).await,
            Listener::Agent => connection.channel_open_agent().await,
        };
        match opened {
            Ok(opened) => {
                let Client { inflow, gone, entry, .. } = &self.client;
                channel::take_in(&link, id, opened, inflow.clone(), gone, &entry.ended).await;
            }
            Err(error) => {
                tracing::debug!(account = self.client.account.name, %error, "the client refuses");
                link.close(id);
            }
        }
        drop(permit);
    }
}

fn connect_failed(reason: String) -> ChannelOpenFailure {
    // 2 is SSH_OPEN_CONNECT_FAILED (RFC 4254 §5.1).
    ChannelOpenFailure::Other { code: 2, reason }
}

fn name_of(place: &Place) -> String {
    let name = match place {
        Place::Tcp { host, port } => format!("{host}:{port}"),
        Place::Unix { path } => path.clone(),
        Place::Private => "a socket".into(),
    };
    name.chars().take(100).flat_map(char::escape_default).collect()
}
