//! What an operator keeps of accounts, and brings back, under a running service.

use std::process::{Command, Output};

use crate::{
    harness::{Options, Service, at, finish, stderr, stdout, wait_for},
    terminals::Shell,
};

pub fn hermitage(service: &Service, arguments: &[&str]) -> Output {
    let mut command = Command::new(env!("CARGO_BIN_EXE_hermitage"));
    finish(command.arg("--config").arg(service.path("hermitage.toml")).args(arguments))
}

pub fn done(service: &Service, arguments: &[&str]) -> String {
    let output = hermitage(service, arguments);
    assert!(output.status.success(), "{}", stderr(&output));
    stdout(&output)
}

#[test]
fn a_shell_goes_back_to_its_checkpoint_and_forth_again() {
    let service = Service::with(Options { machines: "linger = 60", ..Options::default() });
    service.account("alice");
    let mut shell = Shell::open(&service, "alice");
    shell.run("echo at-fi''rst", "at-first");
    // While she is there, and with her machine put to rest.
    let made = done(&service, &["checkpoint", "create", "alice", "one"]);
    assert!(made.contains("files and memory") && made.contains("goes on"), "{made}");
    shell.run("echo go''es", "goes");
    let made = done(&service, &["checkpoint", "create", "alice", "two", "--stop"]);
    assert!(made.contains("files and memory") && !made.contains("goes on"), "{made}");
    assert_eq!(shell.wait(), 255);

    let mut shell = Shell::open(&service, "alice");
    assert!(shell.expect("goes").contains("resumed from"));
    shell.run("echo and-th''en", "and-then");
    let back = done(&service, &["checkpoint", "restore", "alice", "one", "--stop"]);
    assert!(back.contains("the next login resumes it"), "{back}");
    assert_eq!(shell.wait(), 255);
    let mut shell = Shell::open(&service, "alice");
    assert!(shell.expect("at-first").contains("resumed from"));
    shell.run("echo -$RESUMED-", "-yes-");
    assert!(!shell.shown().contains("goes") && !shell.shown().contains("and-then"));

    // What that replaced is there as well; the service is asked for it while it has the machine.
    let kept = back.split_whitespace().last().unwrap().to_owned();
    done(&service, &["checkpoint", "restore", "alice", &kept, "--stop"]);
    let mut shell = Shell::open(&service, "alice");
    shell.expect("and-then");
}

#[test]
fn files_without_memory_go_back_and_she_is_told() {
    let service = Service::with(Options { machines: "linger = 0", ..Options::default() });
    service.account("alice");
    // Never logged in: nothing is saved.
    done(&service, &["checkpoint", "create", "alice", "new"]);
    let mut shell = Shell::open(&service, "alice");
    shell.run("echo at-fi''rst", "at-first");
    done(&service, &["checkpoint", "restore", "alice", "new", "--stop"]);
    assert_eq!(shell.wait(), 255);
    let mut shell = Shell::open(&service, "alice");
    shell.expect("cold start: you are back at the checkpoint new; your files are all here");
}

/// Alice's shell on the service that she was brought to: her key goes with her.
pub fn moved(here: &Service, there: &Service) -> Shell {
    let mut ssh = Command::new("ssh");
    there.client_options(&mut ssh);
    ssh.arg("-i").arg(here.path("id"));
    ssh.args(["-o", "BatchMode=yes", "-tt", "-p"]).arg(there.port.to_string());
    ssh.arg(crate::harness::at("alice"));
    ssh.stdin(std::process::Stdio::piped()).stdout(std::process::Stdio::piped());
    Shell::of(&mut ssh)
}

#[test]
fn an_account_moves_with_its_shell_between_services() {
    let (here, there) = (Service::start(), Service::start());
    here.account("alice");
    let mut shell = Shell::open(&here, "alice");
    shell.run("echo still-he''re", "still-here");
    let file = here.path("alice.hermitage").display().to_string();
    done(&here, &["account", "export", "alice", "--memory", "--stop", "-o", &file]);
    assert_eq!(shell.wait(), 255);
    let restored = done(&there, &["account", "restore", &file]);
    assert!(restored.contains("and its memory"), "{restored}");
    let mut shell = moved(&here, &there);
    assert!(shell.expect("still-here").contains("resumed from"));
    shell.run("echo -$RESUMED-", "-yes-");
    wait_for("the memory to be used up", || {
        let id = there.accounts().named("alice").unwrap().id;
        (!there.state().snapshot(id).exists()).then_some(())
    });
}

#[test]
fn a_backup_has_everybody_and_those_who_are_here_notice_nothing() {
    let service = Service::with(Options { machines: "linger = 60", ..Options::default() });
    for name in ["alice", "bob", "carol"] {
        service.account(name);
    }
    let mut hers = Shell::open(&service, "alice");
    hers.run("echo i-am-he''re", "i-am-here");
    // He has left; his machine lingers.
    assert!(service.ssh("bob", "true").status.success());
    wait_for("bob to have left", || {
        service.account_status("bob").filter(|status| status.state == "lingering")
    });
    let dir = service.path("backup").display().to_string();
    let made = hermitage(&service, &["backup", "create", &dir, "--memory"]);
    assert!(made.status.success(), "{}", stderr(&made));
    let told = stdout(&made);
    assert!(told.contains("3 accounts") && told.contains("1 copied while in use"), "{told}");
    hers.run("echo st''ill", "still");
    // With memory a machine that nobody uses is put to rest for it, else it lingers on.
    assert_eq!(service.account_status("bob").unwrap().state, "saved");
    assert!(service.ssh("bob", "true").status.success());
    let made = done(&service, &["backup", "create", &dir, "--json"]);
    let made: serde_json::Value = serde_json::from_str(&made).unwrap();
    assert_eq!(made["in_use"], serde_json::json!(["alice", "bob"]));
    assert!(service.account_status("bob").unwrap().machine_pid.is_some());
    // Exactly what was copied comes back.
    done(&service, &["backup", "restore", &dir, "alice", "--name", "again"]);
    assert!(
        service.ssh_with_keys(&["id"]).arg(at("again")).arg("true").status().unwrap().success()
    );
    hers.run("echo st''ill-here", "still-here");
    let made = hermitage(&service, &["backup", "create", &dir, "--stop"]);
    assert!(made.status.success(), "{}", stderr(&made));
    assert_eq!(hers.wait(), 255);
    let mut hers = Shell::open(&service, "alice");
    assert!(hers.expect("still").contains("resumed from"));
}
