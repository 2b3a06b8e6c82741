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
    session::{Inflow, InputQueue, feed, pump, shut_down},
};

/// How long what was sent before a channel was closed, or before a machine ended, may take to arrive.
const DRAIN_TIMEOUT: Duration = Duration::from_secs(5);

/// Returns when both directions have ended, the client has closed the channel, or the machine is gone.
pub(super) async fn relay(
    link: &Use,
    id: ForwardId,
    stream: ByteStream,
    channel: &ChannelWriteHalf<Msg>,
    input: &InputQueue,
    closed: &CancellationToken,
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
    let _ = channel.close().await;
    link.close(id);
}

/// A channel that the client let us open, for a connection that was accepted in the machine.
pub(super) async fn take_in(
    link: &Use,
    id: ForwardId,
    channel: Channel<Msg>,
    inflow: Arc<Inflow>,
    gone: &CancellationToken,
) {
    let (read, write) = channel.split();
    let input = Arc::new(InputQueue::new(inflow));
    let closed = gone.child_token();
    // A task of its own: russh waits with the whole connection until a message is taken.
    tokio::spawn(drain(read, input.clone(), closed.clone()));
    match link.stream(id).await {
        Ok(stream) => relay(link, id, stream, &write, &input, &closed).await,
        Err(reason) => {
            tracing::debug!(reason, "an accepted connection has no stream");
            input.discard();
            let _ = write.close().await;
            link.close(id);
        }
    }
}

/// Puts what comes on a channel where it is counted. Ends with the channel.
async fn drain(mut read: ChannelReadHalf, input: Arc<InputQueue>, closed: CancellationToken) {
    while let Some(message) = read.wait().await {
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
