use crate::host::{Host, KEYS};
use hermitage_storage::accounts::verify_password;
use nix::pty::openpty;
use serde_json::{Value, json};
use std::fs::{self, File};
use std::io::{Read, Write};
use std::os::fd::OwnedFd;
use std::process::{Command, Stdio};

#[test]
fn an_account_is_added_shown_and_listed() {
    let host = Host::new();
    let done =
        host.run_with(&["account", "add", "alice", "--key", "-", "--disk", "2G"], KEYS).success();
    assert!(done.out.contains("alice is added: 7 keys"), "{}", done.out);
    assert!(done.err.contains("base build"), "its disk comes later: {}", done.err);

    let shown = host.json(&["account", "show", "alice"]);
    assert_eq!(shown["name"], "alice");
    assert_eq!(shown["state"], "enabled");
    assert_eq!(shown["limits"]["disk_bytes"], 2u64 << 30);
    assert_eq!(shown["keys"].as_array().unwrap().len(), 7);
    assert_eq!(shown["has_password"], false);
    assert_eq!(shown["machine"], Value::Null);
    assert_eq!(host.json(&["account", "list"])["accounts"][0]["id"], shown["id"]);
    let text = host.run(&["account", "list"]).success().out;
    assert!(text.contains("alice") && text.contains("7 keys"), "{text}");
    assert!(!done.out.contains('\x1b') && !text.contains('\x1b'));
}

#[test]
fn refusals_have_words_and_their_own_status() {
    let host = Host::new();
    host.run(&["account", "add", "alice"]).success();
    host.run(&["account", "add", "alice", "--disk", "7G"]).fails(4, "already an account \"alice\"");
    host.run(&["account", "add", "Alice"]).fails(1, "capital letter");
    host.run(&["account", "show", "bob"]).fails(3, "no account \"bob\"");
    host.run(&["account", "disable", "bob"]).fails(3, "no account");
    host.run(&["account", "remove", "bob"]).fails(3, "no account");
    host.run(&["account", "add"]).fails(2, "NAME");
    host.run(&["account", "add", "bob", "--key", "/nonexistent"]).fails(1, "/nonexistent");
    host.run_with(&["account", "add", "bob", "--key", "-"], "ssh-ed25519 AAAA\n")
        .fails(1, "line 1");
    host.run_with(&["account", "add", "bob", "--key", "-", "--password-stdin"], "x")
        .fails(1, "once");
    host.run(&["account", "show", "bob"]).fails(3, "no account");
    let done = host.run(&["account", "show", "bob", "--json"]);
    let error: Value = serde_json::from_str(&done.err).unwrap();
    assert!(error["error"].as_str().unwrap().contains("bob"));
    assert!(done.out.is_empty());
}

#[test]
fn a_private_key_is_refused_by_name() {
    let host = Host::new();
    let key = "-----BEGIN OPENSSH PRIVATE KEY-----\nAAAA\n-----END OPENSSH PRIVATE KEY-----\n";
    host.run_with(&["account", "add", "alice", "--key", "-"], key).fails(1, "private key");
}

#[test]
fn passwords_come_by_standard_input() {
    let host = Host::new();
    host.run_with(&["account", "add", "alice", "--password-stdin"], "first password\n").success();
    let fits = |password: &str| {
        let alice = host.accounts().named("alice").unwrap();
        verify_password(alice.password.as_deref(), password.as_bytes())
    };
    assert!(fits("first password"));
    host.run_with(&["account", "passwd", "alice"], "second password \r\n").success();
    assert!(fits("second password ") && !fits("first password"));
    host.run_with(&["account", "passwd", "alice"], "\n").fails(1, "empty");
    host.run_with(&["account", "passwd", "alice"], "short\n").fails(1, "8 characters");
    assert!(fits("second password "), "refused ones change nothing");
    assert_eq!(host.json(&["account", "passwd", "alice", "--none"])["has_password"], false);
    assert!(!fits("second password "));
}

