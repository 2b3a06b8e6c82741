//! Changes of accounts that are made together: all of them or none.

use rusqlite::{Transaction, TransactionBehavior, params, types::ToSql};
use uuid::Uuid;

use super::account::{self, Account, Change};
use super::database::{Accounts, AccountsError};
use super::stored_keys::insert_key;
use super::{AccountName, Identity, NewAccount, Policy, PublicKey};

/// What is to change of an account. The outer `None` leaves a value as it is, the inner one takes the
/// account's own away, so that its class' counts.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Changes {
    pub class: Option<Option<String>>,
    /// The number alone: whoever changes it has changed the disk.
    pub disk_bytes: Option<u64>,
    pub max_sessions: Option<Option<u32>>,
    pub max_streams: Option<Option<u32>>,
    pub linger_s: Option<Option<u32>>,
    pub max_linger_s: Option<Option<u32>>,
    pub policy: Option<Option<Policy>>,
    /// 0: without end.
    pub quota_bytes: Option<Option<u64>>,
    pub memory_bytes: Option<Option<u64>>,
    pub vcpus: Option<Option<u8>>,
    pub cpu_weight: Option<Option<u32>>,
    pub cpu_percent: Option<Option<u32>>,
    pub io_rate: Option<Option<u64>>,
    pub io_operations: Option<Option<u32>>,
    pub processes: Option<Option<u32>>,
    pub expires: Option<Option<i64>>,
    pub disabled: Option<bool>,
    /// argon2id, PHC string.
    pub password: Option<String>,
    /// These besides those it has.
    pub keys: Vec<PublicKey>,
}

/// One account's part of a batch.
#[derive(Clone, Debug)]
pub enum Step {
    Create(NewAccount),
    Change(Uuid, Changes),
}

/// Which step of a batch could not be done; nothing was.
#[derive(Debug, thiserror::Error)]
#[error("{source}")]
pub struct BatchError {
    /// `None`: the transaction as a whole.
    pub step: Option<usize>,
    pub source: AccountsError,
}

impl Accounts {
    /// What of it was not so before.
    pub fn change(
        &mut self,
        id: Uuid,
        changes: &Changes,
    ) -> Result<Vec<&'static str>, AccountsError> {
        let tx = self.db.transaction_with_behavior(TransactionBehavior::Immediate)?;
        let changed = apply(&tx, id, changes)?;
        tx.commit()?;
        Ok(changed)
    }

    /// Takes every step or none. The accounts as they are afterwards, in the same order.
    pub fn batch(&mut self, steps: &[Step]) -> Result<Vec<Account>, BatchError> {
        let whole = |source: AccountsError| BatchError { step: None, source };
        let tx = self.db.transaction_with_behavior(TransactionBehavior::Immediate);
        let tx = tx.map_err(|error| whole(error.into()))?;
        let mut accounts = Vec::with_capacity(steps.len());
        for (number, step) in steps.iter().enumerate() {
            let taken = match step {
                Step::Create(new) => account::insert(&tx, new, &Identity::draw()),
                Step::Change(id, changes) => apply(&tx, *id, changes).and_then(|_| {
                    account::by_id(&tx, *id)?.ok_or_else(|| AccountsError::Unknown(id.to_string()))
                }),
            };
            let taken = taken.map_err(|source| BatchError { step: Some(number), source })?;
            accounts.push(taken);
        }
        tx.commit().map_err(|error| whole(error.into()))?;
        Ok(accounts)
    }

    /// Undoes a batch's creations whose disks could not be made: as if they had never been.
    pub fn forget(&mut self, ids: &[Uuid]) -> Result<(), AccountsError> {
        let tx = self.db.transaction_with_behavior(TransactionBehavior::Immediate)?;
        for id in ids {
            tx.execute("DELETE FROM accounts WHERE id = ?1", [id.to_string()])?;
        }
        Ok(tx.commit()?)
    }

    /// Gives an account another name, and the host name that goes with it. In the guest its user keeps the
    /// name: her files, and what she wrote into them, have it.
    pub fn rename(&mut self, id: Uuid, name: &AccountName) -> Result<Change, AccountsError> {
        let tx = self.db.transaction_with_behavior(TransactionBehavior::Immediate)?;
        match account::alive(&tx, name.as_str())? {
            Some(there) if there.id == id => return Ok(Change::AlreadySo),
            Some(_) => return Err(AccountsError::NameTaken(name.to_string())),
            None => {}
        }
        let changed = tx.execute(
            "UPDATE accounts SET guest_name = nullif(coalesce(guest_name, name), ?2), name = ?2, \
             hostname = ?3 WHERE id = ?1 AND removed IS NULL",
            params![id.to_string(), name.as_str(), name.hostname()],
        )?;
        if changed == 0 {
            return Err(AccountsError::Unknown(id.to_string()));
        }
        tx.commit()?;
        Ok(Change::Done)
    }
}

