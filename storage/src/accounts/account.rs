//! Accounts and their keys: what the administrator decides.

use super::database::{Accounts, AccountsError, now};
use super::stored_keys::insert_key;
use super::{Identity, NewAccount, Policy};
use rusqlite::{OptionalExtension, Row, Transaction, TransactionBehavior, params};
use uuid::Uuid;

/// Size of an account's disk where nothing else was asked for.
pub const DEFAULT_DISK_BYTES: u64 = 10 << 30;
/// Sessions of an account at once where neither it nor its class says.
pub const DEFAULT_MAX_SESSIONS: u32 = 32;

/// The kernel's own bound (cgroup-v2.rst, "Weights").
pub const MAX_CPU_WEIGHT: u32 = 10_000;
/// User id in the guest. It is the only person there, so all have the same.
pub const GUEST_UID: u32 = 1000;

#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Account {
    pub id: Uuid,
    pub name: String,
    pub uid: u32,
    pub hostname: String,
    /// Its user in the guest, where that is not [`Self::name`]: it was renamed.
    pub guest_name: Option<String>,
    pub machine_id: [u8; 16],
    /// argon2id, PHC string. `None`: keys only.
    pub password: Option<String>,
    /// Closed by an operator; [`Self::closed_at`] knows whether it still is.
    pub disabled: bool,
    /// Until when that counts; `None`: until it is taken back.
    pub disabled_until: Option<i64>,
    /// From when on nobody logs in.
    pub expires: Option<i64>,
    pub created: i64,
    pub removed: Option<i64>,
    pub disk_bytes: u64,
    /// What the configuration has of this name counts where the account has nothing of its own.
    pub class: Option<String>,
    // Its own, each; `None`: as its class or the configuration says.
    pub max_sessions: Option<u32>,
    /// Streams that one connection forwards at a time.
    pub max_streams: Option<u32>,
    pub linger_s: Option<u32>,
    pub policy: Option<Policy>,
    /// How long work may keep its machine awake.
    pub max_linger_s: Option<u32>,
    /// Bytes that its disk, saved memory and checkpoints may take on the host together; 0: without end.
    pub quota_bytes: Option<u64>,
    /// Bytes that its machine is to have, where its base can give them.
    pub memory_bytes: Option<u64>,
    /// The same of virtual processors.
    pub vcpus: Option<u8>,
    // What the host lets its machine take.
    pub cpu_weight: Option<u32>,
    /// Hundredths of one processor; 0: without end, here and below.
    pub cpu_percent: Option<u32>,
    /// Bytes a second, in each direction.
    pub io_rate: Option<u64>,
    /// Operations a second, in each direction.
    pub io_operations: Option<u32>,
    /// Processes and threads of the user's in her machine; 0: as many as its kernel has.
    pub processes: Option<u32>,
    /// Until when its machine is kept awake; over if that is past.
    pub hold_until: Option<i64>,
}

impl Account {
    /// May it log in at all, now?
    pub fn is_open(&self) -> bool {
        self.closed_at(now()).is_none()
    }

    /// The name of its user in the guest.
    pub fn guest_name(&self) -> &str {
        self.guest_name.as_deref().unwrap_or(&self.name)
    }

    /// Whether an operator has closed it, at that time.
    pub fn is_disabled_at(&self, now: i64) -> bool {
        self.disabled && self.disabled_until.is_none_or(|until| until > now)
    }

    /// Why it may not log in at that time; `None`: it may.
    pub fn closed_at(&self, now: i64) -> Option<Closed> {
        if self.removed.is_some() {
            Some(Closed::Removed)
        } else if self.is_disabled_at(now) {
            Some(Closed::Disabled { until: self.disabled_until })
        } else {
            self.expires.filter(|expires| *expires <= now).map(|since| Closed::Expired { since })
        }
    }

    /// The end of its hold, if it has one at that time.
    pub fn hold_at(&self, now: i64) -> Option<i64> {
        self.hold_until.filter(|until| *until > now)
    }
}

/// Why nobody logs in to an account.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Closed {
    Removed,
    Disabled { until: Option<i64> },
    Expired { since: i64 },
}

