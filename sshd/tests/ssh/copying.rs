//! Exporting an account whose machine runs: its disk is copied by the machine, and its sessions go on.

use std::{
    fs::{self, File},
    os::unix::fs::FileExt,
    process::{Child, Command, Stdio},
    time::Duration,
};

use hermitage::admin::protocol::{Reply, Request};
use hermitage_storage::{accounts::Account, disk, publish, sparse};
use nix::fcntl::{Flock, FlockArg};

use crate::{
    harness::{Options, Service, finish_child, stderr, stdout, wait_for},
    keeping::{done, hermitage, moved},
    terminals::Shell,
    watching::audited,
};

const LINGERS: Options = Options { ssh: "", machines: "linger = 60" };

fn export_of(service: &Service, name: &str) -> Child {
    let mut command = Command::new(env!("CARGO_BIN_EXE_hermitage"));
    command
        .arg("--config")
        .arg(service.path("hermitage.toml"))
        .args(["account", "export", name, "-o"]);
    command.arg(service.path("out.hermitage")).stdout(Stdio::piped()).stderr(Stdio::piped());
    command.spawn().unwrap()
}

/// Nothing is in her folder that was not there before, not for a moment longer than somebody reads it.
pub fn nothing_remains(service: &Service, account: &Account) {
    let dir = service.state().account_dir(account.id);
    let beside =
        || fs::read_dir(&dir).unwrap().flatten().any(|file| publish::is_beside(&file.file_name()));
    wait_for("the copy to be gone", || (!beside()).then_some(()));
}

/// A copy of hers is being made.
pub fn wait_copying(service: &Service, account: &Account) {
    let dir = service.state().account_dir(account.id);
    wait_for("the copy", || {
        let files = fs::read_dir(&dir).unwrap().flatten();
        let mut copies = files.filter(|file| publish::is_beside(&file.file_name()));
        copies.find(|file| file.metadata().is_ok_and(|file| file.len() > 0)).map(drop)
    });
}

#[test]
fn an_account_is_exported_while_she_works() {
    let service = Service::with(LINGERS);
    let alice = service.account("alice");
    let mut shell = Shell::open(&service, "alice");
    shell.run("kept=yes; echo don''e", "done");
    let file = service.path("alice.hermitage").display().to_string();
    let told = done(&service, &["account", "export", "alice", "-o", &file]);
    assert!(told.contains("as its disk was while in use"), "{told}");
    nothing_remains(&service, &alice);
    done(&service, &["account", "restore", &file, "--name", "again"]);
    let digest = |name: &str| {
        let id = service.accounts().named(name).unwrap().id;
        sparse::digest(&File::open(service.state().disk(id)).unwrap()).unwrap()
    };
    assert_eq!(digest("again"), digest("alice"));
    // Whose disk was copied, for whom: the command says what for.
    let copies = wait_for("the audit log", || {
        let copies = audited(&service, "copy");
        copies.iter().any(|copy| copy["what"] == "disk").then_some(copies)
    });
    let of = |what: &str| copies.iter().find(|copy| copy["what"] == what).unwrap();
    let (disk, export) = (of("disk"), of("export"));
    assert_eq!((&disk["account"], &disk["pid"]), (&"alice".into(), &export["pid"]));
    assert!(disk["bytes"].is_u64() && disk["error"].is_null(), "{disk}");
    assert_eq!(export["place"], file.as_str());
    shell.run("echo -$kept-", "-yes-");
    // As JSON, into a pipe, and again: nothing of the first is in the way.
    let output = hermitage(&service, &["account", "export", "alice", "-o", "-"]);
    assert!(output.status.success(), "{}", stderr(&output));
    assert!(output.stdout.starts_with(b"hrmtacct"));
    // With her memory, too: she goes on here, and there as well.
    let file = service.path("memory.hermitage").display().to_string();
    let told = done(&service, &["account", "export", "alice", "--memory", "-o", &file]);
    assert!(told.contains("with its memory, as they were while in use"), "{told}");
    shell.run("echo sti''ll", "still");
    nothing_remains(&service, &alice);
    let there = Service::start();
    let restored = done(&there, &["account", "restore", &file]);
    assert!(restored.contains("and its memory"), "{restored}");
    let mut shell = moved(&service, &there);
    let shown = shell.expect("-yes-");
    assert!(shown.contains("resumed from") && !shown.contains("still"), "{shown}");
}

