//! What `hermitage doctor` finds of the host and the state directory, and what it puts right.

use crate::host::{Host, KEYS};
use serde_json::Value;
use std::fs::{self, Permissions};
use std::os::unix::fs::PermissionsExt;
use std::os::unix::net::UnixListener;
use std::path::Path;

/// As on a host that was used: a base, an account, a copy of the database.
fn used() -> Host {
    let host = Host::new();
    host.install_vmm(1);
    host.run(&["base", "build", "--image", &host.image().display().to_string()]).success();
    host.run_with(&["account", "add", "alice", "--disk", "1M", "--key", "-"], KEYS).success();
    host
}

fn look(host: &Host, arguments: &[&str]) -> Value {
    let done = host.run(&[&["doctor", "--json"], arguments].concat());
    serde_json::from_str(&done.out).expect(&done.out)
}

/// What it would fix.
fn fixes(report: &Value) -> Vec<&str> {
    let findings = report["findings"].as_array().unwrap();
    findings.iter().filter_map(|finding| finding["fix"].as_str()).collect()
}

fn mode(path: &Path) -> u32 {
    fs::metadata(path).unwrap().permissions().mode() & 0o7777
}

/// Every file and folder with its mode and when it was changed.
fn picture(dir: &Path) -> Vec<String> {
    let mut all = vec![];
    let mut folders = vec![dir.to_owned()];
    while let Some(folder) = folders.pop() {
        for entry in fs::read_dir(&folder).unwrap() {
            let path = entry.unwrap().path();
            let metadata = fs::symlink_metadata(&path).unwrap();
            if metadata.is_dir() {
                folders.push(path.clone());
            }
            let name = path.file_name().unwrap().to_string_lossy().into_owned();
            // Looking at the database makes and removes its log.
            if !name.starts_with("accounts.db") {
                all.push(format!("{} {:o}", path.display(), metadata.permissions().mode()));
            }
        }
    }
    all.sort();
    all
}

#[test]
fn what_is_safe_is_put_right_when_asked_for_and_once() {
    let host = used();
    assert_eq!(fixes(&look(&host, &[])), ["take today's copy of the accounts database"]);
    let state = host.state();
    let chmod =
        |path: &Path, mode| fs::set_permissions(path, Permissions::from_mode(mode)).unwrap();
    chmod(&state.accounts_dir(), 0o755);
    chmod(&state.database(), 0o644);
    fs::remove_dir(state.removed_accounts_dir()).unwrap();
    let alice = host.accounts().named("alice").unwrap();
    let half = state.account_dir(alice.id).join(".new-half");
    fs::write(&half, "made").unwrap();
    fs::create_dir(state.images_dir().join(".new-image")).unwrap();
    // What somebody is still writing is locked.
    let busy = state.bases_dir().join(".new-busy");
    let lock = fs::File::create(&busy).unwrap();
    nix::fcntl::Flock::lock(lock, nix::fcntl::FlockArg::LockExclusiveNonblock)
        .map(std::mem::forget)
        .unwrap();
    drop(UnixListener::bind(host.path("run/admin.sock")).unwrap());
    let before = picture(&host.path("."));
    let report = look(&host, &[]);
    assert_eq!(report["fixes"], serde_json::json!([]));
    assert_eq!(picture(&host.path(".")), before, "looking changes nothing");
    let would = fixes(&report);
    assert_eq!(would.len(), 6, "{would:#?}");

    let done = look(&host, &["--fix"]);
    let did: Vec<_> = done["fixes"].as_array().unwrap().iter().collect();
    assert!(did.iter().all(|fix| fix["error"].is_null()), "{did:#?}");
    assert_eq!(did.iter().map(|fix| fix["did"].as_str().unwrap()).collect::<Vec<_>>(), would);
    assert_eq!((mode(&state.accounts_dir()), mode(&state.database())), (0o700, 0o600));
    assert!(state.removed_accounts_dir().is_dir() && !half.exists() && busy.exists());
    assert!(!host.path("run/admin.sock").exists());
    assert!(state.disk(alice.id).exists());
    let copies = host.json(&["database", "list"]);
    assert!(copies["copies"][0]["name"].as_str().unwrap().starts_with("daily-"), "{copies}");
    assert_eq!(fixes(&done), [] as [&str; 0], "as it is afterwards");

    let text = host.run(&["doctor", "--fix"]).out;
    assert!(text.starts_with("There was nothing to fix.\n"), "{text}");
    // It is in the audit log what was done; looking is not.
    let log = fs::read_to_string(state.root().join("audit.jsonl")).unwrap();
    let lines: Vec<_> = log.lines().filter(|line| line.contains("\"doctor\"")).collect();
    assert!(lines.len() == 2 && lines[0].contains("take today's copy"), "{lines:#?}");
}

