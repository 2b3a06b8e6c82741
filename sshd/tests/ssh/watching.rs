//! What operators see, and what is kept for them.

use std::{
    io::{Read, Write},
    os::unix::net::UnixStream,
    process::Stdio,
};

use hermitage::admin::protocol::{Reply, Request, SessionStatus};
use serde_json::Value;

use crate::{
    harness::{Options, PASSWORD, Service, at, stderr, stdout, wait_for},
    openmetrics::{self, Metrics},
    terminals::Shell,
};

fn sessions(service: &Service, account: Option<&str>) -> Vec<SessionStatus> {
    let request = Request::Sessions { account: account.map(str::to_owned) };
    match service.admin(&request) {
        Reply::Sessions { sessions } => sessions,
        other => panic!("{other:?}"),
    }
}

fn counted(service: &Service, request: &Request) -> u32 {
    match service.admin(request) {
        Reply::Counted { count } => count,
        other => panic!("{other:?}"),
    }
}

#[test]
fn an_operator_sees_who_is_here_speaks_to_them_and_ends_a_session() {
    let service = Service::start();
    service.account("alice");
    service.account("bob");
    let mut alice = Shell::open(&service, "alice");
    alice.run("echo a$((40+2))", "a42");
    let mut command = service.ssh_with(&["-o", "BatchMode=yes", &at("bob"), "sleep 50"]);
    let mut bob = command.stdout(Stdio::null()).stderr(Stdio::piped()).spawn().unwrap();
    let all = wait_for("both", || {
        let all = sessions(&service, None);
        (all.len() == 2 && all.iter().all(|session| session.machine.is_some())).then_some(all)
    });
    let of = |name: &str| all.iter().find(|session| session.account == name).unwrap();
    assert_eq!((of("alice").kind.as_str(), of("alice").terminal), ("shell", true));
    assert_eq!((of("bob").kind.as_str(), of("bob").terminal), ("exec", false));
    assert_eq!(of("alice").machine.as_deref(), Some("forked"));
    assert!(of("alice").login.starts_with("key SHA256:"), "{}", of("alice").login);
    assert!(of("alice").source.starts_with("127.0.0.1:"));
    assert_eq!(sessions(&service, Some("bob")), [of("bob").clone()]);
    wait_for("idle seconds", || (sessions(&service, Some("alice"))[0].idle > 0).then_some(()));

    // Only terminals are spoken to, and only in words.
    let text = "closing \x1b[2Jsoon\nsave".to_owned();
    let message = Request::Message { numbers: vec![], account: None, text };
    assert_eq!(counted(&service, &message), 1);
    alice.expect("hermitage: closing  [2Jsoon\r\nsave");

    let numbers = vec![of("bob").number];
    assert_eq!(counted(&service, &Request::EndSessions { numbers, account: None }), 1);
    let mut said = String::new();
    bob.stderr.take().unwrap().read_to_string(&mut said).unwrap();
    assert_eq!(bob.wait().unwrap().code(), Some(255));
    assert!(said.contains("an operator has ended this session"), "{said}");

    // The other goes on; and what was on its terminal when it is ended waits there.
    alice.run("kept=here; echo b$((40+2))", "b42");
    let account = Some("alice".to_owned());
    assert_eq!(counted(&service, &Request::EndSessions { numbers: vec![], account }), 1);
    alice.expect("an operator has ended this session");
    assert_eq!(alice.wait(), 255);
    wait_for("nobody", || sessions(&service, None).is_empty().then_some(()));
    let mut again = Shell::open(&service, "alice");
    again.run("echo c$kept", "chere");
    assert_eq!(sessions(&service, Some("alice"))[0].machine.as_deref(), Some("running"));

    let wrong = Request::EndSessions { numbers: vec![4711], account: None };
    assert!(matches!(service.admin(&wrong), Reply::Error { message } if message.contains("4711")));
    let nobody = Request::EndSessions { numbers: vec![], account: None };
    assert!(matches!(service.admin(&nobody), Reply::Error { .. }), "all of them are meant");
}

