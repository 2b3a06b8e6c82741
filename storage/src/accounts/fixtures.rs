//! What tests of the database begin with.

use super::*;

pub fn database() -> (tempfile::TempDir, Accounts) {
    let dir = tempfile::tempdir().unwrap();
    let accounts = Accounts::open(&dir.path().join("accounts.db")).unwrap();
    (dir, accounts)
}

pub fn keys() -> Vec<PublicKey> {
    parse_keys(include_str!("../../testdata/authorized_keys")).unwrap()
}

pub fn new(name: &str) -> NewAccount {
    NewAccount { keys: keys()[..2].to_vec(), ..NewAccount::new(AccountName::parse(name).unwrap()) }
}
