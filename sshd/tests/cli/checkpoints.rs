//! States of an account that it goes back to, without a service.

use crate::host::Host;
use hermitage_storage::base::BaseId;
use hermitage_storage::disk;
use serde_json::json;
use std::fs::OpenOptions;
use std::os::unix::fs::FileExt;

/// With a base, and alice.
fn with_alice() -> (Host, BaseId) {
    let host = Host::new();
    let base = host.install_vmm(1);
    host.run(&["base", "build", "--image", &host.image().display().to_string()]).success();
    host.run(&["account", "add", "alice", "--disk", "1M"]).success();
    (host, base)
}

fn disk_of(host: &Host) -> std::path::PathBuf {
    host.state().disk(host.accounts().named("alice").unwrap().id)
}

fn write(host: &Host, byte: u8) {
    let disk = OpenOptions::new().write(true).open(disk_of(host)).unwrap();
    disk.write_all_at(&[byte], 500_000).unwrap();
}

fn read(host: &Host) -> u8 {
    let mut byte = [0];
    std::fs::File::open(disk_of(host)).unwrap().read_exact_at(&mut byte, 500_000).unwrap();
    byte[0]
}

#[test]
fn an_account_goes_back_and_forth() {
    let (host, base) = with_alice();
    write(&host, 1);
    host.save_on("alice", &base);
    let made = host.json(&["checkpoint", "create", "alice", "clean"]);
    assert_eq!((&made["memory"], &made["base"]), (&json!(true), &json!(base.as_str())));
    host.run(&["checkpoint", "create", "alice", "clean"]).fails(1, "already");
    host.run(&["account", "reset", "alice"]).success();
    write(&host, 2);

    let done = host.json(&["checkpoint", "restore", "alice", "clean"]);
    assert_eq!((read(&host), &done["memory"]), (1, &json!(true)));
    assert_eq!(host.json(&["snapshot", "show", "alice"])["usable"], true);
    let kept = done["kept"].as_str().unwrap();
    assert!(kept.starts_with("before-20"), "{kept}");
    let listed = host.run(&["checkpoint", "list", "alice"]).success().out;
    assert!(listed.contains("clean") && listed.contains("kept by a restore"), "{listed}");
    let done = host.json(&["checkpoint", "restore", "alice", kept]);
    assert_eq!((read(&host), &done["memory"]), (2, &json!(false)));
    let record = host.accounts().intent(host.accounts().named("alice").unwrap().id).unwrap();
    assert!(record.unwrap().detail.unwrap().contains("back at the checkpoint before-20"));
    host.run(&["checkpoint", "restore", "alice", "nowhere"]).fails(3, "no checkpoint \"nowhere\"");
    host.run(&["checkpoint", "restore", "alice", "../x"]).fails(1, "no name");
    assert!(host.json(&["account", "show", "alice"])["checkpoint_bytes"].as_u64().unwrap() > 0);
}

#[test]
fn a_machine_that_runs_is_in_the_way_of_checkpoints() {
    let (host, _) = with_alice();
    host.run(&["checkpoint", "create", "alice", "one"]).success();
    let lock = disk::open_locked(&disk_of(&host)).unwrap();
    host.run(&["checkpoint", "create", "alice"]).fails(1, "--stop");
    host.run(&["checkpoint", "restore", "alice", "one"]).fails(1, "--stop");
    drop(lock);
    host.run(&["checkpoint", "create", "alice", "--stop"]).success();
    host.run(&["checkpoint", "drop", "alice", "one"]).success();
    host.run(&["checkpoint", "drop", "alice", "one"]).fails(3, "no checkpoint");
}

#[test]
fn a_checkpoints_memory_keeps_its_base_and_goes_with_the_account() {
    let (host, first) = with_alice();
    host.save_on("alice", &first);
    host.run(&["checkpoint", "create", "alice", "one"]).success();
    host.run(&["account", "reset", "alice"]).success();
    host.install_vmm(2);
    host.run(&["base", "build", "--image", &host.image().display().to_string()]).success();
    let kept = host.run(&["base", "gc"]).success().out;
    assert!(kept.contains("alice's checkpoint one needs it"), "{kept}");
    host.run(&["base", "remove", first.as_str()]).fails(1, "checkpoint drop alice one");
    let id = host.accounts().named("alice").unwrap().id;
    host.run(&["account", "remove", "alice"]).success();
    assert!(host.state().removed_dir(id).join("checkpoints/one/disk.img").exists());
    host.run(&["account", "remove", "alice", "--purge"]).success();
    assert!(!host.state().removed_dir(id).exists());
}
