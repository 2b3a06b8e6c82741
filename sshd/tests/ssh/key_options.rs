//! What a key's options leave of a login by it.

use std::{
    fs,
    process::{Command, Output, Stdio},
};

use hermitage_storage::accounts::{Account, PublicKey};

use crate::harness::{Options, Service, at, finish, finish_child, stderr, stdout, wait_for};

/// Gives the account a new key of the name, after these options in its line.
fn bind(service: &Service, account: &Account, name: &str, options: &str) {
    let mut keygen = Command::new("ssh-keygen");
    keygen.args(["-q", "-t", "ed25519", "-N", "", "-f"]).arg(service.path(name));
    assert!(keygen.status().unwrap().success());
    let line = fs::read_to_string(service.path(&format!("{name}.pub"))).unwrap();
    let key = PublicKey::parse_line(&format!("{options} {line}")).unwrap().unwrap();
    service.accounts().add_key(account.id, &key).unwrap();
}

/// `ssh` by that key alone.
fn by(service: &Service, key: &str, options: &[&str]) -> Output {
    finish(service.ssh_with_keys(&[key]).args(options))
}

#[test]
fn a_forced_command_is_all_that_runs() {
    let service = Service::with(Options { ssh: "accept_env = [\"SSH_*\"]", ..Options::default() });
    let alice = service.account("alice");
    let line = r#"command="echo \"forced: ${SSH_ORIGINAL_COMMAND-none}\"; exit 7""#;
    bind(&service, &alice, "bound", line);
    let forged = ["-o", "SetEnv=SSH_ORIGINAL_COMMAND=forged"];
    for (asked, told) in [
        (&["rm", "-rf", "/x"][..], "rm -rf /x"),
        (&[][..], "none"),
        (&["-s", "sftp"][..], "/usr/lib/openssh/sftp-server"),
    ] {
        let mut ssh = service.ssh_with_keys(&["bound"]);
        let (flags, words) = asked.split_at(usize::from(asked.first() == Some(&"-s")));
        let ran = finish(ssh.args(forged).args(flags).arg(at("alice")).args(words));
        assert_eq!(stdout(&ran), format!("forced: {told}\n"), "{}", stderr(&ran));
        assert_eq!(ran.status.code(), Some(7));
    }
    // On a terminal as well, and not in a shell that was left there.
    let ran = by(&service, "bound", &["-tt", &at("alice")]);
    assert_eq!(stdout(&ran), "forced: none\r\n", "{}", stderr(&ran));
    // What becomes of the machine is not its business.
    let ran = by(&service, "bound", &[&at("alice+fresh"), "true"]);
    assert!(stderr(&ran).contains("runs one command"), "{}", stderr(&ran));
    assert_eq!(ran.status.code(), Some(255));
    // The account's other key is not bound.
    assert_eq!(stdout(&service.ssh("alice", "echo free")), "free\n");
}

#[test]
fn a_key_for_files_only() {
    let service = Service::start();
    let alice = service.account("alice");
    bind(&service, &alice, "files", "restrict,command=\"internal-sftp\"");
    fs::write(service.path("here"), "some bytes").unwrap();
    let mut sftp = Command::new("sftp");
    service.client_options(&mut sftp);
    fs::write(service.path("batch"), format!("get {}", service.path("here").display())).unwrap();
    sftp.arg("-i").arg(service.path("files")).arg("-b").arg(service.path("batch"));
    sftp.arg("-P").arg(service.port.to_string()).arg(at("alice"));
    fs::create_dir(service.path("there")).unwrap();
    let done = finish(sftp.current_dir(service.path("there")));
    assert!(done.status.success(), "{}", stderr(&done));
    assert_eq!(fs::read(service.path("there/here")).unwrap(), b"some bytes");
    // A command gets the same service, which finds no packet in its input.
    let ran = by(&service, "files", &[&at("alice"), "echo free"]);
    assert_eq!(stdout(&ran), "");
}

