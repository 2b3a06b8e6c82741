//! The forwarder of one connection: a lease on the machine, the program in it, and who waits for its
//! answers.

use std::{
    collections::HashMap,
    sync::{
        Arc, Mutex, MutexGuard, OnceLock, PoisonError,
        atomic::{AtomicU64, Ordering},
    },
    time::Duration,
};

use hermitage_guest_proto::{
    encode,
    forward::{ACCEPTED, ForwardEvent, ForwardId, ForwardRequest, Place},
};
use tokio::{
    io::AsyncWriteExt,
    sync::{OwnedSemaphorePermit, mpsc, oneshot, watch},
    time::{sleep, timeout},
};
use tokio_util::sync::CancellationToken;

use super::{Inner, Listener};
use crate::{
    lifecycle::Lease,
    machine::{ByteStream, Forwarder, OpenError, Reader, WriteHalf, printable},
    watch::{Live, NewSession, Presence},
};

/// How long the machine may take to connect, or to listen.
const ANSWER_TIMEOUT: Duration = Duration::from_secs(30);

/// How long a forwarder stays after its last use: pages bring their connections in bursts.
const IDLE: Duration = Duration::from_secs(5);

/// Between the end of a machine and that of a connection which listened in it: for its sessions' last
/// words.
const LAST_WORDS: Duration = Duration::from_secs(2);

/// Requests that the forwarder has not read. One that leaves more unread is of no use.
const REQUESTS: usize = 256;

pub struct Link {
    lease: Lease,
    /// Where it takes streams.
    port: u32,
    requests: mpsc::Sender<ForwardRequest>,
    last: AtomicU64,
    table: Mutex<Table>,
    users: watch::Sender<usize>,
    ended: CancellationToken,
    /// The session that it is, once it is one.
    live: OnceLock<Arc<Live>>,
}

#[derive(Default)]
struct Table {
    waiting: HashMap<ForwardId, oneshot::Sender<Result<Option<Place>, String>>>,
    listeners: HashMap<ForwardId, Listener>,
}

/// Somebody who connected to a listening socket.
pub struct Accepted {
    pub listener: Listener,
    pub id: ForwardId,
    pub host: String,
    pub port: u16,
}

impl Link {
    /// Starts a forwarder in the account's machine, which is started if it has none.
    pub(super) async fn open(inner: &Arc<Inner>) -> Result<Arc<Self>, String> {
        let client = &inner.client;
        let mut again = true;
        let (lease, forwarder) = loop {
            let lease = client.registry.login(&client.account).await.map_err(|e| e.to_string())?;
            let started = tokio::select! {
                biased;
                reason = lease.must_end() => return Err(reason),
                started = lease.machine.forwarder() => started,
            };
            match started {
                Ok(forwarder) => break (lease, forwarder),
                // It had just died, and nobody knew yet: the next one will do.
                Err(OpenError::Ended(_)) if again => {
                    again = false;
                    let _ = timeout(LAST_WORDS, lease.machine.ended()).await;
                }
                Err(error) => return Err(error.to_string()),
            }
        };
        let (requests, queue) = mpsc::channel(REQUESTS);
        let link = Arc::new(Self {
            lease,
            port: forwarder.port,
            requests,
            last: AtomicU64::new(0),
            table: Mutex::default(),
            users: watch::channel(0).0,
            ended: CancellationToken::new(),
            live: OnceLock::new(),
        });
        tokio::spawn(attend(inner.clone(), link.clone(), forwarder, queue));
        Ok(link)
    }

    pub fn has_ended(&self) -> bool {
        self.ended.is_cancelled()
    }

    /// Takes an answer, or a connection that was accepted. What is about nothing that was asked for is
    /// ignored: a guest may say anything.
    fn event(&self, event: ForwardEvent) -> Option<Accepted> {
        let mut table = self.table();
        let (id, answer) = match event {
            ForwardEvent::Ready { .. } => return None,
            ForwardEvent::Dialed { id } => (id, Ok(None)),
            ForwardEvent::Listening { id, at } => {
                // Connections may follow at once: they have to bear the right port.
                if let (Some(Listener::Tcp { port, .. }), Place::Tcp { port: bound, .. }) =
                    (table.listeners.get_mut(&id), &at)
                {
                    *port = (*bound).into();
                }
                (id, Ok(Some(at)))
            }
            ForwardEvent::Failed { id, reason } => (id, Err(printable(&reason))),
            ForwardEvent::Accepted { listener, id, host, port } => {
                let listener = table.listeners.get(&listener)?.clone();
                let host = printable(&host);
                return (id >= ACCEPTED).then_some(Accepted { listener, id, host, port });
            }
        };
        if let Some(waiting) = table.waiting.remove(&id) {
            let _ = waiting.send(answer);
        }
        None
    }

