//! The workspace's programs: building them and bringing them to the serving machine.

use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result};

use crate::layout::Layout;
use crate::serving::Serving;

/// What the serving machine gets, and where the lab puts it there.
const SERVED: &[&str] = &["hermitage", "hermitage-vmm", "hermitage-bench"];
const FOLDER: &str = "/usr/local/bin";

/// Packages to build for the host. The image builder runs here, not in the lab machine.
const PACKAGES: &[&str] = &["hermitage-sshd", "hermitage-vmm", "hermitage-image"];

/// What came of bringing the programs over.
#[derive(Debug, Default)]
pub struct Brought {
    pub changed: Vec<String>,
    pub absent: Vec<String>,
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
        let digest = digest(&file)?;
        if serving.push(&file, &format!("{FOLDER}/{name}"), &digest)? {
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