fn apply(
    tx: &Transaction,
    id: Uuid,
    changes: &Changes,
) -> Result<Vec<&'static str>, AccountsError> {
    if changes.max_sessions == Some(Some(0)) {
        return Err(AccountsError::Limit { what: "sessions", value: 0 });
    }
    let disk = match changes.disk_bytes {
        Some(bytes) => match i64::try_from(bytes) {
            Ok(size) if size > 0 => Some(size),
            _ => return Err(AccountsError::Limit { what: "disk", value: bytes }),
        },
        None => None,
    };
    let quota = changes.quota_bytes.map(account::quota).transpose()?;
    let rate = account::io_rate(changes.cpu_weight.flatten(), changes.io_rate.flatten())?;
    let io_rate = changes.io_rate.map(|_| rate);
    let memory = account::memory(changes.memory_bytes.flatten(), changes.vcpus.flatten())?;
    let memory = changes.memory_bytes.map(|_| memory);
    let mut changed = Vec::new();
    let mut set = |column: &'static str, value: Option<&dyn ToSql>| -> Result<(), AccountsError> {
        let Some(value) = value else { return Ok(()) };
        let sql = format!("UPDATE accounts SET {column} = ?2 WHERE id = ?1 AND {column} IS NOT ?2");
        if tx.prepare_cached(&sql)?.execute(params![id.to_string(), value])? > 0 {
            changed.push(column);
        }
        Ok(())
    };
    fn sql<T: ToSql>(value: &Option<T>) -> Option<&dyn ToSql> {
        value.as_ref().map(|value| value as &dyn ToSql)
    }
    set("class", sql(&changes.class))?;
    set("disk_bytes", sql(&disk))?;
    set("max_sessions", sql(&changes.max_sessions))?;
    set("max_streams", sql(&changes.max_streams))?;
    set("linger_s", sql(&changes.linger_s))?;
    set("max_linger_s", sql(&changes.max_linger_s))?;
    set("policy", sql(&changes.policy))?;
    set("quota_bytes", sql(&quota))?;
    set("memory_bytes", sql(&memory))?;
    set("vcpus", sql(&changes.vcpus))?;
    set("cpu_weight", sql(&changes.cpu_weight))?;
    set("cpu_percent", sql(&changes.cpu_percent))?;
    set("io_rate", sql(&io_rate))?;
    set("io_operations", sql(&changes.io_operations))?;
    set("processes", sql(&changes.processes))?;
    set("expires", sql(&changes.expires))?;
    set("password", sql(&changes.password))?;
    set("disabled", sql(&changes.disabled))?;
    if changes.disabled.is_some() {
        set("disabled_until", Some(&None::<i64>))?;
    }
    let mut added = false;
    for key in &changes.keys {
        added |= insert_key(tx, id, key)? == Change::Done;
    }
    if added {
        changed.push("keys");
    }
    Ok(changed)
}

#[cfg(test)]
#[path = "changes_tests.rs"]
mod tests;
