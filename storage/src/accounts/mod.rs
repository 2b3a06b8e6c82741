//! Accounts: names, keys, passwords, limits, and what the service notes about sessions and machines.
//!
//! One SQLite file, `accounts.db`; its schema is `accounts.sql` at the top of the repository, and
//! `docs/accounts.md` says what it means. The service and the admin commands open it at the same time:
//! each call here is one transaction, and nothing is cached, so what a command changed counts from the
//! next call on.
//!
//! Calls block (on the disk, and on another process' transaction for at most [`BUSY`]): not for
//! asynchronous threads.

mod account;
mod changes;
mod copies;
mod database;
mod endpoint;
mod idle;
mod invitations;
mod key_options;
mod keys;
mod machines;
mod name;
mod new_account;
mod password;
mod policy;
mod sessions;
mod source_pattern;
mod stored_keys;
mod usage;

pub use account::{
    Account, Change, Closed, DEFAULT_DISK_BYTES, DEFAULT_MAX_SESSIONS, GUEST_UID, MAX_CPU_WEIGHT,
};
pub use changes::{BatchError, Changes, Step};
pub use copies::{Copies, CopyError, DAILY_KEPT, DatabaseCopy, Examined, examine};
pub use database::{Accounts, AccountsError, BUSY};
pub use endpoint::Endpoint;
pub use invitations::Redeemed;
pub use key_options::{KeyOptions, OptionError, utc_of_digits};
pub use keys::{KeyError, KeyFileError, MAX_KEYS, PublicKey, fingerprint, parse_keys};
pub use machines::{Intent, MachineState};
pub use name::{AccountName, MAX_NAME, NameError};
pub use new_account::{Identity, NewAccount};
pub use password::{
    MAX_PASSWORD, MIN_PASSWORD, PasswordError, check_hash, hash_password, verify_password,
};
pub use policy::Policy;
pub use sessions::{LogQuery, NewSession, SessionRecord};
pub use source_pattern::SourcePattern;
pub use stored_keys::StoredKey;
pub use usage::{Keep, PRUNED_AT_ONCE, Pruned, Used, UsedDay, day_of, first_second};
#[cfg(test)]
mod fixtures;
#[cfg(test)]
mod migration_tests;
#[cfg(test)]
mod sharing_tests;
