//! One login by the real ssh client on a terminal.

use std::{
    fs::{self, File},
    io::{self, Read as _, Write as _},
    os::fd::OwnedFd,
    path::{Path, PathBuf},
    process::{Child, Command, Stdio},
    thread,
    time::Duration,
};

use anyhow::{Context as _, bail};
use nix::pty::{Winsize, openpty};

use super::dial;
use crate::{
    clock,
    prompt::Prompt,
    wait::{Deadline, until_readable},
};

/// A login under emulation takes seconds; the first one of an account also grows its disk.
const PROMPT_LIMIT: Duration = Duration::from_secs(90);
/// A big copy under emulation takes minutes.
const TRANSFER_LIMIT: Duration = Duration::from_secs(1800);
const EXIT_LIMIT: Duration = Duration::from_secs(30);

/// The ssh client with a key of its own, the same for every server.
pub struct Client {
    dir: PathBuf,
    program: PathBuf,
}

impl Client {
    /// Makes a key in `dir`, which lives longer than this. `program` is `hermitage-bench`, which ssh
    /// runs to connect (see [`dial`]).
    pub fn new(dir: &Path, program: &Path) -> anyhow::Result<Self> {
        let key = dir.join("id_ed25519");
        keygen(&key)?;
        Ok(Self { dir: dir.to_owned(), program: program.to_owned() })
    }

    pub fn public_key(&self) -> PathBuf {
        self.dir.join("id_ed25519.pub")
    }

    /// Logs in, waits for the prompt, says `exit`. Nanoseconds from TCP connect to prompt.
    pub fn login(&self, user: &str, port: u16) -> anyhow::Result<u64> {
        self.login_once(user, port).with_context(|| format!("log in as {user} at port {port}"))
    }

    fn login_once(&self, user: &str, port: u16) -> anyhow::Result<u64> {
        let note = self.dir.join("connected-at");
        remove(&note)?;
        let mut session = Session::start(self.command(user, port, &note)?)?;
        let prompt_at = session.prompt()?;
        let connected_at = dial::dialled(&note)?;
        session.exit()?;
        Ok(prompt_at.saturating_sub(connected_at))
    }

    fn command(&self, user: &str, port: u16, note: &Path) -> anyhow::Result<Command> {
        let dial = format!(
            "ProxyCommand={} --dial 127.0.0.1:{port} {}",
            quoted(&self.program)?,
            quoted(note)?
        );
        let mut command = self.tool("ssh");
        command.arg("-tt").args(["-o", "ProxyUseFdpass=yes", "-o", dial.as_str()]);
        command.arg(format!("{user}@127.0.0.1"));
        Ok(command)
    }

    /// `ssh`, `scp` or `sftp` with the key, and nothing of this user's configuration.
    pub fn tool(&self, program: &str) -> Command {
        let mut command = Command::new(program);
        command.arg("-F").arg("/dev/null").arg("-i").arg(self.dir.join("id_ed25519"));
        for option in [
            "IdentitiesOnly=yes",
            "PreferredAuthentications=publickey",
            "BatchMode=yes",
            "StrictHostKeyChecking=no",
            "UserKnownHostsFile=/dev/null",
            "GlobalKnownHostsFile=/dev/null",
            "LogLevel=ERROR",
            "ControlMaster=no",
            "ControlPath=none",
        ] {
            command.arg("-o").arg(option);
        }
        command.env_remove("SSH_AUTH_SOCK").env("TERM", "xterm").env("SHELL", "/bin/sh");
        command
    }

    /// Runs commands at once, their output thrown away. Nanoseconds until all of them have ended well.
    pub fn run_all(&self, commands: Vec<Command>) -> anyhow::Result<u64> {
        let begun = clock::now();
        let mut running = Vec::with_capacity(commands.len());
        for mut command in commands {
            command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::piped());
            let what = format!("{command:?}");
            let child = command.spawn().with_context(|| format!("start {what}"))?;
            running.push((Running(child), what));
        }
        for (child, what) in &mut running {
            child.succeed().with_context(|| format!("run {what}"))?;
        }
        Ok(clock::now() - begun)
    }
}

/// A client that does not outlive the interest in it.
struct Running(Child);

