//! Child processes without fork(2): a fork would write-protect this process's pages and have both
//! sides copy what they touch, which in a machine is memory that its base no longer shares. The child
//! borrows the address space instead, on a stack of its own, until it calls exec or ends; this
//! process sleeps meanwhile (CLONE_VM | CLONE_VFORK, as posix_spawn(3) has it).

use std::os::fd::{AsRawFd, BorrowedFd};

use nix::errno::Errno;
use nix::sys::signal::{SigHandler, Signal, signal};
use nix::unistd::Pid;

/// Enough for a few system calls and a 4 KiB buffer, many times over.
const STACK: usize = 64 * 1024;

/// Runs `child` in a new process; what it returns, if it does, is the exit code. It must not panic, and
/// what it allocates and doesn't free before its exec is lost to this process.
pub fn start<F: FnOnce() -> i32>(child: F) -> nix::Result<Pid> {
    extern "C" fn run<F: FnOnce() -> i32>(child: *mut libc::c_void) -> libc::c_int {
        // SAFETY: `start` passes a pointer to an Option<F> that outlives the child's use of it.
        let child = unsafe { &mut *child.cast::<Option<F>>() };
        match child.take() {
            Some(child) => child(),
            None => 127,
        }
    }

    let mut stack: Vec<u128> = Vec::with_capacity(STACK / size_of::<u128>());
    let mut child = Some(child);
    // SAFETY: one past the end of the vector's allocation, 16-byte aligned as the ABI asks.
    let top = unsafe { stack.as_mut_ptr().add(stack.capacity()) };
    let flags = libc::CLONE_VM | libc::CLONE_VFORK | libc::SIGCHLD;
    // SAFETY: this process has one thread, which sleeps until the child has left the address space
    // by exec or exit, so nothing is used by two at once and `stack` and `child` live long enough.
    // Descriptors, working directory and signal actions are the child's own copies.
    let pid =
        unsafe { libc::clone(run::<F>, top.cast(), flags, std::ptr::from_mut(&mut child).cast()) };
    Errno::result(pid).map(Pid::from_raw)
}

/// In a child: makes these its standard input, output and error. dup2(2) leaves the copies open
/// across exec; the originals are close-on-exec.
pub fn set_standard_streams(streams: [BorrowedFd; 3]) -> nix::Result<()> {
    for (number, stream) in streams.into_iter().enumerate() {
        // SAFETY: both are descriptors' numbers; 0 to 2 belong to the child alone.
        Errno::result(unsafe { libc::dup2(stream.as_raw_fd(), number as libc::c_int) })?;
    }
    Ok(())
}

/// In a child: the default action for SIGPIPE, which Rust's runtime ignores; exec would keep that.
pub fn default_sigpipe() -> nix::Result<()> {
    // SAFETY: the default action runs no code of ours.
    unsafe { signal(Signal::SIGPIPE, SigHandler::SigDfl) }.map(drop)
}

#[cfg(test)]
mod tests {
    use super::*;
    use nix::sys::wait::{WaitStatus, waitpid};
    use nix::unistd::execv;

    #[test]
    fn a_child_execs_or_ends_and_this_process_goes_on() {
        let kept = vec![1, 2, 3];
        let arguments = [c"sh".to_owned(), c"-c".to_owned(), c"exit 7".to_owned()];
        let pid = start(|| {
            let _ = execv(c"/bin/sh", &arguments);
            127
        });
        let pid = pid.unwrap();
        assert_eq!(waitpid(pid, None).unwrap(), WaitStatus::Exited(pid, 7));
        let pid = start(|| 9).unwrap();
        assert_eq!(waitpid(pid, None).unwrap(), WaitStatus::Exited(pid, 9));
        assert_eq!(kept, [1, 2, 3]);
    }
}
