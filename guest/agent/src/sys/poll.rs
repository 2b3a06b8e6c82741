//! poll(2) over a set that is made anew for every wait, each descriptor with a token that says what
//! it is.

use std::os::fd::{AsFd, AsRawFd};
use std::time::Duration;

use nix::errno::Errno;

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Readiness {
    pub readable: bool,
    pub writable: bool,
    /// The other side is gone, or the descriptor is broken. Reported whether asked for or not.
    pub hung_up: bool,
}

/// Keeps its allocations from wait to wait.
pub struct Poller<T> {
    set: Vec<libc::pollfd>,
    tokens: Vec<T>,
}

impl<T: Copy> Poller<T> {
    pub fn new() -> Self {
        Poller { set: Vec::with_capacity(32), tokens: Vec::with_capacity(32) }
    }

    pub fn clear(&mut self) {
        self.set.clear();
        self.tokens.clear();
    }

    /// Adds a descriptor, unless nothing is wanted of it: a hang-up alone would wake us for ever.
    pub fn add(&mut self, file: impl AsFd, token: T, readable: bool, writable: bool) {
        let mut events = 0;
        if readable {
            events |= libc::POLLIN;
        }
        if writable {
            events |= libc::POLLOUT;
        }
        if events != 0 {
            self.set.push(libc::pollfd { fd: file.as_fd().as_raw_fd(), events, revents: 0 });
            self.tokens.push(token);
        }
    }

    /// Waits until a descriptor is ready or the time is over. Descriptors must stay open meanwhile,
    /// which they do: the caller is the one thread there is.
    pub fn wait(&mut self, timeout: Option<Duration>) -> nix::Result<()> {
        // Rounded up: waking a little early would spin until the deadline.
        let milliseconds = timeout.map_or(-1, |timeout| {
            i32::try_from(timeout.as_micros().div_ceil(1000)).unwrap_or(i32::MAX)
        });
        // SAFETY: pointer and length are the vector's own.
        let result = unsafe {
            libc::poll(self.set.as_mut_ptr(), self.set.len() as libc::nfds_t, milliseconds)
        };
        match Errno::result(result) {
            Ok(_) => Ok(()),
            Err(Errno::EINTR) => {
                self.set.iter_mut().for_each(|entry| entry.revents = 0);
                Ok(())
            }
            Err(error) => Err(error),
        }
    }

    /// What the last wait found.
    pub fn ready(&self) -> impl Iterator<Item = (T, Readiness)> {
        self.set.iter().zip(&self.tokens).filter(|(entry, _)| entry.revents != 0).map(
            |(entry, token)| {
                let is = |mask: libc::c_short| entry.revents & mask != 0;
                let readiness = Readiness {
                    readable: is(libc::POLLIN),
                    writable: is(libc::POLLOUT),
                    hung_up: is(libc::POLLHUP | libc::POLLERR | libc::POLLNVAL),
                };
                (*token, readiness)
            },
        )
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::Write;
    use std::os::unix::net::UnixStream;

    #[test]
    fn tells_what_is_ready_by_token() {
        let (mut near, far) = UnixStream::pair().unwrap();
        let mut poller = Poller::new();
        poller.add(&far, 'r', true, false);
        poller.add(&near, 'w', false, true);
        poller.add(&near, 'n', false, false);
        poller.wait(Some(Duration::from_millis(1))).unwrap();
        let ready: Vec<_> = poller.ready().collect();
        assert_eq!(ready.len(), 1);
        assert_eq!(ready[0].0, 'w');

        near.write_all(b"x").unwrap();
        drop(near);
        // A program that another test starts at this moment has a copy of it until it is executed.
        let (token, readiness) = loop {
            poller.clear();
            poller.add(&far, 'r', true, false);
            poller.wait(None).unwrap();
            let (token, readiness) = poller.ready().next().unwrap();
            if readiness.hung_up {
                break (token, readiness);
            }
            std::thread::sleep(Duration::from_millis(1));
        };
        assert_eq!(token, 'r');
        assert!(readiness.readable && readiness.hung_up && !readiness.writable);
    }
}