#[test]
fn a_restricted_key_has_no_terminal_and_forwards_nothing() {
    let service = Service::start();
    let alice = service.account("alice");
    bind(&service, &alice, "bound", "restrict");
    bind(&service, &alice, "typing", "restrict,pty");
    // ssh itself goes no further then.
    let ran = by(&service, "bound", &["-tt", &at("alice"), "echo in"]);
    assert!(stderr(&ran).contains("PTY allocation request failed"), "{}", stderr(&ran));
    let ran = by(&service, "typing", &["-tt", &at("alice"), "test -t 0 && echo a terminal"]);
    assert_eq!(stdout(&ran), "a terminal\r\n", "{}", stderr(&ran));

    let said = service.through("bound", "127.0.0.1:1", "alice");
    assert!(said.contains("administratively prohibited: this login's key"), "{said}");
    let strict = ["-o", "ExitOnForwardFailure=yes", "-N", "-R"];
    for listen in ["0:127.0.0.1:1", "/tmp/hermitage-never.sock:127.0.0.1:1"] {
        let refused = by(&service, "bound", &[&strict[..], &[listen, &at("alice")]].concat());
        assert_eq!(refused.status.code(), Some(255), "{}", stderr(&refused));
    }
    let agent = service.path("agent");
    let mut command = Command::new("ssh-agent");
    let mut running = command.args(["-D", "-a"]).arg(&agent).stdout(Stdio::null()).spawn().unwrap();
    wait_for("the agent", || agent.exists().then_some(()));
    let asked = |key: &str| {
        let mut ssh = service.ssh_with_keys(&[key]);
        ssh.args(["-A", &at("alice"), "echo ${SSH_AUTH_SOCK:-none}"]).env("SSH_AUTH_SOCK", &agent);
        stdout(&finish(&mut ssh))
    };
    let told = [asked("bound"), asked("id")];
    running.kill().unwrap();
    running.wait().unwrap();
    assert_eq!(told[0], "none\n");
    assert!(told[1].starts_with("/tmp/hermitage-fake-"), "{told:?}");
}

#[test]
fn a_key_forwards_where_it_may() {
    let service = Service::start();
    let alice = service.account("alice");
    // Nobody listens there, so what is let through is refused by the machine.
    let bound =
        r#"restrict,port-forwarding,permitopen="127.0.0.1:1",permitlisten="localhost:4711""#;
    bind(&service, &alice, "bound", bound);
    let said = service.through("bound", "127.0.0.1:1", "alice");
    assert!(said.contains("Connection refused"), "{said}");
    for other in ["127.0.0.1:2", "localhost:1"] {
        let said = service.through("bound", other, "alice");
        assert!(said.contains("prohibited"), "{said}");
    }
    let mut ssh = service.ssh_with_keys(&["bound"]);
    ssh.args(["-o", "ExitOnForwardFailure=yes", "-N", "-R", "4712:127.0.0.1:1", &at("alice")]);
    let refused = finish_child(ssh.stderr(Stdio::piped()).spawn().unwrap());
    assert_eq!(refused.status.code(), Some(255));
    assert!(service.log().contains("does not permit it"));
}

#[test]
fn a_key_is_for_its_time_and_its_places() {
    let service = Service::start();
    let alice = service.account("alice");
    for (name, options, opens) in [
        ("here", "from=\"127.0.0.0/8\"", true),
        ("there", "from=\"192.0.2.0/24,2001:db8::/32\"", false),
        ("nothere", "from=\"127.*,!127.0.0.1\"", false),
        ("early", "expiry-time=\"20990101\"", true),
        ("late", "expiry-time=\"20200101\"", false),
    ] {
        bind(&service, &alice, name, options);
        let ran = by(&service, name, &[&at("alice"), "echo in"]);
        assert_eq!(stdout(&ran) == "in\n", opens, "{name}: {}", stderr(&ran));
    }
    // From another of this host's addresses, the second one may.
    let ran = by(&service, "nothere", &["-b", "127.0.0.2", &at("alice"), "echo in"]);
    assert_eq!(stdout(&ran), "in\n", "{}", stderr(&ran));
    let log = service.log();
    assert!(log.contains("it may not be used from 127.0.0.1"), "{log}");
    assert!(log.contains("its time is over"), "{log}");
}

#[test]
fn a_revoked_key_opens_nothing() {
    let mut service = Service::prepare(Options::default());
    let list = service.path("revoked");
    service.configure(&format!("revoked_keys = {list:?}"));
    service.account("alice");
    fs::write(&list, "# nobody yet\n").unwrap();
    service.run();
    assert_eq!(stdout(&service.ssh("alice", "echo in")), "in\n");
    fs::copy(service.path("id.pub"), &list).unwrap();
    assert_eq!(service.ssh("alice", "echo in").status.code(), Some(255));
    assert!(service.log().contains("is revoked"));
    // Whom a list that can't be read would name is not known, so nobody gets in by a key.
    fs::remove_file(&list).unwrap();
    assert_eq!(service.ssh("alice", "echo in").status.code(), Some(255));
    assert!(service.log().contains("could not be read"));
    let password = crate::harness::PASSWORD;
    assert_eq!(stdout(&service.ssh_by_password("alice", password)), "in\n");
}