/// Whether a call found something to change: commands can be repeated.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Change {
    Done,
    AlreadySo,
}

const COLUMNS: &str = "id, name, uid, hostname, machine_id, password, disabled, created, removed, \
                       disk_bytes, max_sessions, linger_s, policy, max_linger_s, hold_until, class, \
                       max_streams, expires, disabled_until, guest_name, quota_bytes, cpu_weight, \
                       cpu_percent, io_rate, io_operations, memory_bytes, vcpus, \
                       processes";

impl Accounts {
    /// Makes an account with a new id and machine id, all of it or nothing.
    pub fn create(&mut self, new: &NewAccount) -> Result<Account, AccountsError> {
        self.create_as(new, &Identity::draw())
    }

    /// The same with an id that was drawn before: its folder is there already.
    pub fn create_as(
        &mut self,
        new: &NewAccount,
        identity: &Identity,
    ) -> Result<Account, AccountsError> {
        let tx = self.db.transaction_with_behavior(TransactionBehavior::Immediate)?;
        let account = insert(&tx, new, identity)?;
        tx.commit()?;
        Ok(account)
    }

    /// All accounts by name; the removed ones, not yet purged, after the others.
    pub fn list(&self, with_removed: bool) -> Result<Vec<Account>, AccountsError> {
        let mut statement = self.db.prepare_cached(&format!(
            "SELECT {COLUMNS} FROM accounts WHERE removed IS NULL OR ?1 \
             ORDER BY removed IS NOT NULL, name, removed"
        ))?;
        let rows = statement.query_map([with_removed], account)?;
        Ok(rows.collect::<Result<_, _>>()?)
    }

    /// The account of that name, disabled or not, unless it is removed.
    pub fn by_name(&self, name: &str) -> Result<Option<Account>, AccountsError> {
        Ok(alive(&self.db, name)?)
    }

    /// As [`Self::by_name`], for when it has to be there.
    pub fn named(&self, name: &str) -> Result<Account, AccountsError> {
        self.by_name(name)?.ok_or_else(|| AccountsError::Unknown(name.to_owned()))
    }

    /// Removed or not.
    pub fn by_id(&self, id: Uuid) -> Result<Option<Account>, AccountsError> {
        Ok(by_id(&self.db, id)?)
    }

    /// Whether an account, removed or not, has this machine id.
    pub fn knows_machine(&self, machine_id: &[u8; 16]) -> Result<bool, AccountsError> {
        let sql = "SELECT EXISTS (SELECT 1 FROM accounts WHERE machine_id = ?1)";
        Ok(self.db.query_row(sql, params![machine_id], |row| row.get(0))?)
    }

    /// Removed accounts that had this name and are not purged, the last removed first.
    pub fn removed(&self, name: &str) -> Result<Vec<Account>, AccountsError> {
        let mut statement = self.db.prepare_cached(&format!(
            "SELECT {COLUMNS} FROM accounts WHERE name = ?1 AND removed IS NOT NULL \
             ORDER BY removed DESC, id"
        ))?;
        let rows = statement.query_map([name], account)?;
        Ok(rows.collect::<Result<_, _>>()?)
    }

    /// `hash` as [`super::hash_password`] makes it; `None` takes the password away.
    pub fn set_password(&self, id: Uuid, hash: Option<&str>) -> Result<(), AccountsError> {
        let changed = self.db.execute(
            "UPDATE accounts SET password = ?2 WHERE id = ?1",
            params![id.to_string(), hash],
        )?;
        known(id, changed)
    }

    /// Closes an account until that is taken back, or opens it.
    pub fn set_disabled(&self, id: Uuid, disabled: bool) -> Result<Change, AccountsError> {
        self.disable(id, disabled, None)
    }

    /// Closes an account; it is open again at that time by itself.
    pub fn disable_until(&self, id: Uuid, until: i64) -> Result<Change, AccountsError> {
        self.disable(id, true, Some(until))
    }

