//! Who may log in. Every answer comes from the database at the moment it is asked: a key removed a
//! second ago does not log in, and a key accepted as an offer is looked up again once its signature is
//! verified.
//!
//! Names are not to be found out: an unknown user, a closed account, an account without a password and
//! a wrong password all verify one argon2id hash and take the same time. That an account is closed is told
//! to whoever has its password or key, and to nobody else: so it is looked at last, by [`Authenticator::closed`],
//! and what comes before takes closed accounts like open ones.

mod certificates;
mod krl;
mod refusal;
mod revoked;

pub use certificates::Trust;
pub use refusal::Refusal;

use std::{
    net::IpAddr,
    sync::Arc,
    time::{Duration, Instant, SystemTime, UNIX_EPOCH},
};

use hermitage_storage::accounts::{
    Account, Closed, KeyOptions, MAX_PASSWORD, hash_password, verify_password,
};
use russh::keys::Certificate;
use tokio::sync::Semaphore;

use crate::{closing, store::Store};

/// Who is let in by a key or a certificate, and what for.
#[derive(Debug)]
pub struct Admission {
    pub account: Account,
    pub options: KeyOptions,
}

#[derive(Clone)]
pub struct Authenticator {
    store: Store,
    trust: Trust,
    /// Hashing is slow on purpose; this bounds the memory and the cores it takes.
    hashing: Arc<Semaphore>,
    failure_delay: Duration,
}

impl Authenticator {
    pub fn new(
        store: Store,
        trust: Trust,
        password_checks: usize,
        failure_delay: Duration,
    ) -> Self {
        let hashing = Arc::new(Semaphore::new(password_checks));
        Self { store, trust, hashing, failure_delay }
    }

    /// Whether an offered key may turn out to be a certificate's.
    pub fn takes_certificates(&self) -> bool {
        self.trust.authorities.is_some()
    }

    /// Whether this key (blob as on the wire) may be used now and from there, and for what; whether the
    /// account is closed is not looked at.
    pub async fn key(
        &self,
        user: &str,
        blob: Vec<u8>,
        source: IpAddr,
    ) -> Result<Admission, Refusal> {
        let found = self.store.by_key(user, blob.clone()).await;
        let found = found.map_err(|error| Refusal::LookUp(error.to_string()))?;
        let (account, options) = found.ok_or(Refusal::Unknown)?;
        if !options.allows_source(source) {
            return Err(Refusal::Source(source));
        }
        if options.expired(i64::try_from(now()).unwrap_or(i64::MAX)) {
            return Err(Refusal::Expired);
        }
        if self.trust.revoked.is_some() {
            let trust = self.trust.clone();
            on_files(move || trust.check_key(&blob)).await?;
        }
        Ok(Admission { account, options })
    }

    /// Whether this certificate, whose owner has proved to be it, may be used now and from there; whether
    /// the account is closed is not looked at.
    pub async fn certificate(
        &self,
        user: &str,
        certificate: &Certificate,
        source: IpAddr,
    ) -> Result<Admission, Refusal> {
        let (trust, certificate) = (self.trust.clone(), certificate.clone());
        let name = user.to_owned();
        let options = on_files(move || trust.judge(&certificate, &name, source, now())).await?;
        let account = self.store.by_name(user).await;
        let account = account.map_err(|error| Refusal::LookUp(error.to_string()))?;
        let account = account.ok_or(Refusal::NoAccount)?;
        Ok(Admission { account, options })
    }

    /// The account whose invitation's code this is; closed or not.
    pub async fn invitation(&self, user: &str, code: &str) -> Option<Account> {
        if code.len() > MAX_PASSWORD {
            return None;
        }
        let now = i64::try_from(now()).unwrap_or(i64::MAX);
        match self.store.by_invitation(user, code, now).await {
            Ok(account) => account,
            Err(error) => {
                tracing::error!(%error, "can't look up an invitation");
                None
            }
        }
    }

    /// The account whose password this is; closed or not, which is for its owner to know.
    pub async fn password(&self, user: &str, password: &str) -> Option<Account> {
        let begun = Instant::now();
        let verified = self.verify(user, password).await;
        if verified.is_none() {
            tokio::time::sleep(self.failure_delay.saturating_sub(begun.elapsed())).await;
        }
        verified
    }

    async fn verify(&self, user: &str, password: &str) -> Option<Account> {
        if password.len() > MAX_PASSWORD {
            return None;
        }
        let account = match self.store.by_name(user).await {
            Ok(account) => account,
            Err(error) => {
                tracing::error!(%error, "can't look up an account");
                None
            }
        };
        let permit = self.hashing.clone().acquire_owned().await.ok()?;
        let hash = account.as_ref().and_then(|account| account.password.clone());
        let password = password.as_bytes().to_owned();
        let matches = tokio::task::spawn_blocking(move || {
            let matches = verify_password(hash.as_deref(), &password);
            drop(permit);
            matches
        });
        if !matches.await.unwrap_or(false) {
            return None;
        }
        account
    }

