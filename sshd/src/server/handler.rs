//! russh's callbacks, turned into what sessions understand. Nothing is decided here but who may go on.
//!
//! A callback holds up its whole connection, so none of them waits for a machine or a program.

use std::{collections::HashMap, net::SocketAddr, sync::Arc};

use hermitage_guest_proto::{Window, forward::Place};
use hermitage_storage::accounts::{Account, KeyOptions};
use russh::{
    Channel, ChannelId, Disconnect, Sig,
    keys::Certificate,
    server::{
        Auth, ChannelOpenHandle, Handler, Msg, PublicKeyOffer, Session as Connection,
        VerifiedPublicKey,
    },
};
use tokio::time::timeout;
use tokio_util::sync::{CancellationToken, DropGuard};

use super::{
    Server, banner,
    channels::{ChannelState, Setup},
    connections::Entry,
    environment,
    eow::Meant,
    forwarding::tcp,
    listener::{CLOSE_TIMEOUT, offend},
    login_name::{self, Wishes},
    penalties::Offence,
    words::{again, shortage, shown, signal_name, window},
};
use crate::closing;
use crate::forward::{Forwards, Listener, Listening};
use crate::lobby::Word;
use crate::session::{Inflow, InputQueue, Kind, Pty};
use crate::watch::{Event, Method};

/// Longest command, and longest TERM, in bytes. What the agent is told has to fit a frame.
const MAX_COMMAND: usize = 128 * 1024;
const MAX_TERM: usize = 64;

pub struct ClientHandler {
    pub(super) server: Arc<Server>,
    pub(super) peer: SocketAddr,
    /// What programs are told of the connection.
    pub(super) ends: Vec<(String, String)>,
    pub(super) inflow: Arc<Inflow>,
    pub(super) entry: Arc<Entry>,
    failures: u32,
    /// Who authenticated last; settled once authentication has succeeded.
    pub(super) account: Option<Account>,
    /// What that login was by.
    pub(super) by: String,
    /// What the key or the certificate of that login permits.
    pub(super) options: KeyOptions,
    /// What that login asked for, or why that can't be.
    pub(super) wishes: Result<Wishes, String>,
    pub(super) channels: HashMap<ChannelId, ChannelState>,
    pub(super) meant: Meant,
    /// From the first thing that is forwarded.
    pub(super) forwards: Option<Forwards>,
    /// What is listened on in the machine, by what the client calls it.
    pub(super) listening: HashMap<Listener, Listening>,
    /// Ends every session of this connection when it goes.
    pub(super) gone: DropGuard,
}

impl ClientHandler {
    pub fn new(
        server: Arc<Server>,
        peer: SocketAddr,
        ends: Vec<(String, String)>,
        inflow: Arc<Inflow>,
        entry: Arc<Entry>,
    ) -> Self {
        let gone = CancellationToken::new().drop_guard();
        let channels = HashMap::new();
        let wishes = Ok(Wishes::default());
        Self {
            server,
            peer,
            ends,
            inflow,
            entry,
            failures: 0,
            account: None,
            by: String::new(),
            options: KeyOptions::default(),
            wishes,
            channels,
            meant: Meant::default(),
            forwards: None,
            listening: HashMap::new(),
            gone,
        }
    }

    /// A failed attempt. Offers of keys are none: an agent offers all it has.
    pub(super) async fn failed(&mut self, user: &str, method: Method) -> Auth {
        self.failures += 1;
        let user = shown(user);
        tracing::warn!(peer = %self.peer, user, method = method.as_str(), "failed login");
        self.server.watch.tell(Event::LoginRefused {
            user,
            source: self.peer.to_string(),
            method,
            by: None,
            reason: "it proves nothing".into(),
        });
        offend(&self.server, self.peer, Offence::Failure);
        if self.failures >= self.server.config.ssh.max_failures {
            self.entry.disconnect("too many authentication failures");
            // Answered before that is on its way, the client would try once more.
            let _ = timeout(CLOSE_TIMEOUT, self.entry.goodbye()).await;
        }
        again()
    }

