//! Channels that ended from here, before their client closed them.
//!
//! Of each russh keeps a sender with its queue, some 4 KiB, for as long as the connection lives: it takes no notice of
//! the client's close any more (docs/ssh.md, "What russh does not offer"). So a connection has so many of them.

use std::sync::atomic::{AtomicUsize, Ordering};

/// Those of one connection.
#[derive(Default)]
pub struct Ended(AtomicUsize);

impl Ended {
    pub fn add(&self, channels: usize) {
        self.0.fetch_add(channels, Ordering::Relaxed);
    }

    /// Whether there may be more channels, or why not.
    pub fn room(&self, most: usize) -> Result<(), String> {
        if self.0.load(Ordering::Relaxed) < most {
            return Ok(());
        }
        Err(format!(
            "{most} commands and streams of this connection are over, and it takes no more (ssh.max_ended_channels): \
             connect anew"
        ))
    }
}
