//! The database file: opening it, and bringing its schema forward.

use super::{Copies, CopyError, OptionError, copies};
use rusqlite::{Connection, ErrorCode, OpenFlags, TransactionBehavior};
use std::fs::OpenOptions;
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};
use std::thread;
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

/// How long a call waits for another process' transaction.
pub const BUSY: Duration = Duration::from_secs(5);

const SCHEMA: &str = include_str!("../../../accounts.sql");

/// The accounts database. Not `Sync`: give each thread its own, or one a lock.
#[derive(Debug)]
pub struct Accounts {
    pub(super) db: Connection,
}

#[derive(Debug, thiserror::Error)]
pub enum AccountsError {
    #[error("{} could not be made or opened: {source}", path.display())]
    File { path: PathBuf, source: std::io::Error },
    #[error("{} could not be opened as an accounts database: {source}", path.display())]
    Open { path: PathBuf, source: rusqlite::Error },
    #[error(
        "{} has schema {found}, this program knows up to {known}: it was last used by a newer Hermitage. \
         Use that version or a copy of the database from before",
        path.display()
    )]
    Newer { path: PathBuf, found: i64, known: i64 },
    #[error("{} is a database, but none of accounts", .0.display())]
    NotOurs(PathBuf),
    #[error("before the schema is brought forward, the database is copied; that failed: {0}")]
    Copy(#[source] Box<CopyError>),
    #[error("the schema could not be brought from {from} to {to}; nothing was changed: {source}")]
    Migrate { from: i64, to: i64, source: rusqlite::Error },
    #[error("there is already an account \"{0}\"")]
    NameTaken(String),
    #[error("there is no account \"{0}\" (hermitage account list shows which there are)")]
    Unknown(String),
    #[error(
        "the key {key} is there already, with {}; take it away first to give it others",
        shown(options)
    )]
    OtherOptions { key: String, options: String },
    #[error(
        "the options of the key {key} are not understood, so it opens nothing; take it away and add it \
         again: {source}"
    )]
    Options { key: String, source: OptionError },
    #[error("the limit {what} can't be {value}")]
    Limit { what: &'static str, value: u64 },
    #[error("the accounts database: {0}")]
    Database(#[from] rusqlite::Error),
}

/// SQLite begins to empty the log at 1000 pages (`wal_autocheckpoint`), and goes on to write while that waits for readers.
const LOG_BYTES: i64 = 1200 * 4096;

impl Accounts {
    /// Opens the database, makes it if there is none (mode 0600), and brings its schema up to date.
    pub fn open(path: &Path) -> Result<Self, AccountsError> {
        // SQLite would make it readable for all; its WAL and index take over the mode. Only a file that
        // is not there is opened here: closing any descriptor of one that is would drop the locks of this
        // process's other connections (https://sqlite.org/howtocorrupt.html §2.2).
        match OpenOptions::new().create_new(true).write(true).mode(0o600).open(path) {
            Ok(_) => {}
            Err(error) if error.kind() == std::io::ErrorKind::AlreadyExists => {}
            Err(source) => return Err(AccountsError::File { path: path.to_owned(), source }),
        }
        let open = |source| AccountsError::Open { path: path.to_owned(), source };
        let flags = OpenFlags::SQLITE_OPEN_READ_WRITE | OpenFlags::SQLITE_OPEN_NO_MUTEX;
        let mut db = Connection::open_with_flags(path, flags).map_err(open)?;
        patiently(|| configure(&db)).map_err(open)?;
        migrate(&mut db, path, &sections(SCHEMA))?;
        Ok(Self { db })
    }

    /// Makes the log (`-wal`) as long as it usually gets, so that what an operator does when the disk is full still has
    /// room: the log is kept for as long as the database is open, and written again from its start. Pages of a
    /// transaction that is taken back are the only ones one may have too many of.
    pub fn reserve_log(&mut self) -> Result<(), AccountsError> {
        let kept: i64 = self.db.pragma_query_value(None, "cache_size", |row| row.get(0))?;
        // So few that what is written does not wait in memory for a commit that never comes.
        self.db.pragma_update(None, "cache_size", 10)?;
        let step = self.db.transaction_with_behavior(TransactionBehavior::Immediate)?;
        let filled = step
            .execute_batch("CREATE TABLE reserve (bytes BLOB)")
            .and_then(|()| step.execute("INSERT INTO reserve VALUES (zeroblob(?))", [LOG_BYTES]));
        step.rollback()?;
        self.db.pragma_update(None, "cache_size", kept)?;
        filled.map(drop).map_err(AccountsError::from)
    }

    /// What is wrong with the database, at most ten things. Empty: it is sound.
    pub fn damage(&self) -> Result<Vec<String>, AccountsError> {
        copies::damage(&self.db)
    }
}

/// Making a new database a WAL one takes a lock for which SQLite does not wait, whatever the busy
/// timeout: two first users at once meet there.
fn patiently(mut call: impl FnMut() -> Result<(), rusqlite::Error>) -> Result<(), rusqlite::Error> {
    let deadline = Instant::now() + BUSY;
    loop {
        match call() {
            Err(error)
                if error.sqlite_error_code() == Some(ErrorCode::DatabaseBusy)
                    && Instant::now() < deadline =>
            {
                thread::sleep(Duration::from_millis(10));
            }
            done => return done,
        }
    }
}

fn configure(db: &Connection) -> Result<(), rusqlite::Error> {
    db.busy_timeout(BUSY)?;
    db.pragma_update(None, "journal_mode", "WAL")?;
    // What a command reported as done must outlive a power cut; NORMAL would not promise that with WAL.
    db.pragma_update(None, "synchronous", "FULL")?;
    db.pragma_update(None, "foreign_keys", true)?;
    // A removed key or password hash must not linger in free pages.
    db.pragma_update(None, "secure_delete", true)?;
    db.pragma_update(None, "trusted_schema", false)
}

/// The sections of `accounts.sql`, in order.
fn sections(schema: &str) -> Vec<&str> {
    schema.split("\n-- section ").skip(1).map(after_first_line).collect()
}

fn after_first_line(text: &str) -> &str {
    text.split_once('\n').map_or("", |(_, rest)| rest)
}

fn migrate(db: &mut Connection, path: &Path, sections: &[&str]) -> Result<(), AccountsError> {
    let open = |source| AccountsError::Open { path: path.to_owned(), source };
    let known = sections.len() as i64;
    let before = version(db).map_err(open)?;
    if (1..known).contains(&before) {
        // Going back to the program from before takes the database from before.
        Copies::of(path)
            .take_of(db, &format!("before-schema-{known}"))
            .map_err(|error| AccountsError::Copy(error.into()))?;
    }
    loop {
        if version(db).map_err(open)? == known {
            return Ok(());
        }
        let step = db.transaction_with_behavior(TransactionBehavior::Immediate).map_err(open)?;
        // Again, now that nobody else can be migrating.
        let from = version(&step).map_err(open)?;
        let left = usize::try_from(from).ok().and_then(|from| sections.get(from..));
        let steps = match (left, from) {
            (Some([]), _) => return Ok(()),
            // A new one appears whole: nobody is to take it for one of a former version.
            (Some(all), 0) => all,
            (Some(left), _) => &left[..1],
            (None, _) => {
                return Err(AccountsError::Newer { path: path.to_owned(), found: from, known });
            }
        };
        let to = from + steps.len() as i64;
        step.execute_batch(&steps.join("\n"))
            .and_then(|()| step.pragma_update(None, "user_version", to))
            .and_then(|()| step.commit())
            .map_err(|source| AccountsError::Migrate { from, to, source })?;
    }
}

/// The schema that this program brings databases to.
pub(super) fn known_schema() -> i64 {
    sections(SCHEMA).len() as i64
}

pub(super) fn version(db: &Connection) -> Result<i64, rusqlite::Error> {
    db.pragma_query_value(None, "user_version", |row| row.get(0))
}

fn shown(options: &str) -> String {
    if options.is_empty() { "no options".into() } else { format!("the options {options}") }
}

/// Now, as the database keeps it.
pub(super) fn now() -> i64 {
    SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |d| d.as_secs() as i64)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::MetadataExt;

    #[test]
    fn the_log_has_its_length_ahead_and_keeps_it() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("accounts.db");
        let mut accounts = Accounts::open(&path).unwrap();
        let log = || std::fs::metadata(dir.path().join("accounts.db-wal")).unwrap();
        for _ in 0..2 {
            accounts.reserve_log().unwrap();
            assert!(log().len() >= LOG_BYTES as u64, "{} bytes", log().len());
            // Blocks, not a hole.
            assert!(std::os::unix::fs::MetadataExt::blocks(&log()) * 512 >= LOG_BYTES as u64);
            assert!(accounts.damage().unwrap().is_empty());
        }
        let reserve = "SELECT count(*) FROM sqlite_schema WHERE name = 'reserve'";
        let tables: i64 = accounts.db.query_row(reserve, [], |row| row.get(0)).unwrap();
        assert_eq!(tables, 0);
        let before = log().len();
        for name in ["one", "two"] {
            accounts.db.execute_batch(&format!("CREATE TABLE {name} (x)")).unwrap();
        }
        assert_eq!(log().len(), before);
    }

    #[test]
    fn a_new_database_is_private_and_has_the_schema() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("accounts.db");
        let accounts = Accounts::open(&path).unwrap();
        assert_eq!(version(&accounts.db).unwrap(), sections(SCHEMA).len() as i64);
        for entry in std::fs::read_dir(dir.path()).unwrap() {
            let entry = entry.unwrap();
            assert_eq!(entry.metadata().unwrap().mode() & 0o777, 0o600, "{:?}", entry.path());
        }
        let mode: String =
            accounts.db.pragma_query_value(None, "journal_mode", |row| row.get(0)).unwrap();
        assert_eq!(mode, "wal");
        drop(accounts);
        Accounts::open(&path).unwrap();
    }

    #[test]
    fn a_newer_schema_is_refused_with_words() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("accounts.db");
        let accounts = Accounts::open(&path).unwrap();
        accounts.db.pragma_update(None, "user_version", 99).unwrap();
        drop(accounts);
        let error = Accounts::open(&path).unwrap_err();
        assert!(matches!(error, AccountsError::Newer { found: 99, .. }));
        assert!(error.to_string().contains("newer Hermitage"), "{error}");
    }

    #[test]
    fn what_is_no_database_is_refused() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("accounts.db");
        std::fs::write(&path, vec![7; 8192]).unwrap();
        assert!(matches!(Accounts::open(&path), Err(AccountsError::Open { .. })));
        assert_eq!(std::fs::read(&path).unwrap(), vec![7; 8192], "and left as it was");
    }

    #[test]
    fn a_failed_migration_changes_nothing() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("accounts.db");
        let mut db = Accounts::open(&path).unwrap().db;
        let before = version(&db).unwrap();
        let mut steps = sections(SCHEMA);
        steps.push("CREATE TABLE extra (x INTEGER) STRICT; CREATE TABLE accounts (x INTEGER);");
        let error = migrate(&mut db, &path, &steps).unwrap_err();
        assert!(matches!(error, AccountsError::Migrate { .. }));
        assert_eq!(version(&db).unwrap(), before);
        assert!(!db.table_exists(None, "extra").unwrap());
    }

    #[test]
    fn migrations_from_two_processes_meet() {
        let dir = tempfile::tempdir().unwrap();
        for round in 0..20 {
            let path = dir.path().join(format!("{round}.db"));
            std::thread::scope(|scope| {
                for _ in 0..4 {
                    scope.spawn(|| Accounts::open(&path).unwrap());
                }
            });
        }
    }
}
