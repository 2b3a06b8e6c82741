//! The sessions log: who came from where, for what, and how it ended.

use super::account::id_column;
use super::database::{Accounts, AccountsError, now};
use rusqlite::{OptionalExtension, Row, params};
use uuid::Uuid;

#[derive(Clone, Debug)]
pub struct NewSession<'a> {
    pub account: Uuid,
    /// Address and port of the client.
    pub source: &'a str,
    /// `shell`, `exec`, `sftp`, …
    pub kind: &'a str,
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub struct SessionRecord {
    pub id: i64,
    pub account: Uuid,
    pub source: String,
    pub kind: String,
    pub started: i64,
    /// `None`: going on.
    pub ended: Option<i64>,
    pub outcome: Option<String>,
}

const COLUMNS: &str = "id, account, source, kind, started, ended, outcome";

impl Accounts {
    /// Returns the number under which to tell its end.
    pub fn session_started(&self, session: &NewSession) -> Result<i64, AccountsError> {
        self.db.execute(
            "INSERT INTO sessions (account, source, kind, started) VALUES (?1, ?2, ?3, ?4)",
            params![session.account.to_string(), session.source, session.kind, now()],
        )?;
        Ok(self.db.last_insert_rowid())
    }

    /// Only the first end counts.
    pub fn session_ended(&self, id: i64, outcome: &str) -> Result<(), AccountsError> {
        self.db.execute(
            "UPDATE sessions SET ended = ?2, outcome = ?3 WHERE id = ?1 AND ended IS NULL",
            params![id, now(), outcome],
        )?;
        Ok(())
    }

    /// For the start of the service: what is still open was cut off with the former one. Returns how
    /// many there were.
    pub fn end_open_sessions(&self, outcome: &str) -> Result<usize, AccountsError> {
        Ok(self.db.execute(
            "UPDATE sessions SET ended = ?1, outcome = ?2 WHERE ended IS NULL",
            params![now(), outcome],
        )?)
    }

    /// The last sessions of an account, the latest first.
    pub fn sessions(&self, account: Uuid, most: u32) -> Result<Vec<SessionRecord>, AccountsError> {
        let mut statement = self.db.prepare_cached(&format!(
            "SELECT {COLUMNS} FROM sessions WHERE account = ?1 ORDER BY id DESC LIMIT ?2"
        ))?;
        let rows = statement.query_map(params![account.to_string(), most], session)?;
        Ok(rows.collect::<Result<_, _>>()?)
    }

    /// When an account's last shell was started, and from where; of its last thousand sessions.
    pub fn last_shell(&self, account: Uuid) -> Result<Option<(i64, String)>, AccountsError> {
        let mut statement = self.db.prepare_cached(
            "SELECT started, source FROM \
             (SELECT * FROM sessions WHERE account = ?1 ORDER BY id DESC LIMIT 1000) \
             WHERE kind = 'shell' ORDER BY id DESC LIMIT 1",
        )?;
        let row = statement.query_row([account.to_string()], |row| Ok((row.get(0)?, row.get(1)?)));
        Ok(row.optional()?)
    }
}

fn session(row: &Row) -> Result<SessionRecord, rusqlite::Error> {
    Ok(SessionRecord {
        id: row.get(0)?,
        account: id_column(row, 1)?,
        source: row.get(2)?,
        kind: row.get(3)?,
        started: row.get(4)?,
        ended: row.get(5)?,
        outcome: row.get(6)?,
    })
}
