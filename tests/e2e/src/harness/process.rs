//! Programs run with a deadline, their output in files: nothing here blocks on a pipe.

use std::{
    fs::File,
    io::{Read as _, Seek as _, SeekFrom, Write as _},
    os::unix::process::ExitStatusExt as _,
    process::{Child, ChildStdin, Command, ExitStatus, Stdio},
    thread,
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result, anyhow, bail};

/// Most of an output that is kept as text.
const MOST_TEXT: u64 = 4 * 1024 * 1024;

pub enum Input {
    Nothing,
    Bytes(Vec<u8>),
    File(File),
    /// Kept open until [`Running::close_input`] or the end.
    Pipe,
}

pub struct Ended {
    pub what: String,
    pub status: ExitStatus,
    pub stdout: Vec<u8>,
    pub stderr: Vec<u8>,
    pub seconds: f64,
}

impl Ended {
    pub fn out(&self) -> String {
        String::from_utf8_lossy(&self.stdout).into_owned()
    }

    pub fn err(&self) -> String {
        String::from_utf8_lossy(&self.stderr).into_owned()
    }

    pub fn code(&self) -> Option<i32> {
        self.status.code()
    }

    /// Fails unless the program ended with 0; otherwise what it wrote.
    pub fn success(self) -> Result<String> {
        if !self.status.success() {
            return Err(self.complaint());
        }
        Ok(self.out())
    }

    pub fn complaint(&self) -> anyhow::Error {
        let ended = match (self.status.code(), self.status.signal()) {
            (Some(code), _) => format!("exit status {code}"),
            (None, Some(signal)) => format!("signal {signal}"),
            (None, None) => "no status".into(),
        };
        anyhow!(
            "{}: {ended} after {:.1} s\n  stdout: {}\n  stderr: {}",
            self.what,
            self.seconds,
            tail(&self.out()),
            tail(&self.err())
        )
    }
}

/// The end of a long text, on one line.
pub fn tail(text: &str) -> String {
    const MOST: usize = 1200;
    let start = text.len().saturating_sub(MOST);
    let start = (start..text.len()).find(|&at| text.is_char_boundary(at)).unwrap_or(text.len());
    let dots = if start > 0 { "…" } else { "" };
    format!("{dots}{:?}", &text[start..])
}

/// A program in the background; killed when it is dropped.
pub struct Running {
    what: String,
    child: Child,
    stdin: Option<ChildStdin>,
    stdout: File,
    stderr: File,
    begun: Instant,
}

pub fn start(what: &str, command: Command, input: Input) -> Result<Running> {
    start_into(what, command, input, tempfile::tempfile().context("no file for the output")?)
}

/// With standard output to a given file, for more than fits into memory.
pub fn start_into(what: &str, mut command: Command, input: Input, stdout: File) -> Result<Running> {
    let stderr = tempfile::tempfile().context("no file for the output")?;
    let stdin = match input {
        Input::Nothing => Stdio::null(),
        Input::Bytes(bytes) => {
            let mut file = tempfile::tempfile().context("no file for the input")?;
            file.write_all(&bytes).and_then(|()| file.rewind()).context("can't write the input")?;
            Stdio::from(file)
        }
        Input::File(file) => Stdio::from(file),
        Input::Pipe => Stdio::piped(),
    };
    command
        .stdin(stdin)
        .stdout(stdout.try_clone().context("can't share the output file")?)
        .stderr(stderr.try_clone().context("can't share the output file")?);
    let mut child = command.spawn().with_context(|| format!("can't start {command:?}"))?;
    let stdin = child.stdin.take();
    Ok(Running { what: what.to_owned(), child, stdin, stdout, stderr, begun: Instant::now() })
}

impl Running {
    pub fn write(&mut self, bytes: &[u8]) -> Result<()> {
        let stdin = self.stdin.as_mut().ok_or_else(|| anyhow!("{}: no input", self.what))?;
        stdin
            .write_all(bytes)
            .and_then(|()| stdin.flush())
            .with_context(|| format!("{}: can't write to its input", self.what))
    }

    pub fn close_input(&mut self) {
        self.stdin = None;
    }

