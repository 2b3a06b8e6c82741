//! Copies of the database, and putting one back in its place.
//!
//! They lie beside it in `database-copies/`, each a whole database in one file. One is taken before a schema
//! is brought forward, and one a day by the service; a damaged database is never copied over good copies,
//! as each has a name of its own and the oldest go only when a newer one has been made.

use super::database::{Accounts, AccountsError, known_schema, version};
use crate::publish::{self, NewDir, NewFile};
use rusqlite::{Connection, OpenFlags};
use std::fs::{self, DirBuilder, File, OpenOptions};
use std::io;
use std::os::unix::fs::{DirBuilderExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::time::SystemTime;

/// Copies of a day that are kept.
pub const DAILY_KEPT: usize = 14;

const DAILY: &str = "daily-";
const SUFFIX: &str = ".db";
/// What belongs to a database besides its file (https://sqlite.org/tempfiles.html).
const COMPANIONS: [&str; 2] = ["-wal", "-shm"];

#[derive(Debug, thiserror::Error)]
pub enum CopyError {
    #[error("{}: {doing}: {source}", path.display())]
    Io { path: PathBuf, doing: &'static str, source: io::Error },
    #[error("{} could not be written: {source}", path.display())]
    Write { path: PathBuf, source: rusqlite::Error },
    #[error("{} is damaged, so it is not used: {}", path.display(), damage.join("; "))]
    Damaged { path: PathBuf, damage: Vec<String> },
    #[error(transparent)]
    Accounts(#[from] AccountsError),
}

fn failed(path: &Path, doing: &'static str) -> impl FnOnce(io::Error) -> CopyError {
    move |source| CopyError::Io { path: path.to_owned(), doing, source }
}

impl Accounts {
    /// Writes the database as it is at this moment to a file that is not there yet.
    pub fn copy_to(&self, target: &Path) -> Result<(), CopyError> {
        copy(&self.db, target)
    }
}

/// One of the copies beside a database.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct DatabaseCopy {
    pub name: String,
    pub path: PathBuf,
    pub taken: SystemTime,
    pub bytes: u64,
}

/// What is in a database file.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Examined {
    pub schema: i64,
    pub accounts: u32,
    /// Empty: it is sound.
    pub damage: Vec<String>,
}

/// The folder with the copies of a database.
#[derive(Clone, Debug)]
pub struct Copies {
    dir: PathBuf,
}

impl Copies {
    pub fn of(database: &Path) -> Self {
        Self { dir: database.with_file_name("database-copies") }
    }

    pub fn dir(&self) -> &Path {
        &self.dir
    }

    /// The newest first.
    pub fn list(&self) -> Result<Vec<DatabaseCopy>, CopyError> {
        let entries = match fs::read_dir(&self.dir) {
            Ok(entries) => entries,
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Vec::new()),
            Err(error) => return Err(failed(&self.dir, "reading the folder of copies")(error)),
        };
        let mut copies = Vec::new();
        for entry in entries {
            let entry = entry.map_err(failed(&self.dir, "reading the folder of copies"))?;
            let Ok(name) = entry.file_name().into_string() else { continue };
            let path = entry.path();
            if name.starts_with('.') || !name.ends_with(SUFFIX) {
                continue;
            }
            let looked = entry.metadata().and_then(|meta| Ok((meta.modified()?, meta.len())));
            let (taken, bytes) = looked.map_err(failed(&path, "looking at a copy"))?;
            copies.push(DatabaseCopy { name, path, taken, bytes });
        }
        copies.sort_by(|a, b| (b.taken, &b.name).cmp(&(a.taken, &a.name)));
        Ok(copies)
    }

    /// A copy of the database as it is at this moment, as `name`. `None`: there is one of that name.
    pub fn take(&self, accounts: &Accounts, name: &str) -> Result<Option<PathBuf>, CopyError> {
        self.take_of(&accounts.db, name)
    }

    pub(super) fn take_of(
        &self,
        db: &Connection,
        name: &str,
    ) -> Result<Option<PathBuf>, CopyError> {
        DirBuilder::new()
            .recursive(true)
            .mode(0o700)
            .create(&self.dir)
            .and_then(|()| publish::sweep(&self.dir))
            .map_err(failed(&self.dir, "making the folder of copies"))?;
        let path = self.dir.join(format!("{name}{SUFFIX}"));
        match copy(db, &path) {
            Ok(()) => Ok(Some(path)),
            Err(CopyError::Io { source, .. }) if source.kind() == io::ErrorKind::AlreadyExists => {
                Ok(None)
            }
            Err(error) => Err(error),
        }
    }

    /// The last copy of a day, if there is one.
    pub fn last_daily(&self) -> Result<Option<DatabaseCopy>, CopyError> {
        Ok(self.list()?.into_iter().find(|copy| copy.name.starts_with(DAILY)))
    }

    /// Takes the copy of a day, and lets go of the oldest beyond [`DAILY_KEPT`]. A damaged database is
    /// not copied.
    pub fn take_daily(&self, accounts: &Accounts, stamp: &str) -> Result<(), CopyError> {
        let damage = accounts.damage()?;
        if !damage.is_empty() {
            let path = accounts.db.path().unwrap_or_default().into();
            return Err(CopyError::Damaged { path, damage });
        }
        self.take(accounts, &format!("{DAILY}{stamp}"))?;
        let daily = self.list()?.into_iter().filter(|copy| copy.name.starts_with(DAILY));
        for old in daily.skip(DAILY_KEPT) {
            fs::remove_file(&old.path).map_err(failed(&old.path, "removing an old copy"))?;
        }
        Ok(())
    }

    /// Puts a copy in the place of the database. What was there is kept among the copies, as `aside`: damaged
    /// or not, somebody may want what is in it. Nobody may have the database open.
    pub fn restore(
        &self,
        database: &Path,
        from: &Path,
        aside: &str,
    ) -> Result<Examined, CopyError> {
        let examined = examine(from)?;
        if !examined.damage.is_empty() {
            return Err(CopyError::Damaged { path: from.to_owned(), damage: examined.damage });
        }
        let put = |new: &NewFile| -> io::Result<()> {
            let mut target = new.file();
            io::copy(&mut File::open(from)?, &mut target)?;
            target.sync_all()?;
            if !database.exists() {
                return Ok(());
            }
            DirBuilder::new().recursive(true).mode(0o700).create(&self.dir)?;
            let aside = self.dir.join(format!("{aside}{SUFFIX}"));
            // The file itself stays until the new one takes its place: without any, an empty database
            // would be made. Its log has to be gone by then: it would be applied to the new one.
            fs::hard_link(database, &aside)?;
            for companion in COMPANIONS {
                match fs::rename(with(database, companion), with(&aside, companion)) {
                    Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
                    _ => {}
                }
            }
            publish::sync_dir(&self.dir)?;
            publish::sync_dir(database.parent().unwrap_or(Path::new(".")))
        };
        let new = NewFile::create(database, 0o600);
        let new = new.map_err(failed(database, "making room for the restored database"))?;
        put(&new)
            .and_then(|()| new.publish())
            .map_err(failed(database, "restoring the database"))?;
        Ok(examined)
    }
}

