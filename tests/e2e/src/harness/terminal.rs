//! A person at a terminal: the `ssh` client on a pseudo-terminal of ours, and waits for what it shows.

use std::{
    io,
    os::fd::{AsFd as _, OwnedFd},
    process::{Child, Command, Stdio},
    sync::atomic::Ordering,
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result, bail};
use nix::{
    errno::Errno,
    fcntl::{FcntlArg, FdFlag, fcntl},
    poll::{PollFd, PollFlags, PollTimeout, poll},
    pty::{Winsize, openpty},
    sys::signal::{Signal, kill},
    unistd::{Pid, read, write},
};

use super::{
    Story,
    process::tail,
    screen::{Seen, Watched},
};

/// Most of what was shown that is kept for looking back.
const MOST_KEPT: usize = 1 << 20;

pub struct Terminal<'a> {
    story: &'a Story,
    what: String,
    child: Child,
    master: OwnedFd,
    /// What was shown and not yet matched.
    shown: Vec<u8>,
    /// What was shown before that, for error messages.
    past: Vec<u8>,
    ended: bool,
    marks: u32,
    watched: Option<Watched>,
}

impl<'a> Terminal<'a> {
    /// Starts the program with its three streams on a new terminal of that size.
    pub fn open(
        story: &'a Story,
        what: &str,
        mut command: Command,
        columns: u16,
        rows: u16,
    ) -> Result<Self> {
        let size = Winsize { ws_row: rows, ws_col: columns, ws_xpixel: 0, ws_ypixel: 0 };
        let pty = openpty(&size, None).context("can't open a pseudo-terminal")?;
        // Or every client started later would hold this terminal open.
        for fd in [&pty.master, &pty.slave] {
            fcntl(fd, FcntlArg::F_SETFD(FdFlag::FD_CLOEXEC)).context("can't keep a descriptor")?;
        }
        let slave = || pty.slave.try_clone().map(Stdio::from).context("can't share a terminal");
        command.stdin(slave()?).stdout(slave()?).stderr(slave()?);
        let child = command.spawn().with_context(|| format!("can't start {command:?}"))?;
        Ok(Self {
            story,
            what: what.to_owned(),
            child,
            master: pty.master,
            shown: Vec::new(),
            past: Vec::new(),
            ended: false,
            // A screen that is redrawn shows the marks of the terminal before.
            marks: 1000 * story.world.names.fetch_add(1, Ordering::Relaxed),
            watched: None,
        })
    }

    /// Draws all that is shown from now on, on a screen of that size.
    pub fn watch(mut self, columns: u16, rows: u16) -> Self {
        self.watched = Some(Watched::new(columns, rows));
        self
    }

    /// What a watched terminal shows once it has come to rest. What was shown is matched by no later
    /// [`expect`](Self::expect).
    pub fn screen(&mut self) -> Result<Seen> {
        let rest = self.story.world.patient(Duration::from_millis(700));
        let mut end = Instant::now() + rest;
        while Instant::now() < end && !self.ended {
            self.read_until(end)?;
            if !self.shown.is_empty() {
                let shown = std::mem::take(&mut self.shown);
                self.remember(&shown);
                end = (Instant::now() + rest).min(self.story.deadline);
            }
        }
        self.watched.as_ref().map(Watched::seen).context("the terminal is not watched")
    }

    pub fn send(&mut self, text: &str) -> Result<()> {
        self.send_bytes(text.as_bytes())
    }

    pub fn send_bytes(&mut self, mut bytes: &[u8]) -> Result<()> {
        while !bytes.is_empty() {
            let n = write(&self.master, bytes)
                .with_context(|| format!("{}: can't type {bytes:?}", self.what))?;
            bytes = &bytes[n..];
        }
        Ok(())
    }

