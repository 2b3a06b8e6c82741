//! Bytes between a channel and its stream into the machine: both directions at once, each with an end
//! of its own, and each only as fast as its receiver takes them.

use std::{pin::pin, sync::Arc, time::Duration};

use hermitage_guest_proto::forward::ForwardId;
use russh::{Channel, ChannelMsg, ChannelReadHalf, ChannelWriteHalf, server::Msg};
use tokio::time::timeout;
use tokio_util::sync::CancellationToken;

use super::link::Use;
use crate::{
    machine::ByteStream,
    server::Ended,
    session::{Inflow, InputQueue, feed, pump, shut_down},
};

/// How long what was sent before a channel was closed, or before a machine ended, may take to arrive.
const DRAIN_TIMEOUT: Duration = Duration::from_secs(5);

/// How long a client may take to close a channel when both directions have ended: it has nothing to wait for.
const CLOSE_TIMEOUT: Duration = Duration::from_secs(1);

/// Returns when both directions have ended, the client has closed the channel, or the machine is gone.
pub(super) async fn relay(
    link: &Use,
    id: ForwardId,
    stream: ByteStream,
    channel: &ChannelWriteHalf<Msg>,
    input: &InputQueue,
    closed: &CancellationToken,
    ended: &Ended,
) {
    let (from, to) = stream.into_split();
    let live = link.live();
    if let Some(live) = &live {
        input.on_input(live.clone());
    }
    let mut inward = pin!(async {
        if let Some(to) = feed(input, to).await {
            let _ = shut_down(to).await;
        }
    });
    let mut outward = pin!(async {
        let sent = |bytes| live.iter().for_each(|live| live.traffic.sent(bytes));
        pump(from, channel.make_writer(), sent).await;
        let _ = channel.eof().await;
    });
    let (mut all_in, mut all_out) = (false, false);
    while !(all_in && all_out) {
        tokio::select! {
            () = &mut inward, if !all_in => all_in = true,
            () = &mut outward, if !all_out => all_out = true,
            () = closed.cancelled() => {
                if !all_in {
                    let _ = timeout(DRAIN_TIMEOUT, inward).await;
                }
                break;
            }
            () = link.ended() => {
                if !all_out {
                    let _ = timeout(DRAIN_TIMEOUT, outward).await;
                }
                break;
            }
        }
    }
    input.discard();
    link.close(id);
    // Clients close what has ended both ways, and what they close is forgotten; what is closed from here is not.
    if !(all_in && all_out && timeout(CLOSE_TIMEOUT, closed.cancelled()).await.is_ok()) {
        close(channel, closed, ended).await;
    }
}

/// Before the client does, unless it has.
async fn close(channel: &ChannelWriteHalf<Msg>, closed: &CancellationToken, ended: &Ended) {
    if !closed.is_cancelled() {
        ended.add(1);
    }
    let _ = channel.close().await;
    // No callback and no message comes for it any more.
    closed.cancel();
}

/// A channel that the client let us open, for a connection that was accepted in the machine.
pub(super) async fn take_in(
    link: &Use,
    id: ForwardId,
    channel: Channel<Msg>,
    inflow: Arc<Inflow>,
    gone: &CancellationToken,
    ended: &Ended,
) {
    let (read, write) = channel.split();
    let input = Arc::new(InputQueue::new(inflow));
    let closed = gone.child_token();
    // A task of its own: russh waits with the whole connection until a message is taken.
    tokio::spawn(drain(read, input.clone(), closed.clone()));
    match link.stream(id).await {
        Ok(stream) => relay(link, id, stream, &write, &input, &closed, ended).await,
        Err(reason) => {
            tracing::debug!(reason, "an accepted connection has no stream");
            input.discard();
            close(&write, &closed, ended).await;
            link.close(id);
        }
    }
}

/// Puts what comes on a channel where it is counted. Ends with the channel.
async fn drain(mut read: ChannelReadHalf, input: Arc<InputQueue>, closed: CancellationToken) {
    loop {
        let message = tokio::select! {
            message = read.wait() => message,
            () = closed.cancelled() => break,
        };
        let Some(message) = message else { break };
        match message {
            ChannelMsg::Data { data } => input.push(&data),
            ChannelMsg::Eof => input.end(),
            ChannelMsg::Close => break,
            _ => {}
        }
    }
    input.end();
    closed.cancel();
}
