//! `hermitage console`: the serial console of a machine, as if one sat at it.

use super::admin::{self, Answer};
use super::context::Context;
use anyhow::{Context as _, bail};
use hermitage::admin::protocol::{Reply, Request};
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::termios::{SetArg, Termios, cfmakeraw, tcgetattr, tcsetattr};
use std::fs::File;
use std::io::{self, IsTerminal, Read, Stdin, Write};
use std::net::Shutdown;
use std::os::fd::AsFd;
use std::os::unix::net::UnixStream;

pub fn run(context: &Context, account: &str) -> anyhow::Result<()> {
    let request = Request::Console { account: account.to_owned() };
    let Some(Answer { reply, stream }) = admin::ask(context, &request)? else {
        bail!("the service is not running, so no machine is (hermitage serve starts it)");
    };
    match reply {
        Reply::Done => {}
        Reply::Error { message } => bail!("{message}"),
        _ => bail!("the service gave no console"),
    }
    let early = stream.buffer().to_vec();
    let stream = stream.into_inner();
    stream.set_read_timeout(None)?;
    stream.set_write_timeout(None)?;

    let stdin = io::stdin();
    let raw = if stdin.is_terminal() {
        eprintln!("Console of {account}; leave with Ctrl-] or ~. at the start of a line.");
        Some(Raw::begin(&stdin)?)
    } else {
        None
    };
    io::stdout().write_all(&early)?;
    let ended = relay(&stream, &stdin, raw.is_some());
    drop(raw);
    eprintln!();
    let left = ended.context("relaying the console")?;
    context.out.note(if left { "Left the console." } else { "The machine has ended." });
    Ok(())
}

/// Both ways, until the person leaves (true) or the machine's side ends (false).
fn relay(stream: &UnixStream, stdin: &Stdin, terminal: bool) -> io::Result<bool> {
    let (mut from, mut to) = (stream, stream);
    // Not through the buffer of `Stdin`, which poll knows nothing of.
    let mut input = File::from(stdin.as_fd().try_clone_to_owned()?);
    let mut escape = Escape::default();
    let mut typing = true;
    let mut buffer = [0; 16 * 1024];
    loop {
        let mut ready = [
            PollFd::new(stream.as_fd(), PollFlags::POLLIN),
            PollFd::new(stdin.as_fd(), PollFlags::POLLIN),
        ];
        let watched = if typing { &mut ready[..] } else { &mut ready[..1] };
        match poll(watched, PollTimeout::NONE) {
            Err(nix::errno::Errno::EINTR) => continue,
            polled => polled?,
        };
        let [output, typed] = ready.map(|fd| fd.any().unwrap_or(false));
        if output {
            let n = from.read(&mut buffer)?;
            if n == 0 {
                return Ok(false);
            }
            let mut out = io::stdout().lock();
            out.write_all(&buffer[..n])?;
            out.flush()?;
        }
        if typing && typed {
            let n = input.read(&mut buffer)?;
            if n == 0 {
                typing = false;
                stream.shutdown(Shutdown::Write)?;
                continue;
            }
            if !terminal {
                to.write_all(&buffer[..n])?;
                continue;
            }
            let (bytes, leave) = escape.take(&buffer[..n]);
            to.write_all(&bytes)?;
            if leave {
                return Ok(true);
            }
        }
    }
}

/// Finds the two ways to leave in what is typed.
#[derive(Debug)]
struct Escape {
    line_start: bool,
    /// A `~` that began a line and is held back until it is known what follows it.
    tilde: bool,
}

impl Default for Escape {
    fn default() -> Self {
        Self { line_start: true, tilde: false }
    }
}

const CTRL_BRACKET: u8 = 0x1d;

impl Escape {
    /// What to pass on, and whether the person leaves.
    fn take(&mut self, typed: &[u8]) -> (Vec<u8>, bool) {
        let mut bytes = Vec::with_capacity(typed.len() + 1);
        for &byte in typed {
            if byte == CTRL_BRACKET || (self.tilde && byte == b'.') {
                return (bytes, true);
            }
            if std::mem::take(&mut self.tilde) {
                bytes.push(b'~');
                // `~~` is how to type one, as in ssh(1).
                if byte == b'~' {
                    self.line_start = false;
                    continue;
                }
            } else if self.line_start && byte == b'~' {
                self.tilde = true;
                continue;
            }
            bytes.push(byte);
            self.line_start = matches!(byte, b'\r' | b'\n');
        }
        (bytes, false)
    }
}

/// The terminal's modes are put back when this is dropped.
struct Raw<'a> {
    terminal: &'a Stdin,
    before: Termios,
}

impl<'a> Raw<'a> {
    fn begin(terminal: &'a Stdin) -> anyhow::Result<Self> {
        let before = tcgetattr(terminal).context("the terminal's modes")?;
        let mut raw = before.clone();
        cfmakeraw(&mut raw);
        tcsetattr(terminal, SetArg::TCSADRAIN, &raw).context("making the terminal raw")?;
        Ok(Self { terminal, before })
    }
}

impl Drop for Raw<'_> {
    fn drop(&mut self) {
        let _ = tcsetattr(self.terminal, SetArg::TCSADRAIN, &self.before);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn typed(parts: &[&str]) -> (String, bool) {
        let mut escape = Escape::default();
        let mut passed = Vec::new();
        for part in parts {
            let (bytes, leave) = escape.take(part.as_bytes());
            passed.extend(bytes);
            if leave {
                return (String::from_utf8(passed).unwrap(), true);
            }
        }
        (String::from_utf8(passed).unwrap(), false)
    }

    #[test]
    fn there_are_two_ways_to_leave() {
        assert_eq!(typed(&["~."]), (String::new(), true));
        assert_eq!(typed(&["ls\r", "~", "."]), ("ls\r".into(), true));
        assert_eq!(typed(&["ls\x1dmore"]), ("ls".into(), true));
    }

    #[test]
    fn everything_else_passes() {
        for text in ["ls ~.\r", "a~.", "~/bin\r", "\r~x"] {
            assert_eq!(typed(&[text]), (text.into(), false));
        }
        assert_eq!(typed(&["~~."]), ("~.".into(), false));
        assert_eq!(typed(&["~", "~", "."]), ("~.".into(), false));
    }
}
