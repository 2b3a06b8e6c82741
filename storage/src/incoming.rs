//! An account that comes from elsewhere, until it is one of this host: docs/formats/archive.md, "Order of steps".
//!
//! Its folder grows beside, under a name that nobody looks at. It becomes an account in three steps that are
//! each whole (the folder's name, the row, the end of the mark), and is nobody's before the second: dropped
//! or killed before that, it never was.

use std::fs::{self, File, OpenOptions};
use std::io::{self, ErrorKind};
use std::os::unix::fs::{FileExt as _, OpenOptionsExt as _};
use std::path::{Path, PathBuf};

use rustix::fs::{FlockOperation, flock};
use uuid::Uuid;

use crate::StateDir;
use crate::accounts::{
    Account, Accounts, AccountsError, Identity, Intent, MachineState, NewAccount,
};
use crate::base::BaseId;
use crate::disk::{self, Tag};
use crate::publish::{self, NewDir, sync_dir};
use crate::snapshot::{self, SnapshotError};

/// In a folder that is whole and may not have a row yet.
const MARK: &str = "restoring";
const PAGE: usize = 4096;

#[derive(Debug, thiserror::Error)]
pub enum IncomingError {
    #[error("{}: {doing}: {source}", path.display())]
    Io { path: PathBuf, doing: &'static str, source: io::Error },
    #[error("the saved memory: {0}")]
    Memory(#[from] SnapshotError),
    #[error("the saved memory is of the base {found}, and was said to be of {said}")]
    OtherBase { found: BaseId, said: String },
    #[error(transparent)]
    Accounts(#[from] AccountsError),
}

/// What is to be known of the memory beside its bytes.
#[derive(Clone, Debug)]
pub struct Remembered {
    pub base: String,
    pub terminals: Option<String>,
    pub paused: Option<String>,
}

pub struct Incoming {
    dir: NewDir,
    place: PathBuf,
    id: Uuid,
    disk: File,
    memory: Option<File>,
}

impl Incoming {
    /// An empty disk of this size, for the account of this id.
    pub fn begin(state: &StateDir, id: Uuid, disk_bytes: u64) -> Result<Self, IncomingError> {
        let place = state.account_dir(id);
        let begun = || -> io::Result<Self> {
            let dir = NewDir::create(&place, 0o700)?;
            let disk = new_file(&dir.path().join(StateDir::DISK))?;
            disk.set_len(disk_bytes)?;
            Ok(Self { dir, place: place.clone(), id, disk, memory: None })
        };
        begun().map_err(failed(&place, "making a folder for the account"))
    }

    pub fn disk(&mut self, offset: u64, data: &[u8]) -> Result<(), IncomingError> {
        write_sparse(&self.disk, offset, data)
            .map_err(failed(&self.place, "writing the account's disk"))
    }

    pub fn memory(&mut self, offset: u64, data: &[u8]) -> Result<(), IncomingError> {
        let failing = failed(&self.place, "writing the account's saved memory");
        let file = match self.memory.take() {
            Some(file) => Ok(file),
            None => new_file(&self.dir.path().join(StateDir::SNAPSHOT)),
        };
        let wrote = file.and_then(|file| self.memory.insert(file).write_all_at(data, offset));
        wrote.map_err(failing)
    }

    /// Makes it an account. All that came has to have been checked. `remembered` is of the memory, if
    /// there was any.
    pub fn publish(
        self,
        accounts: &mut Accounts,
        new: &NewAccount,
        identity: Identity,
        remembered: Option<&Remembered>,
    ) -> Result<Account, IncomingError> {
        let Self { dir, place, id, disk, memory } = self;
        let identity = Identity { id, ..identity };
        let io = |doing| failed(&place, doing);
        if let (Some(memory), Some(remembered)) = (&memory, remembered) {
            let tag: Tag = *Uuid::new_v4().as_bytes();
            let base = snapshot::verify(memory)?.description.base;
            if base.as_str() != remembered.base {
                return Err(IncomingError::OtherBase {
                    found: base,
                    said: remembered.base.clone(),
                });
            }
            snapshot::readdress(memory, id, tag)?;
            memory.sync_all().map_err(io("syncing the saved memory"))?;
            disk::set_tag(&disk, tag).map_err(io("tagging the disk"))?;
        }
        disk.sync_all().map_err(io("syncing the disk"))?;
        new_file(&dir.path().join(MARK))
            .and_then(|mark| mark.sync_all())
            .map_err(io("marking the folder"))?;
        let held = dir.publish_held().map_err(io("putting the folder in its place"))?;
        let made = accounts.create_as(new, &identity);
        let account = match made {
            Ok(account) => account,
            Err(error) => {
                // Nobody's: the next sweep would take it as well.
                let _ = fs::remove_dir_all(&place);
                return Err(error.into());
            }
        };
        if let Some(Remembered { base, terminals, paused }) =
            remembered.filter(|_| memory.is_some())
        {
            accounts.record_intent(&Intent {
                account: id,
                state: MachineState::Saved,
                pid: None,
                base: Some(base.clone()),
                detail: None,
                terminals: terminals.clone(),
                paused: paused.clone(),
                since: 0,
            })?;
        }
        unmark(&place).map_err(io("removing the mark"))?;
        drop(held);
        Ok(account)
    }
}

/// What [`sweep`] would take away.
pub fn leftovers(state: &StateDir, accounts: &Accounts) -> Result<Vec<PathBuf>, IncomingError> {
    let dir = state.accounts_dir();
    let mut found = publish::leftovers(&dir).map_err(failed(&dir, "looking at leftovers"))?;
    for (id, place, _held) in marked(&dir)? {
        if accounts.by_id(id)?.is_none() {
            found.push(place);
        }
    }
    Ok(found)
}

/// Takes away what restores that were cut off have left. Returns the folders.
pub fn sweep(state: &StateDir, accounts: &Accounts) -> Result<Vec<PathBuf>, IncomingError> {
    let dir = state.accounts_dir();
    let failing = |doing| failed(&dir, doing);
    let mut swept = publish::sweep(&dir).map_err(failing("sweeping"))?;
    for (id, place, _held) in marked(&dir)? {
        match accounts.by_id(id)? {
            Some(_) => unmark(&place).map_err(failed(&place, "removing the mark"))?,
            None => {
                fs::remove_dir_all(&place).map_err(failed(&place, "removing what nobody owns"))?;
                swept.push(place);
            }
        }
    }
    Ok(swept)
}

/// Folders of accounts whose restore was not over, and that nobody is at: each is held.
fn marked(dir: &Path) -> Result<Vec<(Uuid, PathBuf, File)>, IncomingError> {
    let failing = |doing| failed(dir, doing);
    let mut found = Vec::new();
    for entry in fs::read_dir(dir).map_err(failing("sweeping"))? {
        let place = entry.map_err(failing("sweeping"))?.path();
        let name = place.file_name().and_then(|name| name.to_str());
        let Some(id) = name.and_then(|name| Uuid::try_parse(name).ok()) else { continue };
        if !place.join(MARK).exists() {
            continue;
        }
        let Ok(held) = File::open(&place) else { continue };
        if flock(&held, FlockOperation::NonBlockingLockExclusive).is_ok() {
            found.push((id, place, held));
        }
    }
    Ok(found)
}

fn unmark(place: &Path) -> io::Result<()> {
    match fs::remove_file(place.join(MARK)) {
        Err(error) if error.kind() != ErrorKind::NotFound => Err(error),
        _ => sync_dir(place),
    }
}

fn new_file(path: &Path) -> io::Result<File> {
    OpenOptions::new().read(true).write(true).create_new(true).mode(0o600).open(path)
}

/// Leaves pages that are all zero as holes.
pub(crate) fn write_sparse(file: &File, offset: u64, data: &[u8]) -> io::Result<()> {
    let page = |at: usize| &data[at..data.len().min(at + PAGE)];
    let is_zero = |page: &[u8]| page.iter().all(|byte| *byte == 0);
    let mut start = 0;
    while start < data.len() {
        let mut end = start;
        while end < data.len() && !is_zero(page(end)) {
            end += page(end).len();
        }
        if end > start {
            file.write_all_at(&data[start..end], offset + start as u64)?;
        }
        // What stopped us is a page of zeroes, or the end.
        start = data.len().min(end + PAGE);
    }
    Ok(())
}

fn failed(path: &Path, doing: &'static str) -> impl FnOnce(io::Error) -> IncomingError {
    move |source| IncomingError::Io { path: path.to_owned(), doing, source }
}