/// Writes the database as it is at this moment to `target`, which must not be there: one whole file, mode
/// 0600, all or nothing.
fn copy(db: &Connection, target: &Path) -> Result<(), CopyError> {
    // SQLite makes a journal beside what it writes: both are in a folder that is swept as one.
    let dir = NewDir::create(target, 0o700).map_err(failed(target, "making a copy"))?;
    let new = dir.path().join("copy");
    // An empty file to write into, because it would make one that others can read.
    let file = OpenOptions::new().create_new(true).write(true).mode(0o600).open(&new);
    let file = file.map_err(failed(target, "making a copy"))?;
    db.execute("VACUUM INTO ?1", [new.to_string_lossy()])
        .map_err(|source| CopyError::Write { path: target.to_owned(), source })?;
    let parent = target.parent().filter(|parent| *parent != Path::new(""));
    file.sync_all()
        .and_then(|()| fs::hard_link(&new, target))
        .and_then(|()| publish::sync_dir(parent.unwrap_or(Path::new("."))))
        .map_err(failed(target, "publishing a copy"))
}

/// Looks into a database that nobody uses, without changing it.
pub fn examine(path: &Path) -> Result<Examined, AccountsError> {
    let open = |source| AccountsError::Open { path: path.to_owned(), source };
    let flags = OpenFlags::SQLITE_OPEN_READ_ONLY | OpenFlags::SQLITE_OPEN_NO_MUTEX;
    let db = Connection::open_with_flags(path, flags).map_err(open)?;
    let schema = version(&db).map_err(open)?;
    let known = known_schema();
    if schema > known {
        return Err(AccountsError::Newer { path: path.to_owned(), found: schema, known });
    }
    if schema == 0 {
        return Err(AccountsError::NotOurs(path.to_owned()));
    }
    let damage = damage(&db)?;
    let accounts = match damage.is_empty() {
        true => db.query_row("SELECT count(*) FROM accounts WHERE removed IS NULL", [], |row| {
            row.get(0)
        })?,
        false => 0,
    };
    Ok(Examined { schema, accounts, damage })
}

/// What SQLite finds wrong, at most ten things: pages, indexes, and rows without the account they name.
pub(super) fn damage(db: &Connection) -> Result<Vec<String>, AccountsError> {
    let look = || -> Result<Vec<String>, rusqlite::Error> {
        let mut statement = db.prepare("PRAGMA integrity_check(10)")?;
        let rows = statement.query_map([], |row| row.get(0))?;
        let mut found = rows.collect::<Result<Vec<String>, _>>()?;
        found.retain(|line| line != "ok");
        if found.is_empty() {
            let mut statement = db.prepare("PRAGMA foreign_key_check")?;
            let rows = statement.query_map([], |row| {
                Ok(format!(
                    "a row of {} names an account that is not there",
                    row.get::<_, String>(0)?
                ))
            })?;
            found = rows.take(10).collect::<Result<_, _>>()?;
        }
        Ok(found)
    };
    match look() {
        // Damage that keeps SQLite from looking for it.
        Err(error)
            if matches!(
                error.sqlite_error_code(),
                Some(rusqlite::ErrorCode::DatabaseCorrupt | rusqlite::ErrorCode::NotADatabase)
            ) =>
        {
            Ok(vec![error.to_string()])
        }
        looked => Ok(looked?),
    }
}

fn with(path: &Path, suffix: &str) -> PathBuf {
    let mut name = path.as_os_str().to_owned();
    name.push(suffix);
    name.into()
}

#[cfg(test)]
#[path = "copies_tests.rs"]
mod tests;
