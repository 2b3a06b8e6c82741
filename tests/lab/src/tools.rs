//! Tools the lab needs from Debian, installed when missing.

use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Result, bail};

use crate::process::{privileged, run_logged};
use crate::steps::{note, step};

/// Tool and the Debian package that has it.
const TOOLS: &[(&str, &str)] = &[
    ("cc", "build-essential"),
    ("mmdebstrap", "mmdebstrap"),
    ("mkfs.erofs", "erofs-utils"),
    ("mke2fs", "e2fsprogs"),
    ("xz", "xz-utils"),
    ("zstd", "zstd"),
    ("cpio", "cpio"),
    ("tar", "tar"),
    ("ssh", "openssh-client"),
    ("rsync", "rsync"),
    ("sshpass", "sshpass"),
];

/// Only for the emulated machine.
const EMULATOR: (&str, &str) = ("qemu-system-x86_64", "qemu-system-x86");

/// What is no program on the path, by its file: what `mmdebstrap` checks the packages' signatures with, and what
/// stands in for a guest's sftp in tests of the service.
const FILES: &[(&str, &str)] = &[
    ("/usr/share/keyrings/debian-archive-keyring.gpg", "debian-archive-keyring"),
    ("/usr/lib/openssh/sftp-server", "openssh-sftp-server"),
];

pub fn install_missing(emulated: bool, log: &Path) -> Result<()> {
    let mut missing: Vec<&str> = TOOLS
        .iter()
        .chain(emulated.then_some(&EMULATOR))
        .filter(|(tool, _)| find(tool).is_none())
        .map(|(_, package)| *package)
        .collect();
    let files = FILES.iter().filter(|(file, _)| !Path::new(file).exists());
    missing.extend(files.map(|(_, package)| *package));
    if missing.is_empty() {
        return Ok(());
    }
    if find("apt-get").is_none() {
        bail!("missing: {}. This system has no apt-get; install them by hand", missing.join(" "));
    }
    step(&format!("install {}", missing.join(" ")), || {
        run_logged(apt().arg("update"), log)?;
        run_logged(apt().args(["install", "--yes", "--no-install-recommends"]).args(&missing), log)
    })
}

/// SSH clients that the end-to-end tests try, each with its Debian package. A test whose client can't be
/// had is skipped, and says so.
const CLIENTS: &[(&str, &str)] = &[
    ("git", "git"),
    ("curl", "curl"),
    ("plink", "putty-tools"),
    ("dbclient", "dropbear-bin"),
    ("sshfs", "sshfs"),
];

/// Python's clients have no program to look for.
const PYTHON_CLIENTS: &[(&str, &str)] = &[
    ("/usr/lib/python3/dist-packages/paramiko", "python3-paramiko"),
    ("/usr/lib/python3/dist-packages/asyncssh", "python3-asyncssh"),
];

/// From PyPI, by the name of the module: what Debian's releases have in versions that don't know today's algorithms,
/// or only for C. Of `ssh-audit` that one version, as its opinions are what the test compares with. None of them
/// has dependencies.
const FROM_PYPI: &[(&str, &str)] =
    &[("ssh_audit", "ssh-audit==3.9.0"), ("pylibsshext", "ansible-pylibssh==1.4.0")];

/// Installs what of them is missing, as far as that is possible; modules from PyPI into that folder.
pub fn install_clients(modules: &Path, log: &Path) {
    install_debians_clients(log);
    for (module, package) in FROM_PYPI {
        if modules.join(module).exists() {
            continue;
        }
        let installed = step(&format!("install {package}"), || {
            let mut pip = tool("python3");
            pip.args(["-m", "pip", "install", "--quiet", "--no-deps", "--target"]).arg(modules);
            run_logged(pip.arg(package), log)
        });
        if let Err(error) = installed {
            note(&format!("its test is skipped: {error:#}"));
        }
    }
}

fn install_debians_clients(log: &Path) {
    let programs = CLIENTS.iter().filter(|(tool, _)| find(tool).is_none());
    let modules = PYTHON_CLIENTS.iter().filter(|(folder, _)| !Path::new(folder).exists());
    let missing: Vec<&str> = programs.chain(modules).map(|(_, package)| *package).collect();
    if missing.is_empty() || find("apt-get").is_none() {
        return;
    }
    let installed = step(&format!("install clients to test with: {}", missing.join(" ")), || {
        run_logged(apt().arg("update"), log)?;
        run_logged(apt().args(["install", "--yes", "--no-install-recommends"]).args(&missing), log)
    });
    if let Err(error) = installed {
        note(&format!("tests of those clients are skipped: {error:#}"));
    }
}

fn apt() -> Command {
    let mut command = privileged("env");
    command.args(["DEBIAN_FRONTEND=noninteractive", "apt-get", "-o", "DPkg::Lock::Timeout=300"]);
    command
}

/// Looks in PATH and in the folders of root's PATH, where Debian keeps file system tools.
pub fn find(tool: &str) -> Option<PathBuf> {
    let path = std::env::var_os("PATH").unwrap_or_default();
    std::env::split_paths(&path)
        .chain(["/usr/sbin", "/sbin", "/usr/bin"].map(PathBuf::from))
        .map(|dir| dir.join(tool))
        .find(|file| file.is_file())
}

/// A command for a tool that may lie outside an ordinary user's PATH.
pub fn tool(name: &str) -> Command {
    Command::new(find(name).unwrap_or_else(|| PathBuf::from(name)))
}
