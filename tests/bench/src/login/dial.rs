//! The moment of the TCP connect, taken without standing in the way.
//!
//! The ssh client runs us as its `ProxyCommand` with `ProxyUseFdpass` (ssh_config(5)): we connect,
//! note the time, hand the connected socket over and are gone. Everything after that is client and
//! server alone, and the start of the client itself is not counted.

use std::{
    fs,
    io::{self, IoSlice},
    mem::MaybeUninit,
    net::TcpStream,
    os::fd::AsFd as _,
    path::Path,
};

use anyhow::Context as _;
use rustix::net::{SendAncillaryBuffer, SendAncillaryMessage, SendFlags, sendmsg};

use crate::clock;

/// In the child: connects to `address`, leaves the time in `note`, passes the socket on standard
/// output.
pub fn dial(address: &str, note: &Path) -> anyhow::Result<()> {
    let before = clock::now();
    let socket = TcpStream::connect(address).with_context(|| format!("connect to {address}"))?;
    fs::write(note, before.to_string()).with_context(|| format!("write {}", note.display()))?;
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
    let mut ancillary = SendAncillaryBuffer::new(&mut space);
    let sockets = [socket.as_fd()];
    ancillary.push(SendAncillaryMessage::ScmRights(&sockets));
    // One byte, because a descriptor does not travel alone.
    sendmsg(io::stdout(), &[IoSlice::new(&[0])], &mut ancillary, SendFlags::NOSIGNAL)
        .context("pass the socket to ssh on standard output")?;
    Ok(())
}

/// Reads what [`dial`] left.
pub fn dialled(note: &Path) -> anyhow::Result<u64> {
    let text = fs::read_to_string(note)
        .with_context(|| format!("ssh did not connect: there is no {}", note.display()))?;
    text.parse().with_context(|| format!("{} holds {text:?}, not a time", note.display()))
}
