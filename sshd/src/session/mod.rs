//! One session channel from its request to its exit status (RFC 4254 §6).
//!
//! A session asks for its account's machine, opens a terminal or a command in it and relays bytes. It
//! reads from the machine only what the client takes: a client that stops reading stops the program,
//! not the host. All output goes out before the exit status. Whatever ends it otherwise (the machine
//! dies, an operator stops it, the account is disabled) is said on the channel, then the exit status
//! is 255.

mod input;
mod output;
mod relay;

use std::{
    net::SocketAddr,
    sync::{Arc, Weak},
    time::Duration,
};

use hermitage_guest_proto::{ExitStatus, Program, Window};
use hermitage_storage::accounts::Account;
use tokio::{
    sync::{mpsc, oneshot, watch},
    time::timeout,
};
use tokio_util::sync::CancellationToken;
use uuid::Uuid;

pub use input::{Inflow, InputQueue, WINDOW};
pub use output::{Output, pump};
pub use relay::{feed, shut_down};

use crate::{
    forward::{Forwards, Listening},
    lifecycle::{Lease, LoginError},
    link::Link,
    lobby::{self, Desk, Visit},
    machine::{Claim, OpenError, Taken, Terminal, TerminalSpec},
    server::Wishes,
    store::Store,
    time,
    watch::{Live, NewSession, Presence, Watch},
};

/// Signals that a program may have waiting; more are dropped.
pub const SIGNALS: usize = 16;

/// Exit status of a session that ended otherwise than by its program.
const EXIT_LOST: u32 = 255;

/// The environment variable that tells programs where the key agent is (ssh-agent(1)).
const AGENT_SOCKET: &str = "SSH_AUTH_SOCK";

/// How long a machine that does not answer any more may take to be noticed as dead.
const NOTICE_TIMEOUT: Duration = Duration::from_secs(2);

/// What the client asked for.
#[derive(Clone, Debug)]
pub enum Kind {
    Shell,
    Exec(Vec<u8>),
    Sftp,
}

impl Kind {
    /// Its name in the sessions log.
    fn name(&self) -> &'static str {
        match self {
            Kind::Shell => "shell",
            Kind::Exec(_) => "exec",
            Kind::Sftp => "sftp",
        }
    }
}

/// A pty-req (RFC 4254 §6.2).
#[derive(Clone, Debug)]
pub struct Pty {
    pub term: String,
    pub modes: Vec<(u8, u32)>,
}

/// Everything a session needs to run.
pub struct Session {
    pub account: Account,
    /// What the login asked for, or why it can't have it.
    pub wishes: Result<Wishes, String>,
    /// Address and port of the client.
    pub source: String,
    /// What the login was by.
    pub login: String,
    pub link: Weak<Link>,
    pub kind: Kind,
    pub pty: Option<Pty>,
    pub env: Vec<(String, String)>,
    /// Whose key agent its program may use.
    pub agent: Option<Forwards>,
    /// For a new shell on a terminal.
    pub greeting: String,
    pub client: Client,
    pub output: Arc<Output>,
}

/// What comes from the client while the session runs.
pub struct Client {
    pub input: Arc<InputQueue>,
    pub window: watch::Receiver<Window>,
    pub signals: mpsc::Receiver<String>,
    /// It takes no more of the standard output of a command.
    pub unread: CancellationToken,
    /// The channel was closed, or the connection is gone.
    pub closed: CancellationToken,
}

/// How a session ended.
#[derive(Debug)]
enum Outcome {
    Exited(ExitStatus),
    ClientGone,
    /// In words for the user.
    Lost(String),
}

impl std::fmt::Display for Outcome {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Outcome::Exited(ExitStatus::Code(code)) => write!(f, "exit status {code}"),
            Outcome::Exited(ExitStatus::Signal { name, .. }) => {
                write!(f, "signal {}", signal_name(name))
            }
            Outcome::ClientGone => f.write_str("the client went away"),
            Outcome::Lost(reason) => f.write_str(reason),
        }
    }
}

impl From<OpenError> for Outcome {
    fn from(error: OpenError) -> Self {
        Outcome::Lost(error.to_string())
    }
}

impl From<LoginError> for Outcome {
    fn from(error: LoginError) -> Self {
        Outcome::Lost(error.to_string())
    }
}

impl Session {
    /// What it is called in the sessions log.
    fn kind(&self) -> &'static str {
        let lobby = self.wishes.as_ref().ok().and_then(|wishes| wishes.lobby);
        lobby.map_or(self.kind.name(), lobby::Word::with_plus)
    }
}