    /// Waits until the text is shown; what came before it is returned.
    pub fn expect(&mut self, text: &str, seconds: u64) -> Result<String> {
        let deadline = self.story.within(seconds);
        let begun = Instant::now();
        loop {
            if let Some(at) = find(&self.shown, text.as_bytes()) {
                let before: Vec<u8> = self.shown.drain(..at + text.len()).collect();
                self.remember(&before);
                return Ok(String::from_utf8_lossy(&before[..at]).into_owned());
            }
            if self.ended {
                bail!("{}: ended before it showed {text:?}; {}", self.what, self.showed());
            }
            if Instant::now() >= deadline {
                let waited = begun.elapsed().as_secs_f64();
                bail!("{}: waited {waited:.1} s for {text:?}; {}", self.what, self.showed());
            }
            self.read_until(deadline)?;
            if self.shown.len() > MOST_KEPT {
                let most: Vec<u8> = self.shown.drain(..MOST_KEPT / 2).collect();
                self.remember(&most);
            }
        }
    }

    /// The shell's first prompt.
    pub fn expect_prompt(&mut self) -> Result<()> {
        self.expect("$ ", 90).map(drop)
    }

    /// Runs a command in the shell and returns what it printed, line ends as in a file. The marks
    /// around it are typed in a form that differs from what they print, so the echo is no match.
    pub fn run(&mut self, command: &str) -> Result<String> {
        let (output, status) = self.run_status(command, 60)?;
        if status != 0 {
            bail!("{}: {command:?} ended with {status}, printed {output:?}", self.what);
        }
        Ok(output)
    }

    pub fn run_status(&mut self, command: &str, seconds: u64) -> Result<(String, i32)> {
        self.marks = self.marks.wrapping_add(1);
        let mark = self.marks;
        self.send(&format!("echo '<be''gin {mark}>'; {command}; echo \"<e\"\"nd {mark} $?>\"\n"))?;
        self.expect(&format!("<begin {mark}>\r\n"), seconds)?;
        let output = self.expect(&format!("<end {mark} "), seconds)?;
        let status = self.expect(">", 10)?;
        let status =
            status.trim().parse().with_context(|| format!("odd exit status {status:?}"))?;
        Ok((output.replace("\r\n", "\n"), status))
    }

    /// Changes the window's size, as a terminal emulator does.
    pub fn resize(&mut self, columns: u16, rows: u16) -> Result<()> {
        let size =
            rustix::termios::Winsize { ws_row: rows, ws_col: columns, ws_xpixel: 0, ws_ypixel: 0 };
        rustix::termios::tcsetwinsize(&self.master, size).context("can't set the window's size")?;
        // The client does not have this terminal as its controlling one, so the kernel tells it nothing.
        kill(self.pid()?, Signal::SIGWINCH).context("can't signal the client")
    }

    /// Ends the client the hard way: the connection is gone from one moment to the next.
    pub fn cut(mut self) -> Result<()> {
        self.child.kill().and_then(|()| self.child.wait()).context("can't kill the client")?;
        Ok(())
    }

    /// Waits for the end of the client: its exit status, and what it showed up to it.
    pub fn wait_end(&mut self, seconds: u64) -> Result<(i32, String)> {
        let deadline = self.story.within(seconds);
        while !self.ended {
            if Instant::now() >= deadline {
                bail!("{}: did not end within {seconds} s; {}", self.what, self.showed());
            }
            self.read_until(deadline)?;
        }
        let status = self.child.wait().context("can't wait for the client")?;
        let shown = std::mem::take(&mut self.shown);
        Ok((status.code().unwrap_or(-1), String::from_utf8_lossy(&shown).into_owned()))
    }

    /// What is shown for a while, and was not looked at before.
    pub fn look(&mut self, time: Duration) -> Result<String> {
        let end = (Instant::now() + time).min(self.story.deadline);
        while Instant::now() < end && !self.ended && self.shown.len() < MOST_KEPT {
            self.read_until(end)?;
        }
        Ok(String::from_utf8_lossy(&std::mem::take(&mut self.shown)).into_owned())
    }

    /// Reads and forgets what is shown for a while; how much it was.
    pub fn discard(&mut self, time: Duration) -> Result<usize> {
        let end = (Instant::now() + time).min(self.story.deadline);
        let mut count = 0;
        while Instant::now() < end && !self.ended {
            self.read_until(end)?;
            count += self.shown.len();
            self.shown.clear();
        }
        Ok(count)
    }

