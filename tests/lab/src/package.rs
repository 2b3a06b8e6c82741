//! `cargo lab package`: the Debian package, by cargo-deb, of what `[package.metadata.deb]` in
//! `sshd/Cargo.toml` lists. What is not a program's own build comes first: static programs, manual pages,
//! completions.

use std::fs;
use std::path::PathBuf;
use std::process::Command;

use anyhow::{Context, Result, bail};

use crate::layout::Layout;
use crate::process::{run_captured, run_logged};
use crate::programs;
use crate::steps::step;

/// Completions by the names that the shells look for.
const COMPLETIONS: [(&str, &str); 3] =
    [("bash", "hermitage.bash"), ("zsh", "_hermitage"), ("fish", "hermitage.fish")];

/// Returns where it is.
pub fn build(layout: &Layout) -> Result<PathBuf> {
    let log = layout.step_log();
    if run_captured(programs::cargo(layout).args(["deb", "--version"])).is_err() {
        bail!("there is no cargo-deb; cargo install cargo-deb brings it");
    }
    step("build the programs", || programs::build(layout))?;
    let dir = layout.root().join("target/package");
    step("gather programs, manual pages and completions", || {
        let _ = fs::remove_dir_all(&dir);
        fs::create_dir_all(&dir).with_context(|| format!("make {}", dir.display()))?;
        let hermitage = layout.program("hermitage");
        run_logged(Command::new(&hermitage).arg("man").arg(dir.join("man")), &log)?;
        // Those that are not the package's own.
        let others =
            [layout.program("hermitage-vmm"), layout.program("hermitage-image"), layout.agent()];
        for program in others {
            let name = program.file_name().context("a program has a name")?;
            fs::copy(&program, dir.join(name))
                .with_context(|| format!("copy {}", program.display()))?;
        }
        for (shell, name) in COMPLETIONS {
            let script = run_captured(Command::new(&hermitage).args(["completions", shell]))?;
            fs::write(dir.join(name), script.stdout).with_context(|| format!("write {name}"))?;
        }
        Ok(())
    })?;
    let package = dir.join("hermitage.deb");
    step("put the package together", || {
        let mut deb = programs::cargo(layout);
        deb.args(["deb", "-p", "hermitage", "--no-build", "--strip", "--output"]).arg(&package);
        run_logged(&mut deb, &log)
    })?;
    Ok(package)
}
