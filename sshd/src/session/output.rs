//! A channel's output: bytes as the client's window takes them, then the exit status, in this order.

use std::sync::{Arc, OnceLock};

use hermitage_guest_proto::ExitStatus;
use russh::{
    ChannelId, ChannelWriteHalf, Sig,
    server::{Handle, Msg},
};
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt};

use super::{EXIT_LOST, Farewell, signal_name};
use crate::watch::Live;

/// SSH_EXTENDED_DATA_STDERR (RFC 4254 §5.2).
const STDERR: u32 = 1;

/// Makes a terminal that a full-screen program had fit for a shell again, and changes nothing on one that is:
/// the primary screen (without the cursor's position that 1049 brings back), no mouse reports, no bracketed
/// paste, ordinary keys, a cursor, no colour.
const PLAIN: &str =
    "\x1b[?47l\x1b[?1000l\x1b[?1002l\x1b[?1003l\x1b[?1006l\x1b[?2004l\x1b[?1l\x1b>\x1b[?25h\x1b[m";

/// Read from the machine at a time: a full SSH packet.
const CHUNK: usize = 32 * 1024;

pub struct Output {
    pub channel: ChannelWriteHalf<Msg>,
    pub connection: Handle,
    /// Whose bytes these are, once that is known.
    pub live: OnceLock<Arc<Live>>,
}

impl Output {
    fn id(&self) -> ChannelId {
        self.channel.id()
    }

    /// Copies `from` to the client's standard output until its end, or until the client is gone.
    pub async fn stdout(&self, from: impl AsyncRead + Unpin) {
        pump(from, self.channel.make_writer(), |bytes| self.sent(bytes)).await;
    }

    fn sent(&self, bytes: usize) {
        if let Some(live) = self.live.get() {
            live.traffic.sent(bytes);
        }
    }

    /// The same for standard error.
    pub async fn stderr(&self, from: impl AsyncRead + Unpin) {
        pump(from, self.channel.make_writer_ext(Some(STDERR)), |bytes| self.sent(bytes)).await;
    }

    /// Says what is left to say and closes the channel. The status goes before the end of output: ssh's shared
    /// connections close a channel whose input has ended as soon as they see that end.
    pub(super) async fn finish(&self, farewell: Farewell, terminal: bool) {
        // A connection that is gone can't be told; nothing to do about it.
        let _ = match farewell {
            Farewell::Status(ExitStatus::Code(code)) => {
                self.channel.exit_status(code.into()).await.map_err(drop)
            }
            Farewell::Status(ExitStatus::Signal { name, core_dumped }) => {
                let signal = Sig::Custom(signal_name(&name).to_owned());
                self.connection
                    .exit_signal_request(
                        self.id(),
                        signal,
                        core_dumped,
                        String::new(),
                        String::new(),
                    )
                    .await
            }
            Farewell::Words(words) => {
                self.say(&words, terminal).await;
                self.channel.exit_status(EXIT_LOST).await.map_err(drop)
            }
            Farewell::Nothing => Ok(()),
        };
        let _ = self.channel.eof().await;
        let _ = self.channel.close().await;
    }

    /// A line before anything else on a terminal.
    pub(super) async fn greet(&self, words: &str) {
        let _ = self.channel.make_writer().write_all(format!("{words}\r\n").as_bytes()).await;
    }

    /// What an operator says to everybody on this terminal, in the middle of whatever is there.
    pub(super) async fn announce(&self, words: &str) {
        let words = words.replace('\n', "\r\n");
        let text = format!("\r\n\x07hermitage: {words}\r\n");
        let _ = self.channel.make_writer().write_all(text.as_bytes()).await;
    }

    /// What the service itself answers, on standard output; a terminal's is raw.
    pub async fn print(&self, words: &str, terminal: bool) {
        let text = if terminal { words.replace('\n', "\r\n") } else { words.to_owned() };
        let _ = self.channel.make_writer().write_all(text.as_bytes()).await;
    }

    /// A line from the service itself: on standard error, or on the terminal where there is one.
    async fn say(&self, words: &str, terminal: bool) {
        if terminal {
            // The cursor may be anywhere, and the terminal is raw.
            let line = format!("{PLAIN}\r\nhermitage: {words}\r\n");
            let _ = self.channel.make_writer().write_all(line.as_bytes()).await;
        } else {
            let line = format!("hermitage: {words}\n");
            let mut stderr = self.channel.make_writer_ext(Some(STDERR));
            let _ = stderr.write_all(line.as_bytes()).await;
        }
    }
}

/// Copies until the end of `from`, or until `to` takes no more. `took` hears of each part that it took.
pub async fn pump(
    mut from: impl AsyncRead + Unpin,
    mut to: impl AsyncWrite + Unpin,
    took: impl Fn(usize),
) {
    let mut chunk = vec![0; CHUNK];
    loop {
        // An error is a reset: the machine's end of the socket is gone, which is an end.
        let count = from.read(&mut chunk).await.unwrap_or(0);
        let Some(bytes) = chunk.get(..count).filter(|bytes| !bytes.is_empty()) else { return };
        // As the client's window permits; an error means that the connection is gone.
        if to.write_all(bytes).await.is_err() {
            return;
        }
        took(bytes.len());
    }
}