    pub fn pid(&self) -> Result<Pid> {
        Ok(Pid::from_raw(self.child.id().try_into().context("odd process id")?))
    }

    /// One read, when there is something, or its end.
    fn read_until(&mut self, deadline: Instant) -> Result<()> {
        let left = deadline.saturating_duration_since(Instant::now()).as_millis();
        let time = PollTimeout::from(u16::try_from(left.clamp(1, 200)).unwrap_or(200));
        let mut fds = [PollFd::new(self.master.as_fd(), PollFlags::POLLIN)];
        match poll(&mut fds, time) {
            Ok(0) => {
                // While this side has no slave open the end shows as a hang-up; this is for a client
                // that left a child holding it.
                self.ended = matches!(self.child.try_wait(), Ok(Some(_)));
                return Ok(());
            }
            Ok(_) => {}
            Err(Errno::EINTR) => return Ok(()),
            Err(error) => return Err(io::Error::from(error)).context("can't poll a terminal"),
        }
        let mut buffer = [0; 65536];
        match read(&self.master, &mut buffer) {
            Ok(0) | Err(Errno::EIO) => self.ended = true,
            Ok(n) => {
                self.shown.extend_from_slice(&buffer[..n]);
                if let Some(watched) = &mut self.watched {
                    watched.feed(&buffer[..n]);
                }
            }
            Err(Errno::EINTR | Errno::EAGAIN) => {}
            Err(error) => return Err(io::Error::from(error)).context("can't read a terminal"),
        }
        Ok(())
    }

    fn remember(&mut self, bytes: &[u8]) {
        self.past.extend_from_slice(bytes);
        let excess = self.past.len().saturating_sub(2000);
        self.past.drain(..excess);
    }

    fn showed(&self) -> String {
        let mut all = self.past.clone();
        all.extend_from_slice(&self.shown);
        format!("it showed {}", tail(&String::from_utf8_lossy(&all)))
    }
}

impl Drop for Terminal<'_> {
    fn drop(&mut self) {
        // It may have ended by itself.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

fn find(text: &[u8], part: &[u8]) -> Option<usize> {
    text.windows(part.len()).position(|window| window == part)
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use clap::Parser as _;

    use super::*;
    use crate::{Options, harness::World};

    fn story() -> Story {
        let world = Arc::new(World::new(&Options::parse_from(["e2e"])).unwrap());
        Story::new(world, Instant::now() + Duration::from_secs(60))
    }

    fn bash(story: &Story) -> Terminal<'_> {
        let mut command = Command::new("bash");
        command.args(["--norc", "-i"]).env("PS1", "$ ").env("TERM", "dumb");
        let mut shell = Terminal::open(story, "bash", command, 80, 24).unwrap();
        shell.expect_prompt().unwrap();
        shell
    }

    #[test]
    fn a_command_gives_its_output_and_nothing_else() {
        let story = story();
        let mut shell = bash(&story);
        assert_eq!(shell.run("echo one; echo two").unwrap(), "one\ntwo\n");
        assert_eq!(shell.run("true").unwrap(), "");
        assert_eq!(shell.run("printf 'no end'").unwrap(), "no end");
        assert_eq!(
            shell.run_status("cat /nowhere/at/all 2>/dev/null", 10).unwrap(),
            ("".into(), 1)
        );
        let error = shell.run("false").unwrap_err().to_string();
        assert!(error.contains("ended with 1"), "{error}");
    }

    #[test]
    fn the_end_and_its_status_are_seen() {
        let story = story();
        let mut shell = bash(&story);
        shell.send("exit 5\n").unwrap();
        assert_eq!(shell.wait_end(20).unwrap().0, 5);
        let error = shell.expect("anything", 5).unwrap_err().to_string();
        assert!(error.contains("ended before"), "{error}");
    }

    #[test]
    fn what_does_not_come_is_told_with_what_came() {
        let story = story();
        let mut shell = bash(&story);
        shell.send("echo some'thing'\n").unwrap();
        let error = shell.expect("else", 1).unwrap_err().to_string();
        assert!(error.contains("something") && error.contains("\"else\""), "{error}");
    }
}