/// Runs a session to its end.
pub async fn run(desk: Arc<Desk>, watch: Watch, mut session: Session) {
    let store = desk.store.clone();
    let kind = session.kind();
    let (name, source) = (session.account.name.clone(), session.source.clone());
    let who = NewSession {
        account: name.clone(),
        id: session.account.id,
        source: source.clone(),
        kind,
        terminal: session.pty.is_some(),
        login: session.login.clone(),
    };
    let mut presence = Presence::new(&watch, who);
    let live = presence.live();
    session.client.input.on_input(live.clone());
    let _ = session.output.live.set(live.clone());
    tracing::info!(account = name, source, kind, pty = session.pty.is_some(), "session");
    // Beside the session: nobody waits for the log's fsync. What was before is read before.
    let (tell, last) = oneshot::channel();
    let started = tokio::spawn({
        let (store, account, source) = (store.clone(), session.account.id, source.clone());
        let login = session.login.clone();
        async move {
            // Who asked may be gone.
            let _ = tell.send(last_login(&store, account).await);
            store.session_started(account, source, kind, login).await
        }
    });

    let closed = session.client.closed.clone();
    let output = session.output.clone();
    let outcome = tokio::select! {
        outcome = attend(&desk, &mut session, &live, last) => outcome,
        () = closed.cancelled() => Outcome::ClientGone,
        reason = live.must_end() => Outcome::Lost(reason),
        never = announce(&mut presence, &output) => match never {},
    };
    // Nobody takes input any more; it must not hold up the connection's other channels.
    session.client.input.discard();
    tracing::info!(account = name, source, kind, %outcome, "session ended");
    let words = outcome.to_string();
    let farewell = session.output.finish(outcome_for_client(outcome), session.pty.is_some());
    tokio::select! {
        () = farewell => {}
        () = closed.cancelled() => {}
    }

    let machine = presence.machine();
    presence.ended(&words);
    let noted = match started.await {
        Ok(Ok(id)) => store.session_ended(id, words, machine).await,
        Ok(Err(error)) => Err(error),
        Err(_) => return,
    };
    if let Err(error) = noted {
        tracing::error!(account = name, %error, "can't write the sessions log");
    }
}

/// Shows what operators have to say, as the client takes it.
async fn announce(presence: &mut Presence, output: &Output) -> std::convert::Infallible {
    loop {
        let words = presence.words().await;
        output.announce(&words).await;
    }
}

/// A line as sshd(8) and login(1) have it: somebody who was not here then should know. Empty at the first login.
async fn last_login(store: &Store, account: Uuid) -> String {
    match store.last_shell(account).await {
        Ok(Some((when, from))) => {
            let from =
                from.parse::<SocketAddr>().map_or(from, |at| at.ip().to_canonical().to_string());
            format!("Last login: {} UTC from {from}", time::short(when))
        }
        Ok(None) => String::new(),
        Err(error) => {
            tracing::warn!(%error, "can't read the sessions log");
            String::new()
        }
    }
}

/// From the machine to the program's end.
async fn attend(
    desk: &Desk,
    session: &mut Session,
    live: &Live,
    last: oneshot::Receiver<String>,
) -> Outcome {
    let registry = &desk.registry;
    let wishes = match &session.wishes {
        Ok(wishes) => *wishes,
        Err(reason) => return Outcome::Lost(reason.clone()),
    };
    if let Some(word) = wishes.lobby {
        return visit(desk, word, session).await;
    }
    if wishes.fresh_machine {
        match registry.sessions(session.account.id) {
            0 => registry.reset(&session.account).await,
            1 => return Outcome::Lost("+fresh needs your other session to be closed first".into()),
            count => {
                let words = format!("+fresh needs your {count} other sessions to be closed first");
                return Outcome::Lost(words);
            }
        }
    }
    let mut again = true;
    let mut last = Some(last);
    loop {
        let lease = match registry.login(&session.account).await {
            Ok(lease) => lease,
            Err(error) => return error.into(),
        };
        live.found_machine(lease.how);
        if let Some(last) = last.take() {
            // Read long ago: a machine takes longer than the database.
            session.greeting = last.await.unwrap_or_default();
        }
        let shell = matches!((&session.kind, &session.pty), (Kind::Shell, Some(_)));
        let tight = if shell { desk.tight(&session.account).await } else { None };
        let served = tokio::select! {
            // A machine that is taken away says so, rather than what its end looks like from here.
            biased;
            reason = lease.must_end() => return Outcome::Lost(reason),
            served = serve(&lease, session, wishes, tight) => served,
        };
        match served {
            Ok(outcome) => return outcome,
            // It had just died, and nobody knew yet: the next one will do.
            Err(OpenError::Ended(_)) if again => {
                again = false;
                let _ = timeout(NOTICE_TIMEOUT, lease.machine.ended()).await;
            }
            Err(error @ OpenError::Timeout(_)) => {
                return Outcome::Lost(hung(&error, &session.account.name));
            }
            Err(error) => return error.into(),
        }
    }
}

