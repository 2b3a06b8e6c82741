//! Databases of former versions, as they were left, are brought forward with everything in them.

use rusqlite::Connection;
use uuid::Uuid;

use super::*;

const SCHEMAS: [&str; 9] = [
    include_str!("../../testdata/accounts-schema-1.sql"),
    include_str!("../../testdata/accounts-schema-2.sql"),
    include_str!("../../testdata/accounts-schema-3.sql"),
    include_str!("../../testdata/accounts-schema-4.sql"),
    include_str!("../../testdata/accounts-schema-5.sql"),
    include_str!("../../testdata/accounts-schema-6.sql"),
    include_str!("../../testdata/accounts-schema-7.sql"),
    include_str!("../../testdata/accounts-schema-8.sql"),
    include_str!("../../testdata/accounts-schema-9.sql"),
];

const ALICE: Uuid = Uuid::from_u128(0x11111111_1111_4111_8111_111111111111);

/// The database that the dump describes, opened by this version.
fn brought_forward(dump: &str) -> (tempfile::TempDir, Accounts) {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("accounts.db");
    Connection::open(&path).unwrap().execute_batch(dump).unwrap();
    let accounts = Accounts::open(&path).unwrap();
    assert!(accounts.damage().unwrap().is_empty());
    // What there was before is kept, for the program from before.
    let copies = Copies::of(&path).list().unwrap();
    let [copy] = &copies[..] else { panic!("{copies:?}") };
    let schema = dump.lines().last().unwrap().trim_end_matches(';').rsplit('=').next().unwrap();
    assert_eq!(examine(&copy.path).unwrap().schema.to_string(), schema);
    (dir, accounts)
}

#[test]
fn what_there_was_is_there_after_every_migration() {
    for (version, dump) in SCHEMAS.into_iter().enumerate() {
        let (_dir, mut accounts) = brought_forward(dump);
        let names: Vec<_> = accounts.list(true).unwrap().into_iter().map(|a| a.name).collect();
        assert_eq!(names, ["alice", "bob", "carol"]);
        let alice = accounts.named("alice").unwrap();
        assert_eq!((alice.id, alice.linger_s, alice.is_open()), (ALICE, None, true));
        assert_eq!(alice.machine_id[..3], [0, 1, 2]);
        let bob = accounts.named("bob").unwrap();
        assert_eq!((bob.linger_s, bob.disabled, bob.max_sessions), (Some(5), true, Some(4)));
        assert_eq!(accounts.removed("carol").unwrap().len(), 1);
        // Keys had no options up to schema 3: they open what they did.
        let options = accounts.key_options(ALICE, &[0, 0, 0, 11]).unwrap().unwrap();
        assert_eq!(options, KeyOptions::default());
        let backup = accounts.key_options(ALICE, &[0, 0, 0, 12]).unwrap();
        assert_eq!(backup.is_some_and(|options| options.command.is_some()), version >= 3);
        let session = &accounts.sessions(ALICE, 9).unwrap()[0];
        assert_eq!((session.id, &session.login, &session.machine), (7, &None, &None));
        // What came with later versions says what it said before there was such a thing.
        assert_eq!((alice.max_linger_s, alice.hold_until), (None, None));
        assert_eq!(accounts.intent(ALICE).unwrap().unwrap().paused, None);
        assert_eq!((alice.quota_bytes, accounts.usage(ALICE, 0).unwrap()), (None, vec![]));
        // And takes new values.
        assert_eq!(accounts.set_hold(ALICE, Some(9)).unwrap(), Change::Done);
        assert_eq!(accounts.set_max_linger(ALICE, Some(0)).unwrap(), Change::Done);
        let new = NewAccount::new(AccountName::parse("dave").unwrap());
        assert_eq!(accounts.create(&new).unwrap().policy, None);
    }
}

