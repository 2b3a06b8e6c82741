//! Sessions, their log, and what commands leave in the audit log.

use crate::host::{Host, KEYS};
use crate::service::Service;
use hermitage::admin::protocol::{Reply, Request, SessionStatus};
use hermitage_storage::accounts::NewSession;
use serde_json::Value;

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
