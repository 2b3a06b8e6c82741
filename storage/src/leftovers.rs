//! What killed programs left half-made, wherever something is made: all of it is named by [`publish`], whose lock tells
//! what somebody still writes.

use std::fs;
use std::io::{self, ErrorKind};
use std::path::PathBuf;

use uuid::Uuid;

use crate::accounts::Copies;
use crate::{StateDir, publish};

/// Where things are made that are not an account's.
pub fn shared_folders(state: &StateDir) -> Vec<PathBuf> {
    vec![
        state.root().to_owned(),
        state.images_dir(),
        state.bases_dir(),
        state.disk_templates_dir(),
        Copies::of(&state.database()).dir().to_owned(),
    ]
}

/// And where those of one account are.
pub fn account_folders(state: &StateDir, account: Uuid) -> Vec<PathBuf> {
    vec![state.account_dir(account), state.checkpoints_dir(account)]
}

/// All of them.
pub fn folders(state: &StateDir) -> Vec<PathBuf> {
    let accounts = fs::read_dir(state.accounts_dir()).into_iter().flatten().flatten();
    let ids = accounts.filter_map(|entry| Uuid::try_parse(entry.file_name().to_str()?).ok());
    let theirs = ids.flat_map(|id| account_folders(state, id));
    shared_folders(state).into_iter().chain(theirs).collect()
}

/// Deletes what is left in these folders, as far as they are there. Goes on after an error; the first one is told, and
/// what was deleted.
pub fn sweep(folders: impl IntoIterator<Item = PathBuf>) -> (Vec<PathBuf>, io::Result<()>) {
    let (mut swept, mut fault) = (Vec::new(), Ok(()));
    for folder in folders {
        match publish::sweep(&folder) {
            Ok(names) => swept.extend(names),
            Err(error) if error.kind() == ErrorKind::NotFound => {}
            Err(error) => {
                let told = format!("{}: {error}", folder.display());
                fault = fault.and(Err(io::Error::new(error.kind(), told)));
            }
        }
    }
    (swept, fault)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::publish::NewFile;

    #[test]
    fn what_nobody_writes_is_deleted_wherever_something_is_made() {
        let dir = tempfile::tempdir().unwrap();
        let state = StateDir::new(dir.path());
        state.create().unwrap();
        let id = Uuid::from_u128(7);
        fs::create_dir_all(state.checkpoints_dir(id)).unwrap();
        fs::create_dir_all(Copies::of(&state.database()).dir()).unwrap();
        let all = folders(&state);
        assert_eq!(all.len(), 7, "{all:?}");
        for folder in &all {
            fs::create_dir_all(folder).unwrap();
            fs::write(folder.join(".new-left"), "half").unwrap();
        }
        fs::write(state.account_dir(id).join("disk.img"), "a disk").unwrap();
        let held = NewFile::create(&state.account_dir(id).join("export"), 0o600).unwrap();
        let gone = state.account_dir(Uuid::from_u128(8));
        let (swept, fault) = sweep(all.into_iter().chain([gone]));
        fault.unwrap();
        assert_eq!(swept.len(), 7, "{swept:?}");
        assert!(swept.iter().all(|path| !path.exists()));
        assert!(held.path().exists() && state.disk(id).exists());
    }
}