#[test]
fn accounts_of_schema_1_get_the_default_policy() {
    let (_dir, accounts) = brought_forward(SCHEMAS[0]);
    let intent = accounts.intent(ALICE).unwrap().unwrap();
    assert_eq!((intent.state, intent.terminals), (MachineState::Stopped, None));
    let policy = |name: &str| accounts.named(name).unwrap().policy;
    assert_eq!((policy("alice"), policy("bob")), (None, None));
    assert_eq!(accounts.set_policy(ALICE, Policy::Discard).unwrap(), Change::Done);
    assert_eq!(policy("alice"), Some(Policy::Discard));
}

#[test]
fn policies_and_left_terminals_of_schema_2_stay() {
    let (_dir, accounts) = brought_forward(SCHEMAS[1]);
    let intent = accounts.intent(ALICE).unwrap().unwrap();
    assert_eq!(intent.state, MachineState::Saved);
    assert_eq!(intent.terminals.as_deref(), Some("3 0"));
    let policy = |name: &str| accounts.named(name).unwrap().policy;
    assert_eq!((policy("alice"), policy("bob")), (Some(Policy::Keep), Some(Policy::Discard)));
    assert_eq!(accounts.named("bob").unwrap().hold_until, None);
}

#[test]
fn holds_and_limits_of_schema_3_stay() {
    let (_dir, accounts) = brought_forward(SCHEMAS[2]);
    let account = |name: &str| accounts.named(name).unwrap();
    assert_eq!((account("alice").max_linger_s, account("alice").hold_until), (None, None));
    assert_eq!((account("bob").max_linger_s, account("bob").hold_until), (Some(900), Some(1)));
    assert_eq!(account("bob").policy, Some(Policy::Discard));
}

/// Each account's sessions and policy were always written down; what everybody had is nobody's own now.
#[test]
fn limits_of_schema_4_are_the_accounts_own_if_they_were_not_everybodys() {
    let (_dir, mut accounts) = brought_forward(SCHEMAS[3]);
    let account = |name: &str| accounts.named(name).unwrap();
    assert_eq!(
        (account("alice").max_sessions, account("alice").policy),
        (None, Some(Policy::Keep))
    );
    assert_eq!(
        (account("bob").max_sessions, account("bob").policy),
        (Some(4), Some(Policy::Discard))
    );
    let carol = &accounts.removed("carol").unwrap()[0];
    assert_eq!((carol.max_sessions, carol.policy), (Some(4), None));
    let new = [account("alice").class, account("bob").class];
    assert_eq!(new, [None, None]);
    assert_eq!((account("alice").expires, account("bob").disabled_until), (None, None));
    assert_eq!(account("bob").closed_at(0), Some(Closed::Disabled { until: None }));
    // The options of keys, and keys themselves: tables that name accounts are not emptied on the way.
    let keys = accounts.keys(ALICE).unwrap();
    let options: Vec<_> = keys.iter().map(|key| key.options.as_str()).collect();
    assert_eq!(options, ["", "restrict,command=\"borg serve\""]);
    let changes = Changes { max_sessions: Some(None), ..Changes::default() };
    let bob = account("bob").id;
    assert_eq!(accounts.change(bob, &changes).unwrap(), ["max_sessions"]);
}

#[test]
fn classes_and_ends_of_schema_5_stay() {
    let (_dir, accounts) = brought_forward(SCHEMAS[4]);
    let (alice, bob) = (accounts.named("alice").unwrap(), accounts.named("bob").unwrap());
    assert_eq!((alice.class.as_deref(), alice.expires), (Some("student"), Some(4_086_547_200)));
    assert_eq!((alice.guest_name(), bob.guest_name()), ("alicia", "bob"));
    assert_eq!((bob.max_streams, bob.disabled_until), (Some(7), Some(1_863_000_000)));
    assert_eq!((alice.policy, bob.policy), (Some(Policy::Keep), Some(Policy::Discard)));
    assert_eq!(accounts.invited_until(ALICE).unwrap(), None);
}

#[test]
fn invitations_of_schema_6_stay() {
    let (_dir, mut accounts) = brought_forward(SCHEMAS[5]);
    assert_eq!(accounts.invited_until(ALICE).unwrap(), Some(4_086_547_200));
    let changes = Changes { quota_bytes: Some(Some(5 << 30)), ..Changes::default() };
    assert_eq!(accounts.change(ALICE, &changes).unwrap(), ["quota_bytes"]);
    assert_eq!(accounts.change(ALICE, &changes).unwrap(), [] as [&str; 0]);
    assert_eq!(accounts.named("alice").unwrap().quota_bytes, Some(5 << 30));
}