    /// Asks for something and waits for the answer.
    async fn ask(&self, id: ForwardId, request: ForwardRequest) -> Result<Option<Place>, String> {
        let (sender, answer) = oneshot::channel();
        self.table().waiting.insert(id, sender);
        let asked = async {
            self.requests.send(request).await.map_err(|_| ended())?;
            answer.await.map_err(|_| ended())?
        };
        let outcome = tokio::select! {
            outcome = timeout(ANSWER_TIMEOUT, asked) => outcome.unwrap_or_else(|_| {
                let seconds = ANSWER_TIMEOUT.as_secs();
                Err(format!("the machine did not answer within {seconds} s"))
            }),
            () = self.ended.cancelled() => Err(ended()),
        };
        if outcome.is_err() {
            self.table().waiting.remove(&id);
            self.tell(ForwardRequest::Close { id });
        }
        outcome
    }

    /// Says something without waiting. A forwarder that does not listen to that either is given up.
    fn tell(&self, request: ForwardRequest) {
        if let Err(mpsc::error::TrySendError::Full(_)) = self.requests.try_send(request) {
            self.ended.cancel();
        }
    }

    fn next(&self) -> ForwardId {
        self.last.fetch_add(1, Ordering::Relaxed) + 1
    }

    fn table(&self) -> MutexGuard<'_, Table> {
        self.table.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

fn ended() -> String {
    "the machine's end of it is gone".into()
}

/// A reason for the forwarder to stay.
pub struct Use(Arc<Link>);

impl Use {
    pub(super) fn of(link: &Arc<Link>) -> Self {
        link.users.send_modify(|users| *users += 1);
        Self(link.clone())
    }

    /// Connects to an address in the machine.
    pub(super) async fn dial(&self, to: Place) -> Result<(ForwardId, ByteStream), String> {
        let id = self.0.next();
        self.0.ask(id, ForwardRequest::Dial { id, to }).await?;
        match self.stream(id).await {
            Ok(stream) => Ok((id, stream)),
            Err(reason) => {
                self.close(id);
                Err(reason)
            }
        }
    }

    pub(super) async fn listen(
        self,
        at: Place,
        listener: Listener,
        permit: OwnedSemaphorePermit,
    ) -> Result<Listening, String> {
        let id = self.0.next();
        // Before it is asked: somebody may connect before the answer is looked at.
        self.0.table().listeners.insert(id, listener);
        let mut listening = Listening { link: self, id, place: Place::Private, _permit: permit };
        let request = ForwardRequest::Listen { id, at };
        listening.place = listening.link.0.ask(id, request).await?.ok_or_else(ended)?;
        Ok(listening)
    }

    /// The stream of a connection.
    pub(super) async fn stream(&self, id: ForwardId) -> Result<ByteStream, String> {
        let stream = self.0.lease.machine.stream_to(self.0.port, id);
        stream.await.map_err(|error| error.to_string())
    }

    /// The host is done with a connection.
    pub(super) fn close(&self, id: ForwardId) {
        self.0.tell(ForwardRequest::Close { id });
    }

    /// Whose bytes its streams' are.
    pub(super) fn live(&self) -> Option<Arc<Live>> {
        self.0.live.get().cloned()
    }

