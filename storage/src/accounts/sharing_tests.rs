//! One database, several connections, in one process and in several.

use std::{
    env,
    fs::File,
    path::{Path, PathBuf},
    process::Command,
};

use nix::{
    fcntl::{FcntlArg, fcntl},
    libc,
};

use super::*;

const DATABASE: &str = "HERMITAGE_TEST_DATABASE";

/// Where SQLite keeps its shared locks in the file (SHARED_FIRST and SHARED_SIZE; part of its format).
const SHARED: libc::flock = libc::flock {
    l_type: libc::F_WRLCK as libc::c_short,
    l_whence: libc::SEEK_SET as libc::c_short,
    l_start: 0x4000_0002,
    l_len: 510,
    l_pid: 0,
};

fn add(accounts: &mut Accounts, name: &str) {
    accounts.create(&NewAccount::new(AccountName::parse(name).unwrap())).unwrap();
}

fn names(accounts: &Accounts) -> Vec<String> {
    accounts.list(false).unwrap().into_iter().map(|account| account.name).collect()
}

/// What another process does; no test of its own.
#[test]
fn another_process() {
    let Some(path) = env::var_os(DATABASE).map(PathBuf::from) else { return };
    let mut lock = SHARED;
    fcntl(File::open(&path).unwrap(), FcntlArg::F_GETLK(&mut lock)).unwrap();
    assert_eq!(lock.l_type, libc::F_RDLCK as libc::c_short, "nobody seems to use the database");
    let mut accounts = Accounts::open(&path).unwrap();
    assert_eq!(names(&accounts), ["alice"]);
    add(&mut accounts, "bob");
}

fn open_and_close_in_another_process(path: &Path) {
    let name = concat!(module_path!(), "::another_process");
    let (_, name) = name.split_once("::").unwrap();
    let output = Command::new(env::current_exe().unwrap())
        .args(["--exact", name])
        .env(DATABASE, path)
        .output()
        .unwrap();
    let said = String::from_utf8_lossy(&output.stdout).into_owned();
    assert!(output.status.success() && said.contains("1 passed"), "{said}");
}

/// Locks of fcntl(2) belong to the process, and go when it closes any descriptor of the file. A second
/// opening that did so took the first connection's locks: another process, closing, then took itself for
/// the last user and deleted the log (-wal) from under it, and what was written later was lost. SQLite
/// from 3.51 on looks twice before it deletes the log, hence the look at the lock itself.
#[test]
fn a_second_opening_leaves_the_first_ones_locks_alone() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("accounts.db");
    let mut first = Accounts::open(&path).unwrap();
    add(&mut first, "alice");
    let second = Accounts::open(&path).unwrap();
    open_and_close_in_another_process(&path);
    let log = dir.path().join("accounts.db-wal");
    assert!(log.exists(), "the log of open connections was deleted");
    for accounts in [&first, &second] {
        assert_eq!(names(accounts), ["alice", "bob"]);
    }
    add(&mut first, "carol");
    assert_eq!(names(&second), ["alice", "bob", "carol"]);
    drop((first, second));
    assert_eq!(names(&Accounts::open(&path).unwrap()), ["alice", "bob", "carol"]);
}