    /// What it was by is known.
    pub(super) fn tell_of_login(&self, account: &Account, method: Method, restricted: bool) {
        self.server.watch.tell(Event::Login {
            account: account.name.clone(),
            id: account.id,
            source: self.peer.to_string(),
            method,
            by: self.by.clone(),
            restricted,
        });
    }
}

impl Handler for ClientHandler {
    type Error = russh::Error;

    async fn authentication_banner(&mut self) -> Result<Option<String>, Self::Error> {
        let Some(path) = self.server.config.ssh.banner.clone() else { return Ok(None) };
        let shown = path.display().to_string();
        match tokio::task::spawn_blocking(move || banner::read(&path)).await {
            Ok(Ok(text)) if !text.is_empty() => Ok(Some(text)),
            Ok(Err(error)) => {
                tracing::error!(path = shown, %error, "ssh.banner can't be shown; logins go on without it");
                Ok(None)
            }
            _ => Ok(None),
        }
    }

    async fn auth_none(&mut self, _user: &str) -> Result<Auth, Self::Error> {
        Ok(again())
    }

    async fn auth_publickey_offered(
        &mut self,
        user: &str,
        offer: PublicKeyOffer<'_>,
    ) -> Result<Auth, Self::Error> {
        Ok(self.key_offered(user, offer).await)
    }

    async fn auth_publickey(
        &mut self,
        user: &str,
        key: VerifiedPublicKey<'_>,
    ) -> Result<Auth, Self::Error> {
        Ok(self.key_verified(user, key).await)
    }

    async fn auth_openssh_certificate(
        &mut self,
        user: &str,
        certificate: &Certificate,
    ) -> Result<Auth, Self::Error> {
        Ok(self.certificate_verified(user, certificate).await)
    }

    async fn auth_password(&mut self, user: &str, password: &str) -> Result<Auth, Self::Error> {
        let (name, wishes) = login_name::parse(user);
        if let Some(account) = self.server.authenticator.invitation(name, password).await {
            tracing::info!(peer = %self.peer, account = account.name, "login by invitation");
            self.by = "invitation".into();
            self.tell_of_login(&account, Method::Password, true);
            // It may redeem the invitation, for which it may have a terminal, and nothing else.
            self.options = KeyOptions::restricted();
            self.options.pty = true;
            self.wishes = Ok(Wishes { lobby: Some(Word::Invitation), ..Wishes::default() });
            self.account = Some(account);
            return Ok(Auth::Accept);
        }
        let account = self.server.authenticator.password(name, password).await;
        let Some(account) = account else { return Ok(self.failed(user, Method::Password).await) };
        tracing::info!(peer = %self.peer, account = account.name, "login by password");
        self.by = "password".into();
        self.tell_of_login(&account, Method::Password, false);
        (self.account, self.wishes) = (Some(account), wishes);
        Ok(Auth::Accept)
    }

    async fn auth_succeeded(&mut self, connection: &mut Connection) -> Result<(), Self::Error> {
        let Some(account) = &self.account else { return Err(russh::Error::Inconsistent) };
        self.entry.authenticated(account.id);
        // From here on a change of the account reaches this connection; one that came just before is
        // seen now.
        if let Some(closed) = self.server.authenticator.closed(account).await {
            let words = closing::words(closed);
            tracing::info!(peer = %self.peer, account = account.name, "turned away: {words}");
            // Nothing is started for it in what time is left, and these words come before any answer.
            self.account = None;
            return connection.disconnect(Disconnect::ByApplication, &words, "en");
        }
        // A machine that is to start anew is not resumed ahead; one that is not wanted, not at all.
        if self.wishes.as_ref().is_ok_and(Wishes::want_the_machine) {
            self.server.registry.expect(account);
        }
        Ok(())
    }