#[test]
fn the_sessions_log_says_by_what_and_how() {
    let service = Service::with(Options { machines: "linger = 0", ..Options::default() });
    let account = service.account("alice");
    assert!(service.ssh("alice", "exit 3").status.code() == Some(3));
    wait_for("the save", || service.at_rest("alice").then_some(()));
    assert_eq!(stdout(&service.ssh_by_password("alice", PASSWORD)), "in\n");
    let log = wait_for("the log", || {
        let log = service.accounts().sessions(account.id, 9).unwrap();
        (log.len() == 2 && log.iter().all(|session| session.ended.is_some())).then_some(log)
    });
    let [by_password, by_key] = &log[..] else { panic!("{log:?}") };
    assert_eq!(by_password.login.as_deref(), Some("password"));
    assert_eq!(by_password.machine.as_deref(), Some("resumed"));
    let public = std::fs::read_to_string(service.path("id.pub")).unwrap();
    let key = &hermitage_storage::accounts::parse_keys(&public).unwrap()[0];
    assert_eq!(by_key.login, Some(format!("key {}", key.fingerprint())));
    assert_eq!(by_key.machine.as_deref(), Some("forked"));
    assert_eq!(by_key.outcome.as_deref(), Some("exit status 3"));
}

/// What is in the audit log by now, of this kind.
pub fn audited(service: &Service, event: &str) -> Vec<Value> {
    let text = std::fs::read_to_string(service.path("state/audit.jsonl")).unwrap_or_default();
    let lines = text.lines().map(|line| serde_json::from_str::<Value>(line).expect(line));
    lines.filter(|line| line["event"] == event).collect()
}

#[test]
fn the_audit_log_has_logins_refusals_penalties_and_requests_and_no_secret() {
    let ssh = "failure_delay_ms = 1\npenalty_exempt = []";
    let mut service = Service::with(Options { ssh, machines: "linger = 0" });
    let account = service.account("alice");
    assert!(service.ssh("alice", "echo a-secret-command").status.success());
    assert_eq!(stdout(&service.ssh_by_password("alice", PASSWORD)), "in\n");
    for _ in 0..3 {
        let wrong = service.ssh_by_password_from("127.0.0.2", "alice", "a-secret-guess");
        assert!(stderr(&wrong).contains("Permission denied"), "{}", stderr(&wrong));
    }
    service.admin(&Request::StopAccount { account: "alice".into() });
    service.signal(nix::sys::signal::Signal::SIGTERM);
    service.wait();

    let logins = audited(&service, "login");
    let methods: Vec<_> = logins.iter().map(|login| login["method"].as_str().unwrap()).collect();
    assert_eq!(methods, ["publickey", "password"]);
    assert!(logins[0]["by"].as_str().unwrap().starts_with("key SHA256:"), "{}", logins[0]);
    assert_eq!(logins[0]["account"], "alice");
    assert_eq!(logins[0]["id"], account.id.to_string());
    assert!(logins[0]["source"].as_str().unwrap().starts_with("127.0.0.1:"));
    assert!(logins[0]["time"].as_str().unwrap().ends_with('Z'));
    let refused = audited(&service, "login-refused");
    assert_eq!(refused.len(), 3, "{refused:?}");
    assert!(refused.iter().all(|line| line["user"] == "alice" && line["method"] == "password"));
    let penalties = audited(&service, "penalty");
    assert_eq!(penalties[0]["source"], "127.0.0.2", "{penalties:?}");
    let sessions = audited(&service, "session-ended");
    assert_eq!(sessions.len(), 2);
    assert_eq!(sessions[0]["outcome"], "exit status 0");
    assert_eq!((&sessions[0]["kind"], &sessions[0]["machine"]), (&"exec".into(), &"forked".into()));
    assert_eq!(
        audited(&service, "machine-started").len(),
        audited(&service, "machine-ended").len()
    );
    assert!(!audited(&service, "machine-saved").is_empty());
    let requests = audited(&service, "admin-request");
    assert_eq!(requests.len(), 1, "looking at the status is none: {requests:?}");
    assert_eq!(requests[0]["uid"], nix::unistd::getuid().as_raw());
    assert_eq!(requests[0]["request"]["op"], "stop-account");
    assert_eq!(audited(&service, "service-started").len(), 1);
    assert_eq!(audited(&service, "service-stopped").len(), 1, "the end is in it");

    let text = std::fs::read_to_string(service.path("state/audit.jsonl")).unwrap();
    for secret in [PASSWORD, "a-secret-guess", "a-secret-command", "argon2"] {
        assert!(!text.contains(secret), "{secret} is in the audit log");
    }
}

fn get(service: &Service, request: &str) -> String {
    let mut stream = UnixStream::connect(service.path("run/metrics.sock")).unwrap();
    stream.write_all(request.as_bytes()).unwrap();
    let mut answer = String::new();
    stream.read_to_string(&mut answer).unwrap();
    answer
}

fn metrics(service: &Service) -> Metrics {
    let answer = get(service, "GET /metrics HTTP/1.1\r\nHost: hermitage\r\n\r\n");
    let (head, body) = answer.split_once("\r\n\r\n").unwrap();
    assert!(head.starts_with("HTTP/1.0 200 OK\r\n"), "{head}");
    assert!(head.contains("Content-Type: application/openmetrics-text; version=1.0.0"), "{head}");
    assert!(head.contains(&format!("Content-Length: {}", body.len())), "{head}");
    openmetrics::parse(body)
}

