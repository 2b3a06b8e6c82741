use super::super::fixtures::{database, keys, new};
use super::super::*;
use uuid::Uuid;

#[test]
fn a_key_opens_its_account_only() {
    let (_dir, mut accounts) = database();
    let alice = accounts.create(&new("alice")).unwrap();
    let bob = accounts.create(&NewAccount { keys: vec![], ..new("bob") }).unwrap();
    let key = &keys()[0];
    assert!(accounts.key_options(alice.id, key.blob()).unwrap().is_some());
    assert!(accounts.key_options(bob.id, key.blob()).unwrap().is_none());
    assert!(accounts.key_options(alice.id, keys()[2].blob()).unwrap().is_none());
    assert!(accounts.key_options(Uuid::nil(), key.blob()).unwrap().is_none());

    accounts.set_disabled(alice.id, true).unwrap();
    assert!(
        accounts.key_options(alice.id, key.blob()).unwrap().is_some(),
        "its owner is told more"
    );
    assert!(!accounts.named("alice").unwrap().is_open());
    accounts.remove(alice.id).unwrap();
    assert!(accounts.key_options(alice.id, key.blob()).unwrap().is_none(), "removed");
}

#[test]
fn keys_come_and_go() {
    let (_dir, mut accounts) = database();
    let alice = accounts.create(&new("alice")).unwrap();
    let key = &keys()[3];
    assert_eq!(accounts.add_key(alice.id, key).unwrap(), Change::Done);
    assert_eq!(accounts.add_key(alice.id, key).unwrap(), Change::AlreadySo);
    let stored = accounts.keys(alice.id).unwrap();
    assert_eq!(stored.len(), 3);
    assert_eq!((&stored[2].fingerprint, &*stored[2].comment), (&key.fingerprint(), key.comment()));
    assert_eq!(accounts.remove_key(alice.id, &key.fingerprint()).unwrap(), Change::Done);
    assert_eq!(accounts.remove_key(alice.id, &key.fingerprint()).unwrap(), Change::AlreadySo);
    assert_eq!(accounts.keys(alice.id).unwrap().len(), 2);
    assert!(accounts.add_key(Uuid::nil(), key).is_err(), "a key needs an account");
}

#[test]
fn a_key_keeps_its_options() {
    let (_dir, mut accounts) = database();
    let bound = |options: &str| keys()[0].clone().with_options(KeyOptions::parse(options).unwrap());
    let restricted = bound(r#"restrict,command="git-shell -c x""#);
    let alice = NewAccount { keys: vec![restricted.clone()], ..new("alice") };
    let alice = accounts.create(&alice).unwrap();
    let options = accounts.key_options(alice.id, restricted.blob()).unwrap().unwrap();
    assert_eq!(&options, restricted.options());
    assert_eq!(accounts.keys(alice.id).unwrap()[0].options, restricted.options().to_string());
    assert_eq!(accounts.add_key(alice.id, &restricted).unwrap(), Change::AlreadySo);

    // Neither freed nor bound otherwise by being added again, alone or with an account.
    for other in [bound(""), bound("restrict")] {
        let error = accounts.add_key(alice.id, &other).unwrap_err().to_string();
        assert!(error.contains("git-shell") && error.contains(&other.fingerprint()), "{error}");
    }
    let twice = NewAccount { keys: vec![bound(""), bound("no-pty")], ..new("bob") };
    assert!(accounts.create(&twice).unwrap_err().to_string().contains("no options"));
    assert!(accounts.by_name("bob").unwrap().is_none());
    let options = accounts.key_options(alice.id, restricted.blob()).unwrap().unwrap();
    assert_eq!(&options, restricted.options());
}

#[test]
fn a_key_with_options_that_are_not_understood_opens_nothing() {
    let (_dir, mut accounts) = database();
    let alice = accounts.create(&new("alice")).unwrap();
    accounts.db.execute("UPDATE keys SET options = 'only-on-sundays'", []).unwrap();
    let error = accounts.key_options(alice.id, keys()[0].blob()).unwrap_err().to_string();
    assert!(error.contains("only-on-sundays"), "{error}");
}
