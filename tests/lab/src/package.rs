//! `cargo lab package`: the Debian package, by cargo-deb, of what `[package.metadata.deb]` in
//! `sshd/Cargo.toml` lists. What is not a program's own build comes first: static programs, manual pages,
//! completions.

use std::env;
use std::ffi::OsString;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result};

use crate::layout::Layout;
use crate::process::{run_captured, run_logged};
use crate::programs;
use crate::steps::step;

/// Completions by the names that the shells look for.
const COMPLETIONS: [(&str, &str); 3] =
    [("bash", "hermitage.bash"), ("zsh", "_hermitage"), ("fish", "hermitage.fish")];

/// Its own dependencies are pinned as well (`--locked`).
const CARGO_DEB: &str = "3.8.0";

/// glibc of Debian trixie.
const TRIXIE_LIBC: (u32, u32) = (2, 41);

/// Two versions of the same programs, for an upgrade.
#[derive(Debug)]
pub struct Pair {
    pub former: PathBuf,
    pub next: PathBuf,
}

/// Returns where it is.
pub fn build(layout: &Layout) -> Result<PathBuf> {
    let dir = prepare(layout)?;
    let package = dir.join("hermitage.deb");
    step("put the package together", || put_together(layout, &package, &[]))?;
    Ok(package)
}

pub fn build_pair(layout: &Layout) -> Result<Pair> {
    let dir = prepare(layout)?;
    let pair = Pair { former: dir.join("trial-former.deb"), next: dir.join("trial-next.deb") };
    step("put the package and a later version of it together", || {
        // They go nowhere, so they may be large.
        put_together(layout, &pair.former, &["--fast"])?;
        let next = format!("{}+next", field(&pair.former, "Version")?);
        put_together(layout, &pair.next, &["--fast", "--deb-version", &next])
    })?;
    Ok(pair)
}

/// Programs here are linked with this system's C library, which may be too new for Debian's.
pub fn why_not_in_trixie(package: &Path) -> Result<Option<String>> {
    let depends = field(package, "Depends")?;
    Ok(needed_libc(&depends).filter(|needed| *needed > TRIXIE_LIBC).map(|(major, minor)| {
        format!(
            "programs that are built on this system need glibc {major}.{minor}, and Debian trixie has {}.{}",
            TRIXIE_LIBC.0, TRIXIE_LIBC.1
        )
    }))
}

/// `libc6 (>= 2.34), …`
fn needed_libc(depends: &str) -> Option<(u32, u32)> {
    let version = depends
        .split(", ")
        .find_map(|entry| entry.strip_prefix("libc6 (>= ")?.strip_suffix(')'))?;
    let (major, rest) = version.split_once('.')?;
    let minor = rest.split(|c: char| !c.is_ascii_digit()).next()?;
    Some((major.parse().ok()?, minor.parse().ok()?))
}

fn field(package: &Path, name: &str) -> Result<String> {
    let said = run_captured(Command::new("dpkg-deb").arg("--field").arg(package).arg(name))?;
    Ok(String::from_utf8_lossy(&said.stdout).trim().to_owned())
}

/// Everything that goes into the package, built; returns the folder for it.
fn prepare(layout: &Layout) -> Result<PathBuf> {
    let log = layout.step_log();
    ensure_cargo_deb(layout)?;
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
    Ok(dir)
}

fn put_together(layout: &Layout, package: &Path, options: &[&str]) -> Result<()> {
    let mut deb = cargo_deb(layout)?;
    deb.args(["-p", "hermitage", "--no-build", "--strip"]).args(options);
    run_logged(deb.arg("--output").arg(package), &layout.step_log())
}

/// Installed into the lab's own folder, in that very version, unless it is there.
fn ensure_cargo_deb(layout: &Layout) -> Result<()> {
    let there = run_captured(cargo_deb(layout)?.arg("--version"));
    if there.is_ok_and(|said| {
        String::from_utf8_lossy(&said.stdout).trim() == format!("cargo-deb {CARGO_DEB}")
    }) {
        return Ok(());
    }
    step(&format!("install cargo-deb {CARGO_DEB}"), || {
        let mut install = programs::cargo(layout);
        install.args(["install", "--quiet", "--locked", "--force", "--root"]).arg(layout.tools());
        install.args(["--version", &format!("={CARGO_DEB}"), "cargo-deb"]);
        run_logged(&mut install, &layout.step_log())
    })
}

/// `cargo deb`; cargo looks for it in PATH.
fn cargo_deb(layout: &Layout) -> Result<Command> {
    let mut path = vec![layout.tools().join("bin")];
    path.extend(env::split_paths(&env::var_os("PATH").unwrap_or_default()));
    let path: OsString = env::join_paths(path).context("put the lab's tools into PATH")?;
    let mut cargo = programs::cargo(layout);
    cargo.env("PATH", path).arg("deb");
    Ok(cargo)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_c_library_is_read_from_what_a_package_depends_on() {
        let depends = "libc6 (>= 2.34), libgcc-s1 (>= 4.2), mmdebstrap";
        assert_eq!(needed_libc(depends), Some((2, 34)));
        assert_eq!(needed_libc("libc6 (>= 2.42~1), e2fsprogs"), Some((2, 42)));
        assert_eq!(needed_libc("mmdebstrap"), None);
        assert!((2, 42) > TRIXIE_LIBC && (2, 34) < TRIXIE_LIBC);
    }
}