#[test]
fn metrics_tell_what_happened_and_what_is() {
    let ssh = "failure_delay_ms = 1";
    let service = Service::with(Options { ssh, machines: "linger = 0" });
    service.account("alice");
    service.account("bob");
    assert!(service.ssh("alice", "true").status.success());
    wait_for("the save", || service.at_rest("alice").then_some(()));
    assert!(service.ssh("alice", "true").status.success());
    wait_for("the save", || service.at_rest("alice").then_some(()));
    service.ssh_by_password("alice", "guess");
    let mut bob = Shell::open(&service, "bob");
    bob.run("echo a$((40+2))", "a42");

    let metrics = metrics(&service);
    let value = |series: &str| metrics.value(series);
    assert_eq!(value(r#"hermitage_logins_total{method="publickey",outcome="accepted"}"#), 3.0);
    assert_eq!(value(r#"hermitage_logins_total{method="password",outcome="refused"}"#), 1.0);
    assert_eq!(value(r#"hermitage_sessions_total{kind="exec"}"#), 2.0);
    assert_eq!(value(r#"hermitage_sessions_open{kind="shell"}"#), 1.0);
    assert_eq!(value(r#"hermitage_machine_start_seconds_count{how="forked"}"#), 2.0);
    assert_eq!(value(r#"hermitage_machine_start_seconds_count{how="resumed"}"#), 1.0);
    assert_eq!(value(r#"hermitage_machine_saves_total{outcome="saved"}"#), 2.0);
    assert_eq!(value("hermitage_machine_save_seconds_count"), 2.0);
    assert_eq!(
        value(r#"hermitage_machine_stage_seconds_count{of="save",stage="freeze the guest"}"#),
        2.0
    );
    assert!(
        value(r#"hermitage_machine_stage_seconds_count{of="fork",stage="fork process"}"#) > 0.0
    );
    assert_eq!(value(r#"hermitage_machines{state="running"}"#), 1.0);
    assert_eq!(value(r#"hermitage_machines{state="saved"}"#), 1.0);
    assert!(value(r#"hermitage_machine_memory_bytes{kind="private"}"#) > 0.0);
    assert!(value("hermitage_state_free_bytes") > 0.0);
    assert!(value("hermitage_start_time_seconds") > 1.7e9);
    assert_eq!(value("hermitage_audit_lost_total"), 0.0);
    assert_eq!(value("hermitage_quotas_reached_total"), 0.0);
    assert_eq!(value(r#"hermitage_session_bytes_total{direction="received"}"#), 0.0);

    // And whoever asks for something else is told so.
    assert!(get(&service, "GET / HTTP/1.1\r\n\r\n").starts_with("HTTP/1.0 404 "));
    assert!(get(&service, "POST /metrics HTTP/1.1\r\n\r\n").starts_with("HTTP/1.0 400 "));
    assert!(get(&service, &"x".repeat(8192)).starts_with("HTTP/1.0 400 "));
}

/// What the dashboard does not show, and why not.
const NOT_ON_THE_DASHBOARD: [(&str, &str); 1] =
    [("hermitage_build_info", "the same at all times; for queries that compare versions")];

#[test]
fn the_dashboard_and_the_manual_have_every_metric_and_no_other() {
    let service = Service::with(Options { ssh: "", machines: "linger = 0" });
    service.account("alice");
    assert!(service.ssh("alice", "true").status.success());
    // Stages have no series before the first of them.
    wait_for("the save", || service.at_rest("alice").then_some(()));
    let metrics = metrics(&service);
    let dashboard = include_str!("../../../config/grafana-dashboard.json");
    let dashboard: Value = serde_json::from_str(dashboard).unwrap();
    let mut asked = vec![];
    openmetrics::names_in(&dashboard, &mut asked);
    for name in &asked {
        assert!(metrics.has(name), "the dashboard asks for {name}, which is not there");
    }
    let manual = include_str!("../../../docs/watching.md");
    for name in metrics.names() {
        let of_it = |asked: &String| asked.strip_suffix("_bucket").unwrap_or(asked) == name;
        let shown = asked.iter().any(of_it);
        let left_out = NOT_ON_THE_DASHBOARD.iter().any(|(left_out, _)| *left_out == name);
        assert_ne!(
            shown, left_out,
            "{name}: put it on the dashboard, or say why not, and not both"
        );
        assert!(manual.contains(&format!("| `{name}`")), "{name} is not in docs/watching.md");
    }
}
