//! The workspace's programs: building them and bringing them to the serving machine.

use std::fs;
use std::io;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result, bail};
use tempfile::NamedTempFile;

use crate::layout::Layout;
use crate::process::run_logged;
use crate::serving::Serving;

/// What the serving machine gets. The image builder runs here, not there.
const SERVED: &[&str] = &["hermitage", "hermitage-vmm", "hermitage-bench"];
const FOLDER: &str = "/usr/local/bin";

/// Builds everything that a served login needs.
pub fn build(layout: &Layout) -> Result<()> {
    let mut host = cargo(layout);
    host.args(["build", "--release", "-p", "hermitage", "-p", "hermitage-image"]);
    run_logged(&mut host, &layout.step_log())?;

    // PID 1 of a machine has nothing to load libraries from, so it is linked statically. So is the vmm:
    // each library is four or five more mappings that every fork of the fork server has to copy. A
    // target of their own keeps that flag from rebuilding everything else.
    let target = "x86_64-unknown-linux-gnu";
    let mut fixed = cargo(layout);
    fixed
        .env("CARGO_TARGET_X86_64_UNKNOWN_LINUX_GNU_RUSTFLAGS", "-C target-feature=+crt-static")
        .args(["build", "--release", "-p", "hermitage-agent", "-p", "hermitage-vmm"])
        .args(["--target", target]);
    run_logged(&mut fixed, &layout.step_log())?;
    // `hermitage` looks for it beside itself.
    put_beside(&layout.static_program("hermitage-vmm"), &layout.program("hermitage-vmm"))
}

/// Copies a program to where it is to be, unless it is there already. Several labs of one checkout may do so
/// at once (the suite and the package's trial do), so each makes its copy under a name of its own.
fn put_beside(from: &Path, to: &Path) -> Result<()> {
    if to.exists() && digest(from)? == digest(to)? {
        return Ok(());
    }
    let copied = || {
        let mut copy = NamedTempFile::new_in(to.parent().unwrap_or(Path::new(".")))?;
        let mut program = fs::File::open(from)?;
        io::copy(&mut program, copy.as_file_mut())?;
        copy.as_file().set_permissions(program.metadata()?.permissions())?;
        copy.persist(to).map_err(|error| error.error)
    };
    copied().with_context(|| format!("copy {} to {}", from.display(), to.display()))?;
    Ok(())
}

/// Builds one more package.
pub fn build_package(layout: &Layout, package: &str) -> Result<()> {
    run_logged(cargo(layout).args(["build", "--release", "-p", package]), &layout.step_log())
}

/// `cargo` in the checkout, without what the outer `cargo run` put into the environment.
pub fn cargo(layout: &Layout) -> Command {
    let mut command = Command::new(std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into()));
    command.current_dir(layout.root());
    for (name, _) in std::env::vars_os() {
        let name = name.to_string_lossy();
        if name.starts_with("CARGO_PKG_") || name.starts_with("CARGO_MANIFEST_") {
            command.env_remove(&*name);
        }
    }
    command
}

/// What came of bringing the programs over.
#[derive(Debug, Default)]
pub struct Brought {
    pub changed: Vec<String>,
    pub absent: Vec<String>,
}

impl Brought {
    pub fn has_changed(&self, name: &str) -> bool {
        self.changed.iter().any(|changed| changed == name)
    }
}

/// Brings every program that is built; one that is not is named.
pub fn bring(serving: &mut Serving) -> Result<Brought> {
    let mut brought = Brought::default();
    let lab = std::env::current_exe().context("find this program")?;
    let mut files: Vec<(String, PathBuf)> = vec![("lab".to_owned(), lab)];
    files.extend(SERVED.iter().map(|name| (name.to_string(), serving.layout().program(name))));
    for (name, file) in files {
        if !file.exists() {
            brought.absent.push(name);
            continue;
        }
        if serving.is_native() {
            // They lie where the wrappers expect them; only what is new is of interest.
            if serving.note_digest(&name, &digest(&file)?)? {
                brought.changed.push(name);
            }
        } else if serving.push(&file, &format!("{FOLDER}/{name}"), &digest(&file)?)? {
            brought.changed.push(name);
        }
    }
    Ok(brought)
}

/// blake3 of a file's content.
pub fn digest(file: &Path) -> Result<String> {
    let mut hasher = blake3::Hasher::new();
    fs::File::open(file)
        .and_then(|opened| hasher.update_reader(opened).map(|_| ()))
        .with_context(|| format!("read {}", file.display()))?;
    Ok(hasher.finalize().to_hex().to_string())
}

/// One digest over several files and words, in order.
pub fn digest_of(files: &[PathBuf], words: &[&str]) -> Result<String> {
    let mut hasher = blake3::Hasher::new();
    for file in files {
        if !file.exists() {
            bail!("{} is missing; was it built?", file.display());
        }
        hasher.update(digest(file)?.as_bytes());
    }
    for word in words {
        hasher.update(&(word.len() as u64).to_le_bytes());
        hasher.update(word.as_bytes());
    }
    Ok(hasher.finalize().to_hex().to_string())
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::PermissionsExt;
    use std::sync::Barrier;
    use std::thread;

    use super::*;

    #[test]
    fn several_at_once_put_a_program_where_it_is_to_be() {
        let dir = tempfile::tempdir().unwrap();
        let (from, to) = (dir.path().join("built"), dir.path().join("beside"));
        for round in 0..20_u8 {
            fs::write(&from, vec![round; 1 << 20]).unwrap();
            fs::set_permissions(&from, fs::Permissions::from_mode(0o755)).unwrap();
            let together = Barrier::new(4);
            thread::scope(|scope| {
                for _ in 0..4 {
                    scope.spawn(|| {
                        together.wait();
                        put_beside(&from, &to).unwrap();
                    });
                }
            });
            assert!(fs::read(&to).unwrap() == vec![round; 1 << 20], "round {round}");
            assert_eq!(fs::metadata(&to).unwrap().permissions().mode() & 0o777, 0o755);
        }
        assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 2, "a copy was left behind");
    }
}