    async fn channel_open_session(
        &mut self,
        channel: Channel<Msg>,
        reply: ChannelOpenHandle,
        connection: &mut Connection,
    ) -> Result<(), Self::Error> {
        self.forget_ended(connection);
        let ssh = &self.server.config.ssh;
        let most = ssh.max_channels;
        let room = match self.sessions() >= most {
            true => Err(format!("a connection has at most {most} sessions here")),
            false => self.entry.ended.room(ssh.max_ended_channels),
        };
        if let Err(reason) = room {
            reply.reject(shortage(reason)).await;
            return Ok(());
        }
        // The read half is dropped: data comes through the callbacks below, which can count it.
        let (_, write) = channel.split();
        let setup = Setup {
            pty: None,
            window: Window::default(),
            env: environment::Env::default(),
            input: Arc::new(InputQueue::new(self.inflow.clone())),
            agent: false,
            write,
        };
        self.channels.insert(setup.write.id(), ChannelState::Idle(Box::new(setup)));
        self.settle_who_is_meant(connection);
        reply.accept().await;
        Ok(())
    }

    async fn channel_open_direct_tcpip(
        &mut self,
        channel: Channel<Msg>,
        host: &str,
        port: u32,
        _originator: &str,
        _originator_port: u32,
        reply: ChannelOpenHandle,
        connection: &mut Connection,
    ) -> Result<(), Self::Error> {
        let to = tcp(host, port);
        self.open_direct(to, channel, reply, connection).await;
        Ok(())
    }

    async fn channel_open_direct_streamlocal(
        &mut self,
        channel: Channel<Msg>,
        path: &str,
        reply: ChannelOpenHandle,
        connection: &mut Connection,
    ) -> Result<(), Self::Error> {
        let to = Ok(Place::Unix { path: path.to_owned() });
        self.open_direct(to, channel, reply, connection).await;
        Ok(())
    }

    async fn pty_request(
        &mut self,
        channel: ChannelId,
        term: &str,
        columns: u32,
        rows: u32,
        width_px: u32,
        height_px: u32,
        modes: &[(russh::Pty, u32)],
        connection: &mut Connection,
    ) -> Result<(), Self::Error> {
        let permitted = self.options.pty;
        let plausible = term.len() <= MAX_TERM && term.bytes().all(|byte| byte.is_ascii_graphic());
        match self.setup(channel) {
            Some(setup) if setup.pty.is_none() && plausible && permitted => {
                let modes = modes
                    .iter()
                    .map(|(mode, value)| (*mode as u8, *value))
                    .filter(|(mode, _)| *mode != 0)
                    .collect();
                setup.pty = Some(Pty { term: term.to_owned(), modes });
                setup.window = window(columns, rows, width_px, height_px);
                connection.channel_success(channel)
            }
            _ => connection.channel_failure(channel),
        }
    }

    async fn env_request(
        &mut self,
        channel: ChannelId,
        name: &str,
        value: &str,
        connection: &mut Connection,
    ) -> Result<(), Self::Error> {
        let server = self.server.clone();
        let taken = self
            .setup(channel)
            .is_some_and(|setup| setup.env.set(name, value, &server.config.ssh.accept_env));
        match taken {
            true => connection.channel_success(channel),
            false => connection.channel_failure(channel),
        }
    }

    async fn shell_request(
        &mut self,
        channel: ChannelId,
        connection: &mut Connection,
    ) -> Result<(), Self::Error> {
        match self.start(channel, Kind::Shell, connection) {
            true => connection.channel_success(channel),
            false => connection.channel_failure(channel),
        }
    }

    async fn exec_request(
        &mut self,
        channel: ChannelId,
        command: &[u8],
        connection: &mut Connection,
    ) -> Result<(), Self::Error> {
        let short = command.len() <= MAX_COMMAND && !command.contains(&0);
        match short && self.start(channel, Kind::Exec(command.to_vec()), connection) {
            true => connection.channel_success(channel),
            false => connection.channel_failure(channel),
        }
    }

    async fn subsystem_request(
        &mut self,
        channel: ChannelId,
        name: &str,
        connection: &mut Connection,
    ) -> Result<(), Self::Error> {
        match name == "sftp" && self.start(channel, Kind::Sftp, connection) {
            true => connection.channel_success(channel),
            false => connection.channel_failure(channel),
        }
    }

