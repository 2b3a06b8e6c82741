//! Reads and writes between descriptors of the host and guest memory, without a copy in between.
//!
//! Guest memory is never lent out as a slice: the guest writes to it at the same time. The kernel gets
//! the addresses, in the only file that has them.

use std::{
    io,
    os::fd::{AsRawFd, OwnedFd},
};

use vm_memory::GuestMemoryBackend;

use super::chain::Segment;
use crate::memory::GuestMemory;

/// Most pieces one call takes (UIO_MAXIOV is 1024). Callers go on where a call stopped.
const MAX_PIECES: usize = 512;

fn pieces(memory: &GuestMemory, segments: &[Segment]) -> io::Result<Vec<libc::iovec>> {
    let mut out = Vec::with_capacity(segments.len());
    for segment in segments {
        for slice in memory.get_slices(segment.address, segment.length as usize) {
            let slice = slice.map_err(io::Error::other)?;
            if out.len() == MAX_PIECES {
                return Ok(out);
            }
            out.push(libc::iovec {
                iov_base: slice.ptr_guard_mut().as_ptr().cast(),
                iov_len: slice.len(),
            });
        }
    }
    Ok(out)
}

fn message(pieces: &mut [libc::iovec]) -> libc::msghdr {
    // SAFETY: msghdr is plain data for which all zeroes is a valid value (no name, no control).
    let mut message: libc::msghdr = unsafe { std::mem::zeroed() };
    message.msg_iov = pieces.as_mut_ptr();
    message.msg_iovlen = pieces.len();
    message
}

fn retried(mut call: impl FnMut() -> isize) -> io::Result<usize> {
    loop {
        if let Ok(count) = usize::try_from(call()) {
            return Ok(count);
        }
        let error = io::Error::last_os_error();
        if error.kind() != io::ErrorKind::Interrupted {
            return Err(error);
        }
    }
}

/// Sends from guest memory to a stream socket what it takes now; never waits, never raises SIGPIPE.
pub fn send(socket: &OwnedFd, memory: &GuestMemory, segments: &[Segment]) -> io::Result<usize> {
    let mut pieces = pieces(memory, segments)?;
    let message = message(&mut pieces);
    let flags = libc::MSG_DONTWAIT | libc::MSG_NOSIGNAL;
    // SAFETY: `message` points to `pieces`, whose addresses lie in mappings that `memory` keeps for
    // longer than this call. The kernel reads them; that the guest may write meanwhile changes which
    // bytes are sent, nothing else.
    retried(|| unsafe { libc::sendmsg(socket.as_raw_fd(), &message, flags) })
}

/// Receives from a stream socket into guest memory what is there now; never waits. 0 is the end of
/// the stream, as long as `segments` is not empty.
pub fn receive(socket: &OwnedFd, memory: &GuestMemory, segments: &[Segment]) -> io::Result<usize> {
    let mut pieces = pieces(memory, segments)?;
    let mut message = message(&mut pieces);
    // SAFETY: as in `send`; the kernel writes only within the pieces, all of them guest memory, of
    // which no Rust reference exists.
    retried(|| unsafe { libc::recvmsg(socket.as_raw_fd(), &mut message, libc::MSG_DONTWAIT) })
}

/// Sends from our own memory what the socket takes now.
pub fn send_bytes(socket: &OwnedFd, bytes: &[u8]) -> io::Result<usize> {
    let flags = libc::MSG_DONTWAIT | libc::MSG_NOSIGNAL;
    // SAFETY: pointer and length are those of a live slice, which the kernel only reads.
    retried(|| unsafe { libc::send(socket.as_raw_fd(), bytes.as_ptr().cast(), bytes.len(), flags) })
}

/// Reads from a file at `offset` into guest memory. May be short.
pub fn read_at(
    file: &impl AsRawFd,
    memory: &GuestMemory,
    segments: &[Segment],
    offset: u64,
) -> io::Result<usize> {
    let pieces = pieces(memory, segments)?;
    let offset = file_offset(offset)?;
    // The casts can't cut: there are at most MAX_PIECES.
    let count = pieces.len() as libc::c_int;
    // SAFETY: as in `receive`.
    retried(|| unsafe { libc::preadv(file.as_raw_fd(), pieces.as_ptr(), count, offset) })
}

/// Writes from guest memory to a file at `offset`. May be short.
pub fn write_at(
    file: &impl AsRawFd,
    memory: &GuestMemory,
    segments: &[Segment],
    offset: u64,
) -> io::Result<usize> {
    let pieces = pieces(memory, segments)?;
    let offset = file_offset(offset)?;
    let count = pieces.len() as libc::c_int;
    // SAFETY: as in `send`.
    retried(|| unsafe { libc::pwritev(file.as_raw_fd(), pieces.as_ptr(), count, offset) })
}

/// fallocate(2).
pub fn allocate(file: &impl AsRawFd, mode: i32, offset: u64, length: u64) -> io::Result<()> {
    let (offset, length) = (file_offset(offset)?, file_offset(length)?);
    // SAFETY: no pointers are involved.
    retried(|| unsafe { libc::fallocate(file.as_raw_fd(), mode, offset, length) } as isize)
        .map(drop)
}

/// Closes one or both directions of a socket: `how` is SHUT_RD, SHUT_WR or SHUT_RDWR.
pub fn shutdown(socket: &OwnedFd, how: i32) {
    // SAFETY: no pointers are involved. It fails only where the peer is gone already, which comes to
    // the same.
    unsafe { libc::shutdown(socket.as_raw_fd(), how) };
}

fn file_offset(value: u64) -> io::Result<libc::off_t> {
    libc::off_t::try_from(value).map_err(|_| io::Error::from_raw_os_error(libc::EFBIG))
}

/// Most bytes of unread input that [`close_in_order`] looks at.
const UNREAD_LIMIT: usize = 1 << 20;

/// Makes the peer see the end of the stream, whoever else has a duplicate of this descriptor.
///
/// A Unix socket that is closed with unread input gives its peer ECONNRESET instead of the end, so
/// that input is read and thrown away; after the shutdown no more of it can come.
pub fn close_in_order(socket: &OwnedFd) {
    shutdown(socket, libc::SHUT_RDWR);
    let mut sink = [0u8; 4096];
    for _ in 0..UNREAD_LIMIT / sink.len() {
        let (buffer, length) = (sink.as_mut_ptr().cast(), sink.len());
        // SAFETY: pointer and length are those of `sink`, to which no other reference exists.
        let result = retried(|| unsafe {
            libc::recv(socket.as_raw_fd(), buffer, length, libc::MSG_DONTWAIT)
        });
        if !matches!(result, Ok(1..)) {
            break;
        }
    }
}
