//! Root's way into the emulated machine: OpenSSH's client with the lab's own key, over one kept
//! connection, because a fresh login costs about a second under emulation.

use std::ffi::OsStr;
use std::fs;
use std::io::{self, IsTerminal};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use anyhow::{Context, Result, bail};

use crate::layout::Layout;
use crate::process::{run_captured, write_whole};

/// Name under which the machine's host key is known.
const HOST_ALIAS: &str = "hermitage-lab";

#[derive(Clone, Debug)]
pub struct Ssh {
    /// The lab's folder; ssh runs in it, so that the control socket's path stays below the limit of
    /// 108 bytes however deep the checkout lies.
    dir: PathBuf,
    key: PathBuf,
    port: u16,
}

impl Ssh {
    pub fn new(layout: &Layout, port: u16) -> Self {
        Self { dir: layout.own(), key: key_file(layout), port }
    }

    /// Writes down which host key the machine has.
    pub fn trust(&self, host_key: &str) -> Result<()> {
        write_whole(&self.dir.join("known_hosts"), format!("{HOST_ALIAS} {host_key}\n").as_bytes())
    }

    /// Opens the kept connection when it isn't there.
    pub fn connect(&self) -> Result<()> {
        let there = self.base().args(["-O", "check", HOST_ALIAS]).stdin(Stdio::null()).output();
        if there.is_ok_and(|output| output.status.success()) {
            return Ok(());
        }
        // Its standard streams are closed: a reader of ours would wait for its end otherwise.
        let log = fs::File::create(self.dir.join("ssh.log")).context("make the ssh log")?;
        let status = self
            .base()
            .args(["-M", "-N", "-f", "-o", "ControlPersist=yes", HOST_ALIAS])
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(log)
            .status()
            .context("start ssh")?;
        if !status.success() {
            let said = fs::read_to_string(self.dir.join("ssh.log")).unwrap_or_default();
            bail!(
                "ssh into the lab machine on port {} ended with {status}: {}",
                self.port,
                said.trim()
            );
        }
        Ok(())
    }

    pub fn disconnect(&self) {
        // There may be none, and the socket file of a dead one is of no use.
        let _ = self.base().args(["-O", "exit", HOST_ALIAS]).stdin(Stdio::null()).output();
        let _ = fs::remove_file(self.dir.join("control"));
    }

    /// A command in the machine; each argument arrives as it is.
    pub fn command<S: AsRef<OsStr>>(&self, arguments: &[S], terminal: bool) -> Command {
        let mut command = self.base();
        command.arg(if terminal { "-tt" } else { "-T" }).arg(HOST_ALIAS).arg("--");
        let line: Vec<String> =
            arguments.iter().map(|a| quote(&a.as_ref().to_string_lossy())).collect();
        command.arg(line.join(" "));
        command
    }

    fn base(&self) -> Command {
        let mut command = Command::new("ssh");
        command.current_dir(&self.dir).args(["-F", "/dev/null", "-l", "root"]);
        command.arg("-p").arg(self.port.to_string()).arg("-i").arg(&self.key);
        for option in [
            "HostName=127.0.0.1",
            "HostKeyAlias=hermitage-lab",
            "UserKnownHostsFile=known_hosts",
            "GlobalKnownHostsFile=/dev/null",
            "StrictHostKeyChecking=yes",
            "IdentitiesOnly=yes",
            "BatchMode=yes",
            "LogLevel=ERROR",
            "ConnectTimeout=30",
            "ServerAliveInterval=20",
            "ServerAliveCountMax=6",
            "ControlPath=control",
        ] {
            command.arg("-o").arg(option);
        }
        command
    }
}

/// The key pair of all labs of this checkout, made at first use.
pub fn key_file(layout: &Layout) -> PathBuf {
    layout.shared().join("key/id_ed25519")
}

pub fn ensure_key(layout: &Layout) -> Result<()> {
    let key = key_file(layout);
    if key.exists() {
        return Ok(());
    }
    let dir = key.parent().context("the key's folder")?;
    fs::create_dir_all(dir).with_context(|| format!("make {}", dir.display()))?;
    let part = dir.join("part");
    for leftover in [part.clone(), part.with_extension("pub")] {
        if let Err(error) = fs::remove_file(&leftover)
            && error.kind() != io::ErrorKind::NotFound
        {
            return Err(error).with_context(|| format!("remove {}", leftover.display()));
        }
    }
    run_captured(
        Command::new("ssh-keygen")
            .args(["-q", "-t", "ed25519", "-N", "", "-C", "lab", "-f"])
            .arg(&part),
    )?;
    // The private half last: it is what says that the pair is there.
    fs::rename(part.with_extension("pub"), key.with_extension("pub"))?;
    fs::rename(&part, &key).context("put the lab's key in place")
}

/// The base64 part of an OpenSSH public key file.
pub fn public_blob(path: &Path) -> Result<String> {
    let line = fs::read_to_string(path).with_context(|| format!("read {}", path.display()))?;
    line.split_ascii_whitespace()
        .nth(1)
        .map(str::to_owned)
        .with_context(|| format!("{}: not an OpenSSH public key", path.display()))
}

/// Whether a command given to us deserves a terminal on the other side.
pub fn wants_terminal() -> bool {
    io::stdin().is_terminal() && io::stdout().is_terminal()
}

/// Quotes one word for a POSIX shell.
pub fn quote(word: &str) -> String {
    let plain = |c: char| c.is_ascii_alphanumeric() || "-_./:=@%+,".contains(c);
    if !word.is_empty() && word.chars().all(plain) {
        return word.to_owned();
    }
    format!("'{}'", word.replace('\'', r"'\''"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn words_survive_a_shell() {
        for word in ["", "plain", "two words", "it's", "$HOME `id` \"x\" \\ \n;&|", "ünï"] {
            let line = format!("printf %s {}", quote(word));
            let output = Command::new("sh").arg("-c").arg(line).output().unwrap();
            assert_eq!(String::from_utf8(output.stdout).unwrap(), word);
        }
    }
}