impl Running {
    fn succeed(&mut self) -> anyhow::Result<()> {
        let mut said = String::new();
        let stderr = self.0.stderr.take().context("its standard error is gone")?;
        let deadline = Deadline::after(TRANSFER_LIMIT);
        // Its end closes it.
        until_readable(&stderr, deadline, "end of it")?;
        stderr.take(4096).read_to_string(&mut said).context("read what it says")?;
        let status = self.0.wait().context("wait for it")?;
        if !status.success() {
            bail!("{status}: {}", said.trim());
        }
        Ok(())
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// A running client and the terminal it sits on.
struct Session {
    child: Child,
    terminal: File,
    prompt: Prompt,
}

impl Session {
    fn start(mut command: Command) -> anyhow::Result<Self> {
        let size = Winsize { ws_row: 24, ws_col: 80, ws_xpixel: 0, ws_ypixel: 0 };
        let pty = openpty(&size, None).context("open a pseudo-terminal")?;
        let end = |fd: &OwnedFd| fd.try_clone().map(Stdio::from).context("duplicate a terminal");
        command.stdin(end(&pty.slave)?).stdout(end(&pty.slave)?).stderr(end(&pty.slave)?);
        let child = command.spawn().context("start ssh")?;
        Ok(Self { child, terminal: File::from(pty.master), prompt: Prompt::default() })
    }

    /// When the prompt was there.
    fn prompt(&mut self) -> anyhow::Result<u64> {
        let deadline = Deadline::after(PROMPT_LIMIT);
        loop {
            let Some(bytes) = self.read(deadline, "prompt")? else {
                let status = self.child.wait().context("wait for ssh")?;
                bail!("ssh ended ({status}) before a prompt; it said: {:?}", self.prompt.seen());
            };
            let at = clock::now();
            if self.prompt.feed(&bytes) {
                return Ok(at);
            }
        }
    }

    fn exit(mut self) -> anyhow::Result<()> {
        self.terminal.write_all(b"exit\r").context("write to the terminal")?;
        let deadline = Deadline::after(EXIT_LIMIT);
        while let Some(bytes) = self.read(deadline, "end of the session")? {
            self.prompt.feed(&bytes);
        }
        while self.child.try_wait().context("wait for ssh")?.is_none() {
            deadline.left("exit of ssh")?;
            thread::sleep(Duration::from_millis(5));
        }
        Ok(())
    }

    /// None: the terminal has no other end any more.
    fn read(&mut self, deadline: Deadline, what: &str) -> anyhow::Result<Option<Vec<u8>>> {
        until_readable(&self.terminal, deadline, what)
            .with_context(|| format!("the terminal shows {:?}", self.prompt.seen()))?;
        let mut bytes = vec![0; 16 * 1024];
        match self.terminal.read(&mut bytes) {
            Ok(0) => Ok(None),
            Ok(n) => {
                bytes.truncate(n);
                Ok(Some(bytes))
            }
            // Linux's way to say that the last slave is closed.
            Err(e) if e.raw_os_error() == Some(nix::libc::EIO) => Ok(None),
            Err(e) => Err(e).context("read the terminal"),
        }
    }
}

impl Drop for Session {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// A new ed25519 key without a passphrase at `path`.
pub fn keygen(path: &Path) -> anyhow::Result<()> {
    let status = Command::new("ssh-keygen")
        .args(["-q", "-t", "ed25519", "-N", "", "-C", "hermitage-bench", "-f"])
        .arg(path)
        .stdin(Stdio::null())
        .status()
        .context("start ssh-keygen (is openssh-client installed?)")?;
    if !status.success() {
        bail!("ssh-keygen for {} failed: {status}", path.display());
    }
    Ok(())
}

fn remove(path: &Path) -> anyhow::Result<()> {
    match fs::remove_file(path) {
        Err(e) if e.kind() != io::ErrorKind::NotFound => {
            Err(e).with_context(|| format!("remove {}", path.display()))
        }
        _ => Ok(()),
    }
}

/// For the shell that runs a ProxyCommand, in which `%` is ssh's own.
fn quoted(path: &Path) -> anyhow::Result<String> {
    let text = path.to_str().with_context(|| format!("{} is not UTF-8", path.display()))?;
    Ok(format!("'{}'", text.replace('\'', r"'\''").replace('%', "%%")))
}
