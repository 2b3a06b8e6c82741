//! What the service was about to do with each account's machine.
//!
//! Written before it is done, so that a service that starts after a crash knows what may have been left
//! behind, and by whom.

use super::account::id_column;
use super::database::{Accounts, AccountsError, now};
use rusqlite::types::{FromSql, FromSqlError, FromSqlResult, ToSql, ToSqlOutput, ValueRef};
use rusqlite::{OptionalExtension, Row, params};
use std::fmt;
use uuid::Uuid;

/// The states of an account's lifecycle.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum MachineState {
    Stopped,
    Starting,
    Running,
    Lingering,
    Saving,
    Saved,
    Resuming,
    Stopping,
    Failed,
}

const STATES: &[(MachineState, &str)] = &[
    (MachineState::Stopped, "stopped"),
    (MachineState::Starting, "starting"),
    (MachineState::Running, "running"),
    (MachineState::Lingering, "lingering"),
    (MachineState::Saving, "saving"),
    (MachineState::Saved, "saved"),
    (MachineState::Resuming, "resuming"),
    (MachineState::Stopping, "stopping"),
    (MachineState::Failed, "failed"),
];

impl MachineState {
    pub fn as_str(self) -> &'static str {
        STATES.iter().find(|(state, _)| *state == self).map_or("", |(_, name)| name)
    }
}

impl fmt::Display for MachineState {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.as_str())
    }
}

impl ToSql for MachineState {
    fn to_sql(&self) -> rusqlite::Result<ToSqlOutput<'_>> {
        Ok(self.as_str().into())
    }
}

impl FromSql for MachineState {
    fn column_result(value: ValueRef<'_>) -> FromSqlResult<Self> {
        let name = value.as_str()?;
        let state = STATES.iter().find(|(_, known)| *known == name);
        state.map(|(state, _)| *state).ok_or_else(|| {
            FromSqlError::Other(format!("machine state \"{name}\" is not known here").into())
        })
    }
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Intent {
    pub account: Uuid,
    pub state: MachineState,
    /// The machine's process, once there is one.
    pub pid: Option<i32>,
    /// The base it was or is to be forked from.
    pub base: Option<String>,
    /// Why, for people.
    pub detail: Option<String>,
    /// The terminals that wait for their user, the one left last first.
    pub terminals: Option<String>,
    /// What was at work in it when it was saved.
    pub paused: Option<String>,
    /// When it was recorded; ignored by [`Accounts::record_intent`].
    pub since: i64,
}

impl Accounts {
    /// Durable when it returns.
    pub fn record_intent(&self, intent: &Intent) -> Result<(), AccountsError> {
        self.db.execute(
            "INSERT INTO machines (account, state, since, pid, base, detail, terminals, paused) \
             VALUES (?1, ?2, ?3, ?4, ?5, ?6, ?7, ?8) ON CONFLICT (account) DO UPDATE SET \
             state = ?2, since = ?3, pid = ?4, base = ?5, detail = ?6, terminals = ?7, paused = ?8",
            params![
                intent.account.to_string(),
                intent.state,
                now(),
                intent.pid,
                intent.base,
                intent.detail,
                intent.terminals,
                intent.paused
            ],
        )?;
        Ok(())
    }

    /// What was recorded of an account, if anything.
    pub fn intent(&self, account: Uuid) -> Result<Option<Intent>, AccountsError> {
        let mut statement = self.db.prepare_cached(
            "SELECT account, state, pid, base, detail, terminals, paused, since FROM machines \
             WHERE account = ?1",
        )?;
        Ok(statement.query_row([account.to_string()], intent).optional()?)
    }

    pub fn intents(&self) -> Result<Vec<Intent>, AccountsError> {
        let mut statement = self.db.prepare_cached(
            "SELECT account, state, pid, base, detail, terminals, paused, since FROM machines \
             ORDER BY since, account",
        )?;
        let rows = statement.query_map([], intent)?;
        Ok(rows.collect::<Result<_, _>>()?)
    }
}

fn intent(row: &Row) -> Result<Intent, rusqlite::Error> {
    Ok(Intent {
        account: id_column(row, 0)?,
        state: row.get(1)?,
        pid: row.get(2)?,
        base: row.get(3)?,
        detail: row.get(4)?,
        terminals: row.get(5)?,
        paused: row.get(6)?,
        since: row.get(7)?,
    })
}
