//! Handing out a copy of a disk that is in use.

use std::time::Duration;

use tokio::{
    io::AsyncReadExt,
    net::UnixStream,
    time::{interval, timeout},
};

use super::{answer, asker, protocol::Reply, refused};
use crate::{
    lifecycle::{Copies, CopyNews, discard},
    server::Server,
    watch::{Copied, CopyNote},
};

/// How often the client hears something, so that it can tell a long copy from a service that is gone.
const TELL: Duration = Duration::from_secs(1);

/// How long it may leave that unread.
const UNREAD: Duration = Duration::from_secs(60);

pub(super) async fn copy_disk(
    server: &Server,
    name: &str,
    memory: bool,
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
    let note = CopyNote::new(Copied::Disk, &account.name, Some(account.id)).by(asker(&stream));
    let mut news = server.registry.copy(&account, memory).await;
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
                Some(CopyNews::Over(Ok(copies))) => {
                    server.watch.tell(note.over(Ok::<_, String>(of)));
                    return hand_out(copies, stream).await;
                }
                Some(CopyNews::Over(Err(reason))) => {
                    server.watch.tell(note.over(Err(&reason)));
                    break refused(format!("{name}'s machine was not copied: {reason}"));
                }
                None => {
                    server.watch.tell(note.over(Err("cut off")));
                    break refused(format!("copying {name}'s machine was cut off"));
                }
            },
            // One that does not read holds its machine's rest up, and others' copies.
            _ = tick.tick() => {
                let told = timeout(UNREAD, answer(&mut stream, &stands)).await;
                if !matches!(told, Ok(Ok(()))) {
                    server.watch.tell(note.over(Err("whoever wanted it does not read")));
                    return told?;
                }
            }
            // Dropping the channel gives the copy up.
            () = closed(&mut stream) => {
                server.watch.tell(note.over(Err("nobody wants it any more")));
                return Ok(());
            }
        }
    };
    answer(&mut stream, &reply).await
}

/// The copies go with the connection.
async fn hand_out(copies: Copies, mut stream: UnixStream) -> std::io::Result<()> {
    let path = copies.disk.path().to_owned();
    let memory = copies.memory.as_ref().map(|memory| memory.path().to_owned());
    let told = answer(&mut stream, &Reply::Copied { path, memory }).await;
    if told.is_ok() {
        closed(&mut stream).await;
    }
    discard(copies);
    told
}

/// Waits until the client has closed; what it says is not listened to.
async fn closed(stream: &mut UnixStream) {
    let mut sink = [0; 64];
    while let Ok(1..) = stream.read(&mut sink).await {}
}
