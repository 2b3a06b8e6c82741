//! Running Debian's tools, with errors that say which package brings a missing one.

use std::ffi::OsStr;
use std::io::ErrorKind;
use std::process::{Command, Stdio};

use anyhow::{Context, Result, bail};

/// Tool and the Debian package it comes from.
const TOOLS: [(&str, &str); 6] = [
    ("mmdebstrap", "mmdebstrap"),
    ("mkfs.erofs", "erofs-utils"),
    ("mke2fs", "e2fsprogs"),
    ("xz", "xz-utils"),
    ("dpkg-deb", "dpkg"),
    ("cp", "coreutils"),
];

/// Fails at once, and completely, instead of after a minute of work.
pub fn require() -> Result<()> {
    if !rustix::process::geteuid().is_root() {
        bail!("building an image needs root (mmdebstrap makes device nodes and owners)");
    }
    let missing: Vec<&str> =
        TOOLS.iter().filter(|(tool, _)| !in_path(tool)).map(|(_, package)| *package).collect();
    if !missing.is_empty() {
        bail!("these packages are missing: apt-get install {}", missing.join(" "));
    }
    Ok(())
}

fn in_path(tool: &str) -> bool {
    let path = std::env::var_os("PATH").unwrap_or_else(|| "/usr/sbin:/usr/bin:/sbin:/bin".into());
    std::env::split_paths(&path).any(|dir| dir.join(tool).is_file())
}

/// Runs a tool to its end; its standard output goes to our standard error, because ours carries the
/// image's id.
pub fn run<S: AsRef<OsStr>>(tool: &str, args: impl IntoIterator<Item = S>) -> Result<()> {
    let mut command = Command::new(tool);
    command.args(args).stdin(Stdio::null()).stdout(std::io::stderr());
    let status = spawned(tool, command.status())?;
    if !status.success() {
        bail!("{tool} failed: {status}");
    }
    Ok(())
}

/// Runs a tool quietly and returns its standard output.
pub fn output<S: AsRef<OsStr>>(tool: &str, args: impl IntoIterator<Item = S>) -> Result<Vec<u8>> {
    let mut command = Command::new(tool);
    command.args(args).stdin(Stdio::null()).stderr(Stdio::inherit());
    let output = spawned(tool, command.output())?;
    if !output.status.success() {
        bail!("{tool} failed: {}", output.status);
    }
    Ok(output.stdout)
}

fn spawned<T>(tool: &str, result: std::io::Result<T>) -> Result<T> {
    result
        .map_err(|error| match error.kind() {
            ErrorKind::NotFound => anyhow::anyhow!("{tool} is not in PATH"),
            _ => error.into(),
        })
        .with_context(|| format!("running {tool}"))
}
