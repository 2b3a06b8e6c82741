//! What happens to an account's machine while nobody is logged in: the administrator's part of it.

use rusqlite::{params, types::ToSql};
use uuid::Uuid;

use super::Policy;
use super::account::Change;
use super::database::{Accounts, AccountsError};

impl Accounts {
    /// `None`: as its class says, or as everybody's.
    pub fn set_policy(
        &self,
        id: Uuid,
        policy: impl Into<Option<Policy>>,
    ) -> Result<Change, AccountsError> {
        self.set(id, "policy", policy.into())
    }

    /// How long a machine stays after the last session, in seconds; `None`: as configured.
    pub fn set_linger(&self, id: Uuid, seconds: Option<u32>) -> Result<Change, AccountsError> {
        self.set(id, "linger_s", seconds)
    }

    /// How long work may keep a machine awake after the last session, in seconds; `None`: as configured.
    pub fn set_max_linger(&self, id: Uuid, seconds: Option<u32>) -> Result<Change, AccountsError> {
        self.set(id, "max_linger_s", seconds)
    }

    /// Keeps the machine awake until then; `None` takes that back.
    pub fn set_hold(&self, id: Uuid, until: Option<i64>) -> Result<Change, AccountsError> {
        self.set(id, "hold_until", until)
    }

    fn set(&self, id: Uuid, column: &str, value: impl ToSql) -> Result<Change, AccountsError> {
        let sql = format!("UPDATE accounts SET {column} = ?2 WHERE id = ?1 AND {column} IS NOT ?2");
        let changed = self.db.execute(&sql, params![id.to_string(), value])?;
        Ok(if changed == 0 { Change::AlreadySo } else { Change::Done })
    }
}

#[cfg(test)]
mod tests {
    use super::super::*;

    #[test]
    fn each_setting_is_its_own_and_is_found_again() {
        let dir = tempfile::tempdir().unwrap();
        let mut accounts = Accounts::open(&dir.path().join("accounts.db")).unwrap();
        let name = |name| NewAccount::new(AccountName::parse(name).unwrap());
        let alice = accounts.create(&name("alice")).unwrap();
        let bob = accounts.create(&NewAccount { max_linger_s: Some(0), ..name("bob") }).unwrap();
        assert_eq!((alice.max_linger_s, bob.max_linger_s, alice.hold_until), (None, Some(0), None));

        assert_eq!(accounts.set_policy(alice.id, Policy::Keep).unwrap(), Change::Done);
        assert_eq!(accounts.set_policy(alice.id, Policy::Keep).unwrap(), Change::AlreadySo);
        assert_eq!(accounts.set_linger(alice.id, Some(5)).unwrap(), Change::Done);
        assert_eq!(accounts.set_max_linger(alice.id, Some(60)).unwrap(), Change::Done);
        assert_eq!(accounts.set_hold(alice.id, Some(100)).unwrap(), Change::Done);
        assert_eq!(accounts.set_hold(alice.id, Some(100)).unwrap(), Change::AlreadySo);
        let set = accounts.named("alice").unwrap();
        let wanted = Account {
            policy: Some(Policy::Keep),
            linger_s: Some(5),
            max_linger_s: Some(60),
            hold_until: Some(100),
            ..alice
        };
        assert_eq!(set, wanted);
        assert_eq!((set.hold_at(99), set.hold_at(100)), (Some(100), None));

        assert_eq!(accounts.set_linger(set.id, None).unwrap(), Change::Done);
        assert_eq!(accounts.set_max_linger(set.id, None).unwrap(), Change::Done);
        assert_eq!(accounts.set_hold(set.id, None).unwrap(), Change::Done);
        assert_eq!(accounts.set_hold(set.id, None).unwrap(), Change::AlreadySo);
        assert_eq!(accounts.named("bob").unwrap(), bob, "another's settings");
    }
}
