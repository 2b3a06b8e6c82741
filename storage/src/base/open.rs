//! Reading a base: everything is checked, through the same descriptors that are then used.

use super::manifest::{FileSeal, Manifest, ManifestError};
use super::{BaseId, MANIFEST, MEMORY, ROOT, STATE};
use crate::StateDir;
use crate::sparse;
use nix::libc;
use rustix::fs::{FlockOperation, flock};
use rustix::io::Errno;
use std::fs::{self, File, OpenOptions};
use std::io::{self, Read};
use std::os::unix::fs::{FileExt, MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::thread;
use std::time::{Duration, Instant};

/// Most bytes of machine state: a vCPU's is some 10 KiB.
pub const MAX_STATE: usize = 16 << 20;
const MAX_MANIFEST: u64 = 64 * 1024;

/// How long, and how often, a base is asked for that somebody else looks at whether to remove it.
const LOCK_PATIENCE: Duration = Duration::from_secs(10);
const LOCK_RETRY: Duration = Duration::from_millis(10);

#[derive(Debug, thiserror::Error)]
pub enum BaseError {
    #[error("there is no base {} (hermitage base build makes one)", .0.display())]
    Missing(PathBuf),
    #[error("the base {} can't be used: {file}: {reason}", dir.display())]
    Damaged { dir: PathBuf, file: &'static str, reason: String },
    #[error("the base {} can't be read: {file}: {source}", dir.display())]
    Read { dir: PathBuf, file: &'static str, source: io::Error },
    #[error("{}: {doing}: {source}", path.display())]
    Write { path: PathBuf, doing: &'static str, source: io::Error },
    #[error("the machine's state has {0} bytes; at most {MAX_STATE} are allowed")]
    StateTooLong(usize),
}

impl BaseError {
    pub(super) fn damaged(dir: &Path, file: &'static str, reason: impl ToString) -> Self {
        Self::Damaged { dir: dir.to_owned(), file, reason: reason.to_string() }
    }
}

/// A base that was checked. Its files are open for reading only.
#[derive(Debug)]
pub struct Base {
    pub dir: PathBuf,
    pub manifest: Manifest,
    /// The guest's memory, to be mapped privately.
    pub memory: File,
    /// The root file system.
    pub root: File,
    /// The vmm's state.
    pub state: Vec<u8>,
}

impl Base {
    /// Opens a base and checks all of it: manifest, lengths, digests. Reads every byte that is not in a
    /// hole, on all processors.
    ///
    /// As long as the memory file is open or mapped in any process, the base can't be removed
    /// ([`super::Removal`]).
    pub fn open(dir: &Path) -> Result<Self, BaseError> {
        // A look first, for what is said of a base that is not there.
        Self::manifest(dir)?;
        let memory = hold(dir)?;
        let manifest = Self::manifest(dir)?;
        let files = &manifest.content.files;
        check(dir, MEMORY, &memory, &files.memory)?;
        let root = checked(dir, ROOT, &files.root)?;
        let state_file = checked(dir, STATE, &files.state)?;
        let length = files.state.length as usize;
        if length > MAX_STATE {
            return Err(BaseError::damaged(dir, STATE, BaseError::StateTooLong(length)));
        }
        let mut state = vec![0; length];
        state_file.read_exact_at(&mut state, 0).map_err(|source| BaseError::Read {
            dir: dir.to_owned(),
            file: STATE,
            source,
        })?;
        Ok(Self { dir: dir.to_owned(), manifest, memory, root, state })
    }

    /// Reads and checks the manifest alone, which says nothing about the files.
    pub fn manifest(dir: &Path) -> Result<Manifest, BaseError> {
        let mut bytes = Vec::new();
        let file = match open(&dir.join(MANIFEST)) {
            Err(error) if error.kind() == io::ErrorKind::NotFound && !dir.exists() => {
                return Err(BaseError::Missing(dir.to_owned()));
            }
            file => file,
        };
        file.and_then(|file| file.take(MAX_MANIFEST + 1).read_to_end(&mut bytes))
            .map_err(|source| BaseError::Read { dir: dir.to_owned(), file: MANIFEST, source })?;
        if bytes.len() as u64 > MAX_MANIFEST {
            let reason = format!("it has more than {MAX_MANIFEST} bytes");
            return Err(BaseError::damaged(dir, MANIFEST, reason));
        }
        Manifest::from_bytes(&bytes)
            .map_err(|error: ManifestError| BaseError::damaged(dir, MANIFEST, error))
    }

    pub fn id(&self) -> &BaseId {
        &self.manifest.id
    }
}

/// Opens the memory file and shares the lock that keeps the base from being removed. Somebody who is about
/// to remove it looks around for some moments only, and then it is gone or free again.
fn hold(dir: &Path) -> Result<File, BaseError> {
    let read = |source| BaseError::Read { dir: dir.to_owned(), file: MEMORY, source };
    let memory = open(&dir.join(MEMORY)).map_err(read)?;
    let deadline = Instant::now() + LOCK_PATIENCE;
    loop {
        match flock(&memory, FlockOperation::NonBlockingLockShared) {
            Ok(()) => return Ok(memory),
            Err(Errno::WOULDBLOCK) if Instant::now() < deadline => thread::sleep(LOCK_RETRY),
            Err(Errno::WOULDBLOCK) => {
                return Err(BaseError::damaged(dir, MEMORY, "it is being removed"));
            }
            Err(errno) => return Err(read(errno.into())),
        }
    }
}

pub(super) fn open(path: &Path) -> io::Result<File> {
    // Non-blocking: a FIFO by that name must not hang the service.
    let file = OpenOptions::new()
        .read(true)
        .custom_flags(libc::O_NOFOLLOW | libc::O_NONBLOCK)
        .open(path)?;
    if !file.metadata()?.is_file() {
        return Err(io::Error::new(io::ErrorKind::InvalidInput, "it is not a regular file"));
    }
    Ok(file)
}

fn checked(dir: &Path, name: &'static str, seal: &FileSeal) -> Result<File, BaseError> {
    let read = |source| BaseError::Read { dir: dir.to_owned(), file: name, source };
    let file = open(&dir.join(name)).map_err(read)?;
    check(dir, name, &file, seal)?;
    Ok(file)
}

fn check(dir: &Path, name: &'static str, file: &File, seal: &FileSeal) -> Result<(), BaseError> {
    let read = |source| BaseError::Read { dir: dir.to_owned(), file: name, source };
    let length = file.metadata().map_err(read)?.len();
    if length != seal.length {
        let kind = if length < seal.length { "truncated" } else { "lengthened" };
        let reason =
            format!("it was {kind}: it has {length} bytes and should have {}", seal.length);
        return Err(BaseError::damaged(dir, name, reason));
    }
    let digest = sparse::digest(file).map_err(read)?.to_string();
    if digest != seal.digest {
        let reason = format!(
            "it was altered: its digest is {digest} and should be {}; make the base again with: \
             hermitage base build",
            seal.digest
        );
        return Err(BaseError::damaged(dir, name, reason));
    }
    Ok(())
}

/// A base in the state directory, its manifest read, its files not checked.
#[derive(Debug)]
pub struct Listed {
    pub id: BaseId,
    pub manifest: Result<Manifest, BaseError>,
    /// Seconds since 1970-01-01 UTC.
    pub created: i64,
    /// Bytes that its memory and state take on the disk.
    pub allocated: u64,
}

/// The bases there are, the latest first.
pub fn list(state: &StateDir) -> io::Result<Vec<Listed>> {
    let mut found = Vec::new();
    let entries = match fs::read_dir(state.bases_dir()) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(found),
        entries => entries?,
    };
    for entry in entries {
        let entry = entry?;
        let Some(id) = entry.file_name().to_str().and_then(BaseId::parse) else { continue };
        let dir = entry.path();
        let allocated = [MEMORY, STATE]
            .iter()
            .filter_map(|name| fs::metadata(dir.join(name)).ok())
            .map(|meta| meta.blocks() * 512)
            .sum();
        let manifest = Base::manifest(&dir).and_then(|manifest| {
            if manifest.id == id {
                return Ok(manifest);
            }
            let reason = format!("it is the manifest of base {}", manifest.id);
            Err(BaseError::damaged(&dir, MANIFEST, reason))
        });
        let created = fs::metadata(dir.join(MANIFEST)).map_or(0, |meta| meta.mtime());
        found.push(Listed { id, manifest, created, allocated });
    }
    found.sort_by(|a, b| b.created.cmp(&a.created).then_with(|| a.id.cmp(&b.id)));
    Ok(found)
}
