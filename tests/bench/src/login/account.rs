//! An account for the run, made and stopped the way an operator does.

use std::{
    io::{BufRead as _, BufReader, Write as _},
    os::unix::net::UnixStream,
    path::{Path, PathBuf},
    process::{Command, Stdio},
    time::Duration,
};

use anyhow::{Context as _, bail};

/// The machine has the service's `stop_timeout` (20 s by default) and some.
const STOP_LIMIT: Duration = Duration::from_secs(60);

pub struct Account {
    pub name: String,
    host: Host,
}

/// The service it is on.
struct Host {
    hermitage: PathBuf,
    state_dir: PathBuf,
    run_dir: PathBuf,
}

impl Account {
    pub fn add(
        hermitage: &Path,
        state_dir: &Path,
        run_dir: &Path,
        key: &Path,
    ) -> anyhow::Result<Self> {
        let host = Host {
            hermitage: hermitage.to_owned(),
            state_dir: state_dir.to_owned(),
            run_dir: run_dir.to_owned(),
        };
        // Unlikely to be anybody's.
        let name = format!("bench-{:x}", std::process::id());
        host.command(&["account", "add", &name], &[Path::new("--key"), key])?;
        Ok(Self { name, host })
    }

    /// Stops the account's machine; returns when it is gone.
    pub fn stop_machine(&self) -> anyhow::Result<()> {
        let path = self.host.run_dir.join("admin.sock");
        let socket = UnixStream::connect(&path).with_context(|| {
            format!("connect to {} (is `hermitage serve` running?)", path.display())
        })?;
        socket.set_read_timeout(Some(STOP_LIMIT))?;
        let request = serde_json::json!({"op": "stop-account", "account": self.name});
        writeln!(&socket, "{request}").context("ask the service to stop a machine")?;
        let mut line = String::new();
        BufReader::new(&socket)
            .read_line(&mut line)
            .with_context(|| format!("no answer to {request} within {} s", STOP_LIMIT.as_secs()))?;
        let reply: serde_json::Value =
            serde_json::from_str(&line).with_context(|| format!("the service said {line:?}"))?;
        if reply["reply"] != "done" {
            bail!("the service did not stop the machine of {}: {line}", self.name);
        }
        Ok(())
    }
}

impl Host {
    fn command(&self, words: &[&str], paths: &[&Path]) -> anyhow::Result<()> {
        let output = Command::new(&self.hermitage)
            .arg("--state-dir")
            .arg(&self.state_dir)
            .arg("--run-dir")
            .arg(&self.run_dir)
            .args(words)
            .args(paths)
            .stdin(Stdio::null())
            .output()
            .with_context(|| format!("start {}", self.hermitage.display()))?;
        if !output.status.success() {
            bail!(
                "hermitage {}: {}: {}",
                words.join(" "),
                output.status,
                String::from_utf8_lossy(&output.stderr).trim()
            );
        }
        Ok(())
    }
}

impl Drop for Account {
    fn drop(&mut self) {
        if let Err(e) = self.host.command(&["account", "remove", "--purge", &self.name], &[]) {
            eprintln!("hermitage-bench: the account {} stays behind: {e:#}", self.name);
        }
    }
}