#[test]
fn what_sessions_do_while_the_guest_stands_still_is_done_after_it() {
    let service = Service::with(LINGERS);
    service.account("standing");
    let mut shell = Shell::open(&service, "standing");
    shell.run("echo he''re", "here");
    let export = export_of(&service, "standing");
    wait_for("the guest to stand still", || {
        service.log().contains("guest told: Freeze").then_some(())
    });
    // She logs in once more in that very moment.
    let second = service.ssh("standing", "echo in");
    assert_eq!(stdout(&second), "in\n", "{}", stderr(&second));
    let output = finish_child(export);
    assert!(output.status.success(), "{}", stderr(&output));
    let log = service.log();
    let place = |words: &str| log.rfind(words).unwrap_or_else(|| panic!("no {words}"));
    assert!(place("guest told: Resume") < place("guest told: Exec"), "it would have been ignored");
    shell.run("echo st''ill", "still");
}

#[test]
fn a_copy_that_can_not_be_made_is_told_and_nothing_comes_of_it() {
    for (name, reason) in
        [("unfrozen", "its disk does not answer"), ("fullcopy", "there is room for 1")]
    {
        let service = Service::with(LINGERS);
        let account = service.account(name);
        let mut shell = Shell::open(&service, name);
        shell.run("kept=yes; echo don''e", "done");
        let output = finish_child(export_of(&service, name));
        assert!(stderr(&output).contains(reason), "{}", stderr(&output));
        assert!(!service.path("out.hermitage").exists());
        nothing_remains(&service, &account);
        shell.run("echo -$kept-", "-yes-");
        let copies = wait_for("the audit log", || {
            Some(audited(&service, "copy")).filter(|copies| copies.len() == 2)
        });
        let told = |copy: &serde_json::Value| copy["error"].as_str().unwrap().contains(reason);
        assert!(copies.iter().all(told), "{copies:?}");
    }
}

/// The answers to one that took too long come when nobody waits for them any more.
#[test]
fn what_is_said_of_a_former_copy_is_not_taken_for_this_one() {
    let service = Service::with(LINGERS);
    let account = service.account("mixedcopy");
    let mut shell = Shell::open(&service, "mixedcopy");
    shell.run("echo he''re", "here");
    for _ in 0..2 {
        let made = hermitage(&service, &["account", "export", "mixedcopy", "-o", "-"]);
        assert!(made.status.success(), "{}", stderr(&made));
    }
    nothing_remains(&service, &account);
    shell.run("echo st''ill", "still");
}

#[test]
fn stopping_the_machine_calls_the_copy_off() {
    let service = Service::with(LINGERS);
    let account = service.account("slowcopy");
    let mut shell = Shell::open(&service, "slowcopy");
    shell.run("echo i-was-he''re", "i-was-here");
    let export = export_of(&service, "slowcopy");
    wait_copying(&service, &account);
    assert_eq!(service.admin(&Request::StopAccount { account: "slowcopy".into() }), Reply::Done);
    let output = finish_child(export);
    assert!(stderr(&output).contains("put to rest or stopped meanwhile"), "{}", stderr(&output));
    nothing_remains(&service, &account);
    assert_eq!(service.account_status("slowcopy").unwrap().state, "saved");
    let mut shell = Shell::open(&service, "slowcopy");
    assert!(shell.expect("i-was-here").contains("resumed from"));
}

