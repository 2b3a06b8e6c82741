//! Virtio devices over the memory-mapped transport (virtio 1.2 §4.2).
//!
//! Everything behind these registers and queues is written by the guest and taken as hostile. What a
//! device cannot make sense of becomes a [`Fault`], which ends that machine and nothing else.
//!
//! [`Transport`] has the registers, the interrupt and the lock; a [`VirtioDevice`] has what is
//! particular to console, vsock, block or balloon. Top-down: [`transport`] → [`console`], [`vsock`],
//! [`block`], [`balloon`] → [`queue`] → [`chain`] → [`io`], the one file with raw pointers into guest memory.

pub mod balloon;
pub mod block;
pub mod chain;
pub mod console;
mod io;
pub mod queue;
pub mod transport;
pub mod vsock;

#[cfg(test)]
mod fuzz;
#[cfg(test)]
mod testing;

pub use balloon::Balloon;
pub use block::{Block, BlockStats, CopyNews, CopyOrder, WhichCopy};
pub use console::{Console, ConsoleStats};
pub use transport::{Context, Transport, TransportState, VirtioDevice, acknowledge};
pub use vsock::{Vsock, VsockOutcome, VsockState, VsockStats};

use std::io::Error as IoError;

/// A device's interrupt line: level-triggered, high while the device has something to say
/// (virtio 1.2 §4.2.2, InterruptStatus).
pub trait Interrupt: Send + Sync {
    fn set_level(&self, high: bool) -> std::io::Result<()>;

    /// One interrupt of a line that is edge-triggered.
    fn pulse(&self) -> std::io::Result<()> {
        self.set_level(true)?;
        self.set_level(false)
    }
}

impl<I: Interrupt + ?Sized> Interrupt for std::sync::Arc<I> {
    fn set_level(&self, high: bool) -> std::io::Result<()> {
        (**self).set_level(high)
    }
}

/// Why a device can't go on. Either kind ends the machine.
#[derive(Debug, thiserror::Error)]
pub enum Fault {
    /// The guest broke the device's rules.
    #[error("{device}: {reason}")]
    Guest { device: &'static str, reason: String },
    /// The host could not do its part.
    #[error("{device}: {what}: {source}")]
    Host { device: &'static str, what: &'static str, source: IoError },
}

impl Fault {
    fn guest(device: &'static str, reason: impl Into<String>) -> Self {
        Self::Guest { device, reason: reason.into() }
    }
}

/// Why a device's state can't be saved, or can't be restored from.
#[derive(Debug, thiserror::Error)]
pub enum StateError {
    /// Not now: something is under way that a state can't hold.
    #[error("{device} can't be saved now: {reason}")]
    Busy { device: &'static str, reason: String },
    #[error("{device}: the saved state is wrong: {reason}")]
    Invalid { device: &'static str, reason: String },
    #[error("{device}: the saved state has version {found}, this program reads {expected}")]
    Version { device: &'static str, found: u16, expected: u16 },
}

impl StateError {
    /// Whether it may be better in a moment.
    pub fn is_busy(&self) -> bool {
        matches!(self, Self::Busy { .. })
    }

    fn busy(device: &'static str, reason: impl Into<String>) -> Self {
        Self::Busy { device, reason: reason.into() }
    }

    fn invalid(device: &'static str, reason: impl Into<String>) -> Self {
        Self::Invalid { device, reason: reason.into() }
    }
}

/// Serves a read from a device's configuration space. What lies behind the end reads as zero.
fn read_config_bytes(config: &[u8], offset: u64, data: &mut [u8]) {
    let start = usize::try_from(offset).unwrap_or(usize::MAX).min(config.len());
    let available = &config[start..];
    let count = available.len().min(data.len());
    data[..count].copy_from_slice(&available[..count]);
    data[count..].fill(0);
}
