use std::fs::OpenOptions;
use std::os::unix::fs::{FileExt as _, PermissionsExt as _};

use super::*;
use crate::accounts::Accounts;
use crate::archive::tests::Host;
use crate::archive::{BackMemory, RestoreError, Restored, Wish, describe, restore};
use crate::rest::AtRest;
use crate::sparse;

/// Far from any change of a test's files.
const LATER: i64 = 1 << 40;

struct Shelf {
    host: Host,
    dir: tempfile::TempDir,
}

impl Shelf {
    fn new() -> Self {
        Self { host: Host::new(), dir: tempfile::tempdir().unwrap() }
    }

    fn path(&self) -> PathBuf {
        self.dir.path().join("backup")
    }

    /// A run of all accounts; what became of each.
    fn run(&self, now: i64) -> (Written, Vec<Added>) {
        let accounts = self.host.accounts();
        let mut writer = Writer::begin(Backup::open_or_make(&self.path()).unwrap(), now).unwrap();
        let mut added = vec![];
        for account in accounts.list(false).unwrap() {
            let at_rest = AtRest::take(&self.host.state, account.id).unwrap();
            let manifest = describe(&accounts, &account, at_rest.kept(), true, "0", now).unwrap();
            added.push(writer.add(manifest, at_rest.kept()).unwrap());
        }
        writer.leave_out("zoe", "she is busy".into());
        (writer.finish(&accounts, self.host.state.root(), "20261121-101530", "0").unwrap(), added)
    }

    fn change(&self, name: &str, at: u64) {
        let id = self.host.accounts().named(name).unwrap().id;
        let disk = OpenOptions::new().write(true).open(self.host.state.disk(id)).unwrap();
        disk.write_all_at(&[0xcc; 10], at).unwrap();
    }

    fn digest(&self, name: &str) -> String {
        digest(&self.host, name)
    }

    fn restore(&self, run: &str, name: &str) -> (Host, Result<Restored, RestoreError>) {
        let there = Host::new();
        let restored = || -> Result<Restored, RestoreError> {
            let backup = Backup::open(&self.path())?;
            let run = backup.run(Some(run))?;
            let wish = Wish { name: None, memory: true, room: 1 << 30 };
            restore(&there.state, &mut there.accounts(), backup.account(&run, name)?, &wish)
        };
        let restored = restored();
        (there, restored)
    }

    /// Every file below it.
    fn files(&self) -> Vec<PathBuf> {
        let mut folders = vec![self.path()];
        let mut files = vec![];
        while let Some(folder) = folders.pop() {
            for entry in fs::read_dir(folder).unwrap() {
                let path = entry.unwrap().path();
                if path.is_dir() { folders.push(path) } else { files.push(path) }
            }
        }
        files.sort();
        files
    }
}

fn digest(host: &Host, name: &str) -> String {
    let id = host.accounts().named(name).unwrap().id;
    sparse::digest(&File::open(host.state.disk(id)).unwrap()).unwrap().to_string()
}

#[test]
fn each_run_is_whole_and_what_has_not_changed_is_there_once() {
    let shelf = Shelf::new();
    shelf.host.account("alice", true);
    shelf.host.account("bob", false);
    let (first, _) = shelf.run(LATER);
    let before = shelf.digest("alice");
    shelf.change("alice", 5_000_000);
    let (second, added) = shelf.run(LATER);
    assert_eq!([added[0].unchanged, added[1].unchanged], [false, true]);
    assert_eq!(added[1].written, 0, "bob is as he was");
    assert!(second.bytes < first.bytes, "{} after {}", second.bytes, first.bytes);
    assert_eq!((&*first.run.id, &*second.run.id), ("20261121-101530", "20261121-101530-2"));
    assert_eq!(second.run.content.left_out[0].name, "zoe");

    let (there, restored) = shelf.restore(&first.run.id, "alice");
    let restored = restored.unwrap();
    assert!(matches!(restored.memory, BackMemory::Kept(_)));
    assert_eq!(digest(&there, "alice"), before);
    assert!(AtRest::take(&there.state, restored.account.id).unwrap().saved().is_some());
    let (there, restored) = shelf.restore(&second.run.id, "alice");
    restored.unwrap();
    assert_eq!(digest(&there, "alice"), shelf.digest("alice"));
    assert_ne!(before, shelf.digest("alice"));
    let (there, restored) = shelf.restore(&second.run.id, "carol");
    assert!(matches!(restored, Err(RestoreError::Backup(BackupError::UnknownAccount { .. }))));
    there.assert_empty();
}

#[test]
fn a_change_that_may_have_the_time_of_another_is_not_missed() {
    let shelf = Shelf::new();
    shelf.host.account("alice", false);
    let now = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH).unwrap();
    let now = now.as_secs() as i64;
    shelf.run(now);
    assert!(!shelf.run(now).1[0].unchanged, "its last change is a moment ago");
    shelf.run(now + 10);
    assert!(shelf.run(now + 20).1[0].unchanged);
    shelf.change("alice", 4096);
    assert!(!shelf.run(now + 30).1[0].unchanged);
}