#[test]
fn a_machine_that_dies_ends_the_copy() {
    let service = Service::with(LINGERS);
    let account = service.account("slowcopy");
    let mut shell = Shell::open(&service, "slowcopy");
    shell.run("echo he''re", "here");
    let export = export_of(&service, "slowcopy");
    wait_copying(&service, &account);
    let pid = service.account_status("slowcopy").unwrap().machine_pid.unwrap();
    nix::sys::signal::kill(nix::unistd::Pid::from_raw(pid), nix::sys::signal::Signal::SIGKILL)
        .unwrap();
    let output = finish_child(export);
    let told = stderr(&output);
    assert!(told.contains("slowcopy's machine was not copied: the machine "), "{told}");
    nothing_remains(&service, &account);
    drop(shell);
}

#[test]
fn an_export_that_is_killed_leaves_nothing_behind() {
    let service = Service::with(LINGERS);
    let account = service.account("slowcopy");
    let disk = File::options().write(true).open(service.state().disk(account.id)).unwrap();
    disk.write_all_at(&[7; 64 << 10], 0).unwrap();
    let mut shell = Shell::open(&service, "slowcopy");
    shell.run("echo he''re", "here");
    let mut export = export_of(&service, "slowcopy");
    wait_copying(&service, &account);
    export.kill().unwrap();
    export.wait().unwrap();
    nothing_remains(&service, &account);
    wait_for("the machine to let go", || {
        service.log().contains("nobody wants it any more").then_some(())
    });
    // And the next one is one, with figures of how far it is.
    let output = finish_child(export_of(&service, "slowcopy"));
    assert!(output.status.success(), "{}", stderr(&output));
    let told = stderr(&output);
    assert!(told.contains("slowcopy is in use; copying the disk: "), "{told}");
    // Figures of the copy, not of one that has not begun.
    assert!(told.contains(" of 64 KiB") && !told.contains("waiting"), "{told}");
    shell.run("echo st''ill", "still");
}

#[test]
fn a_killed_services_half_copy_is_gone_soon_after_the_next_ones_start() {
    let mut service = Service::with(LINGERS);
    let account = service.account("slowcopy");
    let mut shell = Shell::open(&service, "slowcopy");
    shell.run("echo he''re", "here");
    let export = export_of(&service, "slowcopy");
    wait_copying(&service, &account);
    service.signal(nix::sys::signal::Signal::SIGKILL);
    service.wait();
    assert!(!finish_child(export).status.success());
    let dir = service.state().account_dir(account.id);
    let halves = || {
        let files = fs::read_dir(&dir).unwrap().flatten();
        files.filter(|file| publish::is_beside(&file.file_name())).count()
    };
    assert_eq!(halves(), 1);
    // What another one left, and what a command writes at this moment.
    let checkpoints = service.state().checkpoints_dir(service.account("bob").id);
    fs::create_dir_all(&checkpoints).unwrap();
    let left = checkpoints.join(".new-left");
    fs::write(&left, "half a checkpoint").unwrap();
    let held = publish::NewFile::create(&checkpoints.join("one"), 0o600).unwrap();
    // Her machine is not gone yet: it has its disk, and what it was writing.
    let disk = wait_for("her disk", || disk::open_locked(&service.state().disk(account.id)).ok());
    let side = File::create(dir.join(".new-side")).unwrap();
    let side = Flock::lock(side, FlockArg::LockExclusiveNonblock).unwrap();
    service.run();
    wait_for("the rest to be gone", || (!left.exists() && halves() == 1).then_some(()));
    drop(side);
    drop(disk);
    nothing_remains(&service, &account);
    assert!(held.path().exists());
    let words = "deleted what was left half-made";
    wait_for("words of it", || (service.log().matches(words).count() == 3).then_some(()));
}

