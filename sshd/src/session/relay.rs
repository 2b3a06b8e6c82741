//! Bytes, windows and signals between a client and its program.

use std::{pin::pin, time::Duration};

use tokio::{
    io::{AsyncWrite, AsyncWriteExt},
    time::timeout,
};
use tokio_util::sync::CancellationToken;

use super::{Client, InputQueue, Outcome, Output};
use crate::{
    lifecycle::Lease,
    machine::{Command, ReadHalf, Remote, Terminal},
};

/// How long what a dead machine has left in its sockets may take to reach the client.
const DRAIN_TIMEOUT: Duration = Duration::from_secs(2);

/// A program on a terminal.
pub(super) async fn terminal(
    lease: &Lease,
    terminal: Terminal,
    client: &mut Client,
    output: &Output,
) -> Outcome {
    let Terminal { socket, mut program, .. } = terminal;
    let remote = program.remote();
    let (from, to) = socket.into_split();
    let input = client.input.clone();
    let mut feeding = pin!(async {
        // The client's end of input means nothing on a terminal: there, end-of-file is a key. The
        // socket stays open both ways.
        let _open = feed(&input, to).await;
        std::future::pending::<()>().await
    });
    let mut showing = pin!(output.stdout(from));
    let mut shown = false;
    let status = loop {
        tokio::select! {
            status = program.exited() => break status,
            () = &mut showing, if !shown => shown = true,
            () = &mut feeding => {}
            () = attend_client(&remote, client) => {}
            _ = lease.machine.ended() => break None,
        }
    };
    let Some(status) = status else {
        if !shown {
            let _ = timeout(DRAIN_TIMEOUT, showing).await;
        }
        return Outcome::Lost(lease.machine.ended().await);
    };
    // The machine delivers what the terminal has written so far and closes: that is all of it.
    if !shown && program.detach().await.is_ok() {
        showing.await;
    }
    Outcome::Exited(status)
}

/// A program on streams.
pub(super) async fn command(
    lease: &Lease,
    command: Command,
    client: &mut Client,
    output: &Output,
) -> Outcome {
    let Command { stdio, stderr, mut program } = command;
    let remote = program.remote();
    let (from, to) = stdio.into_split();
    let (input, unread) = (client.input.clone(), client.unread.clone());
    let mut feeding = pin!(async {
        if let Some(to) = feed(&input, to).await {
            // Half-close: the program sees the end of its input and may still write.
            let _ = shut_down(to).await;
        }
    });
    let mut showing = pin!(async {
        tokio::join!(show(output, from, &unread), output.stderr(stderr));
    });
    let mut shown = false;
    let mut fed = false;
    let mut status = None;
    loop {
        tokio::select! {
            exited = program.exited(), if status.is_none() => match exited {
                Some(exited) => status = Some(exited),
                None => break,
            },
            // Both streams end when the last process that has them is gone, as with any sshd.
            () = &mut showing, if !shown => shown = true,
            () = &mut feeding, if !fed => fed = true,
            () = attend_client(&remote, client) => {}
            _ = lease.machine.ended(), if status.is_none() || !shown => break,
        }
        if shown && let Some(status) = status.take() {
            return Outcome::Exited(status);
        }
    }
    if !shown {
        let _ = timeout(DRAIN_TIMEOUT, showing).await;
    }
    match status {
        Some(status) => Outcome::Exited(status),
        None => Outcome::Lost(lease.machine.ended().await),
    }
}

/// Standard output: until its end, or until the client takes no more of it and whoever writes it is to know.
async fn show(output: &Output, mut from: ReadHalf, unread: &CancellationToken) {
    tokio::select! {
        () = output.stdout(&mut from) => return,
        () = unread.cancelled() => {}
    }
    from.shut_down();
}

/// One window change or signal. Cancellation-safe.
async fn attend_client(program: &Remote, client: &mut Client) {
    tokio::select! {
        changed = client.window.changed() => match changed {
            Ok(()) => program.resize(*client.window.borrow_and_update()),
            Err(_) => std::future::pending().await,
        },
        signal = client.signals.recv() => match signal {
            Some(signal) => program.signal(signal),
            None => std::future::pending().await,
        },
    }
}

/// Writes queued input until its end. None if the program closed its side: the rest is dropped.
pub async fn feed<W: AsyncWrite + Unpin>(input: &InputQueue, mut to: W) -> Option<W> {
    while let Some(chunk) = input.next().await {
        if to.write_all(&chunk.bytes).await.is_err() {
            input.discard();
            return None;
        }
    }
    Some(to)
}

pub async fn shut_down(mut to: impl AsyncWrite + Unpin) -> std::io::Result<()> {
    to.shutdown().await
}
