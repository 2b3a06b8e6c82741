//! Commands that change files, ended by SIGKILL at whatever moment. What only changes the database is tried in
//! `database.rs`; every step of saves, restores and checkpoints in the storage crate's crash tests.

use crate::host::Host;
use hermitage_storage::accounts::Accounts;
use hermitage_storage::checkpoint;
use hermitage_storage::rest::{AtRest, Resting};
use std::fs::File;
use std::os::unix::fs::FileExt;
use std::process::Stdio;
use std::time::{Duration, Instant};

const MARK_AT: u64 = 500_000;

fn mark(host: &Host, name: &str) -> Option<u8> {
    let account = host.accounts().named(name).ok()?;
    let mut byte = [0];
    File::open(host.state().disk(account.id)).unwrap().read_exact_at(&mut byte, MARK_AT).unwrap();
    Some(byte[0])
}

fn set_mark(host: &Host, name: &str, byte: u8) {
    let disk = host.state().disk(host.accounts().named(name).unwrap().id);
    File::options().write(true).open(disk).unwrap().write_all_at(&[byte], MARK_AT).unwrap();
}

/// Starts the command and kills it after that time. True: it was still there.
fn killed(host: &Host, arguments: &[&str], after: Duration) -> bool {
    let begun = Instant::now();
    let mut child = host
        .command(arguments)
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .spawn()
        .unwrap();
    std::thread::sleep(after.saturating_sub(begun.elapsed()));
    child.kill().unwrap();
    child.wait().unwrap().code().is_none()
}

/// What has to hold whatever was cut off: the database is sound, the account's disk can be had, and what is saved
/// of its memory is of this disk or said not to be.
fn check(host: &Host, what: &[&str]) {
    let accounts = Accounts::open(&host.state().database()).unwrap();
    assert!(accounts.damage().unwrap().is_empty(), "{what:?}");
    let alice = accounts.named("alice").unwrap();
    let deadline = Instant::now() + Duration::from_secs(10);
    let at_rest = loop {
        match AtRest::take(&host.state(), alice.id) {
            // A child of another test's has a copy of the descriptor until it runs its program.
            Err(error) if Instant::now() < deadline => {
                assert!(error.to_string().contains("in use"), "{what:?}: {error}");
                std::thread::sleep(Duration::from_millis(20));
            }
            taken => break taken.unwrap(),
        }
    };
    if let Resting::Saved(file, _) = &at_rest.memory {
        hermitage_storage::snapshot::verify(file).unwrap();
    }
    for one in checkpoint::list(&host.state(), alice.id).unwrap() {
        let cut_off = |reason: &String| reason.contains("the next command completes or drops it");
        assert!(one.about.as_ref().err().is_none_or(cut_off), "{what:?}: {one:?}");
    }
}

#[test]
fn a_killed_command_that_changes_files_leaves_an_account_that_goes_on() {
    let host = Host::new();
    let first = host.install_vmm(1);
    let image = host.image().display().to_string();
    host.run(&["base", "build", "--image", &image]).success();
    host.run(&["account", "add", "alice", "--disk", "4M"]).success();
    set_mark(&host, "alice", 1);
    host.save_on("alice", &first);
    let archive = host.path("alice.hermitage").display().to_string();
    host.run(&["account", "export", "alice", "-o", &archive]).success();
    let backups = host.path("backups").display().to_string();
    let first = first.as_str().to_owned();
    host.install_vmm(2);

    let commands: &[&[&str]] = &[
        &["account", "invite", "alice"],
        &["account", "invite", "alice", "--revoke"],
        &["checkpoint", "create", "alice", "one"],
        &["account", "restore", &archive, "--name", "again"],
        &["backup", "create", &backups, "--memory"],
        &["backup", "prune", &backups, "--keep", "1"],
        &["base", "build"],
        &["base", "use", &first],
        &["base", "gc"],
        &["checkpoint", "restore", "alice", "one"],
        &["checkpoint", "drop", "alice", "one"],
        &["snapshot", "drop", "alice"],
        &["account", "reset", "alice"],
        &["account", "remove", "again", "--purge"],
        &["doctor", "--fix"],
        &["account", "factory-reset", "alice", "--yes"],
    ];
    let mut met = 0;
    for (number, arguments) in commands.iter().enumerate() {
        // How long such a command takes here, to be met all over.
        let number = number as u32;
        for round in 0..5 {
            let after = Duration::from_micros(u64::from(1_500 + round * 6_000 + number * 373));
            met += u32::from(killed(&host, arguments, after));
            check(&host, arguments);
        }
        let again = host.run_when_free(arguments);
        // Done before it was killed: there is nothing left to do, or it is there.
        let done = ["already", "no checkpoint", "there is no account", "nothing is saved"];
        let so = again.code == 0 || done.iter().any(|words| again.err.contains(words));
        assert!(so || arguments[0] == "doctor", "{arguments:?}: {}", again.err);
        check(&host, arguments);
        let wanted = if arguments.contains(&"factory-reset") { 0 } else { 1 };
        assert_eq!(mark(&host, "alice") == Some(1), wanted == 1, "her files after {arguments:?}");
        assert!([None, Some(1)].contains(&mark(&host, "again")), "of the archive: {arguments:?}");
    }
    assert!(met >= commands.len() as u32, "{met} were killed: the others were quicker");
    assert!(
        host.accounts().named("alice").unwrap().closed_at(hermitage::time::now() + 120).is_none()
    );
    let would = host.run(&["doctor"]).out;
    assert!(would.contains("nothing half-made is left"), "{would}");
    let left = std::fs::read_dir(host.state().accounts_dir()).unwrap().count();
    assert_eq!(left, host.accounts().list(false).unwrap().len(), "folders that are nobody's");
}