    async fn window_change_request(
        &mut self,
        channel: ChannelId,
        columns: u32,
        rows: u32,
        width_px: u32,
        height_px: u32,
        _connection: &mut Connection,
    ) -> Result<(), Self::Error> {
        let window = window(columns, rows, width_px, height_px);
        match self.channels.get_mut(&channel) {
            Some(ChannelState::Idle(setup)) => setup.window = window,
            Some(ChannelState::Running(controls)) => {
                controls.window.send_replace(window);
            }
            Some(ChannelState::Stream { .. }) | None => {}
        }
        Ok(())
    }

    async fn x11_request(
        &mut self,
        channel: ChannelId,
        _single_connection: bool,
        _protocol: &str,
        _cookie: &str,
        _screen: u32,
        connection: &mut Connection,
    ) -> Result<(), Self::Error> {
        connection.channel_failure(channel)
    }

    /// russh answers it.
    async fn agent_request(
        &mut self,
        channel: ChannelId,
        _connection: &mut Connection,
    ) -> Result<bool, Self::Error> {
        let permitted = self.options.agent_forwarding;
        Ok(permitted && self.setup(channel).map(|setup| setup.agent = true).is_some())
    }

    async fn signal(
        &mut self,
        channel: ChannelId,
        signal: Sig,
        _connection: &mut Connection,
    ) -> Result<(), Self::Error> {
        let Some(name) = signal_name(&signal) else { return Ok(()) };
        if let Some(ChannelState::Running(controls)) = self.channels.get(&channel)
            && controls.signals.try_send(name.into()).is_err()
        {
            tracing::debug!(peer = %self.peer, name, "too many signals at once; dropped");
        }
        Ok(())
    }

    /// Of two sessions one may have ended, and nobody was told.
    async fn window_adjusted(
        &mut self,
        _channel: ChannelId,
        _size: u32,
        connection: &mut Connection,
    ) -> Result<(), Self::Error> {
        if self.sessions() > 1 {
            self.settle_who_is_meant(connection);
        }
        Ok(())
    }

    fn adjust_window(&mut self, _channel: ChannelId, _current: u32) -> u32 {
        self.inflow.window()
    }

    async fn data(
        &mut self,
        channel: ChannelId,
        data: &[u8],
        _connection: &mut Connection,
    ) -> Result<(), Self::Error> {
        if let Some(input) = self.input(channel) {
            input.push(data);
        }
        Ok(())
    }

    async fn channel_eof(
        &mut self,
        channel: ChannelId,
        _connection: &mut Connection,
    ) -> Result<(), Self::Error> {
        if let Some(input) = self.input(channel) {
            input.end();
        }
        Ok(())
    }

    async fn channel_close(
        &mut self,
        channel: ChannelId,
        connection: &mut Connection,
    ) -> Result<(), Self::Error> {
        self.forget(channel);
        self.settle_who_is_meant(connection);
        Ok(())
    }

    async fn tcpip_forward(
        &mut self,
        address: &str,
        port: &mut u32,
        connection: &mut Connection,
    ) -> Result<bool, Self::Error> {
        self.listen_tcp(address, port, connection).await
    }

    async fn cancel_tcpip_forward(
        &mut self,
        address: &str,
        port: u32,
        _connection: &mut Connection,
    ) -> Result<bool, Self::Error> {
        Ok(self.stop_listening(&Listener::Tcp { address: address.to_owned(), port }))
    }

    async fn streamlocal_forward(
        &mut self,
        path: &str,
        connection: &mut Connection,
    ) -> Result<bool, Self::Error> {
        self.listen_unix(path, connection).await
    }

    async fn cancel_streamlocal_forward(
        &mut self,
        path: &str,
        _connection: &mut Connection,
    ) -> Result<bool, Self::Error> {
        Ok(self.stop_listening(&Listener::Unix { path: path.to_owned() }))
    }
}
