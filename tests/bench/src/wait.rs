//! Bounded waits.

use std::{
    os::fd::{AsFd, BorrowedFd},
    time::{Duration, Instant},
};

use anyhow::bail;
use rustix::{
    event::{PollFd, PollFlags, Timespec, poll},
    io::Errno,
};

/// A moment and what is expected until then.
#[derive(Clone, Copy, Debug)]
pub struct Deadline {
    at: Instant,
    limit: Duration,
}

impl Deadline {
    pub fn after(limit: Duration) -> Self {
        Self { at: Instant::now() + limit, limit }
    }

    /// Time left; an error that says what did not come once there is none.
    pub fn left(&self, what: &str) -> anyhow::Result<Duration> {
        match self.at.checked_duration_since(Instant::now()) {
            Some(left) if !left.is_zero() => Ok(left),
            _ => bail!("no {what} within {} s", self.limit.as_secs()),
        }
    }
}

/// Waits until one of `fds` is readable or at its end, and says which are.
pub fn readable<const N: usize>(
    fds: [BorrowedFd<'_>; N],
    deadline: Deadline,
    what: &str,
) -> anyhow::Result<[bool; N]> {
    loop {
        let left = deadline.left(what)?;
        let timeout = Timespec {
            tv_sec: i64::try_from(left.as_secs()).unwrap_or(i64::MAX),
            tv_nsec: left.subsec_nanos().into(),
        };
        let mut polled = fds.map(|fd| PollFd::from_borrowed_fd(fd, PollFlags::IN));
        match poll(&mut polled, Some(&timeout)) {
            Ok(0) | Err(Errno::INTR) => continue,
            Ok(_) => return Ok(polled.map(|fd| !fd.revents().is_empty())),
            Err(e) => return Err(e.into()),
        }
    }
}

/// The same for one.
pub fn until_readable(fd: impl AsFd, deadline: Deadline, what: &str) -> anyhow::Result<()> {
    readable([fd.as_fd()], deadline, what).map(drop)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_did_not_come_is_named() {
        let (reader, _writer) = std::io::pipe().unwrap();
        let deadline = Deadline::after(Duration::from_millis(20));
        let error = until_readable(&reader, deadline, "prompt").unwrap_err().to_string();
        assert!(error.contains("no prompt within"), "{error}");
    }

    #[test]
    fn an_end_counts_as_readable() {
        let (quiet, _writer) = std::io::pipe().unwrap();
        let (ended, writer) = std::io::pipe().unwrap();
        drop(writer);
        let deadline = Deadline::after(Duration::from_secs(5));
        let ready = readable([quiet.as_fd(), ended.as_fd()], deadline, "end").unwrap();
        assert_eq!(ready, [false, true]);
    }
}
