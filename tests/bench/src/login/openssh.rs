//! The peer: OpenSSH's sshd giving a bare shell.
//!
//! A server of our own with a configuration of its own, so that the system's stays as it is and the
//! comparison is the same on every host: no PAM, no passwords, everything else by default.

use std::{
    fs,
    io::Read as _,
    net::{TcpListener, TcpStream},
    path::{Path, PathBuf},
    process::{Child, Command, Stdio},
    thread,
    time::Duration,
};

use anyhow::{Context as _, bail};

use super::client::keygen;
use crate::wait::Deadline;

const START_LIMIT: Duration = Duration::from_secs(60);

pub struct OpenSsh {
    child: Child,
    pub port: u16,
}

impl OpenSsh {
    /// Serves root's shell on a loopback port to whoever has one of `keys`.
    pub fn start(dir: &Path, keys: &Path) -> anyhow::Result<Self> {
        let program =
            program().context("no sshd here: install openssh-server to compare with it")?;
        let host_key = dir.join("ssh_host_ed25519_key");
        keygen(&host_key)?;
        // Where it puts its unprivileged part; the system's own service makes it as well.
        fs::create_dir_all("/run/sshd").context("create /run/sshd")?;
        let port = free_port()?;
        let config = dir.join("sshd_config");
        let text = format!(
            "ListenAddress 127.0.0.1:{port}\n\
             HostKey {}\n\
             AuthorizedKeysFile {}\n\
             StrictModes no\n\
             PermitRootLogin prohibit-password\n\
             PasswordAuthentication no\n\
             KbdInteractiveAuthentication no\n\
             UsePAM no\n\
             PidFile none\n\
             Subsystem sftp internal-sftp\n\
             LogLevel ERROR\n",
            host_key.display(),
            keys.display(),
        );
        fs::write(&config, text).with_context(|| format!("write {}", config.display()))?;
        let log = dir.join("sshd.log");
        let child = Command::new(&program)
            .arg("-D")
            .arg("-E")
            .arg(&log)
            .arg("-f")
            .arg(&config)
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .spawn()
            .with_context(|| format!("start {}", program.display()))?;
        let mut server = Self { child, port };
        server.wait_for_banner().with_context(|| {
            let said = fs::read_to_string(&log).unwrap_or_default();
            format!("{} said {said:?}", program.display())
        })?;
        Ok(server)
    }

    fn wait_for_banner(&mut self) -> anyhow::Result<()> {
        let deadline = Deadline::after(START_LIMIT);
        loop {
            if let Some(status) = self.child.try_wait().context("wait for sshd")? {
                bail!("sshd ended at once: {status}");
            }
            let left = deadline.left("greeting from sshd")?;
            if let Ok(mut socket) = TcpStream::connect(("127.0.0.1", self.port)) {
                socket.set_read_timeout(Some(left))?;
                let mut greeting = [0; 4];
                if socket.read_exact(&mut greeting).is_ok() && greeting == *b"SSH-" {
                    return Ok(());
                }
            }
            thread::sleep(Duration::from_millis(20));
        }
    }
}

impl Drop for OpenSsh {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// sshd insists on being started by its absolute path.
fn program() -> Option<PathBuf> {
    ["/usr/sbin/sshd", "/usr/local/sbin/sshd"].into_iter().map(PathBuf::from).find(|p| p.exists())
}

/// Free a moment ago. Another process may take it in between; then the start fails and says so.
fn free_port() -> anyhow::Result<u16> {
    let listener = TcpListener::bind(("127.0.0.1", 0)).context("find a free port")?;
    Ok(listener.local_addr()?.port())
}
