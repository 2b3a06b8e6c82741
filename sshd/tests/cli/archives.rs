//! Accounts as files, from one host to another.

use crate::host::{Host, KEYS};
use hermitage_storage::base::BaseId;
use hermitage_storage::rest::AtRest;
use hermitage_storage::{disk, sparse};
use serde_json::json;
use std::fs::{self, File, OpenOptions};
use std::os::unix::fs::{FileExt, PermissionsExt};
use std::process::Stdio;

/// With a base, and alice, who has keys, files and a saved machine.
fn with_alice() -> (Host, BaseId) {
    let host = Host::new();
    let base = host.install_vmm(1);
    host.run(&["base", "build", "--image", &host.image().display().to_string()]).success();
    host.run_with(&["account", "add", "alice", "--key", "-", "--disk", "64M"], KEYS).success();
    host.run_with(&["account", "passwd", "alice"], "a password\n").success();
    let disk = OpenOptions::new().write(true).open(disk_of(&host, "alice")).unwrap();
    disk.write_all_at(&[5; 300_000], 40 << 20).unwrap();
    disk.sync_all().unwrap();
    host.save_on("alice", &base);
    (host, base)
}

fn disk_of(host: &Host, name: &str) -> std::path::PathBuf {
    host.state().disk(host.accounts().named(name).unwrap().id)
}

fn digest(host: &Host, name: &str) -> String {
    sparse::digest(&File::open(disk_of(host, name)).unwrap()).unwrap().to_string()
}

fn text(path: &std::path::Path) -> String {
    path.display().to_string()
}

#[test]
fn an_account_goes_to_another_host_and_sleeps_on_there() {
    let ((here, _), there) = (with_alice(), Host::new());
    let file = here.path("alice.hermitage");
    let done = here.run(&["account", "export", "alice", "--memory", "-o", &text(&file)]).success();
    assert!(done.out.contains("with its memory") && done.out.contains("hash"), "{}", done.out);
    assert_eq!(fs::metadata(&file).unwrap().permissions().mode() & 0o777, 0o600);
    here.run(&["account", "export", "alice", "-o", &text(&file)]).fails(1, "already");

    // Without the base it will start from its disk, and that is said.
    let done = there.run(&["account", "restore", &text(&file)]).success();
    assert!(done.err.contains("which is not here"), "{}", done.err);
    assert_eq!(digest(&there, "alice"), digest(&here, "alice"));
    let shown = there.json(&["account", "show", "alice"]);
    assert_eq!(
        (shown["keys"].as_array().unwrap().len(), &shown["has_password"]),
        (7, &json!(true))
    );
    there.run(&["account", "restore", &text(&file)]).fails(4, "already an account \"alice\"");
    let done = there.run(&["account", "restore", &text(&file), "--name", "alice2"]).success();
    assert!(done.err.contains("knows itself by the old name"), "{}", done.err);
    assert_eq!(there.json(&["snapshot", "list"])["snapshots"].as_array().unwrap().len(), 1);

    // With it, the memory is good for one resume.
    there.run(&["account", "remove", "alice", "--purge"]).success();
    let base = there.install_vmm(1);
    there.run(&["base", "build", "--image", &there.image().display().to_string()]).success();
    let done = there.json(&["account", "restore", &text(&file)]);
    assert_eq!((&done["memory"], &done["base"]), (&json!(true), &json!(base.as_str())));
    assert_eq!(there.json(&["snapshot", "show", "alice"])["usable"], true);
    assert_eq!(there.json(&["snapshot", "verify"])["snapshots"][0]["whole"], true);
    assert_eq!(here.json(&["snapshot", "show", "alice"])["usable"], true, "as it was");
}

#[test]
fn an_archive_goes_through_a_pipe() {
    let ((here, _), there) = (with_alice(), Host::new());
    let mut from = here.command(&["account", "export", "alice", "-o", "-"]);
    let mut from = from.stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap();
    let mut to = there.command(&["account", "restore", "-", "--name", "bob"]);
    let to = to.stdin(from.stdout.take().unwrap()).output().unwrap();
    assert!(to.status.success(), "{}", String::from_utf8_lossy(&to.stderr));
    assert!(from.wait().unwrap().success());
    assert_eq!(digest(&there, "bob"), digest(&here, "alice"));
    assert_eq!(there.json(&["snapshot", "list"])["snapshots"].as_array().unwrap().len(), 0);
    // A writer that dies leaves nothing.
    let none = there.run(&["account", "restore", "-"]);
    none.fails(1, "cut short");
}

#[test]
fn a_machine_that_runs_is_in_the_way() {
    let (host, _) = with_alice();
    let disk = disk::open_locked(&disk_of(&host, "alice")).unwrap();
    let file = text(&host.path("alice.hermitage"));
    host.run(&["account", "export", "alice", "-o", &file]).fails(1, "--stop");
    assert!(!host.path("alice.hermitage").exists());
    drop(disk);
    host.run(&["account", "export", "alice", "--stop", "-o", &file]).success();
    let id = host.accounts().named("alice").unwrap().id;
    assert!(
        AtRest::take(&host.state(), id).unwrap().saved().is_some(),
        "its memory is still there"
    );
    host.run(&["account", "export", "bob", "-o", "x"]).fails(3, "no account");
}

#[test]
fn a_damaged_archive_is_refused_and_nothing_is_left_of_it() {
    let ((here, _), there) = (with_alice(), Host::new());
    let path = here.path("alice.hermitage");
    here.run(&["account", "export", "alice", "--memory", "-o", &text(&path)]).success();
    let file = OpenOptions::new().read(true).write(true).open(&path).unwrap();
    let length = file.metadata().unwrap().len();
    for at in [3, 30, 500, length / 2, length - 5] {
        let mut byte = [0];
        file.read_exact_at(&mut byte, at).unwrap();
        file.write_all_at(&[byte[0] ^ 4], at).unwrap();
        there.run(&["account", "restore", &text(&path)]).fails(1, "archive");
        file.write_all_at(&byte, at).unwrap();
    }
    assert_eq!(there.json(&["account", "list", "--removed"])["accounts"], json!([]));
    assert_eq!(fs::read_dir(there.state().accounts_dir()).unwrap().count(), 0);
    there.run(&["account", "restore", &text(&path)]).success();
}
