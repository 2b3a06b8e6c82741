//! Machines and what is saved of them, without a service: nothing runs then, but what sleeps can be looked at
//! and dropped.

use crate::host::Host;
use hermitage_storage::base::BaseId;
use hermitage_storage::disk;
use serde_json::json;
use std::fs::{self, File, OpenOptions};
use std::os::unix::fs::FileExt;
use uuid::Uuid;

/// A host with a base, and alice, whose machine was saved on it.
fn with_a_sleeper() -> (Host, BaseId, Uuid) {
    let host = Host::new();
    let base = host.install_vmm(1);
    host.run(&["base", "build", "--image", &host.image().display().to_string()]).success();
    host.run(&["account", "add", "alice", "--disk", "1M"]).success();
    host.save_on("alice", &base);
    let alice = host.accounts().named("alice").unwrap().id;
    (host, base, alice)
}

fn tag(host: &Host, account: Uuid) -> Option<disk::Tag> {
    disk::tag(&File::open(host.state().disk(account)).unwrap()).unwrap()
}

#[test]
fn what_is_saved_is_listed_shown_and_verified() {
    let (host, base, alice) = with_a_sleeper();
    host.run(&["account", "add", "bob", "--disk", "1M"]).success();
    let listed = host.json(&["snapshot", "list"]);
    assert_eq!(listed["snapshots"].as_array().unwrap().len(), 1);
    let one = host.json(&["snapshot", "show", "alice"]);
    assert_eq!(listed["snapshots"][0], one);
    assert_eq!(one["base"], base.as_str());
    assert_eq!((&one["usable"], &one["data_pages"]), (&json!(true), &json!(1)));
    assert_eq!(one["created"], "2023-11-14T22:13:20Z");
    host.run(&["snapshot", "show", "bob"]).fails(3, "nothing is saved of bob's machine");
    host.run(&["snapshot", "show", "carol"]).fails(3, "carol");

    assert_eq!(host.json(&["snapshot", "verify"])["snapshots"][0]["whole"], true);
    let file = OpenOptions::new().write(true).open(host.state().snapshot(alice)).unwrap();
    file.write_all_at(b"x", 4096).unwrap();
    host.run(&["snapshot", "verify", "alice"]).fails_saying("altered");
    host.run(&["snapshot", "verify"]).fails_saying("altered");
    assert!(host.run(&["snapshot", "list"]).success().out.contains("alice"));
}

#[test]
fn a_snapshot_of_another_disk_is_called_unusable() {
    let (host, _, alice) = with_a_sleeper();
    let disk = File::open(host.state().disk(alice)).unwrap();
    disk::set_tag(&disk, [1; 16]).unwrap();
    let one = host.json(&["snapshot", "show", "alice"]);
    assert_eq!(one["usable"], false);
    assert!(one["state"].as_str().unwrap().contains("not of the disk"), "{one}");
}

#[test]
fn dropped_memory_is_gone_with_its_tag_and_the_disk_stays() {
    for command in [["snapshot", "drop", "alice"], ["account", "reset", "alice"]] {
        let (host, _, alice) = with_a_sleeper();
        let before = fs::read(host.state().disk(alice)).unwrap();
        assert!(tag(&host, alice).is_some());
        host.run(&command).success();
        assert!(!host.state().snapshot(alice).exists());
        assert_eq!(tag(&host, alice), None);
        assert!(fs::read(host.state().disk(alice)).unwrap() == before);
        host.run(&["snapshot", "drop", "alice"]).fails(3, "nothing is saved");
        // Nothing to drop is no error where dropping is not all there is to it.
        host.run(&["account", "reset", "alice"]).success();
    }
}

#[test]
fn a_factory_reset_wants_a_yes_and_makes_a_new_disk() {
    let (host, _, alice) = with_a_sleeper();
    let path = host.state().disk(alice);
    let file = OpenOptions::new().write(true).open(&path).unwrap();
    file.write_all_at(b"thesis", 1000).unwrap();
    drop(file);
    let before = fs::read(&path).unwrap();
    host.run(&["account", "factory-reset", "alice"]).fails(1, "--yes");
    assert!(fs::read(&path).unwrap() == before);

    // A machine that is still there has the disk: nothing may be lost over that.
    let machine = disk::open_locked(&path).unwrap();
    host.run(&["account", "factory-reset", "alice", "--yes"]).fails(1, "in use");
    assert!(fs::read(&path).unwrap() == before);
    let shown = host.json(&["account", "show", "alice"]);
    assert_eq!(shown["disabled"], false, "it is open again after a failure: {shown}");
    drop(machine);

    host.run(&["account", "factory-reset", "alice", "--yes"]).success();
    assert!(fs::read(&path).unwrap() != before);
    assert!(!host.state().snapshot(alice).exists());
    host.run(&["account", "factory-reset", "alice", "--yes"]).success();
    host.run(&["account", "factory-reset", "carol", "--yes"]).fails(3, "carol");
}

#[test]
fn policies_are_kept() {
    let (host, _, _) = with_a_sleeper();
    assert_eq!(host.json(&["account", "show", "alice"])["policy"], "save");
    for (policy, changed) in [("keep", true), ("keep", false), ("discard", true), ("save", true)] {
        let said = host.json(&["account", "policy", "alice", policy]);
        assert_eq!((&said["account"], &said["policy"]), (&json!("alice"), &json!(policy)));
        assert_eq!(said["changed"], changed);
        assert_eq!(host.json(&["account", "show", "alice"])["policy"], policy);
    }
    host.run(&["account", "policy", "alice", "sleep"]).fails(2, "save, keep or discard");
    host.run(&["account", "policy", "carol", "keep"]).fails(3, "carol");
}

#[test]
fn without_a_service_nothing_runs() {
    let (host, _, _) = with_a_sleeper();
    host.run(&["account", "start", "alice"]).fails(1, "hermitage serve");
    let stopped = host.json(&["account", "stop", "alice"]);
    assert_eq!(stopped, json!({ "account": "alice", "machine": "saved" }));
    host.run(&["account", "reset", "alice"]).success();
    let stopped = host.json(&["account", "stop", "alice"]);
    assert_eq!(stopped["machine"], "stopped");
    host.run(&["account", "stop", "carol"]).fails(3, "carol");
}