    fn disable(
        &self,
        id: Uuid,
        disabled: bool,
        until: Option<i64>,
    ) -> Result<Change, AccountsError> {
        let changed = self.db.execute(
            "UPDATE accounts SET disabled = ?2, disabled_until = ?3 \
             WHERE id = ?1 AND (disabled <> ?2 OR disabled_until IS NOT ?3)",
            params![id.to_string(), disabled, until],
        )?;
        Ok(if changed == 0 { Change::AlreadySo } else { Change::Done })
    }

    /// Accounts whose time was over in these seconds, the first not among them; the last is.
    pub fn expired_between(&self, after: i64, until: i64) -> Result<Vec<Uuid>, AccountsError> {
        let sql = "SELECT id FROM accounts WHERE expires > ?1 AND expires <= ?2";
        let mut statement = self.db.prepare_cached(sql)?;
        let rows = statement.query_map([after, until], |row| id_column(row, 0))?;
        Ok(rows.collect::<Result<_, _>>()?)
    }

    /// Frees the name and takes keys and password away. The row stays for [`Self::purge`], because the
    /// disk does.
    pub fn remove(&mut self, id: Uuid) -> Result<Change, AccountsError> {
        let tx = self.db.transaction_with_behavior(TransactionBehavior::Immediate)?;
        let changed = tx.execute(
            "UPDATE accounts SET removed = ?2, password = NULL WHERE id = ?1 AND removed IS NULL",
            params![id.to_string(), now()],
        )?;
        tx.execute("DELETE FROM keys WHERE account = ?1", [id.to_string()])?;
        tx.commit()?;
        Ok(if changed == 0 { Change::AlreadySo } else { Change::Done })
    }

    /// Forgets a removed account, sessions log and all. Delete its disk first: afterwards nothing
    /// knows whose it was.
    pub fn purge(&self, id: Uuid) -> Result<(), AccountsError> {
        let sql = "DELETE FROM accounts WHERE id = ?1 AND removed IS NOT NULL";
        known(id, self.db.execute(sql, [id.to_string()])?)
    }
}

/// Checks limits, takes the name, and puts the keys in.
pub(super) fn insert(
    tx: &Transaction,
    new: &NewAccount,
    identity: &Identity,
) -> Result<Account, AccountsError> {
    let limit = |what, value| AccountsError::Limit { what, value };
    let disk = i64::try_from(new.disk_bytes).map_err(|_| limit("disk", new.disk_bytes))?;
    if disk == 0 {
        return Err(limit("disk", 0));
    }
    let quota = quota(new.quota_bytes)?;
    if new.max_sessions == Some(0) {
        return Err(limit("sessions", 0));
    }
    let io_rate = io_rate(new.cpu_weight, new.io_rate)?;
    let memory = memory(new.memory_bytes, new.vcpus)?;
    if alive(tx, new.name.as_str())?.is_some() {
        return Err(AccountsError::NameTaken(new.name.to_string()));
    }
    let Identity { id, machine_id, guest_name } = identity;
    tx.prepare_cached(
        "INSERT INTO accounts (id, name, uid, hostname, machine_id, password, created, disk_bytes, \
         max_sessions, linger_s, policy, max_linger_s, class, max_streams, expires, disabled, disabled_until, \
         guest_name, quota_bytes, cpu_weight, cpu_percent, io_rate, io_operations, memory_bytes, vcpus, \
         processes) \
         VALUES (?1, ?2, ?3, ?4, ?5, ?6, ?7, ?8, ?9, ?10, ?11, ?12, ?13, ?14, ?15, ?16, ?17, ?18, ?19, ?20, \
         ?21, ?22, ?23, ?24, ?25, ?26)",
    )?
    .execute(params![
        id.to_string(),
        new.name.as_str(),
        GUEST_UID,
        new.name.hostname(),
        machine_id,
        new.password_hash,
        now(),
        disk,
        new.max_sessions,
        new.linger_s,
        new.policy,
        new.max_linger_s,
        new.class,
        new.max_streams,
        new.expires,
        new.disabled,
        new.disabled_until,
        guest_name,
        quota,
        new.cpu_weight,
        new.cpu_percent,
        io_rate,
        new.io_operations,
        memory,
        new.vcpus,
        new.processes,
    ])?;
    for key in &new.keys {
        insert_key(tx, *id, key)?;
    }
    alive(tx, new.name.as_str())?.ok_or_else(|| AccountsError::Unknown(new.name.to_string()))
}

