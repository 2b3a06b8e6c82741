//! The channels of a connection: what is open, what runs on them, and what is over.

use std::sync::{Arc, OnceLock};

use hermitage_guest_proto::Window;
use russh::{
    ChannelId, ChannelWriteHalf,
    server::{Msg, Session as Connection},
};
use tokio::sync::{mpsc, watch};
use tokio_util::sync::CancellationToken;

use super::{environment, handler::ClientHandler, permits};
use crate::session::{self, Client, InputQueue, Kind, Output, Pty, SIGNALS, Session};

pub(super) enum ChannelState {
    /// Open; nothing runs yet.
    Idle(Box<Setup>),
    Running(Controls),
    /// A stream that is forwarded into the machine.
    Stream {
        input: Arc<InputQueue>,
        closed: CancellationToken,
    },
}

pub(super) struct Setup {
    pub(super) write: ChannelWriteHalf<Msg>,
    pub(super) pty: Option<Pty>,
    pub(super) window: Window,
    pub(super) env: environment::Env,
    pub(super) input: Arc<InputQueue>,
    /// Its program may use the client's key agent.
    pub(super) agent: bool,
}

/// What a running session is told.
pub(super) struct Controls {
    pub(super) input: Arc<InputQueue>,
    pub(super) window: watch::Sender<Window>,
    pub(super) signals: mpsc::Sender<String>,
    /// Unless its program is on a terminal.
    pub(super) unread: Option<CancellationToken>,
    pub(super) closed: CancellationToken,
}

impl ClientHandler {
    pub(super) fn setup(&mut self, channel: ChannelId) -> Option<&mut Setup> {
        match self.channels.get_mut(&channel) {
            Some(ChannelState::Idle(setup)) => Some(setup),
            _ => None,
        }
    }

    pub(super) fn input(&self, channel: ChannelId) -> Option<&InputQueue> {
        match self.channels.get(&channel)? {
            ChannelState::Idle(setup) => Some(&setup.input),
            ChannelState::Running(controls) => Some(&controls.input),
            ChannelState::Stream { input, .. } => Some(input),
        }
    }

    pub(super) fn sessions(&self) -> usize {
        let is_session = |state: &&ChannelState| !matches!(state, ChannelState::Stream { .. });
        self.channels.values().filter(is_session).count()
    }

    /// Forgets what has ended by itself, or was refused: russh does not say when a client has closed a channel that
    /// was closed from here before.
    pub(super) fn forget_ended(&mut self, connection: &Connection) {
        let ended = &self.entry.ended;
        self.channels.retain(|id, state| match state {
            ChannelState::Idle(_) => true,
            // Of channels that it has no more russh knows no size.
            ChannelState::Running(_) if connection.max_packet_size(id) == 0 => {
                ended.add(1);
                false
            }
            ChannelState::Running(_) => true,
            ChannelState::Stream { closed, .. } => !closed.is_cancelled(),
        });
    }

    /// Whenever sessions change: whom the client means if it says `eow`. If it may be one of two, nobody. All that it
    /// may be are known here: of requests for channels that russh has no more it logs nothing.
    pub(super) fn settle_who_is_meant(&mut self, connection: &Connection) {
        self.forget_ended(connection);
        let one = self.sessions() == 1;
        let unread = self.channels.values().find_map(|state| match state {
            ChannelState::Running(controls) if one => controls.unread.clone(),
            _ => None,
        });
        self.meant.set(unread);
    }

    /// Starts a session on a channel. False if it has one already.
    pub(super) fn start(
        &mut self,
        channel: ChannelId,
        kind: Kind,
        connection: &Connection,
    ) -> bool {
        let Some(account) = self.account.clone() else { return false };
        let setup = match self.channels.remove(&channel) {
            Some(ChannelState::Idle(setup)) => *setup,
            Some(other) => {
                self.channels.insert(channel, other);
                return false;
            }
            None => return false,
        };
        let (window, window_changes) = watch::channel(setup.window);
        let (signals, signals_received) = mpsc::channel(SIGNALS);
        let closed = self.gone.token().child_token();
        let unread = CancellationToken::new();
        let on_streams = setup.pty.is_none();
        let mut env = setup.env.into_pairs(&self.ends);
        let (kind, wishes) = match permits::program(&self.options, kind, &mut env) {
            Ok(kind) => (kind, self.wishes.clone()),
            Err(reason) => (Kind::Shell, Err(reason)),
        };
        let session = Session {
            account,
            wishes,
            source: self.peer.to_string(),
            login: self.by.clone(),
            link: self.entry.link(),
            kind,
            pty: setup.pty,
            env,
            agent: setup.agent.then(|| self.forwards(connection)).flatten(),
            greeting: String::new(),
            client: Client {
                input: setup.input.clone(),
                window: window_changes,
                signals: signals_received,
                unread: unread.clone(),
                closed: closed.clone(),
            },
            output: Arc::new(Output {
                channel: setup.write,
                connection: connection.handle(),
                live: OnceLock::new(),
            }),
        };
        let unread = on_streams.then_some(unread);
        let controls = Controls { input: setup.input, window, signals, unread, closed };
        self.channels.insert(channel, ChannelState::Running(controls));
        self.settle_who_is_meant(connection);
        let (desk, watch) = (self.server.desk.clone(), self.server.watch.clone());
        tokio::spawn(session::run(desk, watch, session));
        true
    }

    pub(super) fn forget(&mut self, channel: ChannelId) {
        match self.channels.remove(&channel) {
            Some(ChannelState::Running(controls)) => controls.closed.cancel(),
            Some(ChannelState::Stream { input, closed }) => {
                // What it sent before is still delivered.
                input.end();
                closed.cancel();
            }
            Some(ChannelState::Idle(_)) | None => {}
        }
    }
}
