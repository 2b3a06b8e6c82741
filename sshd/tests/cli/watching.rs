//! Sessions, their log, and what commands leave in the audit log.

use crate::host::{Host, KEYS};
use crate::service::Service;
use hermitage::admin::protocol::{Reply, Request, SessionStatus};
use hermitage_storage::accounts::NewSession;
use serde_json::Value;
use std::time::{Duration, SystemTime};

fn here() -> SessionStatus {
    SessionStatus {
        number: 7,
        account: "alice".into(),
        source: "192.0.2.1:4711".into(),
        kind: "shell".into(),
        terminal: true,
        login: "key SHA256:x".into(),
        since: 60,
        idle: 3700,
        machine: Some("resumed".into()),
        received: 2048,
        sent: 3 << 20,
    }
}

#[test]
fn sessions_are_listed_ended_and_spoken_to() {
    let host = Host::new();
    host.run(&["session", "list"]).fails(1, "not running");
    let service = Service::start(&host, |request| match request {
        Request::Sessions { account: Some(_) } => Reply::Sessions { sessions: vec![] },
        Request::Sessions { account: None } => Reply::Sessions { sessions: vec![here()] },
        Request::EndSessions { numbers, .. } if numbers == &[9] => {
            Reply::Error { message: "there is no session 9".into() }
        }
        Request::EndSessions { .. } | Request::Message { .. } => Reply::Counted { count: 1 },
        _ => Reply::Done,
    });
    let text = host.run(&["session", "list"]).success().out;
    for word in ["alice", "192.0.2.1:4711", "1h1m40s", "resumed", "key SHA256:x", "2 KiB", "3 MiB"]
    {
        assert!(text.contains(word), "{word}: {text}");
    }
    let object = &host.json(&["session", "list"])["sessions"][0];
    assert_eq!((&object["number"], &object["idle_seconds"]), (&7.into(), &3700.into()));
    assert_eq!(object["since"], "1970-01-01T00:01:00Z");
    assert!(host.run(&["session", "list", "bob"]).success().out.contains("nobody is here"));
    service.asked();

    host.run(&["session", "kill", "7"]).success();
    host.run(&["session", "kill", "--account", "alice"]).success();
    host.run(&["session", "kill", "9"]).fails(3, "there is no session 9");
    host.run(&["session", "kill"]).fails(2, "required");
    let ended = |numbers: &[u64], account: Option<&str>| Request::EndSessions {
        numbers: numbers.into(),
        account: account.map(str::to_owned),
    };
    assert_eq!(service.asked(), [ended(&[7], None), ended(&[], Some("alice")), ended(&[9], None)]);

    host.run_with(&["session", "message", "--all"], "from a file\n").success();
    host.run(&["session", "message", "--session", "7", "words"]).success();
    host.run(&["session", "message", "to whom?"]).fails(2, "required");
    let texts: Vec<_> = service.asked();
    let message = |numbers: &[u64], text: &str| Request::Message {
        numbers: numbers.into(),
        account: None,
        text: text.into(),
    };
    assert_eq!(texts, [message(&[], "from a file\n"), message(&[7], "words")]);
}