#[test]
fn a_disk_that_is_gone_is_told_of_and_never_made_anew() {
    let host = used();
    let disk = host.state().disk(host.accounts().named("alice").unwrap().id);
    fs::remove_file(&disk).unwrap();
    let text = host.run(&["doctor", "--fix"]).out;
    assert!(text.contains("1 account without a disk") && text.contains("alice"), "{text}");
    assert!(!disk.exists());
}

#[test]
fn a_link_in_the_place_of_a_file_is_left_alone() {
    let host = used();
    let secret = host.path("secret");
    fs::write(&secret, "of somebody else").unwrap();
    fs::set_permissions(&secret, Permissions::from_mode(0o644)).unwrap();
    let log = host.state().root().join("audit.jsonl");
    fs::remove_file(&log).unwrap();
    std::os::unix::fs::symlink(&secret, &log).unwrap();
    let done = look(&host, &["--fix"]);
    let failed: Vec<_> =
        done["fixes"].as_array().unwrap().iter().filter(|fix| !fix["error"].is_null()).collect();
    assert!(failed.len() == 1 && failed[0]["error"] == "it is a link", "{failed:#?}");
    assert_eq!(mode(&secret), 0o644);
}

#[test]
fn every_finding_that_is_not_fine_says_what_to_do() {
    let host = used();
    host.configure("[ssh]\nlisten = [\"127.0.0.1:1\"]\n");
    let report = look(&host, &[]);
    let findings = report["findings"].as_array().unwrap();
    let checks: Vec<_> =
        findings.iter().map(|finding| finding["check"].as_str().unwrap()).collect();
    for check in [
        "nested",
        "swap",
        "overcommit",
        "clock",
        "entropy",
        "open files",
        "processes",
        "space",
        "inodes",
        "folders",
        "leftovers",
        "database copies",
        "service lock",
        "service",
        "base",
        "accounts",
    ] {
        assert!(checks.contains(&check), "{check} is not in {checks:?}");
    }
    for finding in findings.iter().filter(|finding| finding["level"] != "ok") {
        assert!(!finding["advice"].as_str().unwrap().is_empty(), "{finding}");
    }
}

#[test]
fn of_a_base_that_can_not_be_used_it_is_said_once_how_another_is_made() {
    let host = used();
    let base = host.state().current_base().unwrap().unwrap();
    // The words for a file of another content have the command in them, those for one that is cut short don't.
    let dir = host.state().base(&base);
    let changes: [fn(&mut Vec<u8>); 2] = [|bytes| bytes[0] ^= 1, |bytes| bytes.truncate(1)];
    for change in changes {
        let path = dir.join("root.erofs");
        let was = std::fs::read(&path).unwrap();
        let mode = std::fs::metadata(&path).unwrap().permissions();
        let mut changed = was.clone();
        change(&mut changed);
        std::fs::remove_file(&path).unwrap();
        std::fs::write(&path, changed).unwrap();
        let report = look(&host, &[]);
        let findings = report["findings"].as_array().unwrap().iter();
        let finding =
            findings.clone().find(|f| f["check"] == "base" && f["level"] != "ok").unwrap();
        let words = format!("{} {}", finding["found"], finding["advice"]);
        assert_eq!(words.matches("hermitage base build").count(), 1, "{words}");
        std::fs::write(&path, was).unwrap();
        std::fs::set_permissions(&path, mode).unwrap();
    }
}
