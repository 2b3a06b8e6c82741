//! The service's daily copy of the accounts database (docs/accounts.md).

use std::{
    path::Path,
    time::{Duration, SystemTime},
};

use hermitage_storage::accounts::{Accounts, AccountsError, Copies, CopyError};

use crate::time;

const DAY: Duration = Duration::from_secs(86_400);

/// How often it is looked whether one is due: a host that sleeps at night has one, too.
const LOOK: Duration = Duration::from_secs(3600);

/// Takes copies, with a connection of its own: a long copy holds nobody up. It stays open, because what SQLite
/// opens it can't close while others of the process hold locks on the same file.
pub struct Keeper {
    copies: Copies,
    accounts: Accounts,
}

impl Keeper {
    pub fn open(database: &Path) -> Result<Self, AccountsError> {
        Ok(Self { copies: Copies::of(database), accounts: Accounts::open(database)? })
    }

    /// For ever.
    pub async fn keep(mut self) {
        loop {
            let looked = tokio::task::spawn_blocking(move || (self.take_if_due(), self)).await;
            let Ok((taken, keeper)) = looked else {
                tracing::error!(
                    "copying the accounts database was cut off; there are no more copies"
                );
                return std::future::pending().await;
            };
            self = keeper;
            match taken {
                Ok(true) => tracing::info!("the accounts database is copied"),
                Ok(false) => {}
                Err(error) => tracing::error!(
                    %error,
                    "no daily copy of the accounts database; see: hermitage database check"
                ),
            }
            tokio::time::sleep(LOOK).await;
        }
    }

    fn take_if_due(&self) -> Result<bool, CopyError> {
        let last = self.copies.last_daily()?;
        // A clock that was put back is no reason to wait for it.
        let age = last.map(|copy| SystemTime::now().duration_since(copy.taken).unwrap_or(DAY));
        if age.is_some_and(|age| age < DAY) {
            return Ok(false);
        }
        let stamp: String = time::rfc3339(time::now()).replace(['-', ':'], "");
        self.copies.take_daily(&self.accounts, &stamp)?;
        Ok(true)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn one_is_taken_a_day() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("accounts.db");
        let keeper = Keeper::open(&path).unwrap();
        assert!(keeper.take_if_due().unwrap());
        assert!(!keeper.take_if_due().unwrap());
        let copies = Copies::of(&path);
        let copy = copies.last_daily().unwrap().unwrap();
        assert!(copy.name.starts_with("daily-2") && copy.name.ends_with("Z.db"), "{}", copy.name);
        let yesterday = SystemTime::now() - DAY;
        let file = std::fs::File::open(&copy.path).unwrap();
        file.set_modified(yesterday).unwrap();
        std::fs::rename(&copy.path, copies.dir().join("daily-1.db")).unwrap();
        assert!(keeper.take_if_due().unwrap());
        assert_eq!(copies.list().unwrap().len(), 2);
    }
}