#[test]
fn the_log_is_of_one_or_all_and_of_a_time() {
    let host = Host::new();
    assert!(host.run(&["log"]).success().out.contains("no sessions"));
    host.run(&["account", "add", "alice"]).success();
    host.run(&["account", "add", "bob"]).success();
    let accounts = host.accounts();
    for (name, source) in
        [("alice", "192.0.2.1:1"), ("bob", "192.0.2.2:2"), ("alice", "192.0.2.3:3")]
    {
        let account = accounts.named(name).unwrap().id;
        let session = NewSession { account, source, kind: "shell", login: "password" };
        let id = accounts.session_started(&session).unwrap();
        if name == "bob" {
            accounts.session_ended(id, "exit status 9", Some("forked")).unwrap();
        }
    }
    let sources = |arguments: &[&str]| -> Vec<String> {
        let log = host.json(arguments);
        let all = log["sessions"].as_array().unwrap();
        all.iter().map(|session| session["source"].as_str().unwrap().to_owned()).collect()
    };
    assert_eq!(sources(&["log"]), ["192.0.2.1:1", "192.0.2.2:2", "192.0.2.3:3"]);
    assert_eq!(sources(&["log", "alice"]), ["192.0.2.1:1", "192.0.2.3:3"]);
    assert_eq!(sources(&["log", "-n", "1"]), ["192.0.2.3:3"]);
    assert_eq!(sources(&["log", "--since", "1h"]).len(), 3);
    let bob = &host.json(&["log", "bob"])["sessions"][0];
    assert_eq!((&bob["login"], &bob["machine"]), (&"password".into(), &"forked".into()));
    assert_eq!((&bob["account"], &bob["outcome"]), (&"bob".into(), &"exit status 9".into()));
    let text = host.run(&["log"]).success().out;
    assert!(text.contains("goes on") && text.contains("exit status 9"), "{text}");
    host.run(&["log", "carol"]).fails(3, "carol");
    // Who has gone is still in it.
    host.run(&["account", "remove", "bob"]).success();
    assert_eq!(sources(&["log", "bob"]), ["192.0.2.2:2"]);
}

fn audit(host: &Host) -> Vec<Value> {
    let text = std::fs::read_to_string(host.path("state/audit.jsonl")).unwrap_or_default();
    text.lines().map(|line| serde_json::from_str(line).unwrap()).collect()
}

#[test]
fn commands_that_change_something_are_audited_and_tell_no_secret() {
    let host = Host::new();
    host.run_with(&["account", "add", "alice", "--password-stdin"], "a-secret-password\n")
        .success();
    host.run_with(&["account", "key", "add", "alice", "-"], KEYS).success();
    host.run(&["account", "list"]).success();
    host.run(&["account", "disable", "nobody"]).fails(3, "nobody");
    let lines = audit(&host);
    let commands: Vec<Vec<&str>> = lines
        .iter()
        .map(|line| line["command"].as_array().unwrap())
        .map(|words| words.iter().skip(4).map(|word| word.as_str().unwrap()).collect())
        .collect();
    assert_eq!(
        commands,
        [
            vec!["account", "add", "alice", "--password-stdin"],
            vec!["account", "key", "add", "alice", "-"],
            vec!["account", "disable", "nobody"],
        ]
    );
    assert!(lines.iter().all(|line| line["event"] == "command"));
    assert!(lines.iter().all(|line| line["uid"] == nix::unistd::getuid().as_raw()));
    let fingerprints: Vec<_> = hermitage_storage::accounts::parse_keys(KEYS)
        .unwrap()
        .iter()
        .map(|key| Value::from(format!("key {}", key.fingerprint())))
        .collect();
    assert_eq!(lines[1]["details"].as_array().unwrap(), &fingerprints);
    assert!(lines[2]["error"].as_str().unwrap().contains("nobody"), "{}", lines[2]);
    assert_eq!(lines[0].get("error"), None);
    let text = std::fs::read_to_string(host.path("state/audit.jsonl")).unwrap();
    assert!(!text.contains("a-secret-password") && !text.contains("argon2"));
}

#[test]
fn without_an_audit_log_none_is_written() {
    let host = Host::new();
    std::fs::write(host.path("hermitage.toml"), "[audit]\nfiles = 0\n").unwrap();
    let config = host.path("hermitage.toml").display().to_string();
    host.run(&["--config", &config, "account", "add", "alice"]).success();
    assert!(!host.path("state/audit.jsonl").exists());
}

