//! What no well-behaved client does, by a client of our own.

use std::sync::Arc;

use russh::{
    ChannelMsg, Sig,
    client::{self, Handle},
    keys::{PrivateKey, PrivateKeyWithHashAlg, PublicKeyOrCertificate},
};

use crate::harness::{Options, Service, stderr, stdout};

struct Client;

impl client::Handler for Client {
    type Error = russh::Error;

    async fn check_server_key(
        &mut self,
        _key: &PublicKeyOrCertificate,
    ) -> Result<bool, russh::Error> {
        Ok(true)
    }
}

async fn login(service: &Service, user: &str) -> Handle<Client> {
    let config = Arc::new(client::Config::default());
    let address = ("127.0.0.1", service.port);
    let mut handle = client::connect(config, address, Client).await.unwrap();
    let key = PrivateKey::read_openssh_file(service.path("id")).unwrap();
    let key = PrivateKeyWithHashAlg::new(Arc::new(key), None);
    assert!(handle.authenticate_publickey(user, key).await.unwrap().success());
    handle
}

/// Everything the channel says until it closes.
async fn all(channel: &mut russh::Channel<client::Msg>) -> Vec<ChannelMsg> {
    let mut messages = vec![];
    while let Some(message) = channel.wait().await {
        if !matches!(message, ChannelMsg::WindowAdjusted { .. }) {
            messages.push(message);
        }
    }
    messages
}

fn output(messages: &[ChannelMsg]) -> String {
    let mut bytes = vec![];
    for message in messages {
        if let ChannelMsg::Data { data } = message {
            bytes.extend_from_slice(data);
        }
    }
    String::from_utf8(bytes).unwrap()
}

#[tokio::test]
async fn a_connection_has_so_many_channels() {
    let service = Service::start();
    service.account("alice");
    let connection = login(&service, "alice").await;
    let mut channels = vec![];
    for _ in 0..64 {
        channels.push(connection.channel_open_session().await.unwrap());
    }
    let refused = connection.channel_open_session().await;
    assert!(matches!(refused, Err(russh::Error::ChannelOpenFailure(_))), "{refused:?}");
    channels.remove(0).close().await.unwrap();
    connection.channel_open_session().await.unwrap();
}

/// Those that have ended by themselves are none of them. (russh does not say that the client has closed a channel
/// that was closed from here before.)
#[tokio::test]
async fn as_many_as_one_likes_may_run_on_a_connection_one_after_another() {
    let service = Service::start();
    service.account("alice");
    let connection = login(&service, "alice").await;
    for number in 0..70 {
        let mut channel = connection.channel_open_session().await.unwrap();
        channel.exec(true, format!("echo {number}")).await.unwrap();
        assert_eq!(output(&all(&mut channel).await), format!("{number}\n"));
    }
}

/// The library keeps something of each.
#[tokio::test(flavor = "multi_thread")]
async fn a_connection_has_had_so_many_channels_and_then_another_one_is_made() {
    let service = Service::with(Options { ssh: "max_ended_channels = 3", machines: "" });
    service.account("alice");
    let connection = login(&service, "alice").await;
    for _ in 0..3 {
        let mut channel = connection.channel_open_session().await.unwrap();
        channel.exec(true, "echo in").await.unwrap();
        assert_eq!(output(&all(&mut channel).await), "in\n");
    }
    let refused = connection.channel_open_session().await;
    assert!(matches!(refused, Err(russh::Error::ChannelOpenFailure(_))), "{refused:?}");

    // OpenSSH's client makes one by itself.
    let control = format!("ControlPath={}", service.path("control").display());
    let multiplexed = ["-o", "BatchMode=yes", "-o", "ControlPersist=20", "-o", &control];
    for round in 0..6 {
        let said = tokio::task::block_in_place(|| {
            let mut ssh = service.ssh_with(&multiplexed);
            ssh.args(["-o", "ControlMaster=auto", &crate::harness::at("alice"), "echo in"]);
            crate::harness::finish(&mut ssh)
        });
        assert_eq!(stdout(&said), "in\n", "round {round}: {}", stderr(&said));
    }
}

#[tokio::test]
async fn input_before_the_command_reaches_it() {
    let service = Service::start();
    service.account("alice");
    let connection = login(&service, "alice").await;
    let mut channel = connection.channel_open_session().await.unwrap();
    channel.data(&b"early"[..]).await.unwrap();
    channel.exec(true, "cat").await.unwrap();
    channel.data(&b" and late"[..]).await.unwrap();
    channel.eof().await.unwrap();
    let messages = all(&mut channel).await;
    assert_eq!(output(&messages), "early and late");
}

#[tokio::test]
async fn a_channel_runs_one_thing() {
    let service = Service::start();
    service.account("alice");
    let connection = login(&service, "alice").await;
    let mut channel = connection.channel_open_session().await.unwrap();
    channel.request_subsystem(true, "no-such").await.unwrap();
    assert!(matches!(channel.wait().await, Some(ChannelMsg::Failure)));
    channel.exec(true, "sleep 1; echo one").await.unwrap();
    assert!(matches!(channel.wait().await, Some(ChannelMsg::Success)));
    channel.exec(true, "echo two").await.unwrap();
    assert!(matches!(channel.wait().await, Some(ChannelMsg::Failure)));
    channel.request_pty(true, "vt100", 80, 24, 0, 0, &[]).await.unwrap();
    assert!(matches!(channel.wait().await, Some(ChannelMsg::Failure)));
    let messages = all(&mut channel).await;
    assert_eq!(output(&messages), "one\n");
}

#[tokio::test]
async fn a_signal_reaches_the_program_and_its_end_comes_back() {
    let service = Service::start();
    service.account("alice");
    let connection = login(&service, "alice").await;
    let mut channel = connection.channel_open_session().await.unwrap();
    channel.exec(true, "echo ready; exec sleep 30").await.unwrap();
    loop {
        if let Some(ChannelMsg::Data { .. }) = channel.wait().await {
            break;
        }
    }
    let signals = "NOSUCH";
    channel.signal(Sig::Custom(signals.into())).await.unwrap();
    channel.signal(Sig::INT).await.unwrap();
    let messages = all(&mut channel).await;
    let told = messages.iter().find_map(|message| match message {
        ChannelMsg::ExitSignal { signal_name, .. } => Some(format!("{signal_name:?}")),
        _ => None,
    });
    assert_eq!(told.as_deref(), Some("INT"), "{messages:?}");
}

#[tokio::test]
async fn terminals_take_any_size_and_hold_no_surprises() {
    let service = Service::start();
    service.account("alice");
    let connection = login(&service, "alice").await;
    let mut channel = connection.channel_open_session().await.unwrap();
    channel.request_pty(true, "xterm\x1b]0;x\x07", 80, 24, 0, 0, &[]).await.unwrap();
    assert!(matches!(channel.wait().await, Some(ChannelMsg::Failure)), "no such TERM");
    channel.request_pty(true, "vt100", u32::MAX, 24, 0, 0, &[]).await.unwrap();
    assert!(matches!(channel.wait().await, Some(ChannelMsg::Success)));
    channel.window_change(91, 17, 0, 0).await.unwrap();
    channel.exec(true, "stty size").await.unwrap();
    let messages = all(&mut channel).await;
    assert_eq!(output(&messages), "17 91\r\n");
}
