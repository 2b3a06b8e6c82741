//! Messages between the service and a machine's *forwarder*: a program of the image that runs as the
//! account's user ([`Program::Forwarder`](crate::Program)) and connects to and listens on addresses of
//! the machine for one SSH connection (RFC 4254 §7, OpenSSH's PROTOCOL §2.4).
//!
//! They are framed like the agent's messages and travel over the program's standard input and output.
//! Bytes that are forwarded do not: each stream is a vsock connection of its own, to the port that
//! [`ForwardEvent::Ready`] names, with the id it belongs to in front (8 bytes, little endian).
//!
//! What the forwarder says was written by a guest: it can claim anything about its own machine, and
//! nothing about another.

use serde::{Deserialize, Serialize};

/// Names what one request is about, and the stream that belongs to it. Those of requests are the
/// host's to choose, those of accepted connections the forwarder's, from [`ACCEPTED`] on.
pub type ForwardId = u64;

/// The first id of accepted connections.
pub const ACCEPTED: ForwardId = 1 << 63;

/// Accepted connections that wait for their stream or their refusal. No more are accepted meanwhile.
pub const MAX_ACCEPTED: usize = 64;

/// An address in the machine.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Place {
    /// A name or number. To listen: `` and `*` are all addresses, port 0 is any that is free.
    Tcp {
        host: String,
        port: u16,
    },
    Unix {
        path: String,
    },
    /// A new socket that nobody else can reach; only to listen.
    Private,
}

/// Service to forwarder.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum ForwardRequest {
    /// Connect. Answered by `Dialed`, after which the stream is expected, or by `Failed`.
    Dial { id: ForwardId, to: Place },
    /// Listen until `Close` or the end of the forwarder. Answered by `Listening` or `Failed`.
    Listen { id: ForwardId, at: Place },
    /// Stop listening; close a connection that has no stream yet.
    Close { id: ForwardId },
}

/// Forwarder to service.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum ForwardEvent {
    /// First of all: the vsock port at which streams are taken.
    Ready {
        port: u32,
    },
    Dialed {
        id: ForwardId,
    },
    /// Where it listens: with the port or the path that it got.
    Listening {
        id: ForwardId,
        at: Place,
    },
    /// Why not, in words for the user.
    Failed {
        id: ForwardId,
        reason: String,
    },
    /// Somebody has connected to a listening socket. The stream is expected, or `Close`.
    Accepted {
        listener: ForwardId,
        id: ForwardId,
        /// Address and port; empty and 0 where there are none.
        host: String,
        port: u16,
    },
}