    pub fn out_so_far(&mut self) -> Result<Vec<u8>> {
        read_all(&self.stdout)
    }

    pub fn errors_so_far(&self) -> Result<String> {
        Ok(String::from_utf8_lossy(&read_all(&self.stderr)?).into_owned())
    }

    pub fn has_ended(&mut self) -> Result<bool> {
        Ok(self.child.try_wait().context("can't wait for a child")?.is_some())
    }

    pub fn kill(&mut self) {
        // It may have ended by itself.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }

    /// Its end, or an error (and its death) at the deadline.
    pub fn wait(mut self, deadline: Instant) -> Result<Ended> {
        let mut pause = Duration::from_millis(2);
        let status = loop {
            if let Some(status) = self.child.try_wait().context("can't wait for a child")? {
                break status;
            }
            if Instant::now() >= deadline {
                self.kill();
                bail!(
                    "{} did not end within {:.0} s\n  stdout: {}\n  stderr: {}",
                    self.what,
                    self.begun.elapsed().as_secs_f64(),
                    tail(&String::from_utf8_lossy(&read_all(&self.stdout)?)),
                    tail(&String::from_utf8_lossy(&read_all(&self.stderr)?)),
                );
            }
            thread::sleep(pause);
            pause = (pause * 2).min(Duration::from_millis(50));
        };
        Ok(Ended {
            what: self.what.clone(),
            status,
            stdout: read_all(&self.stdout)?,
            stderr: read_all(&self.stderr)?,
            seconds: self.begun.elapsed().as_secs_f64(),
        })
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        self.kill();
    }
}

/// Reads by a position of its own: the child appends through the same open file.
fn read_all(file: &File) -> Result<Vec<u8>> {
    use std::os::unix::fs::FileExt as _;
    let length = file.metadata().context("can't look at the output")?.len().min(MOST_TEXT);
    let mut bytes = vec![0; usize::try_from(length)?];
    file.read_exact_at(&mut bytes, 0).context("can't read the output")?;
    Ok(bytes)
}

/// Runs a program to its end.
pub fn run(what: &str, command: Command, input: Input, deadline: Instant) -> Result<Ended> {
    start(what, command, input)?.wait(deadline)
}

/// SHA-256 of a whole file, in hexadecimal.
pub fn hash(file: &mut File) -> Result<String> {
    use sha2::{Digest as _, Sha256};
    file.seek(SeekFrom::Start(0)).context("can't rewind a file")?;
    let mut hash = Sha256::new();
    let mut buffer = vec![0; 1 << 20];
    loop {
        match file.read(&mut buffer).context("can't read a file")? {
            0 => break,
            n => hash.update(&buffer[..n]),
        }
    }
    Ok(hash.finalize().iter().map(|byte| format!("{byte:02x}")).collect())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn sh(script: &str) -> Command {
        let mut command = Command::new("sh");
        command.args(["-c", script]);
        command
    }

    fn soon() -> Instant {
        Instant::now() + Duration::from_secs(20)
    }

    #[test]
    fn streams_and_status_are_kept_apart() {
        let ended =
            run("t", sh("cat; echo two >&2; exit 3"), Input::Bytes(b"one".to_vec()), soon())
                .unwrap();
        assert_eq!((ended.out().as_str(), ended.err().as_str()), ("one", "two\n"));
        assert_eq!(ended.code(), Some(3));
    }

    #[test]
    fn a_deadline_kills_and_tells_what_came() {
        let soon = Instant::now() + Duration::from_millis(300);
        let error = run("napping", sh("echo so far; exec sleep 60"), Input::Nothing, soon)
            .err()
            .map(|e| e.to_string())
            .unwrap_or_default();
        assert!(error.contains("napping") && error.contains("so far"), "{error}");
    }

    #[test]
    fn output_is_read_while_the_program_runs() {
        let mut running = start("cat", sh("cat"), Input::Pipe).unwrap();
        running.write(b"abc").unwrap();
        let end = soon();
        while running.out_so_far().unwrap() != b"abc" {
            assert!(Instant::now() < end);
            thread::sleep(Duration::from_millis(5));
        }
        running.close_input();
        assert_eq!(running.wait(soon()).unwrap().code(), Some(0));
    }
}
