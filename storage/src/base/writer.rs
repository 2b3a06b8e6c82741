//! Writing a base: the folder appears whole, sealed and read-only, or not at all.

use super::manifest::{Content, FileSeal, Files, HostKind, Machine, Manifest};
use super::open::MAX_STATE;
use super::{BaseError, BaseId, MANIFEST, MEMORY, ROOT, STATE};
use crate::publish::NewDir;
use crate::sparse;
use std::fs::{self, File, OpenOptions};
use std::io::{self, Write};
use std::os::unix::fs::{OpenOptionsExt, PermissionsExt};
use std::path::{Path, PathBuf};

/// What the writer can't know by itself.
#[derive(Clone, Debug)]
pub struct Description {
    /// Id of the guest image (`image.json`).
    pub image: String,
    /// As the agent's `Ready` said.
    pub agent_protocol: u16,
    pub guest_kernel: String,
    /// Its most memory is the memory file's length.
    pub machine: Machine,
    pub restorable_on: HostKind,
}

/// A base that is being made. Dropped before [`Self::finish`], nothing of it stays.
#[derive(Debug)]
pub struct BaseWriter {
    dir: NewDir,
    target: PathBuf,
    memory: File,
}

fn failed(path: &Path, doing: &'static str) -> impl FnOnce(io::Error) -> BaseError {
    move |source| BaseError::Write { path: path.to_owned(), doing, source }
}

impl BaseWriter {
    /// `target` must not exist yet. Memory starts as one hole of `memory_bytes`.
    pub fn create(target: &Path, memory_bytes: u64) -> Result<Self, BaseError> {
        let dir =
            NewDir::create(target, 0o755).map_err(failed(target, "making a folder beside"))?;
        let path = dir.path().join(MEMORY);
        let memory = new_file(&path).map_err(failed(&path, "making the memory file"))?;
        memory.set_len(memory_bytes).map_err(failed(&path, "extending the memory file"))?;
        Ok(Self { dir, target: target.to_owned(), memory })
    }

    /// The guest's memory, for positioned writes (or for mapping it shared while the guest boots).
    /// Leave holes where the guest has zeroes; do not change its length.
    pub fn memory(&self) -> &File {
        &self.memory
    }

    /// Seals everything and publishes the folder. `state` is the vmm's, opaque here; `root` is the
    /// image's root file system, taken along by a hard link where it can be.
    pub fn finish(
        self,
        description: Description,
        state: &[u8],
        root: &Path,
    ) -> Result<BaseId, BaseError> {
        if state.len() > MAX_STATE {
            return Err(BaseError::StateTooLong(state.len()));
        }
        let at = |name| self.dir.path().join(name);
        let write_state = || -> io::Result<File> {
            let mut file = new_file(&at(STATE))?;
            file.write_all(state)?;
            Ok(file)
        };
        let state_file = write_state().map_err(failed(&self.target, "writing state.bin"))?;
        let root_file = take_along(root, &at(ROOT))
            .map_err(failed(root, "taking the root file system along"))?;

        let files = Files {
            memory: seal(&self.memory).map_err(failed(&self.target, "sealing memory.img"))?,
            state: seal(&state_file).map_err(failed(&self.target, "sealing state.bin"))?,
            root: seal(&root_file).map_err(failed(&self.target, "sealing root.erofs"))?,
        };
        let manifest = Manifest::of(Content {
            image: description.image,
            agent_protocol: description.agent_protocol,
            guest_kernel: description.guest_kernel,
            machine: description.machine,
            restorable_on: description.restorable_on,
            files,
        });
        let bytes = manifest.as_ref().map_err(Clone::clone).and_then(Manifest::to_bytes);
        let (manifest, bytes) = match (manifest, bytes) {
            (Ok(manifest), Ok(bytes)) => (manifest, bytes),
            (Err(error), _) | (_, Err(error)) => {
                return Err(BaseError::damaged(&self.target, MANIFEST, error));
            }
        };
        let write_manifest = || -> io::Result<()> {
            let mut file = new_file(&at(MANIFEST))?;
            file.write_all(&bytes)?;
            read_only(&file)?;
            file.sync_all()
        };
        write_manifest().map_err(failed(&self.target, "writing base.json"))?;
        self.dir.publish().map_err(failed(&self.target, "publishing the base"))?;
        Ok(manifest.id)
    }
}

fn new_file(path: &Path) -> io::Result<File> {
    OpenOptions::new().read(true).write(true).create_new(true).mode(0o600).open(path)
}

/// A link if the file system allows it: image and base are both never changed.
fn take_along(from: &Path, to: &Path) -> io::Result<File> {
    if fs::hard_link(from, to).is_err() {
        let file = new_file(to)?;
        sparse::copy(&File::open(from)?, &file)?;
        return Ok(file);
    }
    File::open(to)
}

/// Read-only, on the medium, and known by its digest.
fn seal(file: &File) -> io::Result<FileSeal> {
    read_only(file)?;
    file.sync_all()?;
    Ok(FileSeal::new(file.metadata()?.len(), sparse::digest(file)?))
}

fn read_only(file: &File) -> io::Result<()> {
    file.set_permissions(fs::Permissions::from_mode(0o444))
}
