use super::super::fixtures::{database, keys, new};
use super::super::*;
use super::{Changes, Step};

#[test]
fn what_changes_is_said_and_the_rest_stays() {
    let (_dir, mut accounts) = database();
    let alice = accounts.create(&new("alice")).unwrap();
    let changes = Changes {
        class: Some(Some("student".into())),
        disk_bytes: Some(20 << 30),
        max_sessions: Some(Some(3)),
        max_streams: Some(Some(0)),
        policy: Some(Some(Policy::Discard)),
        expires: Some(Some(99)),
        keys: keys(),
        ..Changes::default()
    };
    let changed = accounts.change(alice.id, &changes).unwrap();
    let wanted =
        ["class", "disk_bytes", "max_sessions", "max_streams", "policy", "expires", "keys"];
    assert_eq!(changed, wanted);
    assert!(accounts.change(alice.id, &changes).unwrap().is_empty(), "it is so already");
    let now = accounts.named("alice").unwrap();
    let wanted = Account {
        class: Some("student".into()),
        disk_bytes: 20 << 30,
        max_sessions: Some(3),
        max_streams: Some(0),
        policy: Some(Policy::Discard),
        expires: Some(99),
        ..alice.clone()
    };
    assert_eq!(now, wanted);
    let back = Changes { class: Some(None), max_sessions: Some(None), ..Changes::default() };
    assert_eq!(accounts.change(alice.id, &back).unwrap(), ["class", "max_sessions"]);
    let none = Changes { max_sessions: Some(Some(0)), ..Changes::default() };
    assert!(matches!(accounts.change(alice.id, &none), Err(AccountsError::Limit { .. })));
}

#[test]
fn a_batch_is_taken_whole_or_not_at_all() {
    let (_dir, mut accounts) = database();
    let alice = accounts.create(&new("alice")).unwrap();
    let changes = Changes { class: Some(Some("staff".into())), ..Changes::default() };
    let mut steps = vec![Step::Create(new("bob")), Step::Change(alice.id, changes)];
    steps.push(Step::Create(new("alice")));
    let error = accounts.batch(&steps).unwrap_err();
    assert_eq!(error.step, Some(2));
    assert!(error.to_string().contains("already an account \"alice\""), "{error}");
    assert_eq!(accounts.list(true).unwrap(), std::slice::from_ref(&alice));

    steps.pop();
    let made = accounts.batch(&steps).unwrap();
    assert_eq!(made[0], accounts.named("bob").unwrap());
    assert_eq!(made[1].class.as_deref(), Some("staff"));
    accounts.forget(&[made[0].id]).unwrap();
    assert!(accounts.by_id(made[0].id).unwrap().is_none());
}

#[test]
fn a_name_is_changed_with_its_host_name() {
    let (_dir, mut accounts) = database();
    let alice = accounts.create(&new("alice")).unwrap();
    accounts.create(&new("bob")).unwrap();
    let name = |name| AccountName::parse(name).unwrap();
    let taken = accounts.rename(alice.id, &name("bob"));
    assert!(matches!(taken, Err(AccountsError::NameTaken(name)) if name == "bob"));
    assert_eq!(accounts.rename(alice.id, &name("al_ice")).unwrap(), Change::Done);
    assert_eq!(accounts.rename(alice.id, &name("al_ice")).unwrap(), Change::AlreadySo);
    let renamed = accounts.named("al_ice").unwrap();
    assert_eq!((renamed.id, renamed.hostname.as_str()), (alice.id, "al-ice"));
    assert_eq!(renamed.machine_id, alice.machine_id);
    assert_eq!((alice.guest_name(), renamed.guest_name()), ("alice", "alice"));
    accounts.rename(alice.id, &name("al")).unwrap();
    assert_eq!(accounts.named("al").unwrap().guest_name(), "alice");
    accounts.rename(alice.id, &name("alice")).unwrap();
    assert_eq!(accounts.named("alice").unwrap(), alice, "back again");
    accounts.rename(alice.id, &name("al_ice")).unwrap();
    assert!(accounts.by_name("alice").unwrap().is_none());
    accounts.remove(alice.id).unwrap();
    assert!(accounts.rename(alice.id, &name("alice")).is_err());
}
