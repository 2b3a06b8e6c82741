use super::super::fixtures::{database, new};
use super::super::*;
use super::{DAILY_KEPT, copy};
use std::fs;
use std::os::unix::fs::MetadataExt;
use std::time::{Duration, SystemTime};

#[test]
fn a_copy_is_whole_and_private_and_can_take_the_databases_place() {
    let (dir, mut accounts) = database();
    let path = dir.path().join("accounts.db");
    accounts.create(&new("alice")).unwrap();
    let copies = Copies::of(&path);
    assert!(copies.list().unwrap().is_empty());
    let taken = copies.take(&accounts, "manual-1").unwrap().unwrap();
    assert_eq!(copies.take(&accounts, "manual-1").unwrap(), None, "each has its own name");
    assert_eq!(fs::metadata(&taken).unwrap().mode() & 0o777, 0o600);
    assert_eq!(fs::metadata(copies.dir()).unwrap().mode() & 0o777, 0o700);
    let examined = examine(&taken).unwrap();
    assert_eq!((examined.accounts, examined.damage.len()), (1, 0));

    accounts.create(&new("bob")).unwrap();
    drop(accounts);
    copies.restore(&path, &taken, "replaced-1").unwrap();
    let restored = Accounts::open(&path).unwrap();
    let names = |accounts: &Accounts| -> Vec<String> {
        accounts.list(true).unwrap().into_iter().map(|account| account.name).collect()
    };
    assert_eq!(names(&restored), ["alice"]);
    assert_eq!(restored.keys(restored.named("alice").unwrap().id).unwrap().len(), 2);
    // What it took the place of is there, with what was only in its log.
    let aside = Accounts::open(&copies.dir().join("replaced-1.db")).unwrap();
    assert_eq!(names(&aside), ["alice", "bob"]);
}

#[test]
fn what_was_only_in_the_log_goes_aside_with_its_database() {
    let (dir, mut accounts) = database();
    let path = dir.path().join("accounts.db");
    let copies = Copies::of(&path);
    let empty = copies.take(&accounts, "empty").unwrap().unwrap();
    accounts.create(&new("alice")).unwrap();
    // As after a crash: nobody has closed it, so the log still has everything.
    let crashed = tempfile::tempdir().unwrap();
    let there = crashed.path().join("accounts.db");
    for suffix in ["", "-wal"] {
        fs::copy(super::with(&path, suffix), super::with(&there, suffix)).unwrap();
    }
    let copies = Copies::of(&there);
    copies.restore(&there, &empty, "replaced").unwrap();
    assert!(Accounts::open(&there).unwrap().list(true).unwrap().is_empty());
    let aside = Accounts::open(&copies.dir().join("replaced.db")).unwrap();
    assert!(aside.by_name("alice").unwrap().is_some());
}

#[test]
fn damage_is_found_and_never_copied_or_restored() {
    let (dir, mut accounts) = database();
    for number in 0..50 {
        accounts.create(&new(&format!("user{number}"))).unwrap();
    }
    let path = dir.path().join("accounts.db");
    let copies = Copies::of(&path);
    let good = copies.take(&accounts, "good").unwrap().unwrap();
    let mut bytes = fs::read(&good).unwrap();
    let middle = bytes.len() / 2;
    bytes[middle..middle + 2000].fill(0xa5);
    let bad = copies.dir().join("bad.db");
    fs::write(&bad, &bytes).unwrap();
    assert!(!examine(&bad).unwrap().damage.is_empty());
    assert!(matches!(copies.restore(&path, &bad, "x"), Err(CopyError::Damaged { .. })));
    let garbage = copies.dir().join("garbage.db");
    fs::write(&garbage, [7; 8192]).unwrap();
    assert!(examine(&garbage).is_err());
    let other = copies.dir().join("other.db");
    rusqlite::Connection::open(&other).unwrap().execute("CREATE TABLE t (x)", []).unwrap();
    assert!(matches!(examine(&other), Err(AccountsError::NotOurs(_))));

    drop(accounts);
    fs::write(&path, &bytes).unwrap();
    if let Ok(damaged) = Accounts::open(&path) {
        assert!(!damaged.damage().unwrap().is_empty());
        assert!(matches!(copies.take_daily(&damaged, "x"), Err(CopyError::Damaged { .. })));
    }
    copies.restore(&path, &good, "replaced").unwrap();
    assert_eq!(Accounts::open(&path).unwrap().list(false).unwrap().len(), 50);
}

#[test]
fn a_row_without_its_account_is_damage() {
    let (_dir, accounts) = database();
    assert!(accounts.damage().unwrap().is_empty());
    accounts.db.pragma_update(None, "foreign_keys", false).unwrap();
    let sql = "INSERT INTO machines (account, state, since) VALUES ('nobody', 'stopped', 1)";
    accounts.db.execute(sql, []).unwrap();
    assert!(accounts.damage().unwrap()[0].contains("machines"));
}

#[test]
fn so_many_copies_of_days_are_kept_and_all_others() {
    let (dir, accounts) = database();
    let copies = Copies::of(&dir.path().join("accounts.db"));
    assert!(copies.last_daily().unwrap().is_none());
    copies.take(&accounts, "manual-0").unwrap();
    for day in 0..DAILY_KEPT + 3 {
        copies.take_daily(&accounts, &format!("{day:02}")).unwrap();
        // Days, not moments, are between them.
        let age = Duration::from_secs(86_400 * (100 - day as u64));
        let copy = fs::File::open(copies.dir().join(format!("daily-{day:02}.db"))).unwrap();
        copy.set_modified(SystemTime::now() - age).unwrap();
    }
    let names: Vec<_> = copies.list().unwrap().into_iter().map(|copy| copy.name).collect();
    assert_eq!(names.len(), DAILY_KEPT + 1);
    assert_eq!((names[0].as_str(), names[1].as_str()), ("manual-0.db", "daily-16.db"));
    assert_eq!(copies.last_daily().unwrap().unwrap().name, "daily-16.db");
    assert!(!names.contains(&"daily-02.db".to_owned()), "{names:?}");
}

#[test]
fn a_copy_elsewhere_replaces_nothing() {
    let (dir, accounts) = database();
    let target = dir.path().join("elsewhere.db");
    copy(&accounts.db, &target).unwrap();
    assert!(copy(&accounts.db, &target).is_err());
}
