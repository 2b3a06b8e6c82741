//! What accounts used, day by day, and how long that and the sessions log are kept.
//!
//! The service adds to today's row as it goes; sessions are counted where they are logged, in the same transaction.
//! Both tables would grow for ever: [`Accounts::prune`] takes away what is older than asked for, a bounded number of
//! rows at a time, so that no login waits long for the database.

use super::account::id_column;
use super::database::{Accounts, AccountsError, now};
use rusqlite::{Connection, Row, TransactionBehavior, params};
use uuid::Uuid;

const DAY_SECONDS: i64 = 86_400;

/// Rows that one transaction deletes at most.
pub const PRUNED_AT_ONCE: u32 = 1000;

/// The day of a time, as the database counts: since 1970-01-01, in UTC.
pub fn day_of(seconds: i64) -> i64 {
    seconds.div_euclid(DAY_SECONDS)
}

/// The first second of a day.
pub fn first_second(day: i64) -> i64 {
    day.saturating_mul(DAY_SECONDS)
}

/// What came together in a while, or on a day.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Used {
    pub awake_s: u64,
    pub cpu_ms: u64,
    /// Bytes from clients, and to them.
    pub received: u64,
    pub sent: u64,
    /// Bytes taken on the host, if they were looked at.
    pub disk_bytes: Option<u64>,
}

impl Used {
    pub fn add(&mut self, more: &Used) {
        self.awake_s = self.awake_s.saturating_add(more.awake_s);
        self.cpu_ms = self.cpu_ms.saturating_add(more.cpu_ms);
        self.received = self.received.saturating_add(more.received);
        self.sent = self.sent.saturating_add(more.sent);
        self.disk_bytes = more.disk_bytes.or(self.disk_bytes);
    }
}

/// An account's day.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct UsedDay {
    pub day: i64,
    /// That began on it.
    pub sessions: u64,
    pub used: Used,
}

/// What is kept of the past.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Keep {
    /// Sessions that ended before are forgotten, and those but the last so many.
    pub sessions_since: Option<i64>,
    pub most_sessions: Option<u64>,
    /// The first day that is kept.
    pub usage_since: Option<i64>,
}

/// Rows that were deleted.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Pruned {
    pub sessions: usize,
    pub usage: usize,
}

impl Accounts {
    /// Adds to the accounts' days, all or none. Accounts that are not there any more are passed over.
    pub fn add_usage(&mut self, day: i64, used: &[(Uuid, Used)]) -> Result<(), AccountsError> {
        let tx = self.db.transaction_with_behavior(TransactionBehavior::Immediate)?;
        {
            let mut add = tx.prepare_cached(
                "INSERT INTO usage (account, day, awake_s, cpu_ms, received, sent, disk_bytes) \
                 SELECT id, ?2, ?3, ?4, ?5, ?6, ?7 FROM accounts WHERE id = ?1 \
                 ON CONFLICT (account, day) DO UPDATE SET awake_s = awake_s + ?3, cpu_ms = cpu_ms + ?4, \
                 received = received + ?5, sent = sent + ?6, disk_bytes = coalesce(?7, disk_bytes)",
            )?;
            for (account, used) in used {
                add.execute(params![
                    account.to_string(),
                    day,
                    whole(used.awake_s),
                    whole(used.cpu_ms),
                    whole(used.received),
                    whole(used.sent),
                    used.disk_bytes.map(whole),
                ])?;
            }
        }
        Ok(tx.commit()?)
    }

    /// An account's days from that one on, the last first.
    pub fn usage(&self, account: Uuid, since: i64) -> Result<Vec<UsedDay>, AccountsError> {
        let mut statement = self.db.prepare_cached(
            "SELECT day, sessions, awake_s, cpu_ms, received, sent, disk_bytes FROM usage \
             WHERE account = ?1 AND day >= ?2 ORDER BY day DESC",
        )?;
        let rows = statement.query_map(params![account.to_string(), since], used_day)?;
        Ok(rows.collect::<Result<_, _>>()?)
    }

