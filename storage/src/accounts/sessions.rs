//! The sessions log: who came from where, for what, and how it ended.

use super::account::id_column;
use super::database::{Accounts, AccountsError, now};
use super::usage;
use rusqlite::{OptionalExtension, Row, params};
use uuid::Uuid;

#[derive(Clone, Debug)]
pub struct NewSession<'a> {
    pub account: Uuid,
    /// Address and port of the client.
    pub source: &'a str,
    /// `shell`, `exec`, `sftp`, …
    pub kind: &'a str,
    /// What the login was by: `key SHA256:…`, `password`, `certificate …`.
    pub login: &'a str,
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
    /// `None`: from before this was kept.
    pub login: Option<String>,
    /// How it found its machine: `running`, `forked`, `resumed`, `cold`. `None`: it got none, or goes on.
    pub machine: Option<String>,
}

/// Which part of the log.
#[derive(Clone, Debug)]
pub struct LogQuery {
    /// `None`: of all accounts, removed ones too.
    pub account: Option<Uuid>,
    /// Sessions that were going on at that time, or began later.
    pub since: Option<i64>,
    /// At most so many, the latest.
    pub most: u32,
}

const COLUMNS: &str = "id, account, source, kind, started, ended, outcome, login, machine";

impl Accounts {
    /// Returns the number under which to tell its end. The account's day counts it too, at once with it.
    pub fn session_started(&self, session: &NewSession) -> Result<i64, AccountsError> {
        let tx = self.db.unchecked_transaction()?;
        tx.execute(
            "INSERT INTO sessions (account, source, kind, started, login) VALUES (?1, ?2, ?3, ?4, ?5)",
            params![
                session.account.to_string(),
                session.source,
                session.kind,
                now(),
                session.login
            ],
        )?;
        let id = tx.last_insert_rowid();
        usage::count_session(&tx, session.account)?;
        tx.commit()?;
        Ok(id)
    }

    /// Only the first end counts. `machine`: how it found its machine, if it got one.
    pub fn session_ended(
        &self,
        id: i64,
        outcome: &str,
        machine: Option<&str>,
    ) -> Result<(), AccountsError> {
        self.db.execute(
            "UPDATE sessions SET ended = ?2, outcome = ?3, machine = ?4 \
             WHERE id = ?1 AND ended IS NULL",
            params![id, now(), outcome, machine],
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

    /// The sessions log, the latest first.
    pub fn session_log(&self, query: &LogQuery) -> Result<Vec<SessionRecord>, AccountsError> {
        let mut statement = self.db.prepare_cached(&format!(
            "SELECT {COLUMNS} FROM sessions \
             WHERE (?1 IS NULL OR account = ?1) \
             AND (?2 IS NULL OR ended IS NULL OR ended >= ?2 OR started >= ?2) \
             ORDER BY id DESC LIMIT ?3"
        ))?;
        let account = query.account.map(|id| id.to_string());
        let rows = statement.query_map(params![account, query.since, query.most], session)?;
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
        login: row.get(7)?,
        machine: row.get(8)?,
    })
}