#[test]
fn quotas_and_use_of_schema_7_stay_and_nobody_is_limited_anew() {
    let (_dir, mut accounts) = brought_forward(SCHEMAS[6]);
    let alice = accounts.named("alice").unwrap();
    let bob = accounts.named("bob").unwrap();
    let used = accounts.usage(bob.id, 0).unwrap();
    assert_eq!((bob.quota_bytes, used.len()), (Some(5 << 30), 1));
    assert_eq!((alice.cpu_weight, alice.cpu_percent), (None, None));
    assert_eq!((alice.io_rate, alice.io_operations), (None, None));
    let changes = Changes {
        cpu_weight: Some(Some(10_000)),
        cpu_percent: Some(Some(0)),
        io_rate: Some(Some(20 << 20)),
        ..Changes::default()
    };
    assert_eq!(accounts.change(ALICE, &changes).unwrap(), ["cpu_weight", "cpu_percent", "io_rate"]);
    assert_eq!(accounts.change(ALICE, &changes).unwrap(), [] as [&str; 0]);
    let alice = accounts.named("alice").unwrap();
    assert_eq!((alice.cpu_percent, alice.io_rate), (Some(0), Some(20 << 20)));
    for wrong in [Some(Some(0)), Some(Some(10_001))] {
        let changes = Changes { cpu_weight: wrong, ..Changes::default() };
        assert!(accounts.change(ALICE, &changes).is_err(), "{wrong:?}");
    }
}

#[test]
fn shares_of_schema_8_stay_and_machines_have_what_their_base_says() {
    let (_dir, mut accounts) = brought_forward(SCHEMAS[7]);
    let bob = accounts.named("bob").unwrap();
    assert_eq!((bob.cpu_weight, bob.cpu_percent), (Some(50), Some(25)));
    assert_eq!((bob.io_rate, bob.io_operations), (Some(20 << 20), Some(300)));
    assert_eq!((bob.memory_bytes, bob.vcpus), (None, None));
    let changes =
        Changes { memory_bytes: Some(Some(1 << 30)), vcpus: Some(Some(2)), ..Changes::default() };
    assert_eq!(accounts.change(ALICE, &changes).unwrap(), ["memory_bytes", "vcpus"]);
    assert_eq!(accounts.change(ALICE, &changes).unwrap(), [] as [&str; 0]);
    let alice = accounts.named("alice").unwrap();
    assert_eq!((alice.memory_bytes, alice.vcpus), (Some(1 << 30), Some(2)));
    for (memory_bytes, vcpus) in [(Some(0), None), (Some(u64::MAX), None), (None, Some(0))] {
        let changes =
            Changes { memory_bytes: Some(memory_bytes), vcpus: Some(vcpus), ..Changes::default() };
        assert!(accounts.change(ALICE, &changes).is_err(), "{memory_bytes:?} {vcpus:?}");
    }
}

#[test]
fn sizes_of_schema_9_stay_and_processes_are_as_many_as_there_can_be() {
    let (_dir, mut accounts) = brought_forward(SCHEMAS[8]);
    let bob = accounts.named("bob").unwrap();
    assert_eq!(
        (bob.io_operations, bob.memory_bytes, bob.vcpus),
        (Some(300), Some(1 << 30), Some(2))
    );
    assert_eq!(bob.processes, None);
    let changes = Changes { processes: Some(Some(60)), ..Changes::default() };
    assert_eq!(accounts.change(bob.id, &changes).unwrap(), ["processes"]);
    assert_eq!(accounts.change(bob.id, &changes).unwrap(), [] as [&str; 0]);
    assert_eq!(accounts.named("bob").unwrap().processes, Some(60));
    let mut new = NewAccount::new(AccountName::parse("dave").unwrap());
    new.processes = Some(0);
    assert_eq!(accounts.create(&new).unwrap().processes, Some(0));
}