    /// The hash of a new password; in turn with those that are verified.
    pub async fn hash(&self, password: String) -> Result<String, String> {
        let permit = self.hashing.clone().acquire_owned().await.map_err(|e| e.to_string())?;
        let hashed = tokio::task::spawn_blocking(move || {
            let hashed = hash_password(password.as_bytes()).map_err(|error| error.to_string());
            drop(permit);
            hashed
        });
        hashed.await.map_err(|error| error.to_string())?
    }

    /// Why an account that is about to be let in, or was, may not be here; as it is on record now.
    pub async fn closed(&self, account: &Account) -> Option<Closed> {
        match self.store.by_id(account.id).await {
            Ok(account) => closing::closed(account.as_ref()),
            Err(error) => {
                tracing::error!(%error, "can't look up an account");
                Some(Closed::Disabled { until: None })
            }
        }
    }
}

/// Files are read on threads made for that.
async fn on_files<T: Send + 'static>(
    call: impl FnOnce() -> Result<T, Refusal> + Send + 'static,
) -> Result<T, Refusal> {
    let called = tokio::task::spawn_blocking(call).await;
    called.map_err(|error| Refusal::LookUp(error.to_string()))?
}

/// Seconds since 1970. A clock before that is taken as the end of time: nothing is valid then.
fn now() -> u64 {
    SystemTime::now().duration_since(UNIX_EPOCH).map_or(u64::MAX, |time| time.as_secs())
}

#[cfg(test)]
mod tests {
    use hermitage_storage::accounts::{AccountName, Accounts, NewAccount};

    use super::*;

    fn accounts(dir: &tempfile::TempDir) -> Store {
        let path = dir.path().join("accounts.db");
        let mut accounts = Accounts::open(&path).unwrap();
        for (name, password) in [("alice", Some("right")), ("keysonly", None), ("off", Some("x"))] {
            let mut new = NewAccount::new(AccountName::parse(name).unwrap());
            new.password_hash = password.map(|p| hash_password(p.as_bytes()).unwrap());
            let account = accounts.create(&new).unwrap();
            accounts.set_disabled(account.id, name == "off").unwrap();
        }
        Store::open(&path).unwrap()
    }

    #[tokio::test]
    async fn whoever_is_refused_costs_the_same() {
        let dir = tempfile::tempdir().unwrap();
        let authenticator = Authenticator::new(accounts(&dir), Trust::default(), 1, Duration::ZERO);
        let users = ["alice", "nobody-here", "keysonly", "off"];
        let hash = hash_password(b"something").unwrap();
        let hashing = (0..5).map(|_| {
            let begun = Instant::now();
            assert!(!verify_password(Some(&hash), b"wrong"));
            begun.elapsed()
        });
        let hashing = hashing.min().unwrap();
        // What else runs here only adds, so the quickest refusal tells whether one left the work out.
        for user in users {
            let mut quickest = Duration::MAX;
            for _ in 0..5 {
                let begun = Instant::now();
                assert!(authenticator.password(user, "wrong").await.is_none());
                quickest = quickest.min(begun.elapsed());
            }
            assert!(quickest > hashing / 3, "{user}: {quickest:?}, a hash takes {hashing:?}");
        }
    }

    #[tokio::test]
    async fn a_failure_takes_its_time_and_a_success_does_not() {
        let dir = tempfile::tempdir().unwrap();
        let delay = Duration::from_secs(2);
        let authenticator = Authenticator::new(accounts(&dir), Trust::default(), 1, delay);
        let begun = Instant::now();
        assert_eq!(authenticator.password("alice", "right").await.unwrap().name, "alice");
        assert!(begun.elapsed() < delay);
        let off = authenticator.password("off", "x").await.unwrap();
        assert_eq!(authenticator.closed(&off).await, Some(Closed::Disabled { until: None }));
        assert!(begun.elapsed() < delay);
        assert!(authenticator.password("off", "y").await.is_none());
        assert!(begun.elapsed() >= delay);
    }

    #[tokio::test]
    async fn a_giant_password_is_no_password() {
        let dir = tempfile::tempdir().unwrap();
        let authenticator = Authenticator::new(accounts(&dir), Trust::default(), 1, Duration::ZERO);
        assert!(authenticator.password("alice", &"x".repeat(1 << 20)).await.is_none());
    }
}
