//! What becomes of a user's question about her checkpoints when things do not go as they should.

use std::{
    fs::{self, Permissions},
    os::unix::fs::PermissionsExt,
    process::Stdio,
};

use hermitage::admin::protocol::{Reply, Request};
use hermitage_storage::faults;

use crate::{
    copying::{nothing_remains, wait_copying},
    harness::{Options, Service, at, finish_child, stdout, wait_for},
    lobby::{ask, refused},
    terminals::Shell,
    watching::audited,
};

/// A service that waits some seconds when it comes by one of these points.
fn hanging_at(point: &str) -> Service {
    let mut service = Service::prepare(Options { machines: "linger = 60", ..Options::default() });
    let dir = service.path("faults");
    fs::create_dir(&dir).unwrap();
    fs::set_permissions(&dir, Permissions::from_mode(0o700)).unwrap();
    fs::write(dir.join("plan"), format!("{point} hang 0\n")).unwrap();
    service.run_with(&[(faults::VARIABLE, dir.to_str().unwrap())]);
    service
}

fn passed(service: &Service, point: &str) -> Option<()> {
    let log = fs::read_to_string(service.path("faults/log")).unwrap_or_default();
    log.contains(point).then_some(())
}

#[test]
fn a_return_goes_on_when_the_link_is_cut_and_the_next_login_is_told_of_it() {
    // She may come back before it is done, and waits for it.
    for at_once in [false, true] {
        let service = hanging_at("rollback.exchange");
        service.account("alice");
        // Never logged in: files without memory.
        assert!(ask(&service, "alice+checkpoint", &["new"]).status.success());
        let mut shell = Shell::open(&service, "alice");
        shell.run("echo he''re", "here");
        let mut asking = service.ssh_with(&["-T", "-o", "BatchMode=yes", &at("alice+checkpoint")]);
        let mut asking = asking.arg("restore new yes").spawn().unwrap();
        wait_for("the disks' exchange", || passed(&service, "rollback.exchange"));
        asking.kill().unwrap();
        asking.wait().unwrap();
        wait_for("the link's end to be seen", || {
            let log = service.log();
            let mut ends = log.lines().filter(|line| line.contains("session ended"));
            ends.find(|line| line.contains("checkpoint") && line.contains("client")).map(drop)
        });
        if !at_once {
            wait_for("the restore", || passed(&service, "rollback.done"));
        }
        let mut shell = Shell::open(&service, "alice");
        let shown = shell.expect("fake$ ");
        let words = "cold start: you are back at the checkpoint new; your files are all here";
        assert!(shown.contains(words), "at once: {at_once}: {shown}");
        wait_for("the audit log", || {
            let copies = audited(&service, "copy");
            let mut back = copies.iter().filter(|copy| copy["what"] == "go-back");
            back.find(|copy| copy.get("error").is_none()).map(drop)
        });
    }
}

/// What a copy fails by that concerns her she is told.
#[test]
fn who_gets_no_checkpoint_is_told_why() {
    let service = Service::with(Options { machines: "linger = 60", ..Options::default() });
    let account = service.account("slowcopy");
    let mut shell = Shell::open(&service, "slowcopy");
    shell.run("echo he''re", "here");
    let mut asking = service.ssh_with(&["-T", "-o", "BatchMode=yes", &at("slowcopy+checkpoint")]);
    let asking = asking.arg("one").stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap();
    wait_copying(&service, &account);
    assert_eq!(service.admin(&Request::StopAccount { account: "slowcopy".into() }), Reply::Done);
    let said = refused(&finish_child(asking));
    let words =
        "your machine could not be copied: it was put to rest or ended meanwhile; try again";
    assert!(said.contains(words), "{said}");

    service.account("unfrozen");
    let mut shell = Shell::open(&service, "unfrozen");
    shell.run("echo he''re", "here");
    let said = refused(&ask(&service, "unfrozen+checkpoint", &["one"]));
    assert!(said.contains("could not be copied: its disk does not answer"), "{said}");
}

#[test]
fn a_checkpoint_whose_link_is_cut_is_given_up_and_told_of() {
    let service = Service::with(Options { machines: "linger = 60", ..Options::default() });
    let account = service.account("slowcopy");
    let mut shell = Shell::open(&service, "slowcopy");
    shell.run("echo he''re", "here");
    let mut asking = service.ssh_with(&["-T", "-o", "BatchMode=yes", &at("slowcopy+checkpoint")]);
    let mut asking = asking.arg("one").spawn().unwrap();
    wait_copying(&service, &account);
    asking.kill().unwrap();
    asking.wait().unwrap();
    let told = wait_for("the audit log", || audited(&service, "copy").pop());
    assert_eq!(told["what"], "checkpoint");
    assert_eq!(told["error"], "nobody waits for it any more");
    nothing_remains(&service, &account);
    assert!(stdout(&ask(&service, "slowcopy+checkpoint", &[])).starts_with("No checkpoints."));
    shell.run("echo st''ill", "still");
}
