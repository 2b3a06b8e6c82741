//! Running the programs beside this one.

use super::context::Context;
use anyhow::{Context as _, bail};
use std::ffi::OsString;
use std::path::PathBuf;
use std::process::{Command, Stdio};

pub fn path(context: &Context, name: &str) -> PathBuf {
    context.config.libexec_dir().join(name)
}

/// Runs a program to its end. Its progress goes where ours goes; what it prints on standard output is
/// returned.
pub fn run(context: &Context, name: &str, arguments: &[OsString]) -> anyhow::Result<String> {
    let program = path(context, name);
    let output = Command::new(&program)
        .args(arguments)
        .stdin(Stdio::null())
        .stderr(Stdio::inherit())
        .output()
        .with_context(|| {
            format!(
                "running {} (it is looked for beside hermitage, or where HERMITAGE_LIBEXEC says)",
                program.display()
            )
        })?;
    if !output.status.success() {
        bail!("{name} failed: {}", output.status);
    }
    Ok(String::from_utf8_lossy(&output.stdout).trim().to_owned())
}
