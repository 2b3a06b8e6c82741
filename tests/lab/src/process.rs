//! Running other programs, waiting for things with a bound, and knowing a process again by more than
//! its number.

use std::fs::{File, OpenOptions};
use std::io::{self, Read, Seek, SeekFrom};
use std::path::Path;
use std::process::{Command, Output, Stdio};
use std::thread::sleep;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use nix::errno::Errno;
use nix::sys::signal::{Signal, kill};
use nix::unistd::{Pid, geteuid};
use serde::{Deserialize, Serialize};

pub fn is_root() -> bool {
    geteuid().is_root()
}

/// A command that runs as root: through sudo when we are not.
pub fn privileged(program: impl AsRef<std::ffi::OsStr>) -> Command {
    if is_root() {
        Command::new(program)
    } else {
        let mut command = Command::new("sudo");
        command.arg("--").arg(program);
        command
    }
}

/// Runs a tool with its output in `log`; a failure shows the log's tail.
pub fn run_logged(command: &mut Command, log: &Path) -> Result<()> {
    let name = command.get_program().to_string_lossy().into_owned();
    let file = OpenOptions::new()
        .create(true)
        .append(true)
        .open(log)
        .with_context(|| format!("open {}", log.display()))?;
    let start = file.metadata()?.len();
    let status = command
        .stdin(Stdio::null())
        .stdout(file.try_clone()?)
        .stderr(file)
        .status()
        .with_context(|| format!("start {name}"))?;
    if !status.success() {
        bail!("{name} ended with {status}; its output:\n{}", tail_from(log, start, 60));
    }
    Ok(())
}

/// Runs a tool and takes its output; a failure carries its standard error.
pub fn run_captured(command: &mut Command) -> Result<Output> {
    let name = command.get_program().to_string_lossy().into_owned();
    let output = command.stdin(Stdio::null()).output().with_context(|| format!("start {name}"))?;
    if !output.status.success() {
        bail!(
            "{name} ended with {}: {}{}",
            output.status,
            String::from_utf8_lossy(&output.stdout).trim_end(),
            String::from_utf8_lossy(&output.stderr).trim_end()
        );
    }
    Ok(output)
}

/// The last lines of a file, indented for showing; empty when there is none.
pub fn tail(path: &Path, lines: usize) -> String {
    tail_from(path, 0, lines)
}

fn tail_from(path: &Path, start: u64, lines: usize) -> String {
    const MOST: u64 = 64 * 1024;
    let read = || -> io::Result<Vec<u8>> {
        let mut file = File::open(path)?;
        let length = file.metadata()?.len();
        file.seek(SeekFrom::Start(start.max(length.saturating_sub(MOST))))?;
        let mut bytes = Vec::new();
        file.take(MOST).read_to_end(&mut bytes)?;
        Ok(bytes)
    };
    let Ok(bytes) = read() else { return String::new() };
    let text = String::from_utf8_lossy(&bytes);
    let all: Vec<&str> = text.lines().collect();
    let shown = &all[all.len().saturating_sub(lines)..];
    shown.iter().map(|line| format!("    | {}\n", line.trim_end_matches('\r'))).collect()
}

/// Asks `ready` until it says yes. The error names what was waited for and how long.
pub fn wait_until(
    what: &str,
    bound: Duration,
    mut ready: impl FnMut() -> Result<bool>,
) -> Result<()> {
    let start = Instant::now();
    let mut pause = Duration::from_millis(10);
    loop {
        if ready().with_context(|| format!("while waiting for {what}"))? {
            return Ok(());
        }
        if start.elapsed() > bound {
            bail!("waited {:.0} s for {what}", bound.as_secs_f64());
        }
        sleep(pause);
        pause = (pause * 2).min(Duration::from_millis(200));
    }
}

/// A process, told apart from a later one with the same number by when it started.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Process {
    pid: i32,
    /// Field 22 of `/proc/PID/stat`, in clock ticks since boot.
    started: u64,
}

impl Process {
    /// None when there is no such process, or it is a zombie.
    pub fn find(pid: i32) -> Option<Self> {
        let stat = std::fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
        // The command's name, in parentheses, may itself hold spaces and parentheses.
        let mut fields = stat.get(stat.rfind(')')? + 1..)?.split_ascii_whitespace();
        if fields.next()? == "Z" {
            return None;
        }
        let started = fields.nth(18)?.parse().ok()?;
        Some(Self { pid, started })
    }

    pub fn pid(&self) -> i32 {
        self.pid
    }

    pub fn is_alive(&self) -> bool {
        Self::find(self.pid) == Some(*self)
    }

    pub fn signal(&self, signal: Signal) -> Result<()> {
        if !self.is_alive() {
            return Ok(());
        }
        match kill(Pid::from_raw(self.pid), signal) {
            Ok(()) | Err(Errno::ESRCH) => Ok(()),
            Err(error) => {
                Err(error).with_context(|| format!("send {signal} to process {}", self.pid))
            }
        }
    }

    pub fn wait_end(&self, what: &str, bound: Duration) -> Result<()> {
        wait_until(&format!("the end of {what} (process {})", self.pid), bound, || {
            Ok(!self.is_alive())
        })
    }
}

/// Writes a file beside its place and renames it there.
pub fn write_whole(path: &Path, bytes: &[u8]) -> Result<()> {
    let part = path.with_extension(format!("part-{}", std::process::id()));
    std::fs::write(&part, bytes).with_context(|| format!("write {}", part.display()))?;
    std::fs::rename(&part, path)
        .with_context(|| format!("rename {} to {}", part.display(), path.display()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_process_is_told_from_its_number() {
        let me = Process::find(std::process::id() as i32).unwrap();
        assert!(me.is_alive());
        let other = Process { started: me.started + 1, ..me };
        assert!(!other.is_alive());
        other.signal(Signal::SIGKILL).unwrap();
    }

    #[test]
    fn a_wait_ends_and_says_for_what() {
        let error = wait_until("the moon", Duration::from_millis(30), || Ok(false)).unwrap_err();
        assert!(error.to_string().contains("the moon"), "{error}");
    }

    #[test]
    fn tail_shows_the_last_lines() {
        let path = std::env::temp_dir().join(format!("lab-tail-{}", std::process::id()));
        std::fs::write(&path, "one\ntwo\r\nthree\n").unwrap();
        assert_eq!(tail(&path, 2), "    | two\n    | three\n");
        std::fs::remove_file(&path).unwrap();
        assert_eq!(tail(&path, 2), "");
    }
}
