//! A code from the operator, redeemed over ssh for a key or a password.

use std::{
    io::Write as _,
    process::{Command, Output, Stdio},
};

use crate::harness::{PASSWORD, Service, at, finish_child, stderr, stdout};
use hermitage::time::now;
use hermitage_storage::accounts::{Account, Change, Changes};

/// `ssh` with the code as the password, and lines on standard input in place of a terminal's.
fn redeem(service: &Service, code: &str, arguments: &[&str], input: &str) -> Output {
    let mut command = Command::new("sshpass");
    command.args(["-e", "ssh"]).env("SSHPASS", code);
    service.client_options(&mut command);
    command
        .args(["-o", "PubkeyAuthentication=no", "-o", "NumberOfPasswordPrompts=1", "-p"])
        .arg(service.port.to_string())
        .arg(at("alice"))
        .args(arguments)
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped());
    let mut child = command.spawn().unwrap();
    let _ = child.stdin.take().unwrap().write_all(input.as_bytes());
    finish_child(child)
}

/// An account that nobody can log in to yet.
fn alice(service: &Service) -> Account {
    let alice = service.account("alice");
    let accounts = service.accounts();
    accounts.set_password(alice.id, None).unwrap();
    let key = accounts.keys(alice.id).unwrap().remove(0);
    assert_eq!(accounts.remove_key(alice.id, &key.fingerprint).unwrap(), Change::Done);
    alice
}

fn denied(output: &Output) {
    assert_eq!(output.status.code(), Some(255), "{}", stdout(output));
    assert!(stderr(output).contains("Permission denied"), "{}", stderr(output));
}

#[test]
fn a_code_is_good_for_one_key() {
    let service = Service::start();
    let alice = alice(&service);
    let code = service.accounts().invite(alice.id, now() + 3600).unwrap();
    let key = std::fs::read_to_string(service.path("id.pub")).unwrap();
    assert_eq!(service.ssh("alice", "true").status.code(), Some(255));
    // What is no key and no password leaves the code good, and nothing else can be done with it.
    let short = redeem(&service, &code, &[], "short\n");
    assert!(stderr(&short).contains("still good"), "{}{}", stdout(&short), stderr(&short));
    let cut = redeem(&service, &code, &[], &key[..40]);
    assert!(stderr(&cut).contains("still good"), "{}", stderr(&cut));
    let command = redeem(&service, &code, &["echo in"], "");
    assert_eq!((command.status.code(), stdout(&command).as_str()), (Some(255), ""));
    let through = redeem(&service, &code, &["-W", "127.0.0.1:22"], "");
    assert!(!through.status.success() && stdout(&through).is_empty());
    assert_eq!(service.account_status("alice"), None, "a machine was started");

    let done = redeem(&service, &code.to_lowercase(), &[], &key);
    assert!(done.status.success(), "{}", stderr(&done));
    assert!(stdout(&done).contains("logs in from now on"), "{}", stdout(&done));
    assert_eq!(stdout(&service.ssh("alice", "echo in")), "in\n");
    denied(&redeem(&service, &code, &[], &key));
    let accounts = service.accounts();
    assert_eq!(accounts.invited_until(alice.id).unwrap(), None);
    assert_eq!(accounts.keys(alice.id).unwrap().len(), 1);
    assert!(service.log().contains("has redeemed an invitation"), "{}", service.log());
    assert!(!service.log().contains(&code), "the code is in the log");
}

#[test]
fn a_code_is_good_for_one_password_until_its_time() {
    let service = Service::start();
    let alice = alice(&service);
    let invite = |seconds: i64| service.accounts().invite(alice.id, now() + seconds).unwrap();
    denied(&redeem(&service, &invite(-1), &[], &format!("{PASSWORD}\n")));
    let former = invite(3600);
    let code = invite(3600);
    denied(&redeem(&service, &former, &[], &format!("{PASSWORD}\n")));
    // A closed account is not opened by it.
    let expire = |at: Option<i64>| {
        let changes = Changes { expires: Some(at), ..Changes::default() };
        service.accounts().change(alice.id, &changes).unwrap();
    };
    expire(Some(1));
    let closed = redeem(&service, &code, &[], &format!("{PASSWORD}\n"));
    assert!(stderr(&closed).contains("expired"), "{}", stderr(&closed));
    expire(None);
    let done = redeem(&service, &code, &[], &format!("{PASSWORD}\n"));
    assert!(stdout(&done).contains("Your password is set"), "{}", stderr(&done));
    assert_eq!(stdout(&service.ssh_by_password("alice", PASSWORD)), "in\n");
    denied(&redeem(&service, &code, &[], &format!("{PASSWORD}\n")));
}
