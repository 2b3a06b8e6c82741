//! Logins by OpenSSH user certificates.

use std::{fs, process::Command};

use hermitage_storage::accounts::parse_keys;

use crate::fake_security_key;
use crate::harness::{Options, Service, at, finish, stderr, stdout};

/// A service that trusts `ca`, and revokes what is in `revoked`; `user` is a key of nobody.
fn start() -> Service {
    let mut service = Service::prepare(Options::default());
    for name in ["ca", "other-ca", "user"] {
        let mut keygen = Command::new("ssh-keygen");
        keygen.args(["-q", "-t", "ed25519", "-N", "", "-f"]).arg(service.path(name));
        assert!(keygen.status().unwrap().success());
    }
    fs::write(service.path("revoked"), "").unwrap();
    let (ca, revoked) = (service.path("ca.pub"), service.path("revoked"));
    service
        .configure(&format!("user_ca_keys = {ca:?}\nrevoked_keys = {revoked:?}\nmax_failures = 1"));
    service.account("alice");
    service.run();
    service
}

/// Lets `ca` certify `user` with these options of `ssh-keygen -s`.
fn certify(service: &Service, ca: &str, options: &[&str]) {
    let mut keygen = Command::new("ssh-keygen");
    keygen.arg("-q").arg("-s").arg(service.path(ca)).args(["-I", "alice of desk 7", "-z", "42"]);
    let made = keygen.args(options).arg(service.path("user.pub")).output().unwrap();
    assert!(made.status.success(), "{}", String::from_utf8_lossy(&made.stderr));
}

fn login(service: &Service, options: &[&str]) -> std::process::Output {
    finish(service.ssh_with_keys(&["user"]).args(options))
}

/// What a login says with a certificate of these options.
fn refused(service: &Service, ca: &str, options: &[&str], reason: &str) {
    certify(service, ca, options);
    let output = login(service, &[&at("alice"), "echo in"]);
    assert_eq!(output.status.code(), Some(255), "{reason}");
    assert_eq!(stdout(&output), "");
    assert!(stderr(&output).contains("Permission denied"), "{reason}: {}", stderr(&output));
    assert!(service.log().contains(reason), "{reason} is not in {}", service.log());
}

#[test]
fn a_certificate_for_the_account_logs_in() {
    let service = start();
    assert_eq!(login(&service, &[&at("alice"), "echo in"]).status.code(), Some(255));
    certify(&service, "ca", &["-n", "bob,alice", "-V", "-1m:+5m"]);
    let output = login(&service, &["-tt", &at("alice"), "test -t 0 && echo in"]);
    assert_eq!(stdout(&output), "in\r\n", "{}", stderr(&output));
    assert!(service.log().contains("alice of desk 7") && service.log().contains("serial 42"));
    // It ends in five minutes, and a password would not.
    let output = login(&service, &["-T", &at("alice+passwd")]);
    assert!(stderr(&output).contains("can't set a password"), "{}", stderr(&output));
    // The account it is for has to be there.
    assert_eq!(login(&service, &[&at("bob"), "echo in"]).status.code(), Some(255));
    // Keys go on logging in beside it, behind others that are nobody's.
    let output = finish(service.ssh_with_keys(&["stranger", "id"]).args([&at("alice"), "echo in"]));
    assert_eq!(stdout(&output), "in\n", "{}", stderr(&output));
    let stranger = finish(service.ssh_with_keys(&["stranger"]).args([&at("alice"), "echo in"]));
    assert!(stderr(&stranger).contains("Permission denied"), "{}", stderr(&stranger));
    assert!(!service.log().contains("failed login"), "offers are no failures: {}", service.log());
}

#[test]
fn a_certificate_that_is_not_good_for_it_is_refused_with_its_reason() {
    let service = start();
    refused(&service, "other-ca", &["-n", "alice"], "no authority here");
    refused(&service, "ca", &["-n", "bob,carol"], "it is for bob, carol");
    refused(&service, "ca", &[], "it is for nobody");
    refused(&service, "ca", &["-n", "alice", "-O", "source-address=192.0.2.0/24"], "used from");
    refused(&service, "ca", &["-n", "alice", "-O", "critical:moon=full"], "critical option moon");
    // russh refuses these itself, and says as much.
    let time = "Certificate is expired or not yet valid";
    refused(&service, "ca", &["-n", "alice", "-V", "-2h:-1h"], time);
    refused(&service, "ca", &["-n", "alice", "-V", "+1h:+2h"], time);
    assert_eq!(service.log().matches(time).count(), 2);
    certify(&service, "ca", &["-n", "alice"]);
    assert_eq!(stdout(&login(&service, &[&at("alice"), "echo in"])), "in\n");
    for list in ["serial: 42\n", "id: alice of desk 7\n"] {
        fs::write(service.path("revoked"), list).unwrap();
        refused(&service, "ca", &["-n", "alice"], "is revoked");
    }
    for key in ["user.pub", "ca.pub"] {
        fs::copy(service.path(key), service.path("revoked")).unwrap();
        refused(&service, "ca", &["-n", "alice"], "is revoked");
    }
}

