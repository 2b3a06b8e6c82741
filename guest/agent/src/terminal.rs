//! A terminal in use: a pty whose master is relayed to a virtio-console port
//! (docs/decisions/0001-terminals-are-ptys.md). Both directions hold one bounded buffer; a side that
//! doesn't take its bytes stops the other side's being read, so the writer sleeps in its own write.

use std::fs::File;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use anyhow::{Context, Result};
use hermitage_guest_proto::Window;
use nix::fcntl::{OFlag, open};
use nix::sys::signal::{Signal, killpg};
use nix::sys::stat::Mode;
use nix::sys::termios::{SetArg, tcgetattr, tcsetattr};
use nix::unistd::Pid;

use crate::buffer::{Buffer, Transfer};
use crate::{modes, sys};

/// What may still come out of a pty after the shell's end while other processes hold it open. What
/// the shell wrote is within the kernel's own buffers, which are smaller.
const AFTERMATH: usize = 64 * 1024;

/// The pty of a new session, before and while its program starts.
pub struct Pty {
    pub master: File,
    pub slave: OwnedFd,
    /// N of /dev/pts/N
    pub number: u32,
}

impl Pty {
    pub fn open(owner: u32, window: Window, client_modes: &[(u8, u32)]) -> Result<Pty> {
        let flags = OFlag::O_RDWR | OFlag::O_NOCTTY | OFlag::O_NONBLOCK | OFlag::O_CLOEXEC;
        let master = open("/dev/ptmx", flags, Mode::empty()).context("opening /dev/ptmx")?;
        sys::unlock_pty(&master).context("unlocking the pty")?;
        let number = sys::pty_number(&master).context("the pty's number")?;
        let slave = sys::pty_peer(&master).context("opening the pty's other side")?;
        // What grantpt(3) did; group tty and mode 0620 come from the mount's options.
        nix::unistd::fchown(&slave, Some(owner.into()), None)
            .with_context(|| format!("chown /dev/pts/{number}"))?;
        sys::set_window(&master, window).context("setting the window size")?;
        let mut termios = tcgetattr(&slave).context("reading the terminal's modes")?;
        modes::apply(&mut termios, client_modes);
        tcsetattr(&slave, SetArg::TCSANOW, &termios).context("setting the terminal's modes")?;
        Ok(Pty { master: master.into(), slave, number })
    }
}

/// The relay.
pub struct Terminal {
    /// Which port it is on.
    pub number: u8,
    /// None: hung up.
    master: Option<File>,
    to_program: Buffer,
    to_port: Buffer,
    /// The program has ended; what is left to read from the pty, at most.
    aftermath: Option<usize>,
    /// The host's side of the port is gone; nothing more is wanted of it.
    port_closed: bool,
}

/// What a descriptor is wanted for.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Interest {
    pub readable: bool,
    pub writable: bool,
}

impl Terminal {
    pub fn new(number: u8, master: File) -> Self {
        Terminal {
            number,
            master: Some(master),
            to_program: Buffer::new(),
            to_port: Buffer::new(),
            aftermath: None,
            port_closed: false,
        }
    }

    pub fn master(&self) -> Option<BorrowedFd<'_>> {
        self.master.as_ref().map(AsFd::as_fd)
    }

    pub fn master_interest(&self) -> Interest {
        Interest { readable: self.to_port.is_empty(), writable: !self.to_program.is_empty() }
    }

    /// The port's input is read only while there is a program to give it to.
    pub fn port_interest(&self) -> Interest {
        let live = !self.port_closed;
        Interest {
            readable: live && self.master.is_some() && self.to_program.is_empty(),
            writable: live && !self.to_port.is_empty(),
        }
    }

    /// Moves what can be moved, in both directions, at most one buffer each: others get their turn.
    pub fn relay(&mut self, port: BorrowedFd) {
        self.outward(port);
        self.inward(port);
    }

    fn outward(&mut self, port: BorrowedFd) {
        if let Some(master) = &self.master {
            match self.to_port.fill(master) {
                Ok(Transfer::Moved(count)) => {
                    if let Some(left) = &mut self.aftermath {
                        *left = left.saturating_sub(count);
                    }
                }
                Ok(Transfer::Blocked) => {}
                // EIO: every process has closed it.
                Ok(Transfer::Ended) | Err(_) => self.hang_up(),
            }
        }
        match self.to_port.drain(Device(port)) {
            Ok(Transfer::Moved(_) | Transfer::Blocked) => {}
            Ok(Transfer::Ended) | Err(_) => self.port_gone(),
        }
    }

    fn inward(&mut self, port: BorrowedFd) {
        if self.port_closed {
            return;
        }
        let Some(master) = &self.master else { return };
        // A port whose host side isn't connected reads as an end of file: for it, nothing to read.
        let _ = self.to_program.fill(Device(port));
        match self.to_program.drain(master) {
            Ok(Transfer::Moved(_) | Transfer::Blocked) => {}
            Ok(Transfer::Ended) | Err(_) => self.to_program.clear(),
        }
    }

    /// Closes the pty: the kernel sends SIGHUP to the session and the foreground group.
    pub fn hang_up(&mut self) {
        self.master = None;
        self.to_program.clear();
    }

    /// The host has closed its side of the port: nobody reads what comes.
    pub fn port_gone(&mut self) {
        self.port_closed = true;
        self.to_port.clear();
        self.hang_up();
    }

    /// The session's first process has ended: what it wrote still has to reach the port.
    pub fn program_ended(&mut self) {
        self.aftermath.get_or_insert(AFTERMATH);
    }

    /// Whether all of the ended program's output is in the port's queue. Background processes may
    /// hold the pty open and go on writing: what is there is taken, within a bound, then it's hung up.
    pub fn is_drained(&mut self, port: BorrowedFd) -> bool {
        loop {
            let moved_before = self.aftermath;
            self.outward(port);
            if !self.to_port.is_empty() {
                return false;
            }
            let nothing_came = self.aftermath == moved_before;
            if self.master.is_none() || nothing_came || self.aftermath == Some(0) {
                self.hang_up();
                return true;
            }
        }
    }

    pub fn resize(&self, window: Window) -> nix::Result<()> {
        match &self.master {
            Some(master) => sys::set_window(master, window),
            None => Ok(()),
        }
    }

    /// Signals the foreground process group, or the leader's when there is none.
    pub fn signal(&self, signal: Signal, leader: Pid) -> nix::Result<()> {
        let group = self.master.as_ref().and_then(sys::foreground_group).unwrap_or(leader);
        killpg(group, signal)
    }
}

/// A port as a reader and writer: `File` would own it.
struct Device<'fd>(BorrowedFd<'fd>);

impl std::io::Read for Device<'_> {
    fn read(&mut self, bytes: &mut [u8]) -> std::io::Result<usize> {
        Ok(nix::unistd::read(self.0, bytes)?)
    }
}

impl std::io::Write for Device<'_> {
    fn write(&mut self, bytes: &[u8]) -> std::io::Result<usize> {
        Ok(nix::unistd::write(self.0, bytes)?)
    }

    fn flush(&mut self) -> std::io::Result<()> {
        Ok(())
    }
}

#[cfg(test)]
#[path = "terminal_tests.rs"]
mod tests;