/// What a person types at a terminal: asked twice, never shown.
#[test]
fn passwords_are_asked_twice_on_a_terminal() {
    let host = Host::new();
    host.run(&["account", "add", "alice"]).success();
    let typed = |answers: [&str; 2]| -> (bool, String) {
        let pty = openpty(None, None).unwrap();
        let command = host.command(&["account", "passwd", "alice"]);
        let mut setsid = Command::new("setsid");
        setsid.args(["--ctty", "--wait"]).arg(command.get_program()).args(command.get_args());
        let end = || -> OwnedFd { pty.slave.try_clone().unwrap() };
        let mut child =
            setsid.stdin(Stdio::from(end())).stdout(end()).stderr(end()).spawn().unwrap();
        // With its copies of the terminal's slave end: only then is the other's end seen.
        drop(setsid);
        let mut terminal = File::from(pty.master);
        drop(pty.slave);
        let mut shown = String::new();
        for (prompt, answer) in ["New password for alice: ", "Again: "].iter().zip(answers) {
            read_until(&mut terminal, &mut shown, prompt);
            // The prompt comes before the echo is off, which would flush what is typed in between.
            std::thread::sleep(std::time::Duration::from_millis(300));
            terminal.write_all(format!("{answer}\n").as_bytes()).unwrap();
        }
        let ok = child.wait().unwrap().success();
        read_until(&mut terminal, &mut shown, "\0never");
        (ok, shown)
    };
    let (ok, shown) = typed(["correct horse", "correct house"]);
    assert!(!ok && shown.contains("not the same"), "{shown}");
    assert_eq!(host.json(&["account", "show", "alice"])["has_password"], false);
    let (ok, shown) = typed(["correct horse", "correct horse"]);
    assert!(ok, "{shown}");
    assert!(!shown.contains("horse"), "{shown}");
    let alice = host.accounts().named("alice").unwrap();
    assert!(verify_password(alice.password.as_deref(), b"correct horse"));
}

/// Reads until the text has come or the terminal's other side is gone.
fn read_until(terminal: &mut File, shown: &mut String, text: &str) {
    let mut buffer = [0; 512];
    while !shown.contains(text) {
        match terminal.read(&mut buffer) {
            Ok(0) | Err(_) => return,
            Ok(n) => shown.push_str(&String::from_utf8_lossy(&buffer[..n])),
        }
    }
}

#[test]
fn commands_can_be_repeated() {
    let host = Host::new();
    host.run(&["account", "add", "alice"]).success();
    assert_eq!(host.json(&["account", "disable", "alice"])["changed"], true);
    assert_eq!(host.json(&["account", "disable", "alice"])["changed"], false);
    assert_eq!(host.json(&["account", "show", "alice"])["state"], "disabled");
    assert_eq!(host.json(&["account", "enable", "alice"])["changed"], true);
    host.run_with(&["account", "key", "add", "alice", "-"], KEYS).success();
    let again = host.run_with(&["account", "key", "add", "alice", "-", "--json"], KEYS).success();
    let again: Value = serde_json::from_str(&again.out).unwrap();
    assert_eq!((&again["added"], again["keys"].as_array().unwrap().len()), (&json!(0), 7));
}

#[test]
fn keys_are_listed_and_taken_away() {
    let host = Host::new();
    fs::write(host.path("keys"), KEYS).unwrap();
    let file = host.path("keys").display().to_string();
    host.run(&["account", "add", "alice", "--key", &file]).success();
    let listed = host.json(&["account", "key", "list", "alice"]);
    let fingerprint = listed["keys"][1]["fingerprint"].as_str().unwrap().to_owned();
    assert!(KEYS.contains(&fingerprint));
    let removed = host.json(&["account", "key", "remove", "alice", &fingerprint]);
    assert_eq!(removed["removed"], listed["keys"][1]);
    host.run(&["account", "key", "remove", "alice", &fingerprint]).fails(3, &fingerprint);
    host.run(&["account", "key", "remove", "alice", "alice@laptop"]).success();
    assert_eq!(
        host.json(&["account", "key", "list", "alice"])["keys"].as_array().unwrap().len(),
        5
    );
}