#[test]
fn two_exports_at_once_are_both_had() {
    let service = Service::with(LINGERS);
    let account = service.account("slowcopy");
    let mut shell = Shell::open(&service, "slowcopy");
    shell.run("echo he''re", "here");
    let first = export_of(&service, "slowcopy");
    wait_copying(&service, &account);
    let second = hermitage(&service, &["account", "export", "slowcopy", "-o", "-"]);
    assert!(second.status.success(), "{}", stderr(&second));
    let first = finish_child(first);
    assert!(first.status.success(), "{}", stderr(&first));
    // Who waits for the other one is told so, and when her own begins.
    let told = stderr(&second);
    let waits = told.find("slowcopy is in use; waiting for another copy to be done").unwrap();
    let begins = told.find("slowcopy is in use; copying the disk: ").unwrap();
    assert!(waits < begins, "{told}");
    assert!(!stderr(&first).contains("waiting"), "{}", stderr(&first));
}

#[test]
fn a_copy_waits_for_that_of_another_machine_and_says_so() {
    let service = Service::with(LINGERS);
    let accounts = ["slowcopy", "alice"].map(|name| service.account(name));
    let mut shells = ["slowcopy", "alice"].map(|name| Shell::open(&service, name));
    shells.iter_mut().for_each(|shell| shell.run("echo he''re", "here"));
    let first = export_of(&service, "slowcopy");
    wait_copying(&service, &accounts[0]);
    let second = hermitage(&service, &["account", "export", "alice", "-o", "-"]);
    assert!(second.status.success(), "{}", stderr(&second));
    let told = stderr(&second);
    assert!(told.contains("alice is in use; waiting for another copy to be done"), "{told}");
    assert!(finish_child(first).status.success());
}

#[test]
fn an_idle_machine_waits_for_its_copy_and_then_rests() {
    let service = Service::with(Options { machines: "linger = 1", ..Options::default() });
    let account = service.account("slowcopy");
    let mut shell = Shell::open(&service, "slowcopy");
    shell.run("echo he''re", "here");
    let export = export_of(&service, "slowcopy");
    wait_copying(&service, &account);
    shell.cut(&service);
    std::thread::sleep(Duration::from_millis(1800));
    let status = service.account_status("slowcopy").unwrap();
    assert_eq!(
        (status.state.as_str(), status.why.contains("being copied")),
        ("lingering", true),
        "{}",
        status.why
    );
    let output = finish_child(export);
    assert!(output.status.success(), "{}", stderr(&output));
    wait_for("the machine to rest", || {
        service.account_status("slowcopy").filter(|status| status.state == "saved")
    });
}

/// The service's end is a machine's end like another.
#[test]
fn the_services_end_calls_the_copy_off_and_saves() {
    let mut service = Service::with(LINGERS);
    let account = service.account("slowcopy");
    let mut shell = Shell::open(&service, "slowcopy");
    shell.run("echo i-was-he''re", "i-was-here");
    let export = export_of(&service, "slowcopy");
    wait_copying(&service, &account);
    service.signal(nix::sys::signal::Signal::SIGTERM);
    assert!(service.wait().success());
    assert!(!finish_child(export).status.success());
    nothing_remains(&service, &account);
    assert!(service.state().snapshot(account.id).exists());
    drop(shell);
}

/// A guest that takes longer to stand still than anybody waits, say for its disk: it goes on when it can, and what it
/// said too late is taken for no answer to a later question.
#[test]
fn a_guest_that_does_not_stand_still_in_time_goes_on() {
    let service = Service::with(LINGERS);
    let account = service.account("deaf");
    let mut shell = Shell::open(&service, "deaf");
    shell.run("kept=yes; echo don''e", "done");
    let output = finish_child(export_of(&service, "deaf"));
    assert!(stderr(&output).contains("did not stand still within 30 s"), "{}", stderr(&output));
    nothing_remains(&service, &account);
    // Its programs do what they did all the while.
    shell.run("echo -$kept-", "-yes-");
    // A save that is asked for just then waits for it.
    let stop = Request::StopAccount { account: "deaf".into() };
    assert_eq!(service.admin(&stop), Reply::Done);
    let log = service.log();
    let place = |words: &str| log.rfind(words).unwrap_or_else(|| panic!("no {words}"));
    assert!(place("guest told: Resume") < place("guest told: Freeze"));
    assert_eq!(service.account_status("deaf").unwrap().state, "saved");
}