/// What of the log is about accounts' files: what was done, to whose, where, how much, and what was wrong.
fn copies(host: &Host) -> Vec<(String, String, String, bool, bool)> {
    let lines = audit(host).into_iter().filter(|line| line["event"] == "copy");
    let text = |value: &Value| value.as_str().unwrap().to_owned();
    lines
        .map(|line| {
            assert_eq!(line["uid"], nix::unistd::getuid().as_raw(), "{line}");
            assert!(line["pid"].is_u64() && line["milliseconds"].is_u64(), "{line}");
            assert_eq!(line["bytes"].is_u64(), line["error"].is_null(), "{line}");
            (
                text(&line["what"]),
                text(&line["account"]),
                text(&line["place"]),
                line["id"].is_string(),
                line["error"].is_null(),
            )
        })
        .collect()
}

#[test]
fn what_is_done_with_an_accounts_files_is_audited() {
    let host = Host::new();
    for name in ["alice", "bob"] {
        host.run(&["account", "add", name, "--disk", "1MiB"]).success();
        let disk = host.state().disk(host.accounts().named(name).unwrap().id);
        std::fs::create_dir_all(disk.parent().unwrap()).unwrap();
        std::fs::write(&disk, vec![7; 1 << 20]).unwrap();
        // What was written a moment ago is read again, whatever its time says.
        let long_ago = SystemTime::now() - Duration::from_secs(3600);
        std::fs::File::open(&disk).unwrap().set_modified(long_ago).unwrap();
    }
    let file = host.path("alice.hermitage").display().to_string();
    let backups = host.path("backups").display().to_string();
    let missing = host.path("nowhere/alice").display().to_string();
    host.run(&["account", "export", "alice", "-o", &file]).success();
    host.run(&["account", "export", "alice", "-o", &missing]).fails(1, "nowhere");
    host.run(&["account", "restore", &file, "--name", "again"]).success();
    host.run(&["account", "restore", &file]).fails(4, "alice");
    let those = ["backup", "create", &backups, "--account", "alice", "--account", "bob"];
    host.run(&those).success();
    // Nothing was read of those that are as they were.
    host.run(&those).success();
    host.run(&["backup", "restore", &backups, "bob", "--name", "bob2"]).success();
    host.run(&["checkpoint", "create", "alice", "one"]).success();
    host.run(&["checkpoint", "create", "alice", "one"]).fails(1, "one");
    host.run(&["checkpoint", "restore", "alice", "one"]).success();
    host.run(&["checkpoint", "drop", "alice", "one"]).success();
    // Looks.
    host.run(&["checkpoint", "list", "alice"]).success();
    host.run(&["backup", "verify", &backups]).success();
    let found = copies(&host);
    let found: Vec<_> = found
        .iter()
        .map(|(what, account, place, known, done)| {
            (what.as_str(), account.as_str(), place.as_str(), *known, *done)
        })
        .collect();
    let run = found[6].2;
    assert!(run.ends_with(&format!(" of {backups}")) && run.starts_with("20"), "{run}");
    let wanted = [
        ("export", "alice", file.as_str(), true, true),
        ("export", "alice", &missing, true, false),
        ("restore", "again", &file, true, true),
        ("restore", "alice", &file, false, false),
        ("backup", "alice", &backups, true, true),
        ("backup", "bob", &backups, true, true),
        ("restore", "bob2", run, true, true),
        ("checkpoint", "alice", "one", true, true),
        ("checkpoint", "alice", "one", true, false),
        ("go-back", "alice", "one", true, true),
        ("drop-checkpoint", "alice", "one", true, true),
    ];
    assert_eq!(found, wanted);
    let bytes = |what: &str| {
        let lines = audit(&host);
        let line = lines.iter().find(|line| line["event"] == "copy" && line["what"] == what);
        line.unwrap()["bytes"].as_u64().unwrap()
    };
    // One block, so often: an archive packs it.
    assert!((1..1 << 20).contains(&bytes("export")));
    assert_eq!(bytes("restore"), 1 << 20);
    // The disk, and what is said of it.
    assert!((1 << 20..1 << 21).contains(&bytes("checkpoint")));
}