#[test]
fn keys_keep_their_options() {
    let host = Host::new();
    let mut lines = KEYS.lines().filter(|line| !line.starts_with('#'));
    let (first, second) = (lines.next().unwrap(), lines.next().unwrap());
    let line = format!("restrict,command=\"borg serve\" {first}\n");
    host.run_with(&["account", "add", "alice", "--key", "-"], &line).success();
    let options = |number: usize| {
        host.json(&["account", "key", "list", "alice"])["keys"][number]["options"].clone()
    };
    assert_eq!(options(0), "restrict,command=\"borg serve\"");
    let add = ["account", "key", "add", "alice", "-"];
    host.run_with(&[&add[..], &["--options", "no-pty"]].concat(), second).success();
    assert_eq!(options(1), "no-pty");
    let table = host.run(&["account", "key", "list", "alice"]).success().out;
    assert!(table.contains("OPTIONS") && table.contains("borg serve"), "{table}");

    // All of a list or nothing, and nothing that would be dropped in silence.
    let both = format!("{}\n{first}\n", lines.next().unwrap());
    host.run_with(&add, &both).fails(1, "with the options restrict");
    assert_eq!(options(2), Value::Null);
    host.run_with(&add, &format!("cert-authority {first}")).fails(1, "ssh.user_ca_keys");
    host.run_with(&add, &format!("no-ptty {first}")).fails(1, "line 1");
    host.run_with(&[&add[..], &["--options", "no-ptty"]].concat(), second).fails(2, "no-ptty");
    host.run_with(&[&add[..], &["--options", "pty"]].concat(), &line).fails(1, "of its own");
}

#[test]
fn a_removed_account_keeps_its_disk_until_purge() {
    let host = Host::new();
    host.install_vmm(1);
    let image = host.image().display().to_string();
    host.run(&["base", "build", "--image", &image]).success();
    host.run(&["account", "add", "alice", "--disk", "1G"]).success();
    let id: uuid::Uuid =
        serde_json::from_value(host.json(&["account", "show", "alice"])["id"].clone()).unwrap();
    let (disk, aside) = (host.state().disk(id), host.state().removed_dir(id));
    assert_eq!(fs::metadata(&disk).unwrap().len(), 1 << 30);
    fs::write(disk.with_file_name("mark"), "hers").unwrap();

    let done = host.run(&["account", "remove", "alice"]).success();
    assert!(done.out.contains("--purge") && done.out.contains(&id.to_string()), "{}", done.out);
    assert!(!disk.exists() && aside.join("disk.img").exists());
    host.run(&["account", "show", "alice"]).fails(3, "no account");
    assert_eq!(host.json(&["account", "list", "--removed"])["accounts"][0]["state"], "removed");
    assert_eq!(host.json(&["account", "list"])["accounts"], json!([]));

    // The name is free; who has it now is somebody else, and purging the former leaves her alone.
    host.run(&["account", "add", "alice", "--disk", "1G"]).success();
    let second = host.json(&["account", "show", "alice"])["id"].clone();
    assert_ne!(second, json!(id));
    host.run(&["account", "remove", "alice"]).success();
    assert_eq!(host.json(&["account", "remove", "alice", "--purge"])["purged"], true);
    assert!(!aside.exists());
    host.run(&["account", "remove", "alice", "--purge"]).fails(3, "no account");
}

#[test]
fn a_disk_that_cannot_be_made_leaves_no_account() {
    let host = Host::new();
    host.install_vmm(1);
    let image = host.image().display().to_string();
    host.run(&["base", "build", "--image", &image]).success();
    host.run(&["account", "add", "alice", "--disk", "4096"]).fails(1, "no account was made");
    host.run(&["account", "show", "alice"]).fails(3, "no account");
    assert_eq!(host.json(&["account", "list", "--removed"])["accounts"], json!([]));
    assert_eq!(fs::read_dir(host.state().accounts_dir()).unwrap().count(), 0);
}