#[test]
fn a_flipped_byte_in_any_file_is_found_and_what_is_restored_is_right_or_nothing() {
    let shelf = Shelf::new();
    shelf.host.account("alice", true);
    let (written, _) = shelf.run(LATER);
    let id = written.run.id;
    let good = shelf.digest("alice");
    let check = || -> Result<u64, BackupError> {
        let backup = Backup::open(&shelf.path())?;
        backup.verify(&backup.run(Some(&id))?)
    };
    check().unwrap();
    for path in shelf.files() {
        assert_eq!(fs::metadata(&path).unwrap().permissions().mode() & 0o777, 0o600);
        let bytes = fs::read(&path).unwrap();
        let length = bytes.len();
        for at in [0, 5, length / 3, length / 2, length - 1] {
            let mut altered = bytes.clone();
            altered[at] ^= 0x10;
            fs::write(&path, &altered).unwrap();
            let found = check();
            // The decoded bytes decide: zstd does not use all of its own.
            if found.is_ok() {
                let (there, restored) = shelf.restore(&id, "alice");
                restored.unwrap();
                assert_eq!(digest(&there, "alice"), good, "byte {at} of {}", path.display());
            } else if let (there, Err(_)) = shelf.restore(&id, "alice") {
                there.assert_empty();
            }
        }
        fs::remove_file(&path).unwrap();
        assert!(check().is_err(), "{}", path.display());
        fs::write(&path, &bytes).unwrap();
        fs::set_permissions(&path, fs::Permissions::from_mode(0o600)).unwrap();
    }
    check().unwrap();
}

#[test]
fn what_no_run_names_is_not_trusted() {
    let shelf = Shelf::new();
    shelf.host.account("alice", false);
    let (written, _) = shelf.run(LATER);
    // As after a power cut: the pieces are there and cut short, the run never came to be.
    fs::remove_file(shelf.path().join("runs").join(&written.run.id)).unwrap();
    for path in shelf.files().iter().filter(|path| !path.ends_with(MARK)) {
        fs::write(path, "").unwrap();
    }
    let (written, _) = shelf.run(LATER);
    let backup = Backup::open(&shelf.path()).unwrap();
    backup.verify(&written.run).unwrap();
}

#[test]
fn old_runs_go_with_what_they_alone_name() {
    let shelf = Shelf::new();
    shelf.host.account("alice", false);
    shelf.run(LATER);
    shelf.change("alice", 3 << 20);
    shelf.run(LATER);
    shelf.change("alice", 3 << 20 | 50);
    let (last, _) = shelf.run(LATER);
    let files = shelf.files().len();
    let backup = Backup::open_alone(&shelf.path()).unwrap();
    let pruned = prune(&backup, 1).unwrap();
    assert_eq!((pruned.removed.len(), pruned.kept), (2, 1));
    assert!(pruned.freed > 0 && shelf.files().len() < files - 2);
    backup.verify(&last.run).unwrap();
    assert_eq!(prune(&backup, 1).unwrap().freed, 0);
    drop(backup);
    let (there, restored) = shelf.restore(&last.run.id, "alice");
    restored.unwrap();
    assert_eq!(digest(&there, "alice"), shelf.digest("alice"));
}

#[test]
fn the_database_comes_along() {
    let shelf = Shelf::new();
    shelf.host.account("alice", true);
    let (written, _) = shelf.run(LATER);
    let backup = Backup::open(&shelf.path()).unwrap();
    let to = shelf.dir.path().join("accounts.db");
    backup.database(&written.run, &to).unwrap();
    assert_eq!(fs::metadata(&to).unwrap().permissions().mode() & 0o777, 0o600);
    let copy = Accounts::open(&to).unwrap();
    assert_eq!(copy.damage().unwrap(), Vec::<String>::new());
    assert_eq!(copy.list(true).unwrap(), shelf.host.accounts().list(true).unwrap());
    assert!(backup.database(&written.run, &to).is_err(), "it is there already");
}

#[test]
fn only_backups_are_written_to_and_by_one_at_a_time() {
    let shelf = Shelf::new();
    let other = shelf.dir.path().join("other");
    fs::create_dir(&other).unwrap();
    fs::write(other.join("letter"), "dear").unwrap();
    assert!(matches!(Backup::open_or_make(&other), Err(BackupError::NotABackup(_))));
    // What one leaves that was killed while it made one is taken up.
    let begun = other.with_file_name("begun");
    fs::create_dir_all(begun.join("chunks")).unwrap();
    fs::write(begun.join(".new-mark"), "").unwrap();
    Backup::open_or_make(&begun).unwrap();
    assert!(!begun.join(".new-mark").exists());
    assert!(matches!(Backup::open(&other), Err(BackupError::NotABackup(_))));
    let held = Backup::open_or_make(&shelf.path()).unwrap();
    assert!(matches!(Backup::open(&shelf.path()), Err(BackupError::Busy(_))));
    assert!(matches!(held.run(None), Err(BackupError::NoRun)));
    drop(held);
    let _reading = Backup::open(&shelf.path()).unwrap();
    Backup::open(&shelf.path()).unwrap();
    assert!(matches!(Backup::open_alone(&shelf.path()), Err(BackupError::Busy(_))));
    fs::write(shelf.path().join(MARK), "hermitage backup 2\n").unwrap();
    assert!(matches!(Backup::open(&shelf.path()), Err(BackupError::Version(_))));
}
