use super::super::fixtures::{database, keys, new};
use super::super::*;
use rusqlite::params;

#[test]
fn an_account_is_found_as_it_was_made() {
    let (_dir, mut accounts) = database();
    let alice = accounts.create(&new("alice")).unwrap();
    assert_eq!(accounts.by_name("alice").unwrap().unwrap(), alice);
    assert_eq!(accounts.by_id(alice.id).unwrap().unwrap(), alice);
    assert_eq!(accounts.named("alice").unwrap(), alice);
    assert_eq!(alice.disk_bytes, DEFAULT_DISK_BYTES);
    assert!(alice.is_open());
    let bob = accounts.create(&new("bob")).unwrap();
    assert_ne!(alice.machine_id, bob.machine_id);
    assert_eq!(accounts.list(false).unwrap(), vec![alice, bob]);
    assert!(
        matches!(accounts.named("carol"), Err(AccountsError::Unknown(name)) if name == "carol")
    );
}

#[test]
fn a_name_is_taken_once() {
    let (_dir, mut accounts) = database();
    accounts.create(&new("alice")).unwrap();
    let again = accounts.create(&new("alice"));
    assert!(matches!(again, Err(AccountsError::NameTaken(name)) if name == "alice"));
    assert_eq!(accounts.list(true).unwrap().len(), 1);
}

#[test]
fn impossible_limits_are_refused() {
    let (_dir, mut accounts) = database();
    for bad in [
        NewAccount { disk_bytes: 0, ..new("a") },
        NewAccount { disk_bytes: u64::MAX, ..new("a") },
        NewAccount { max_sessions: Some(0), ..new("a") },
    ] {
        assert!(matches!(accounts.create(&bad), Err(AccountsError::Limit { .. })));
    }
    assert!(accounts.by_name("a").unwrap().is_none());
}

#[test]
fn an_account_is_closed_at_its_times_only() {
    let (_dir, mut accounts) = database();
    let alice = accounts.create(&NewAccount { expires: Some(100), ..new("alice") }).unwrap();
    assert_eq!(alice.closed_at(99), None);
    assert_eq!(alice.closed_at(100), Some(Closed::Expired { since: 100 }));
    assert!(!alice.is_open());
    assert!(accounts.expired_between(98, 99).unwrap().is_empty());
    assert_eq!(accounts.expired_between(99, 100).unwrap(), [alice.id]);
    assert!(accounts.expired_between(100, 900).unwrap().is_empty(), "each is told once");

    assert_eq!(accounts.disable_until(alice.id, 50).unwrap(), Change::Done);
    assert_eq!(accounts.disable_until(alice.id, 50).unwrap(), Change::AlreadySo);
    let alice = accounts.named("alice").unwrap();
    assert_eq!(alice.closed_at(49), Some(Closed::Disabled { until: Some(50) }));
    assert_eq!(alice.closed_at(50), None);
    assert_eq!(accounts.set_disabled(alice.id, true).unwrap(), Change::Done, "for good now");
    let alice = accounts.named("alice").unwrap();
    assert_eq!(alice.closed_at(50), Some(Closed::Disabled { until: None }));
    assert_eq!(accounts.set_disabled(alice.id, false).unwrap(), Change::Done);
    assert_eq!(accounts.named("alice").unwrap().closed_at(50), None);
}

#[test]
fn a_removed_name_is_free_and_its_row_waits_for_purge() {
    let (_dir, mut accounts) = database();
    let first = accounts.create(&new("alice")).unwrap();
    accounts.set_password(first.id, Some("$argon2id$…")).unwrap();
    assert_eq!(accounts.remove(first.id).unwrap(), Change::Done);
    assert_eq!(accounts.remove(first.id).unwrap(), Change::AlreadySo);
    assert!(accounts.by_name("alice").unwrap().is_none());
    assert!(accounts.by_id(first.id).unwrap().unwrap().password.is_none());
    assert!(accounts.keys(first.id).unwrap().is_empty());

    let second = accounts.create(&new("alice")).unwrap();
    assert_ne!(first.id, second.id);
    assert_eq!(accounts.removed("alice").unwrap().len(), 1);
    assert_eq!(accounts.list(false).unwrap().len(), 1);
    assert_eq!(accounts.list(true).unwrap().len(), 2);
    assert!(accounts.purge(second.id).is_err(), "only what was removed can be purged");
    accounts.purge(first.id).unwrap();
    assert!(accounts.by_id(first.id).unwrap().is_none());
    assert!(accounts.by_id(second.id).unwrap().is_some());
}

#[test]
fn another_connection_sees_a_change_at_once() {
    let (dir, mut accounts) = database();
    let other = Accounts::open(&dir.path().join("accounts.db")).unwrap();
    let alice = accounts.create(&new("alice")).unwrap();
    assert!(other.key_options(alice.id, keys()[0].blob()).unwrap().is_some());
    accounts.remove_key(alice.id, &keys()[0].fingerprint()).unwrap();
    assert!(other.key_options(alice.id, keys()[0].blob()).unwrap().is_none());
}

