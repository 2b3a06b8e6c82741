//! Handing out a copy of a disk that is in use.

use std::time::{Duration, Instant};

use hermitage_storage::publish::NewFile;
use tokio::{
    io::AsyncReadExt,
    net::UnixStream,
    time::{interval, timeout},
};

use super::{answer, asker, protocol::Reply, refused};
use crate::{
    lifecycle::{CopyNews, discard},
    server::Server,
    watch::{Copied, Event},
};

/// How often the client hears something, so that it can tell a long copy from a service that is gone.
const TELL: Duration = Duration::from_secs(1);

/// How long it may leave that unread.
const UNREAD: Duration = Duration::from_secs(60);

pub(super) async fn copy_disk(
    server: &Server,
    name: &str,
    mut stream: UnixStream,
) -> std::io::Result<()> {
    let account = match server.store.by_name(name).await {
        Ok(Some(account)) => account,
        Ok(None) => {
            let reply = refused(format!("there is no account \"{name}\""));
            return answer(&mut stream, &reply).await;
        }
        Err(error) => return answer(&mut stream, &refused(error.to_string())).await,
    };
    let (begun, who) = (Instant::now(), asker(&stream));
    let tell = |bytes: u64, error: Option<String>| {
        server.watch.tell(Event::Copy {
            who: Some(who.clone()),
            what: Copied::Disk,
            account: account.name.clone(),
            id: Some(account.id),
            place: None,
            bytes: error.is_none().then_some(bytes),
            milliseconds: begun.elapsed().as_millis().try_into().unwrap_or(u64::MAX),
            error,
        });
    };
    let mut news = server.registry.copy_disk(&account).await;
    let mut tick = interval(TELL);
    let (mut of, mut stands) = (0, Reply::Waiting { for_another: false });
    let reply = loop {
        tokio::select! {
            one = news.recv() => match one {
                Some(CopyNews::Waiting { for_another }) => stands = Reply::Waiting { for_another },
                Some(CopyNews::Copying { copied, of: all }) => {
                    (of, stands) = (all, Reply::Copying { copied, of: all });
                }
                Some(CopyNews::NotRunning) => break Reply::NotRunning,
                Some(CopyNews::Over(Ok(copy))) => {
                    tell(of, None);
                    return hand_out(copy, stream).await;
                }
                Some(CopyNews::Over(Err(reason))) => {
                    tell(0, Some(reason.clone()));
                    break refused(format!("the disk of {name}'s machine can't be copied: {reason}"));
                }
                None => {
                    tell(0, Some("cut off".into()));
                    break refused(format!("copying the disk of {name}'s machine was cut off"));
                }
            },
            // One that does not read holds its machine's rest up, and others' copies.
            _ = tick.tick() => {
                let told = timeout(UNREAD, answer(&mut stream, &stands)).await;
                if !matches!(told, Ok(Ok(()))) {
                    tell(0, Some("whoever wanted it does not read".into()));
                    return told?;
                }
            }
            // Dropping the channel gives the copy up.
            () = closed(&mut stream) => {
                tell(0, Some("nobody wants it any more".into()));
                return Ok(());
            }
        }
    };
    answer(&mut stream, &reply).await
}

/// The copy goes with the connection.
async fn hand_out(copy: NewFile, mut stream: UnixStream) -> std::io::Result<()> {
    let told = answer(&mut stream, &Reply::Copied { path: copy.path().to_owned() }).await;
    if told.is_ok() {
        closed(&mut stream).await;
    }
    discard(copy);
    told
}

/// Waits until the client has closed; what it says is not listened to.
async fn closed(stream: &mut UnixStream) {
    let mut sink = [0; 64];
    while let Ok(1..) = stream.read(&mut sink).await {}
}
