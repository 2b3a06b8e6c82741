//! Commands beside a running service, whose side of the admin socket is played here.

use crate::host::Host;
use hermitage::admin::protocol::{AccountStatus, Enforcement, Reply, Request, Status};
use std::io::{BufRead, BufReader, Read, Write};
use std::os::unix::net::{UnixListener, UnixStream};
use std::process::Stdio;
use std::sync::{Arc, Mutex};
use std::thread;

/// Answers every request with what `reply` says, and remembers them.
pub struct Service {
    asked: Arc<Mutex<Vec<Request>>>,
}

impl Service {
    pub fn start(host: &Host, reply: impl Fn(&Request) -> Reply + Send + 'static) -> Self {
        Self::start_with(host, reply, |_| {})
    }

    fn start_with(
        host: &Host,
        reply: impl Fn(&Request) -> Reply + Send + 'static,
        after: impl Fn(UnixStream) + Send + 'static,
    ) -> Self {
        let listener = UnixListener::bind(host.path("run/admin.sock")).unwrap();
        let asked = Arc::new(Mutex::new(Vec::new()));
        let log = asked.clone();
        thread::spawn(move || {
            for stream in listener.incoming() {
                let mut stream = BufReader::new(stream.unwrap());
                let mut line = String::new();
                stream.read_line(&mut line).unwrap();
                let request: Request = serde_json::from_str(&line).unwrap();
                let answer = reply(&request);
                log.lock().unwrap().push(request);
                let mut stream = stream.into_inner();
                writeln!(stream, "{}", serde_json::to_string(&answer).unwrap()).unwrap();
                after(stream);
            }
        });
        Self { asked }
    }

    pub fn asked(&self) -> Vec<Request> {
        std::mem::take(&mut self.asked.lock().unwrap())
    }
}

fn changed(account: &str) -> Request {
    Request::AccountChanged { account: account.into() }
}

#[test]
fn the_service_is_told_of_every_change() {
    let host = Host::new();
    let service = Service::start(&host, |_| Reply::Done);
    host.run(&["account", "add", "alice"]).success();
    assert_eq!(service.asked(), [changed("alice")]);
    for command in [
        &["account", "disable", "alice"][..],
        &["account", "enable", "alice"],
        &["account", "passwd", "alice", "--none"],
        &["account", "policy", "alice", "keep"],
        &["account", "hold", "alice", "2h"],
        &["account", "hold", "alice", "--off"],
    ] {
        host.run(command).success();
        assert_eq!(service.asked(), [changed("alice")], "{command:?}");
    }
    host.run(&["account", "remove", "alice"]).success();
    let stop = Request::StopAccount { account: "alice".into() };
    assert_eq!(service.asked(), [changed("alice"), stop, changed("alice")]);
}

#[test]
fn a_change_stays_when_the_service_refuses() {
    let host = Host::new();
    let refuse = |_: &Request| Reply::Error { message: "not now".into() };
    let _service = Service::start(&host, refuse);
    let done = host.run(&["account", "add", "alice"]).success();
    assert!(done.err.contains("warning") && done.err.contains("not now"), "{}", done.err);
    assert!(host.accounts().by_name("alice").unwrap().is_some());
    host.run(&["console", "alice"]).fails(1, "not now");
    host.run(&["status"]).fails(1, "not now");
}

