//! Accepting connections, and vsock listeners. Only the host (CID 2) is ever accepted: with the loopback transport loaded, a
//! program in the guest could connect as well.

use std::os::fd::{AsFd, AsRawFd, FromRawFd, OwnedFd};

use nix::errno::Errno;
use nix::sys::socket::{self, AddressFamily, Backlog, SockFlag, SockType, VsockAddr};

/// Listens on a free vsock port of this machine, without blocking; which one it is.
pub fn listen_anywhere() -> nix::Result<(OwnedFd, u32)> {
    let socket = listen(libc::VMADDR_PORT_ANY)?;
    let address: VsockAddr = socket::getsockname(socket.as_raw_fd())?;
    Ok((socket, address.port()))
}

/// Listens on a vsock port of this machine, without blocking.
pub fn listen(port: u32) -> nix::Result<OwnedFd> {
    let socket = socket::socket(
        AddressFamily::Vsock,
        SockType::Stream,
        SockFlag::SOCK_CLOEXEC | SockFlag::SOCK_NONBLOCK,
        None,
    )?;
    socket::bind(socket.as_raw_fd(), &VsockAddr::new(libc::VMADDR_CID_ANY, port))?;
    socket::listen(&socket, Backlog::new(64)?)?;
    Ok(socket)
}

/// The next connection, without blocking and close-on-exec.
pub fn accept(listener: impl AsFd) -> nix::Result<OwnedFd> {
    let flags = SockFlag::SOCK_CLOEXEC | SockFlag::SOCK_NONBLOCK;
    let descriptor = socket::accept4(listener.as_fd().as_raw_fd(), flags)?;
    // SAFETY: the kernel just made it, nobody else owns it.
    Ok(unsafe { OwnedFd::from_raw_fd(descriptor) })
}

/// The next connection of the host's, without blocking and close-on-exec; None when there is none.
pub fn accept_from_host(listener: impl AsFd) -> nix::Result<Option<OwnedFd>> {
    // SAFETY: all zeroes is a valid sockaddr_vm.
    let mut address: libc::sockaddr_vm = unsafe { std::mem::zeroed() };
    let mut length = size_of::<libc::sockaddr_vm>() as libc::socklen_t;
    // SAFETY: address and length describe `address`, which the kernel fills.
    let result = unsafe {
        libc::accept4(
            listener.as_fd().as_raw_fd(),
            std::ptr::from_mut(&mut address).cast(),
            &mut length,
            libc::SOCK_CLOEXEC | libc::SOCK_NONBLOCK,
        )
    };
    match Errno::result(result) {
        Ok(descriptor) => {
            // SAFETY: the kernel just made it, nobody else owns it.
            let socket = unsafe { OwnedFd::from_raw_fd(descriptor) };
            Ok((address.svm_cid == libc::VMADDR_CID_HOST).then_some(socket))
        }
        Err(Errno::EAGAIN | Errno::ECONNABORTED | Errno::EINTR) => Ok(None),
        Err(error) => Err(error),
    }
}