    /// Waits for the end of the machine, or of its forwarder.
    pub(super) async fn ended(&self) {
        self.0.ended.cancelled().await;
    }
}

impl Drop for Use {
    fn drop(&mut self) {
        self.0.users.send_modify(|users| *users = users.saturating_sub(1));
    }
}

/// A socket that is listened on in the machine, as long as this is kept.
pub struct Listening {
    link: Use,
    id: ForwardId,
    place: Place,
    _permit: OwnedSemaphorePermit,
}

impl Listening {
    /// Where it is, as the machine says.
    pub fn place(&self) -> &Place {
        &self.place
    }
}

impl Drop for Listening {
    fn drop(&mut self) {
        self.link.0.table().listeners.remove(&self.id);
        self.link.close(self.id);
    }
}

/// A forwarder's life.
async fn attend(
    inner: Arc<Inner>,
    link: Arc<Link>,
    forwarder: Forwarder,
    requests: mpsc::Receiver<ForwardRequest>,
) {
    let client = &inner.client;
    let who = NewSession {
        account: client.account.name.clone(),
        id: client.account.id,
        source: client.source.clone(),
        kind: "forward",
        terminal: false,
        login: client.login.clone(),
    };
    let presence = Presence::new(&client.watch, who);
    let live = presence.live();
    live.found_machine(link.lease.how);
    let _ = link.live.set(live.clone());
    let (id, source, login) = (client.account.id, client.source.clone(), client.login.clone());
    let started = client.store.session_started(id, source, "forward", login).await;
    let Forwarder { events, to, program, .. } = forwarder;
    let over = tokio::select! {
        biased;
        reason = link.lease.must_end() => Over::Lost(reason),
        reason = live.must_end() => Over::Lost(reason),
        () = client.gone.cancelled() => Over::Done("the client went away"),
        () = unused(&inner, &link) => Over::Done("nothing is forwarded any more"),
        () = link.ended.cancelled() => Over::Lost("its forwarder did not listen any more".into()),
        reason = listen_to(&inner, &link, events) => Over::Lost(reason),
        () = say(to, requests) => Over::Lost("its forwarder took no more requests".into()),
    };
    link.ended.cancel();
    // Whoever waits for an answer waits in vain.
    let listened = {
        let mut table = link.table();
        table.waiting.clear();
        table.listeners.values().any(|listener| *listener != Listener::Agent)
    };
    drop(program);
    let words = match over {
        Over::Done(words) => words.to_owned(),
        Over::Lost(reason) => {
            tracing::info!(account = client.account.name, reason, "forwarding ended");
            if listened {
                // The client believes that it is listening. There is no message that says otherwise,
                // but the end of its connection, which it knows how to deal with.
                let reason = reason.clone();
                let entry = client.entry.clone();
                tokio::spawn(async move {
                    sleep(LAST_WORDS).await;
                    entry.disconnect(&format!("nothing listens any more: {reason}"));
                });
            }
            reason
        }
    };
    let machine = presence.machine();
    presence.ended(&words);
    let noted = match started {
        Ok(id) => client.store.session_ended(id, words, machine).await,
        Err(error) => Err(error),
    };
    if let Err(error) = noted {
        tracing::error!(account = client.account.name, %error, "can't write the sessions log");
    }
}

enum Over {
    Done(&'static str),
    Lost(String),
}

/// Waits until nobody has used the forwarder for a while; then nobody will.
async fn unused(inner: &Inner, link: &Arc<Link>) {
    let mut users = link.users.subscribe();
    loop {
        // The sender is the link's.
        let _ = users.wait_for(|users| *users == 0).await;
        tokio::select! {
            () = sleep(IDLE) => {}
            _ = users.changed() => continue,
        }
        let mut current = inner.link.lock().await;
        if *link.users.borrow() == 0 {
            *current = None;
            return;
        }
    }
}

/// Takes what the forwarder says, until it says no more.
async fn listen_to(inner: &Arc<Inner>, link: &Arc<Link>, mut events: Reader) -> String {
    loop {
        let event = tokio::select! {
            event = events.message() => event,
            reason = link.lease.machine.ended() => return reason,
        };
        let event = match event {
            Ok(event) => event,
            Err(error) => return format!("its forwarder is gone ({error})"),
        };
        let Some(accepted) = link.event(event) else { continue };
        match inner.permit() {
            Ok(permit) => {
                tokio::spawn(inner.clone().accepted(Use::of(link), accepted, permit));
            }
            Err(reason) => {
                tracing::debug!(account = inner.client.account.name, reason, "not accepted");
                link.tell(ForwardRequest::Close { id: accepted.id });
            }
        }
    }
}

async fn say(mut to: WriteHalf, mut requests: mpsc::Receiver<ForwardRequest>) {
    while let Some(request) = requests.recv().await {
        let Ok(frame) = encode(&request) else { continue };
        if to.write_all(&frame).await.is_err() {
            return;
        }
    }
}