#[test]
fn status_and_accounts_show_what_runs() {
    let host = Host::new();
    host.run(&["account", "add", "alice"]).success();
    let stopped = host.run(&["status", "--json"]);
    assert_eq!((stopped.code, stopped.out.trim()), (1, r#"{"running":false}"#));
    let folder = tempfile::tempdir().unwrap();
    let group = folder.path().display().to_string();
    for (file, text) in [
        ("cpu.stat", "usage_usec 12340000\nthrottled_usec 560000\n"),
        ("memory.current", "10485760\n"),
        ("memory.max", "20971520\n"),
        ("io.stat", "8:0 rbytes=1048576 wbytes=2097152\n"),
        ("pids.current", "4\n"),
    ] {
        std::fs::write(folder.path().join(file), text).unwrap();
    }
    let _service = Service::start(&host, move |_| {
        Reply::Status(Status {
            version: "0.1.0".into(),
            pid: 4711,
            since: 0,
            listen: vec!["[::]:2222".into()],
            base: Some("b".into()),
            connections: 2,
            accounts: vec![AccountStatus {
                account: "alice".into(),
                state: "running".into(),
                since: 60,
                why: "1 session".into(),
                machine_pid: Some(4712),
                base: Some("b".into()),
                sessions: 1,
                awake: None,
                cgroup: Some(group.clone()),
                size: None,
                unused: None,
            }],
            limits: Enforcement { path: Some("/sys/fs/cgroup/x/machines".into()), reason: None },
        })
    });
    let status = host.json(&["status"]);
    assert_eq!((&status["running"], &status["pid"]), (&true.into(), &4711.into()));
    let shown = host.json(&["account", "show", "alice"]);
    assert_eq!(shown["machine"]["state"], "running");
    assert_eq!(shown["machine"]["since"], "1970-01-01T00:01:00Z");
    assert_eq!(shown["machine"]["use"]["memory_bytes"], 10_485_760);
    let text = host.run(&["account", "show", "alice"]).success().out;
    for words in [
        "running since",
        "1 session",
        "no cap, weight 100; 12.3 s used, held back for 0.6 s",
        "no cap; 1 MiB read, 2 MiB written",
        "10 MiB of 20 MiB on the host, 4 threads",
    ] {
        assert!(text.contains(words), "{words}: {text}");
    }
    let text = host.run(&["status"]).success().out;
    assert!(text.contains("limits of machines are enforced in /sys/fs/cgroup/x"), "{text}");
    assert!(host.run(&["status"]).success().out.contains("4712"));
}

#[test]
fn status_and_accounts_show_what_keeps_a_machine_awake() {
    let host = Host::new();
    host.run(&["account", "add", "alice"]).success();
    let _service = Service::start(&host, |_| {
        Reply::Status(Status {
            version: "0.1.0".into(),
            pid: 4711,
            since: 0,
            listen: vec![],
            base: None,
            connections: 0,
            accounts: vec![AccountStatus {
                account: "alice".into(),
                state: "lingering".into(),
                since: 60,
                why: "awake: make (pid 812), 97 % CPU; for 3 hours more at most".into(),
                machine_pid: Some(4712),
                base: None,
                sessions: 0,
                awake: Some("make (pid 812), 97 % CPU".into()),
                cgroup: None,
                size: None,
                unused: None,
            }],
            limits: Enforcement { path: None, reason: Some("no groups here".into()) },
        })
    });
    let awake = "make (pid 812), 97 % CPU";
    assert_eq!(host.json(&["status"])["accounts"][0]["awake"], awake);
    let text = host.run(&["status"]).success().out;
    assert!(text.contains("NOT enforced: no groups here"), "{text}");
    assert_eq!(host.json(&["account", "show", "alice"])["machine"]["awake"], awake);
    for command in [&["status"][..], &["account", "list"], &["account", "show", "alice"]] {
        let text = host.run(command).success().out;
        assert!(text.contains("awake: make (pid 812), 97 % CPU; for 3 hours"), "{text}");
    }
}

#[test]
fn a_console_is_relayed_both_ways() {
    let host = Host::new();
    let done = |_: &Request| Reply::Done;
    let _service = Service::start_with(&host, done, |mut stream| {
        stream.write_all(b"[    0.000000] Linux\r\n\xff").unwrap();
        let mut typed = [0; 3];
        stream.read_exact(&mut typed).unwrap();
        stream.write_all(&typed).unwrap();
    });
    let mut child = host
        .command(&["console", "alice"])
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    // Without a terminal nothing is an escape.
    child.stdin.as_mut().unwrap().write_all(b"~.\x1d").unwrap();
    let output = child.wait_with_output().unwrap();
    assert!(output.status.success());
    assert_eq!(output.stdout, b"[    0.000000] Linux\r\n\xff~.\x1d");
    assert!(String::from_utf8_lossy(&output.stderr).contains("has ended"));
}

/// A service that dies in the middle of an answer.
#[test]
fn a_cut_answer_is_an_error() {
    let host = Host::new();
    let listener = UnixListener::bind(host.path("run/admin.sock")).unwrap();
    thread::spawn(move || {
        for stream in listener.incoming() {
            let mut stream = BufReader::new(stream.unwrap());
            stream.read_line(&mut String::new()).unwrap();
            stream.into_inner().write_all(br#"{"reply":"do"#).unwrap();
        }
    });
    host.run(&["status"]).fails(1, "without an answer");
    host.run(&["console", "alice"]).fails(1, "without an answer");
}

#[test]
fn the_service_is_told_of_another_base() {
    let host = Host::new();
    let image = host.image().display().to_string();
    let first = host.install_vmm(1);
    host.run(&["base", "build", "--image", &image]).success();
    host.install_vmm(2);
    let service = Service::start(&host, |_| Reply::Done);
    host.run(&["base", "build"]).success();
    assert_eq!(service.asked(), [Request::BaseChanged]);
    host.run(&["base", "use", first.as_str()]).success();
    assert_eq!(service.asked(), [Request::BaseChanged]);
    host.run(&["base", "gc"]).success();
    assert_eq!(service.asked(), []);
}
