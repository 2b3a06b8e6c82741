//! What is written down about a running lab, so that the next `cargo lab` finds it.

use std::collections::BTreeMap;
use std::fs;
use std::io;
use std::path::Path;

use anyhow::{Context, Result};
use nix::errno::Errno;
use nix::fcntl::{Flock, FlockArg};
use serde::{Deserialize, Serialize};

use crate::layout::Layout;
use crate::process::{Process, write_whole};
use crate::steps::note;

/// A lab that was started. Whether it still runs is for its process to tell.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct State {
    pub place: Place,
    /// Hermitage's port on loopback.
    pub port: u16,
    /// Digest of each thing that was brought to the serving machine since it started, by its path
    /// there.
    #[serde(default)]
    pub pushed: BTreeMap<String, String>,
}

/// Where the service runs.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Place {
    /// This very machine, whose KVM is real.
    Native,
    Emulated {
        process: Process,
        ssh_port: u16,
        memory_mib: u32,
        cpus: u32,
    },
}

impl State {
    pub fn load(layout: &Layout) -> Result<Option<Self>> {
        let path = layout.state_file();
        let bytes = match fs::read(&path) {
            Ok(bytes) => bytes,
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
            Err(error) => return Err(error).with_context(|| format!("read {}", path.display())),
        };
        serde_json::from_slice(&bytes)
            .with_context(|| {
                format!(
                    "{} is not a lab's state; remove it after stopping that lab by hand",
                    path.display()
                )
            })
            .map(Some)
    }

    /// That folder on the serving machine is gone, with all that was brought there.
    pub fn forget(&mut self, dir: &str) {
        self.pushed.retain(|path, _| !Path::new(path).starts_with(dir));
    }

    pub fn save(&self, layout: &Layout) -> Result<()> {
        write_whole(&layout.state_file(), &serde_json::to_vec_pretty(self)?)
    }

    pub fn remove(layout: &Layout) -> Result<()> {
        match fs::remove_file(layout.state_file()) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => {
                Err(error).context("remove the lab's state")
            }
            _ => Ok(()),
        }
    }
}

/// Held while something is changed that another `cargo lab` might change as well; that one waits.
pub struct Claim {
    _lock: Flock<fs::File>,
}

impl Claim {
    /// Only one `up`, `down` or `sync` of a lab works at a time.
    pub fn take(layout: &Layout) -> Result<Self> {
        Self::lock(&layout.own(), "lock", &format!("lab {}", layout.name()))
    }

    /// Only one test run or benchmark at a time has a lab for itself.
    pub fn run(layout: &Layout) -> Result<Self> {
        Self::lock(&layout.own(), "run.lock", &format!("a run in lab {}", layout.name()))
    }

    /// Images are shared by all labs.
    pub fn images(layout: &Layout) -> Result<Self> {
        Self::lock(&layout.shared(), "images.lock", "the images")
    }

    fn lock(dir: &Path, name: &str, what: &str) -> Result<Self> {
        fs::create_dir_all(dir).with_context(|| format!("make {}", dir.display()))?;
        let path = dir.join(name);
        let file = fs::File::create(&path).with_context(|| format!("open {}", path.display()))?;
        let lock = match Flock::lock(file, FlockArg::LockExclusiveNonblock) {
            Ok(lock) => lock,
            Err((file, Errno::EWOULDBLOCK)) => {
                note(&format!("           another cargo lab works on {what}; waiting for it"));
                Flock::lock(file, FlockArg::LockExclusive)
                    .map_err(|(_, error)| error)
                    .with_context(|| format!("lock {}", path.display()))?
            }
            Err((_, error)) => {
                return Err(error).with_context(|| format!("lock {}", path.display()));
            }
        };
        Ok(Self { _lock: lock })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_lay_in_a_folder_that_is_gone_is_brought_again() {
        let paths = ["/lib/.lab-image/a", "/lib/.lab-image/b", "/lib/.lab-image-c", "/bin/x"];
        let pushed = paths.map(|path| (path.to_owned(), "digest".to_owned())).into();
        let mut state = State { place: Place::Native, port: 1, pushed };
        state.forget("/lib/.lab-image");
        assert_eq!(state.pushed.keys().collect::<Vec<_>>(), ["/bin/x", "/lib/.lab-image-c"]);
    }
}