#[test]
fn sessions_are_logged_with_their_end() {
    let (_dir, mut accounts) = database();
    let alice = accounts.create(&new("alice")).unwrap();
    let session = NewSession {
        account: alice.id,
        source: "192.0.2.1:1234",
        kind: "shell",
        login: "key SHA256:x",
    };
    let first = accounts.session_started(&session).unwrap();
    let second = accounts.session_started(&session).unwrap();
    accounts.session_ended(first, "exit 0", Some("forked")).unwrap();
    accounts.session_ended(first, "too late", None).unwrap();
    let log = accounts.sessions(alice.id, 10).unwrap();
    assert_eq!(log.iter().map(|s| s.id).collect::<Vec<_>>(), [second, first]);
    assert_eq!(log[1].outcome.as_deref(), Some("exit 0"));
    assert_eq!(log[0].ended, None);
    assert_eq!(accounts.end_open_sessions("the service was killed").unwrap(), 1);
    assert_eq!(
        accounts.sessions(alice.id, 1).unwrap()[0].outcome.as_deref(),
        Some("the service was killed")
    );
    assert_eq!(accounts.end_open_sessions("again").unwrap(), 0);
}

#[test]
fn the_log_is_of_an_account_and_of_a_time() {
    let (_dir, mut accounts) = database();
    let alice = accounts.create(&new("alice")).unwrap().id;
    let bob = accounts.create(&new("bob")).unwrap().id;
    // When it began and ended.
    for (account, began, ended) in
        [(alice, 100, Some(200)), (bob, 150, None), (alice, 300, Some(400)), (bob, 350, Some(360))]
    {
        let session =
            NewSession { account, source: "192.0.2.1:1", kind: "sftp", login: "password" };
        let id = accounts.session_started(&session).unwrap();
        if ended.is_some() {
            accounts.session_ended(id, "exit status 0", Some("running")).unwrap();
        }
        let times = "UPDATE sessions SET started = ?2, ended = ?3 WHERE id = ?1";
        accounts.db.execute(times, rusqlite::params![id, began, ended]).unwrap();
    }
    let log = |account, since, most| -> Vec<i64> {
        let query = LogQuery { account, since, most };
        accounts.session_log(&query).unwrap().iter().map(|session| session.started).collect()
    };
    assert_eq!(log(None, None, 9), [350, 300, 150, 100]);
    assert_eq!(log(None, None, 2), [350, 300]);
    assert_eq!(log(Some(alice), None, 9), [300, 100]);
    assert_eq!(log(None, Some(201), 9), [350, 300, 150], "one that goes on is of now");
    assert_eq!(log(Some(bob), Some(361), 9), [150]);
    let last = &accounts.session_log(&LogQuery { account: None, since: None, most: 1 }).unwrap()[0];
    assert_eq!(
        (last.login.as_deref(), last.machine.as_deref()),
        (Some("password"), Some("running"))
    );
}

#[test]
fn the_last_shell_is_found_among_other_sessions() {
    let (_dir, mut accounts) = database();
    let (alice, bob) =
        (accounts.create(&new("alice")).unwrap(), accounts.create(&new("bob")).unwrap());
    assert_eq!(accounts.last_shell(alice.id).unwrap(), None);
    for (account, source, kind) in [
        (alice.id, "192.0.2.1:1", "shell"),
        (alice.id, "192.0.2.2:2", "shell"),
        (alice.id, "192.0.2.3:3", "exec"),
        (bob.id, "192.0.2.4:4", "shell"),
    ] {
        accounts.session_started(&NewSession { account, source, kind, login: "password" }).unwrap();
    }
    let (when, from) = accounts.last_shell(alice.id).unwrap().unwrap();
    assert_eq!(from, "192.0.2.2:2");
    assert!(when > 1_700_000_000, "{when}");
}

#[test]
fn intent_is_replaced_and_ends_with_the_account() {
    let (_dir, mut accounts) = database();
    let alice = accounts.create(&new("alice")).unwrap();
    let mut intent = Intent {
        account: alice.id,
        state: MachineState::Starting,
        pid: None,
        base: Some("b1".into()),
        detail: None,
        terminals: Some("3 0".into()),
        paused: Some("make (pid 812)".into()),
        since: 0,
    };
    accounts.record_intent(&intent).unwrap();
    intent = Intent { state: MachineState::Running, pid: Some(42), ..intent };
    accounts.record_intent(&intent).unwrap();
    let found = accounts.intents().unwrap();
    assert_eq!(found.len(), 1);
    assert!(found[0].since > 0);
    assert_eq!(Intent { since: 0, ..found[0].clone() }, intent);

    accounts.remove(alice.id).unwrap();
    accounts.purge(alice.id).unwrap();
    assert!(accounts.intents().unwrap().is_empty());
    assert!(accounts.record_intent(&intent).is_err(), "no machine without an account");
}

#[test]
fn an_unknown_machine_state_is_an_error() {
    let (_dir, mut accounts) = database();
    let alice = accounts.create(&new("alice")).unwrap();
    accounts
        .db
        .execute(
            "INSERT INTO machines (account, state, since) VALUES (?1, 'dreaming', 1)",
            params![alice.id.to_string()],
        )
        .unwrap();
    assert!(accounts.intents().unwrap_err().to_string().contains("dreaming"));
}
