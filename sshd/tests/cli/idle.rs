//! `account policy` and `account hold`: what happens to a machine while nobody is logged in.

use crate::host::Host;
use hermitage::time::now;
use hermitage_storage::accounts::{Intent, MachineState, Policy};
use serde_json::{Value, json};
use std::fs;

fn alice() -> Host {
    let host = Host::new();
    host.run(&["account", "add", "alice"]).success();
    host
}

#[test]
fn a_policy_is_set_shown_and_set_again() {
    let host = alice();
    let shown = host.json(&["account", "policy", "alice"]);
    assert_eq!((&shown["policy"], &shown["changed"]), (&json!("save"), &json!(false)));
    let set = host.json(&["account", "policy", "alice", "keep"]);
    assert_eq!((&set["policy"], &set["changed"]), (&json!("keep"), &json!(true)));
    assert_eq!(host.json(&["account", "policy", "alice", "keep"])["changed"], false);
    assert_eq!(host.json(&["account", "show", "alice"])["policy"], "keep");
    let text = host.run(&["account", "policy", "alice", "discard"]).success().out;
    assert!(text.contains("powered off 1m after the last session"), "{text}");
    assert_eq!(host.accounts().named("alice").unwrap().policy, Some(Policy::Discard));
}

#[test]
fn times_are_set_and_given_back_to_the_configuration() {
    let host = alice();
    let set = ["account", "policy", "alice", "save", "--linger", "10m", "--max-linger", "8h"];
    let object = host.json(&set);
    let times =
        |object: &Value| (object["linger_seconds"].clone(), object["max_linger_seconds"].clone());
    assert_eq!(times(&object), (json!(600), json!(28_800)));
    assert_eq!(object["changed"], true);
    assert_eq!(host.json(&set)["changed"], false);
    let text = host.run(&["account", "policy", "alice"]).success().out;
    assert_eq!(
        text.trim(),
        "alice's machine is saved 10m after the last session; work keeps it awake for 8h at most"
    );
    let shown = host.json(&["account", "show", "alice"]);
    assert_eq!(times(&shown["limits"]), (json!(600), json!(28_800)));
    let text = host.run(&["account", "show", "alice"]).success().out;
    assert!(text.contains("10m, with work at most 8h"), "{text}");

    host.run(&["account", "policy", "alice", "--max-linger", "0s"]).success();
    let text = host.run(&["account", "policy", "alice"]).success().out;
    assert!(text.contains("whatever works in it"), "{text}");
    let back = ["account", "policy", "alice", "--linger", "default", "--max-linger", "default"];
    assert_eq!(times(&host.json(&back)), (Value::Null, Value::Null));
    // Those of a new account, as it is made.
    let add = ["account", "add", "bob", "--linger", "5", "--max-linger", "1h"];
    assert_eq!(times(&host.json(&add)["limits"]), (json!(5), json!(3600)));
}

#[test]
fn policies_and_times_that_are_none_are_refused() {
    let host = alice();
    host.run(&["account", "policy", "alice", "sleep"]).fails(2, "it is save, keep or discard");
    host.run(&["account", "policy", "alice", "--linger", "soon"]).fails(2, "write for example 30m");
    host.run(&["account", "policy", "alice", "--linger", "-5"]).fails(2, "");
    host.run(&["account", "policy", "nobody", "keep"]).fails(3, "there is no account \"nobody\"");
    host.run(&["account", "policy"]).fails(2, "NAME");
    let alice = host.accounts().named("alice").unwrap();
    assert_eq!((alice.policy, alice.linger_s), (None, None));
}

#[test]
fn a_hold_is_set_moved_shown_and_taken_back() {
    let host = alice();
    let before = now();
    let held = host.json(&["account", "hold", "alice", "2h"]);
    assert_eq!((&held["account"], &held["changed"]), (&json!("alice"), &json!(true)));
    let until = || host.accounts().named("alice").unwrap().hold_until;
    let end = until().unwrap();
    assert!((before + 7200..=now() + 7200).contains(&end));
    let shown = host.json(&["account", "show", "alice"]);
    assert_eq!(shown["held_until"], held["held_until"]);
    let text = host.run(&["account", "show", "alice"]).success().out;
    assert!(text.contains("hold      until 2") && text.contains(" UTC"), "{text}");
    // Given again it counts from now.
    let text = host.run(&["account", "hold", "alice", "1d12h"]).success().out;
    assert!(text.starts_with("alice's machine is held awake until "), "{text}");
    assert!(until().unwrap() > end);

    let off = host.json(&["account", "hold", "alice", "--off"]);
    assert_eq!((&off["held_until"], &off["changed"]), (&Value::Null, &json!(true)));
    assert_eq!(host.json(&["account", "hold", "alice", "--off"])["changed"], false);
    let text = host.run(&["account", "hold", "alice", "--off"]).success().out;
    assert_eq!(text.trim(), "alice's machine was not held");
    assert_eq!(host.json(&["account", "show", "alice"])["held_until"], Value::Null);
}

#[test]
fn a_hold_that_is_over_is_none() {
    let host = alice();
    let id = host.accounts().named("alice").unwrap().id;
    host.accounts().set_hold(id, Some(now() - 1)).unwrap();
    assert_eq!(host.json(&["account", "show", "alice"])["held_until"], Value::Null);
    assert_eq!(host.json(&["account", "hold", "alice", "--off"])["changed"], false);
}

#[test]
fn holds_that_can_not_be_are_refused() {
    let host = alice();
    host.run(&["account", "hold", "alice"]).fails(2, "--off");
    host.run(&["account", "hold", "alice", "2h", "--off"]).fails(2, "--off");
    for bad in ["2", "soon", "0", "1h1h"] {
        host.run(&["account", "hold", "alice", bad]).fails(2, "2h");
    }
    host.run(&["account", "hold", "alice", "0s"]).fails(1, "--off");
    host.run(&["account", "hold", "alice", "8d"]).fails(1, "machines.max_hold");
    host.run(&["account", "hold", "nobody", "2h"]).fails(3, "there is no account \"nobody\"");
    assert_eq!(host.accounts().named("alice").unwrap().hold_until, None);
    // As the operator has configured it.
    let config = host.path("hermitage.toml");
    fs::write(&config, "[machines]\nmax_hold = 864000\n").unwrap();
    let config = config.display().to_string();
    host.run(&["--config", &config, "account", "hold", "alice", "8d"]).success();
}

#[test]
fn accounts_say_why_their_machine_sleeps() {
    let host = alice();
    let account = host.accounts().named("alice").unwrap();
    let why = "idle for 60 s; its memory is saved (2.1 MiB)";
    let intent = Intent {
        account: account.id,
        state: MachineState::Saved,
        pid: None,
        base: None,
        detail: Some(why.into()),
        terminals: None,
        paused: None,
        since: 0,
    };
    host.accounts().record_intent(&intent).unwrap();
    assert_eq!(host.json(&["account", "show", "alice"])["because"], why);
    for command in [&["account", "show", "alice"][..], &["account", "list"]] {
        let text = host.run(command).success().out;
        assert!(text.contains(why), "{text}");
    }
}
