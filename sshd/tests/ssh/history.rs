//! What the service writes down of what accounts use, and what it forgets.

use std::{io::Write as _, net::TcpListener, process::Stdio};

use hermitage::admin::protocol::{Reply, Request, SessionStatus};
use hermitage_storage::accounts::{NewSession, Used, day_of};
use nix::sys::signal::Signal;

use crate::{
    harness::{Options, Service, at, finish_child, stdout, wait_for},
    keeping::done,
};

fn here(service: &Service) -> Vec<SessionStatus> {
    match service.admin(&Request::Sessions { account: None }) {
        Reply::Sessions { sessions } => sessions,
        other => panic!("{other:?}"),
    }
}

#[test]
fn what_a_session_passes_and_a_machine_takes_is_on_record_when_the_service_ends() {
    let mut service = Service::with(Options { machines: "linger = 0", ..Options::default() });
    let alice = service.account("alice");
    let today = day_of(hermitage::time::now());
    assert_eq!(stdout(&service.ssh("alice", "head -c 100000 /dev/zero")).len(), 100_000);
    let line = "wc -c; echo on-stderr >&2; sleep 1.2";
    let mut ssh = service.ssh_with(&["-o", "BatchMode=yes", &at("alice"), line]);
    ssh.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped());
    let mut child = ssh.spawn().unwrap();
    child.stdin.take().unwrap().write_all(&[b'x'; 50_000]).unwrap();
    let seen = wait_for("what passed", || here(&service).into_iter().find(|s| s.received > 49_999));
    assert_eq!(seen.received, 50_000);
    assert_eq!(stdout(&finish_child(child)), "50000\n");
    // A forwarded stream's bytes are those of its connection's session.
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let address = listener.local_addr().unwrap().to_string();
    let serving =
        std::thread::spawn(move || listener.accept().unwrap().0.write_all(&[0; 7000]).unwrap());
    let mut ssh = service.ssh_with(&["-o", "BatchMode=yes", "-W", &address, &at("alice")]);
    let output = finish_child(ssh.stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap());
    assert_eq!(output.stdout.len(), 7000);
    serving.join().unwrap();
    service.signal(Signal::SIGTERM);
    service.wait();

    let days = service.accounts().usage(alice.id, today).unwrap();
    let [day] = &days[..] else { panic!("midnight? {days:?}") };
    assert_eq!(day.sessions, 3);
    let Used { awake_s, received, sent, disk_bytes, .. } = day.used;
    assert_eq!((received, sent), (50_000, 100_000 + 6 + 10 + 7000));
    assert!((1..60).contains(&awake_s) && disk_bytes.is_some(), "{day:?}");
    let log = std::fs::read_to_string(service.path("state/audit.jsonl")).unwrap();
    let forwarded =
        log.lines().find(|line| line.contains("session-ended") && line.contains("forward"));
    assert!(forwarded.unwrap().contains(r#""received":0,"sent":7000"#), "{forwarded:?}");

    let text = done(&service, &["account", "usage", "alice"]);
    assert!(text.contains("together") && text.contains("104.5 KiB"), "{text}");
    let all = done(&service, &["account", "usage", "--days", "1"]);
    assert!(all.contains("alice") && all.contains("104.5 KiB"), "{all}");
    let shown = done(&service, &["account", "show", "alice"]);
    assert!(shown.contains("in 7 days 3 sessions, awake "), "{shown}");
}

#[test]
fn a_service_forgets_the_sessions_that_are_too_many() {
    let machines = "[history]\nmost_sessions = 2\nsessions_days = 0";
    let mut service = Service::prepare(Options { machines, ..Options::default() });
    let alice = service.account("alice");
    for kind in ["first", "second", "third", "fourth"] {
        let session = NewSession { account: alice.id, source: "x", kind, login: "password" };
        service.accounts().session_started(&session).unwrap();
    }
    service.accounts().end_open_sessions("before").unwrap();
    service.run();
    let left = wait_for("two to be left", || {
        let left = service.accounts().sessions(alice.id, 9).unwrap();
        (left.len() == 2).then_some(left)
    });
    assert_eq!((left[0].kind.as_str(), left[1].kind.as_str()), ("fourth", "third"));
    let told = || service.log().contains("forgot what is older").then_some(());
    wait_for("the operator to be told", told);
    assert!(service.ssh("alice", "true").status.success());
    assert_eq!(service.accounts().usage(alice.id, 0).unwrap()[0].sessions, 5, "still counted");
}
