//! The keys of accounts, with what each may do.

use super::database::{Accounts, AccountsError, now};
use super::{Change, KeyOptions, PublicKey};
use rusqlite::{OptionalExtension, Transaction, TransactionBehavior, params};
use uuid::Uuid;

#[derive(Clone, Debug, PartialEq, Eq)]
pub struct StoredKey {
    pub key_type: String,
    pub blob: Vec<u8>,
    pub fingerprint: String,
    pub comment: String,
    pub added: i64,
    /// As they were given; empty for none.
    pub options: String,
}

impl StoredKey {
    /// From when on it opens nothing, by an option of its own.
    pub fn expires(&self) -> Option<i64> {
        KeyOptions::parse(&self.options).ok().and_then(|options| options.expires)
    }
}

impl Accounts {
    /// In the order they were added.
    pub fn keys(&self, id: Uuid) -> Result<Vec<StoredKey>, AccountsError> {
        let mut statement = self.db.prepare_cached(
            "SELECT type, blob, fingerprint, comment, added, options FROM keys WHERE account = ?1 \
             ORDER BY id",
        )?;
        let rows = statement.query_map([id.to_string()], |row| {
            Ok(StoredKey {
                key_type: row.get(0)?,
                blob: row.get(1)?,
                fingerprint: row.get(2)?,
                comment: row.get(3)?,
                added: row.get(4)?,
                options: row.get(5)?,
            })
        })?;
        Ok(rows.collect::<Result<_, _>>()?)
    }

    /// What this key (blob as on the wire, RFC 4253 §6.6) may do in the account, if it is one of its keys.
    /// Whether the account is open, times and sources are the caller's to check.
    pub fn key_options(&self, id: Uuid, blob: &[u8]) -> Result<Option<KeyOptions>, AccountsError> {
        let mut statement = self.db.prepare_cached(
            "SELECT fingerprint, options FROM keys JOIN accounts ON accounts.id = keys.account \
             WHERE account = ?1 AND blob = ?2 AND removed IS NULL",
        )?;
        let row = statement.query_row(params![id.to_string(), blob], |row| {
            Ok((row.get::<_, String>(0)?, row.get::<_, String>(1)?))
        });
        let Some((key, options)) = row.optional()? else { return Ok(None) };
        match KeyOptions::parse(&options) {
            Ok(options) => Ok(Some(options)),
            // A restriction that is not understood must not be dropped.
            Err(source) => Err(AccountsError::Options { key, source }),
        }
    }

    pub fn add_key(&mut self, id: Uuid, key: &PublicKey) -> Result<Change, AccountsError> {
        let added = self.add_keys(id, std::slice::from_ref(key))?;
        Ok(if added == 0 { Change::AlreadySo } else { Change::Done })
    }

    /// Adds all of them or none. How many were not there before.
    pub fn add_keys(&mut self, id: Uuid, keys: &[PublicKey]) -> Result<usize, AccountsError> {
        let tx = self.db.transaction_with_behavior(TransactionBehavior::Immediate)?;
        let mut added = 0;
        for key in keys {
            added += usize::from(insert_key(&tx, id, key)? == Change::Done);
        }
        tx.commit()?;
        Ok(added)
    }

    /// `fingerprint` as [`super::fingerprint`] makes it.
    pub fn remove_key(&self, id: Uuid, fingerprint: &str) -> Result<Change, AccountsError> {
        let sql = "DELETE FROM keys WHERE account = ?1 AND fingerprint = ?2";
        let changed = self.db.execute(sql, params![id.to_string(), fingerprint])?;
        Ok(if changed == 0 { Change::AlreadySo } else { Change::Done })
    }
}

/// Adds a key. One that is there with other options is left alone and an error: nobody is to think that it
/// is restricted from now on, and a list of plain keys must not free one that is.
pub(super) fn insert_key(
    tx: &Transaction,
    id: Uuid,
    key: &PublicKey,
) -> Result<Change, AccountsError> {
    let there = "SELECT options FROM keys WHERE account = ?1 AND blob = ?2";
    let there: Option<String> = tx
        .prepare_cached(there)?
        .query_row(params![id.to_string(), key.blob()], |row| row.get(0))
        .optional()?;
    let options = key.options().to_string();
    match there {
        Some(there) if there == options => return Ok(Change::AlreadySo),
        Some(there) => {
            return Err(AccountsError::OtherOptions { key: key.fingerprint(), options: there });
        }
        None => {}
    }
    tx.prepare_cached(
        "INSERT INTO keys (account, type, blob, fingerprint, comment, added, options) \
         VALUES (?1, ?2, ?3, ?4, ?5, ?6, ?7)",
    )?
    .execute(params![
        id.to_string(),
        key.key_type(),
        key.blob(),
        key.fingerprint(),
        key.comment(),
        now(),
        options
    ])?;
    Ok(Change::Done)
}

#[cfg(test)]
#[path = "stored_keys_tests.rs"]
mod tests;
