//! The accounts database from asynchronous code: SQLite blocks, so its calls run on threads made for
//! that, at most two at a time. Readers have a connection of their own and do not wait for a writer's
//! fsync.

use std::{path::Path, sync::Arc};

use hermitage_storage::accounts::{
    Account, Accounts, AccountsError, Change, Intent, KeyOptions, MachineState, NewSession,
    Redeemed, StoredKey,
};
use tokio::sync::Mutex;
use uuid::Uuid;

use crate::time;

#[derive(Clone)]
pub struct Store {
    reading: Arc<Mutex<Accounts>>,
    writing: Arc<Mutex<Accounts>>,
}

#[derive(Debug, thiserror::Error)]
pub enum StoreError {
    #[error(transparent)]
    Accounts(#[from] AccountsError),
    #[error("a database call did not finish: {0}")]
    Interrupted(String),
}

impl Store {
    pub fn open(path: &Path) -> Result<Self, AccountsError> {
        let mut writing = Accounts::open(path)?;
        if let Err(error) = writing.reserve_log() {
            tracing::warn!(%error, "no room is kept for the accounts database's log");
        }
        Ok(Self {
            writing: Arc::new(Mutex::new(writing)),
            reading: Arc::new(Mutex::new(Accounts::open(path)?)),
        })
    }

    pub async fn by_name(&self, name: &str) -> Result<Option<Account>, StoreError> {
        let name = name.to_owned();
        on(&self.reading, move |accounts| accounts.by_name(&name)).await
    }

    pub async fn by_id(&self, id: Uuid) -> Result<Option<Account>, StoreError> {
        on(&self.reading, move |accounts| accounts.by_id(id)).await
    }

    /// The account of that name, closed or not, if this key is one of its, and what the key may do there. An unknown
    /// name costs the same two look-ups.
    pub async fn by_key(
        &self,
        name: &str,
        blob: Vec<u8>,
    ) -> Result<Option<(Account, KeyOptions)>, StoreError> {
        let name = name.to_owned();
        on(&self.reading, move |accounts| {
            let account = accounts.by_name(&name)?;
            let id = account.as_ref().map_or(Uuid::nil(), |account| account.id);
            Ok(account.zip(accounts.key_options(id, &blob)?))
        })
        .await
    }

    pub async fn keys(&self, account: Uuid) -> Result<Vec<StoredKey>, StoreError> {
        on(&self.reading, move |accounts| accounts.keys(account)).await
    }

    /// `hash` as the storage crate makes it.
    pub async fn set_password(&self, account: Uuid, hash: String) -> Result<(), StoreError> {
        on(&self.writing, move |accounts| accounts.set_password(account, Some(&hash))).await
    }

    /// The account of that name, if this is the code of its invitation. An unknown name costs the same two
    /// look-ups.
    pub async fn by_invitation(
        &self,
        name: &str,
        code: &str,
        now: i64,
    ) -> Result<Option<Account>, StoreError> {
        let (name, code) = (name.to_owned(), code.to_owned());
        on(&self.reading, move |accounts| {
            let account = accounts.by_name(&name)?;
            let id = account.as_ref().map_or(Uuid::nil(), |account| account.id);
            let fits = accounts.is_invitation(id, &code, now)?;
            Ok(account.filter(|_| fits))
        })
        .await
    }

    /// Redeems the account's invitation. False: there is none any more.
    pub async fn redeem(&self, account: Uuid, what: Redeemed) -> Result<bool, StoreError> {
        let mut accounts = self.writing.clone().lock_owned().await;
        tokio::task::spawn_blocking(move || accounts.redeem(account, &what, time::now()))
            .await
            .map_err(|error| StoreError::Interrupted(error.to_string()))?
            .map_err(Into::into)
    }

    /// Keeps the machine awake until then; `None` takes that back.
    pub async fn set_hold(&self, account: Uuid, until: Option<i64>) -> Result<Change, StoreError> {
        on(&self.writing, move |accounts| accounts.set_hold(account, until)).await
    }

    /// Accounts whose time was over in these seconds.
    pub async fn expired_between(&self, after: i64, until: i64) -> Result<Vec<Uuid>, StoreError> {
        on(&self.reading, move |accounts| accounts.expired_between(after, until)).await
    }

    pub async fn record(&self, intent: Intent) -> Result<(), StoreError> {
        on(&self.writing, move |accounts| accounts.record_intent(&intent)).await
    }

    /// What is on record of an account's machine.
    pub async fn intent(&self, account: Uuid) -> Result<Option<Intent>, StoreError> {
        on(&self.reading, move |accounts| accounts.intent(account)).await
    }

    /// What a former service left on record as not stopped.
    pub async fn unfinished(&self) -> Result<Vec<Intent>, StoreError> {
        on(&self.writing, |accounts| {
            let mut intents = accounts.intents()?;
            intents.retain(|intent| {
                !matches!(
                    intent.state,
                    MachineState::Stopped | MachineState::Saved | MachineState::Failed
                )
            });
            Ok(intents)
        })
        .await
    }

    pub async fn session_started(
        &self,
        account: Uuid,
        source: String,
        kind: &'static str,
        login: String,
    ) -> Result<i64, StoreError> {
        on(&self.writing, move |accounts| {
            let login = &login;
            accounts.session_started(&NewSession { account, source: &source, kind, login })
        })
        .await
    }

    /// When the account's last shell was started, and from which address and port.
    pub async fn last_shell(&self, account: Uuid) -> Result<Option<(i64, String)>, StoreError> {
        on(&self.reading, move |accounts| accounts.last_shell(account)).await
    }

    /// `machine`: how it found its machine, if it got one.
    pub async fn session_ended(
        &self,
        id: i64,
        outcome: String,
        machine: Option<&'static str>,
    ) -> Result<(), StoreError> {
        on(&self.writing, move |accounts| accounts.session_ended(id, &outcome, machine)).await
    }

    pub async fn end_open_sessions(&self, outcome: &'static str) -> Result<usize, StoreError> {
        on(&self.writing, move |accounts| accounts.end_open_sessions(outcome)).await
    }
}

async fn on<T: Send + 'static>(
    accounts: &Arc<Mutex<Accounts>>,
    call: impl FnOnce(&Accounts) -> Result<T, AccountsError> + Send + 'static,
) -> Result<T, StoreError> {
    let accounts = accounts.clone().lock_owned().await;
    tokio::task::spawn_blocking(move || call(&accounts))
        .await
        .map_err(|error| StoreError::Interrupted(error.to_string()))?
        .map_err(Into::into)
}