/// A machine that does not answer may be at work, or hang for good, which she alone can tell.
fn hung(error: &OpenError, account: &str) -> String {
    format!(
        "{error}; try again, or start it anew from your files, which drops what is in its memory: ssh \
         {account}+fresh@…"
    )
}

/// What the service answers itself.
async fn visit(desk: &Desk, word: lobby::Word, session: &Session) -> Outcome {
    let terminal = session.pty.is_some();
    let visit = Visit {
        account: session.account.id,
        source: &session.source,
        kind: &session.kind,
        input: &session.client.input,
        output: &session.output,
        terminal,
    };
    match lobby::answer(desk, word, visit).await {
        Ok(words) => {
            session.output.print(&words, terminal).await;
            Outcome::Exited(ExitStatus::Code(0))
        }
        Err(reason) => Outcome::Lost(reason),
    }
}

/// Runs the program. An error if it could not be started. `tight`: what a shell's user should know of her room.
async fn serve(
    lease: &Lease,
    session: &mut Session,
    wishes: Wishes,
    tight: Option<String>,
) -> Result<Outcome, OpenError> {
    let mut env = session.env.clone();
    let _socket = agent_socket(session, &mut env).await;
    let client = &mut session.client;
    let program = match (&session.pty, &session.kind) {
        (Some(pty), kind @ (Kind::Shell | Kind::Exec(_))) => {
            let command = match kind {
                Kind::Exec(command) => Some(command.clone()),
                Kind::Shell | Kind::Sftp => None,
            };
            let window = *client.window.borrow_and_update();
            if command.is_none() {
                for words in lease.arrival().into_iter().chain(tight) {
                    session.output.greet(&words).await;
                }
            }
            let claim = Claim {
                take: wishes.take_over,
                source: session.source.clone(),
                link: session.link.clone(),
            };
            let (term, modes) = (pty.term.clone(), pty.modes.clone());
            let greeting = session.greeting.clone();
            let spec = TerminalSpec { term, window, modes, env, command, greeting };
            let mut terminal = terminal(lease, spec, wishes.new_terminal, &claim).await?;
            let taken = std::mem::replace(&mut terminal.taken, Taken::never());
            return Ok(tokio::select! {
                biased;
                words = taken.words() => Outcome::Lost(words),
                outcome = relay::terminal(lease, terminal, client, &session.output) => outcome,
            });
        }
        (_, Kind::Shell) => Program::Shell,
        (_, Kind::Exec(command)) => Program::Command(command.clone()),
        (_, Kind::Sftp) => Program::Sftp,
    };
    let command = lease.machine.exec(program, env).await?;
    Ok(relay::command(lease, command, client, &session.output).await)
}

/// A socket in the machine for the client's key agent, which goes with the session.
async fn agent_socket(session: &Session, env: &mut Vec<(String, String)>) -> Option<Listening> {
    match session.agent.as_ref()?.agent().await {
        Ok((socket, path)) => {
            env.retain(|(name, _)| name != AGENT_SOCKET);
            env.push((AGENT_SOCKET.into(), path));
            Some(socket)
        }
        Err(reason) => {
            // As with any sshd, the session is not refused for it.
            tracing::info!(account = session.account.name, reason, "no agent forwarding");
            None
        }
    }
}

/// A terminal with its program: for a shell the one that was left last or is taken over, unless a new one
/// is wanted.
async fn terminal(
    lease: &Lease,
    spec: TerminalSpec,
    new: bool,
    claim: &Claim,
) -> Result<Terminal, OpenError> {
    if spec.command.is_none()
        && !new
        && let Some(terminal) = lease.machine.take_up(spec.window, claim).await?
    {
        return Ok(terminal);
    }
    lease.machine.open_terminal(spec, claim).await
}

/// What is left to say to the client.
enum Farewell {
    Status(ExitStatus),
    Words(String),
    Nothing,
}

fn outcome_for_client(outcome: Outcome) -> Farewell {
    match outcome {
        Outcome::Exited(status) => Farewell::Status(status),
        Outcome::Lost(reason) => Farewell::Words(reason),
        Outcome::ClientGone => Farewell::Nothing,
    }
}

/// A signal's name as a guest gave it, if it looks like one (RFC 4254 §6.10).
fn signal_name(name: &str) -> &str {
    let plausible = (1..=64).contains(&name.len())
        && name.bytes().all(|byte| byte.is_ascii_alphanumeric() || b"@.-+".contains(&byte));
    if plausible { name } else { "UNKNOWN" }
}

#[cfg(test)]
mod tests {
    use super::signal_name;

    #[test]
    fn a_guests_signal_name_is_a_name() {
        assert_eq!(signal_name("RTMIN+3"), "RTMIN+3");
        assert_eq!(signal_name("X\r\nfake log line"), "UNKNOWN");
        assert_eq!(signal_name(""), "UNKNOWN");
    }
}
