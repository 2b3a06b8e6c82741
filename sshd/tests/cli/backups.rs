//! All accounts in a directory, and out of it.

use crate::host::{Host, KEYS};
use hermitage_storage::{disk, sparse};
use serde_json::json;
use std::fs::{self, File, OpenOptions};
use std::os::unix::fs::FileExt;
use std::path::PathBuf;

fn with_two() -> (Host, String) {
    let host = Host::new();
    let base = host.install_vmm(1);
    host.run(&["base", "build", "--image", &host.image().display().to_string()]).success();
    host.run_with(&["account", "add", "alice", "--key", "-", "--disk", "64M"], KEYS).success();
    host.run(&["account", "add", "bob", "--disk", "1M"]).success();
    let disk = OpenOptions::new().write(true).open(disk_of(&host, "alice")).unwrap();
    disk.write_all_at(&[5; 300_000], 40 << 20).unwrap();
    host.save_on("alice", &base);
    let dir = host.path("backup").display().to_string();
    (host, dir)
}

fn disk_of(host: &Host, name: &str) -> PathBuf {
    host.state().disk(host.accounts().named(name).unwrap().id)
}

fn digest(host: &Host, name: &str) -> String {
    sparse::digest(&File::open(disk_of(host, name)).unwrap()).unwrap().to_string()
}

#[test]
fn accounts_come_back_from_a_backup_on_a_new_host() {
    let (here, dir) = with_two();
    let done = here.json(&["backup", "create", &dir, "--memory"]);
    assert_eq!((&done["accounts"], &done["left_out"]), (&json!(2), &json!([])));
    let first = done["run"].as_str().unwrap().to_owned();
    let before = digest(&here, "alice");
    OpenOptions::new()
        .write(true)
        .open(disk_of(&here, "alice"))
        .unwrap()
        .write_all_at(b"later", 1 << 20)
        .unwrap();
    here.run(&["backup", "create", &dir, "--account", "alice"]).success();
    assert_eq!(here.json(&["backup", "list", &dir])["runs"].as_array().unwrap().len(), 2);
    assert_eq!(here.json(&["backup", "list", &dir, &first])["accounts"], json!(["alice", "bob"]));
    assert!(here.run(&["backup", "verify", &dir]).success().out.contains("whole"));

    let there = Host::new();
    let done = there.run(&["backup", "restore", &dir, "alice", "--run", &first]).success();
    assert!(
        done.out.contains("its memory") && done.err.contains("which is not here"),
        "{}",
        done.err
    );
    assert_eq!(digest(&there, "alice"), before);
    assert_eq!(there.json(&["account", "show", "alice"])["keys"].as_array().unwrap().len(), 7);
    there.run(&["backup", "restore", &dir, "alice"]).fails(4, "already");
    there.run(&["backup", "restore", &dir, "alice", "--name", "now"]).success();
    assert_eq!(digest(&there, "now"), digest(&here, "alice"));
    there.run(&["backup", "restore", &dir, "bob"]).fails(1, "has no account \"bob\"");
    let database = there.path("restored.db").display().to_string();
    there.run(&["backup", "restore", &dir, "--database", &database]).success();
    assert!(there.path("restored.db").metadata().unwrap().len() > 0);

    here.run(&["backup", "prune", &dir, "--keep", "1"]).success();
    here.run(&["backup", "list", &dir, &first]).fails(1, "no run");
    here.run(&["backup", "prune", &dir, "--keep", "0"]).fails(2, "keep");
}

#[test]
fn who_can_not_be_had_is_named_and_the_others_are_there() {
    let (host, dir) = with_two();
    let busy = disk::open_locked(&disk_of(&host, "alice")).unwrap();
    let done = host.run(&["backup", "create", &dir]);
    assert_eq!(done.code, 1, "{}", done.err);
    assert!(
        done.err.contains("alice is left out") && done.out.contains("1 account"),
        "{}",
        done.out
    );
    drop(busy);
    let run = host.json(&["backup", "list", &dir])["runs"][0]["run"].as_str().unwrap().to_owned();
    let listed = host.run(&["backup", "list", &dir, &run]).success().out;
    assert!(listed.contains("bob") && listed.contains("alice: left out"), "{listed}");
}

#[test]
fn damage_is_found_and_named() {
    let (host, dir) = with_two();
    host.run(&["backup", "create", &dir]).success();
    let chunks = host.path("backup/chunks");
    let folder = fs::read_dir(chunks).unwrap().next().unwrap().unwrap().path();
    let chunk = fs::read_dir(folder).unwrap().next().unwrap().unwrap().path();
    fs::write(&chunk, "x").unwrap();
    host.run(&["backup", "verify", &dir]).fails_saying("damaged: the chunk");
    host.run(&["backup", "verify", &host.path("run").display().to_string()]).fails(1, "no backup");
}