/// As the database keeps it.
pub(super) fn quota(bytes: Option<u64>) -> Result<Option<i64>, AccountsError> {
    let fits = |bytes| {
        i64::try_from(bytes).map_err(|_| AccountsError::Limit { what: "quota", value: bytes })
    };
    bytes.map(fits).transpose()
}

/// The rate as the database has it, if it and the weight are what it takes.
pub(super) fn io_rate(
    weight: Option<u32>,
    rate: Option<u64>,
) -> Result<Option<i64>, AccountsError> {
    if let Some(weight) = weight.filter(|weight| !(1..=MAX_CPU_WEIGHT).contains(weight)) {
        return Err(AccountsError::Limit { what: "CPU weight", value: weight.into() });
    }
    let limit = |_| AccountsError::Limit { what: "i/o rate", value: rate.unwrap_or_default() };
    rate.map(i64::try_from).transpose().map_err(limit)
}

/// Memory as the database has it, if it and the processors are what it takes.
pub(super) fn memory(bytes: Option<u64>, vcpus: Option<u8>) -> Result<Option<i64>, AccountsError> {
    if vcpus == Some(0) {
        return Err(AccountsError::Limit { what: "processors", value: 0 });
    }
    let limit = |value| AccountsError::Limit { what: "memory", value };
    let fits = |bytes| i64::try_from(bytes).ok().filter(|n| *n > 0).ok_or(limit(bytes));
    bytes.map(fits).transpose()
}

fn known(id: Uuid, changed: usize) -> Result<(), AccountsError> {
    if changed == 0 { Err(AccountsError::Unknown(id.to_string())) } else { Ok(()) }
}

pub(super) fn alive(
    db: &rusqlite::Connection,
    name: &str,
) -> Result<Option<Account>, rusqlite::Error> {
    let sql = format!("SELECT {COLUMNS} FROM accounts WHERE name = ?1 AND removed IS NULL");
    db.prepare_cached(&sql)?.query_row([name], account).optional()
}

pub(super) fn by_id(
    db: &rusqlite::Connection,
    id: Uuid,
) -> Result<Option<Account>, rusqlite::Error> {
    let sql = format!("SELECT {COLUMNS} FROM accounts WHERE id = ?1");
    db.prepare_cached(&sql)?.query_row([id.to_string()], account).optional()
}

fn account(row: &Row) -> Result<Account, rusqlite::Error> {
    Ok(Account {
        id: id_column(row, 0)?,
        name: row.get(1)?,
        uid: row.get(2)?,
        hostname: row.get(3)?,
        machine_id: row.get(4)?,
        password: row.get(5)?,
        disabled: row.get(6)?,
        created: row.get(7)?,
        removed: row.get(8)?,
        disk_bytes: row.get::<_, i64>(9)?.unsigned_abs(),
        max_sessions: row.get(10)?,
        linger_s: row.get(11)?,
        policy: row.get(12)?,
        max_linger_s: row.get(13)?,
        hold_until: row.get(14)?,
        class: row.get(15)?,
        max_streams: row.get(16)?,
        expires: row.get(17)?,
        disabled_until: row.get(18)?,
        guest_name: row.get(19)?,
        quota_bytes: row.get::<_, Option<i64>>(20)?.map(i64::unsigned_abs),
        cpu_weight: row.get(21)?,
        cpu_percent: row.get(22)?,
        io_rate: row.get::<_, Option<i64>>(23)?.map(i64::unsigned_abs),
        io_operations: row.get(24)?,
        memory_bytes: row.get::<_, Option<i64>>(25)?.map(i64::unsigned_abs),
        vcpus: row.get(26)?,
        processes: row.get(27)?,
    })
}

pub(super) fn id_column(row: &Row, index: usize) -> Result<Uuid, rusqlite::Error> {
    let text: String = row.get(index)?;
    Uuid::try_parse(&text).map_err(|error| {
        rusqlite::Error::FromSqlConversionFailure(index, rusqlite::types::Type::Text, error.into())
    })
}

#[cfg(test)]
#[path = "account_tests.rs"]
mod tests;