    /// What each account used from that day on; what it took is of its last day.
    pub fn usage_of_all(&self, since: i64) -> Result<Vec<(Uuid, UsedDay)>, AccountsError> {
        // A column that is no sum is of the row with the max() (https://sqlite.org/lang_select.html §2.5).
        let mut statement = self.db.prepare_cached(
            "SELECT max(day), sum(sessions), sum(awake_s), sum(cpu_ms), sum(received), sum(sent), \
             disk_bytes, account FROM usage WHERE day >= ?1 GROUP BY account",
        )?;
        let rows = statement.query_map([since], |row| Ok((id_column(row, 7)?, used_day(row)?)))?;
        Ok(rows.collect::<Result<_, _>>()?)
    }

    /// Forgets some of what is older than that: call it again as long as it finds something. Sessions that go on
    /// stay.
    pub fn prune(&mut self, keep: &Keep) -> Result<Pruned, AccountsError> {
        let before = keep.sessions_since.unwrap_or(i64::MIN);
        // Numbers only grow; the last that is too many.
        let beyond: i64 = match keep.most_sessions {
            None => -1,
            Some(most) => {
                let sql = "SELECT coalesce((SELECT id FROM sessions ORDER BY id DESC LIMIT 1 OFFSET ?1), -1)";
                self.db.prepare_cached(sql)?.query_row([whole(most)], |row| row.get(0))?
            }
        };
        // Looked for outside of the transaction: it goes through the whole table where there is little to find.
        let ids: Vec<i64> = {
            let mut statement = self.db.prepare_cached(
                "SELECT id FROM sessions WHERE ended IS NOT NULL AND (ended < ?1 OR id <= ?2) \
                 ORDER BY id LIMIT ?3",
            )?;
            let rows =
                statement.query_map(params![before, beyond, PRUNED_AT_ONCE], |row| row.get(0))?;
            rows.collect::<Result<_, _>>()?
        };
        let tx = self.db.transaction_with_behavior(TransactionBehavior::Immediate)?;
        let mut pruned = Pruned::default();
        for id in ids {
            let sql = "DELETE FROM sessions WHERE id = ?1";
            pruned.sessions += tx.prepare_cached(sql)?.execute([id])?;
        }
        if let Some(day) = keep.usage_since {
            pruned.usage = tx.execute(
                "DELETE FROM usage WHERE (account, day) IN \
                 (SELECT account, day FROM usage WHERE day < ?1 LIMIT ?2)",
                params![day, PRUNED_AT_ONCE],
            )?;
        }
        tx.commit()?;
        Ok(pruned)
    }
}

/// Counts a session that begins now.
pub(super) fn count_session(db: &Connection, account: Uuid) -> Result<(), rusqlite::Error> {
    db.prepare_cached(
        "INSERT INTO usage (account, day, sessions) VALUES (?1, ?2, 1) \
         ON CONFLICT (account, day) DO UPDATE SET sessions = sessions + 1",
    )?
    .execute(params![account.to_string(), day_of(now())])?;
    Ok(())
}

/// SQLite's integers have a sign.
fn whole(number: u64) -> i64 {
    // Far from the end, so that sums stay integers.
    number.min(1 << 60) as i64
}

fn used_day(row: &Row) -> Result<UsedDay, rusqlite::Error> {
    let number = |index| row.get::<_, i64>(index).map(|number| number.max(0).unsigned_abs());
    Ok(UsedDay {
        day: row.get(0)?,
        sessions: number(1)?,
        used: Used {
            awake_s: number(2)?,
            cpu_ms: number(3)?,
            received: number(4)?,
            sent: number(5)?,
            disk_bytes: row.get::<_, Option<i64>>(6)?.map(i64::unsigned_abs),
        },
    })
}

#[cfg(test)]
#[path = "usage_tests.rs"]
mod tests;