/// Who has a certificate of somewhere else for a key that is known here logs in by the key.
#[test]
fn a_certificate_that_is_not_taken_leaves_its_key() {
    let with = start();
    let without = Service::prepare(Options::default());
    for name in ["other-ca", "user", "user.pub"] {
        fs::copy(with.path(name), without.path(name)).unwrap();
    }
    let mut without = without;
    without.account("alice");
    without.run();
    for service in [&with, &without] {
        let line = fs::read_to_string(service.path("user.pub")).unwrap();
        let account = service.accounts().named("alice").unwrap();
        for key in parse_keys(&line).unwrap() {
            service.accounts().add_key(account.id, &key).unwrap();
        }
        certify(service, "other-ca", &["-n", "alice", "-O", "force-command=echo forced"]);
        let only = "PubkeyAcceptedAlgorithms=ssh-ed25519-cert-v01@openssh.com";
        let refused = login(service, &["-o", only, &at("alice"), "echo in"]);
        assert_eq!((refused.status.code(), stdout(&refused)), (Some(255), String::new()));
        let output = login(service, &[&at("alice"), "echo in"]);
        assert_eq!(stdout(&output), "in\n", "{}", stderr(&output));
        assert!(!service.log().contains("failed login"), "{}", service.log());
    }
    assert!(with.log().contains("no authority here"));
    assert!(without.log().contains("ssh.user_ca_keys names no file"));
}

#[test]
fn what_a_certificate_restricts_is_kept() {
    let service = start();
    let forced = "force-command=echo forced: $SSH_ORIGINAL_COMMAND";
    let here = "source-address=127.0.0.0/8";
    certify(&service, "ca", &["-n", "alice", "-O", forced, "-O", here, "-O", "no-pty"]);
    let output = login(&service, &[&at("alice"), "echo in"]);
    assert_eq!(stdout(&output), "forced: echo in\n", "{}", stderr(&output));
    let output = login(&service, &["-tt", &at("alice"), "echo in"]);
    assert!(stderr(&output).contains("PTY allocation request failed"), "{}", stderr(&output));
    certify(&service, "ca", &["-n", "alice", "-O", "no-port-forwarding"]);
    let said = service.through("user", "127.0.0.1:1", "alice");
    assert!(said.contains("administratively prohibited"), "{said}");
    // With all that is permitted by default, it only meets that nobody listens.
    certify(&service, "ca", &["-n", "alice"]);
    let said = service.through("user", "127.0.0.1:1", "alice");
    assert!(said.contains("Connection refused"), "{said}");
}

#[test]
fn certificates_of_every_kind_of_key_log_in() {
    let service = start();
    for (kind, bits) in [("rsa", "3072"), ("ecdsa", "256"), ("ecdsa", "521")] {
        fs::remove_file(service.path("user")).unwrap();
        let mut keygen = Command::new("ssh-keygen");
        keygen.args(["-q", "-t", kind, "-b", bits, "-N", "", "-f"]).arg(service.path("user"));
        assert!(keygen.status().unwrap().success());
        certify(&service, "ca", &["-n", "alice"]);
        let output = login(&service, &[&at("alice"), "echo in"]);
        assert_eq!(stdout(&output), "in\n", "{kind}: {}", stderr(&output));
    }
    // The security key signs, and is known by its certificate only.
    fs::remove_file(service.path("user")).unwrap();
    let kind = "sk-ssh-ed25519@openssh.com";
    let (_, agent) = fake_security_key::plug_in(&service.path(""), "user", kind, false);
    certify(&service, "ca", &["-n", "alice"]);
    let mut ssh = service.ssh_with_keys(&["user.pub"]);
    ssh.arg("-o").arg(format!("CertificateFile={}", service.path("user-cert.pub").display()));
    let output = finish(ssh.env("SSH_AUTH_SOCK", agent).args([&at("alice"), "echo in"]));
    assert_eq!(stdout(&output), "in\n", "{kind}: {}", stderr(&output));
}

#[test]
fn an_authority_that_signs_with_sha1_is_none() {
    let service = start();
    let mut keygen = Command::new("ssh-keygen");
    keygen.args(["-q", "-t", "rsa", "-b", "3072", "-N", "", "-f"]).arg(service.path("rsa-ca"));
    assert!(keygen.status().unwrap().success());
    fs::copy(service.path("rsa-ca.pub"), service.path("ca.pub")).unwrap();
    certify(&service, "rsa-ca", &["-n", "alice"]);
    assert_eq!(stdout(&login(&service, &[&at("alice"), "echo in"])), "in\n");
    refused(&service, "rsa-ca", &["-n", "alice", "-t", "ssh-rsa"], "signed with SHA-1");
}

#[test]
fn files_that_can_not_be_used_are_told_at_the_start() {
    for (setting, text, told) in [
        ("user_ca_keys", None, "nowhere"),
        ("user_ca_keys", Some("no key at all\n"), "line 1"),
        ("revoked_keys", Some("serial: many\n"), "line 1"),
    ] {
        let service = Service::prepare(Options::default());
        let file = service.path(if text.is_some() { "list" } else { "nowhere" });
        if let Some(text) = text {
            fs::write(&file, text).unwrap();
        }
        service.configure(&format!("{setting} = {file:?}"));
        let ended = service.serve_command().status().unwrap();
        assert!(!ended.success());
        let log = service.log();
        assert!(log.contains(told) && log.contains("ssh.user_ca_keys"), "{log}");
    }
}
