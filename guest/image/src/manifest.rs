//! `image.json`: what an image is, so that a base built from it can be told from any other, and an
//! altered file is noticed before it is booted.

use std::collections::BTreeMap;
use std::fs::{self, File};
use std::path::Path;

use anyhow::{Context, Result};
use serde::{Deserialize, Serialize};

/// Version of this file's own layout.
pub const FORMAT: u32 = 1;

/// The files of an image, besides `image.json`.
pub const FILES: [&str; 4] = ["vmlinuz", "initrd.img", "root.erofs", "disk-template.img"];

#[derive(Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Manifest {
    pub format: u32,
    /// Hexadecimal BLAKE3 of what the image is made of (see [`Manifest::id`]).
    pub id: String,
    pub suite: String,
    pub kernel: String,
    /// `hermitage_guest_proto::VERSION` of the agent inside.
    pub agent_protocol: u16,
    pub files: BTreeMap<String, FileEntry>,
}

#[derive(Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct FileEntry {
    pub bytes: u64,
    pub blake3: String,
}

impl Manifest {
    pub fn of(dir: &Path, suite: &str, kernel: &str) -> Result<Manifest> {
        let mut files = BTreeMap::new();
        for name in FILES {
            let path = dir.join(name);
            let entry = hash(&path).with_context(|| format!("hashing {}", path.display()))?;
            files.insert(name.to_owned(), entry);
        }
        let agent_protocol = hermitage_guest_proto::VERSION;
        Ok(Manifest {
            format: FORMAT,
            id: id(agent_protocol, &files),
            suite: suite.to_owned(),
            kernel: kernel.to_owned(),
            agent_protocol,
            files,
        })
    }

    pub fn write(&self, path: &Path) -> Result<()> {
        let mut text = serde_json::to_string_pretty(self)?;
        text.push('\n');
        fs::write(path, text).with_context(|| format!("writing {}", path.display()))
    }
}

/// The format and protocol versions and each file's name and digest, a line each, in the names'
/// order; 128 bits of the hash are enough to name it.
fn id(agent_protocol: u16, files: &BTreeMap<String, FileEntry>) -> String {
    let mut hasher = blake3::Hasher::new();
    hasher.update(format!("hermitage-image {FORMAT} {agent_protocol}\n").as_bytes());
    for (name, entry) in files {
        hasher.update(format!("{name} {} {}\n", entry.bytes, entry.blake3).as_bytes());
    }
    hasher.finalize().to_hex()[..32].to_owned()
}

fn hash(path: &Path) -> Result<FileEntry> {
    let file = File::open(path)?;
    let bytes = file.metadata()?.len();
    let mut hasher = blake3::Hasher::new();
    hasher.update_reader(file)?;
    Ok(FileEntry { bytes, blake3: hasher.finalize().to_hex().to_string() })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_id_changes_with_any_file_and_with_nothing_else() {
        let dir = tempfile::tempdir().unwrap();
        for name in FILES {
            fs::write(dir.path().join(name), name).unwrap();
        }
        let first = Manifest::of(dir.path(), "trixie", "6.12").unwrap();
        assert_eq!(first, Manifest::of(dir.path(), "trixie", "6.12").unwrap());
        assert_eq!(first.id.len(), 32);
        for name in FILES {
            fs::write(dir.path().join(name), "changed").unwrap();
            let changed = Manifest::of(dir.path(), "trixie", "6.12").unwrap();
            assert_ne!(first.id, changed.id, "{name}");
            fs::write(dir.path().join(name), name).unwrap();
        }
        let path = dir.path().join("image.json");
        first.write(&path).unwrap();
        let read: Manifest = serde_json::from_str(&fs::read_to_string(path).unwrap()).unwrap();
        assert_eq!(read, first);
        fs::remove_file(dir.path().join("vmlinuz")).unwrap();
        assert!(Manifest::of(dir.path(), "trixie", "6.12").is_err());
    }
}
