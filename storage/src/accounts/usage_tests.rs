use super::super::NewSession;
use super::super::fixtures::{database, new};
use super::*;

fn used(awake_s: u64, disk_bytes: Option<u64>) -> Used {
    Used { awake_s, cpu_ms: 10 * awake_s, received: 1, sent: 2, disk_bytes }
}

fn begin(accounts: &Accounts, account: Uuid) -> i64 {
    let session = NewSession { account, source: "192.0.2.1:1", kind: "shell", login: "password" };
    accounts.session_started(&session).unwrap()
}

#[test]
fn what_was_used_adds_up_by_the_day() {
    let (_dir, mut accounts) = database();
    let alice = accounts.create(&new("alice")).unwrap().id;
    let bob = accounts.create(&new("bob")).unwrap().id;
    accounts.add_usage(100, &[(alice, used(5, Some(700))), (bob, used(1, None))]).unwrap();
    // One that was purged meanwhile costs the others nothing.
    accounts.add_usage(100, &[(Uuid::nil(), used(9, None)), (alice, used(6, None))]).unwrap();
    accounts.add_usage(101, &[(alice, used(7, Some(600)))]).unwrap();
    let days = accounts.usage(alice, 0).unwrap();
    assert_eq!(days.iter().map(|day| day.day).collect::<Vec<_>>(), [101, 100]);
    let wanted = Used { awake_s: 11, cpu_ms: 110, received: 2, sent: 4, disk_bytes: Some(700) };
    assert_eq!((days[1].used, days[1].sessions), (wanted, 0));
    assert_eq!(accounts.usage(alice, 101).unwrap().len(), 1);
    assert_eq!(accounts.usage(bob, 0).unwrap()[0].used, used(1, None));
    let mut all = accounts.usage_of_all(100).unwrap();
    all.sort_by_key(|(account, _)| *account != alice);
    assert_eq!(
        all[0].1.used,
        Used { awake_s: 18, cpu_ms: 180, received: 3, sent: 6, disk_bytes: Some(600) }
    );
    assert_eq!((all[1].0, all[1].1.used, all.len()), (bob, used(1, None), 2));
    assert_eq!(accounts.usage_of_all(101).unwrap().len(), 1);
    accounts.add_usage(101, &[(alice, Used { sent: u64::MAX, ..Used::default() })]).unwrap();
    assert_eq!(accounts.usage(alice, 101).unwrap()[0].used.sent, (1 << 60) + 2);
}

#[test]
fn sessions_are_counted_on_the_day_they_begin() {
    let (_dir, mut accounts) = database();
    let alice = accounts.create(&new("alice")).unwrap().id;
    begin(&accounts, alice);
    begin(&accounts, alice);
    let days = accounts.usage(alice, 0).unwrap();
    assert_eq!((days.len(), days[0].sessions, days[0].used), (1, 2, Used::default()));
    assert_eq!(days[0].day, day_of(now()));
    // And go with the account.
    accounts.remove(alice).unwrap();
    accounts.purge(alice).unwrap();
    assert!(accounts.usage(alice, 0).unwrap().is_empty());
}

#[test]
fn the_past_is_forgotten_by_age_and_by_number() {
    let (_dir, mut accounts) = database();
    let alice = accounts.create(&new("alice")).unwrap().id;
    let ids: Vec<i64> = (0..10).map(|_| begin(&accounts, alice)).collect();
    for (n, id) in ids.iter().enumerate().skip(1) {
        let sql = "UPDATE sessions SET ended = ?2 WHERE id = ?1";
        accounts.db.execute(sql, params![id, 100 * n as i64]).unwrap();
    }
    let left = |accounts: &Accounts| -> Vec<i64> {
        let mut left: Vec<_> =
            accounts.sessions(alice, 99).unwrap().iter().map(|session| session.id).collect();
        left.reverse();
        left
    };
    let nothing = Keep { sessions_since: None, most_sessions: None, usage_since: None };
    assert_eq!(accounts.prune(&nothing).unwrap(), Pruned::default());
    let aged = Keep { sessions_since: Some(300), ..nothing };
    assert_eq!(accounts.prune(&aged).unwrap(), Pruned { sessions: 2, usage: 0 });
    assert_eq!(accounts.prune(&aged).unwrap(), Pruned::default());
    assert_eq!(left(&accounts), [&ids[..1], &ids[3..]].concat(), "the first still goes on");
    let few = Keep { most_sessions: Some(4), ..nothing };
    assert_eq!(accounts.prune(&few).unwrap().sessions, 3);
    assert_eq!(left(&accounts), [&ids[..1], &ids[6..]].concat());
    assert_eq!(accounts.prune(&Keep { most_sessions: Some(0), ..nothing }).unwrap().sessions, 4);
    assert_eq!(left(&accounts), ids[..1], "one that goes on is never forgotten");

    accounts.add_usage(100, &[(alice, used(1, None))]).unwrap();
    accounts.add_usage(101, &[(alice, used(1, None))]).unwrap();
    let days = Keep { usage_since: Some(101), ..nothing };
    assert_eq!(accounts.prune(&days).unwrap(), Pruned { sessions: 0, usage: 1 });
    assert_eq!(accounts.usage(alice, 0).unwrap().last().unwrap().day, 101);
}

#[test]
fn much_is_forgotten_in_parts() {
    let (_dir, mut accounts) = database();
    let alice = accounts.create(&new("alice")).unwrap().id;
    let count = i64::from(PRUNED_AT_ONCE) + 5;
    accounts
        .db
        .execute(
            "WITH RECURSIVE n(i) AS (SELECT 1 UNION ALL SELECT i + 1 FROM n WHERE i < ?2) \
             INSERT INTO sessions (account, source, kind, started, ended) SELECT ?1, 'x', 'exec', i, i FROM n",
            params![alice.to_string(), count],
        )
        .unwrap();
    let keep = Keep { sessions_since: Some(i64::MAX), most_sessions: None, usage_since: None };
    assert_eq!(accounts.prune(&keep).unwrap().sessions, PRUNED_AT_ONCE as usize);
    assert_eq!(accounts.prune(&keep).unwrap().sessions, 5);
}

#[test]
fn days_begin_at_midnight_utc_before_1970_too() {
    assert_eq!((day_of(86_399), day_of(86_400), day_of(-1)), (0, 1, -1));
    assert_eq!(first_second(day_of(1_700_000_000)), 1_699_920_000);
}
