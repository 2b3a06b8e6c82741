//! The service among services: reading its configuration again, and what it tells its manager.

use std::{
    os::unix::{net::UnixDatagram, process::ExitStatusExt as _},
    process::Command,
    sync::atomic::{AtomicBool, Ordering},
    time::Duration,
};

use hermitage_storage::accounts::Accounts;
use nix::sys::signal::Signal;

use crate::{
    harness::{Options, PASSWORD, Service, at, finish, stderr, stdout, wait_for},
    terminals::Shell,
};

fn reload(service: &Service, change: impl FnOnce(String) -> String, wanted: &str) {
    let path = service.path("hermitage.toml");
    let text = std::fs::read_to_string(&path).unwrap();
    std::fs::write(&path, change(text)).unwrap();
    let before = service.log().matches(wanted).count();
    service.signal(Signal::SIGHUP);
    wait_for(wanted, || (service.log().matches(wanted).count() > before).then_some(()));
}

#[test]
fn the_configuration_is_read_again_and_no_session_notices() {
    let options = Options { ssh: "max_failures = 6", machines: "linger = 60" };
    let service = Service::with(options);
    service.account("alice");
    let mut shell = Shell::open(&service, "alice");
    shell.run("kept=here; echo a$((40+2))", "a42");

    let banner = service.path("banner");
    std::fs::write(&banner, "Welcome to nowhere\n").unwrap();
    let change = |text: String| {
        let banner = format!("banner = {banner:?}\npassword_checks = 3\nmax_failures = 6");
        text.replace("max_failures = 6", &banner).replace("linger = 60", "linger = 0")
    };
    reload(&service, change, "the configuration was read again");
    let log = service.log();
    assert!(log.contains("changed=\"machines.linger, ssh.banner\""), "{log}");
    assert!(log.contains("settings=\"ssh.password_checks\""), "{log}");
    shell.run("echo b$kept", "bhere");
    let mut verbose = service.ssh_with(&["-o", "LogLevel=INFO", "-o", "BatchMode=yes"]);
    let output = verbose.args(["alice@127.0.0.1", "echo in"]).output().unwrap();
    assert_eq!(stdout(&output), "in\n");
    // The new linger counts for the machine that is there.
    assert_eq!(shell.exit(), 7);
    wait_for("the save", || service.at_rest("alice").then_some(()));

    // One that is not right changes nothing, and says why.
    let refused = "the configuration stays as it was";
    reload(&service, |text| text.replace("linger = 0", "linger = \"soon\""), refused);
    assert!(service.log().contains("hermitage.toml is not right"), "{}", service.log());
    reload(
        &service,
        |text| text.replace("linger = \"soon\"", "linger = 0").replace("nner\"", "nner.gone\""),
        refused,
    );
    assert!(service.log().contains("banner.gone"), "{}", service.log());
    assert_eq!(stdout(&service.ssh("alice", "echo in")), "in\n");
}

#[test]
fn sources_that_are_to_be_exempt_are_from_now_on() {
    let ssh = "failure_delay_ms = 1\npenalty_exempt = []\nmax_penalty = 100";
    let service = Service::with(Options { ssh, ..Options::default() });
    service.account("alice");
    let change =
        |text: String| text.replace("penalty_exempt = []", "penalty_exempt = [\"127.0.0.2\"]");
    reload(&service, change, "the configuration was read again");
    for _ in 0..4 {
        service.ssh_by_password_from("127.0.0.2", "alice", "guess");
    }
    assert_eq!(stdout(&service.ssh_by_password_from("127.0.0.2", "alice", PASSWORD)), "in\n");
}

#[test]
fn its_manager_hears_that_it_is_ready_lives_and_stops() {
    for abstract_name in [false, true] {
        let mut service = Service::prepare(Options::default());
        let path = service.path("manager");
        let (socket, name) = match abstract_name {
            false => (UnixDatagram::bind(&path).unwrap(), path.display().to_string()),
            true => {
                use std::os::linux::net::SocketAddrExt as _;
                let name = format!("hermitage-test-{}", std::process::id());
                let address = std::os::unix::net::SocketAddr::from_abstract_name(&name).unwrap();
                (UnixDatagram::bind_addr(&address).unwrap(), format!("@{name}"))
            }
        };
        socket.set_read_timeout(Some(Duration::from_secs(30))).unwrap();
        let mut heard = vec![];
        let mut hear = |wanted: &str| {
            while !heard.iter().any(|message: &String| message.contains(wanted)) {
                let mut bytes = [0; 512];
                let count = socket.recv(&mut bytes).expect(wanted);
                heard.push(String::from_utf8_lossy(&bytes[..count]).into_owned());
            }
            heard.clear();
        };
        service.run_with(&[("NOTIFY_SOCKET", name.as_str()), ("WATCHDOG_USEC", "600000")]);
        hear("READY=1");
        std::net::TcpStream::connect(("127.0.0.1", service.port)).unwrap();
        hear("WATCHDOG=1");
        hear("WATCHDOG=1");
        service.signal(Signal::SIGTERM);
        hear("STOPPING=1");
        assert!(service.wait().success());
    }
}

/// A crash would leave the host key and passwords that are being checked, for whoever reads cores.
#[test]
fn the_service_and_what_it_starts_leave_no_core() {
    let mut service = Service::start();
    service.account("alice");
    let mut ssh = service.ssh_with(&[&at("alice"), "sleep 60"]);
    let mut shell = ssh.spawn().unwrap();
    let machine = wait_for("a machine", || service.account_status("alice")?.machine_pid);
    for pid in [service.pid(), machine] {
        let limits = std::fs::read_to_string(format!("/proc/{pid}/limits")).unwrap();
        let cores = limits.lines().find(|line| line.starts_with("Max core file size")).unwrap();
        let values: Vec<_> = cores.split_whitespace().skip(4).take(2).collect();
        assert_eq!(values, ["0", "0"], "{pid}: {cores}");
    }
    shell.kill().unwrap();
    shell.wait().unwrap();
    service.signal(Signal::SIGABRT);
    let status = service.wait();
    assert_eq!((status.signal(), status.core_dumped()), (Some(Signal::SIGABRT as i32), false));
}

/// From before its socket is there until it is gone again: each command does what it says.
#[test]
fn accounts_are_edited_while_the_service_starts_and_ends() {
    let mut service = Service::prepare(Options::default());
    service.account("alice");
    let config = service.path("hermitage.toml");
    let database = service.state().database();
    let edits = |over: &AtomicBool| {
        let mut count = 0;
        // A few more than there is time for: the last ones are behind the start, or the end.
        let mut more = 3;
        while more > 0 {
            more -= u32::from(over.load(Ordering::SeqCst));
            count += 1;
            let sessions = (count % 50 + 1).to_string();
            let mut command = Command::new(env!("CARGO_BIN_EXE_hermitage"));
            command.arg("--config").arg(&config);
            let set = finish(command.args(["account", "set", "alice", "--sessions", &sessions]));
            assert!(set.status.success(), "{}", stderr(&set));
            let alice = Accounts::open(&database).unwrap().named("alice").unwrap();
            assert_eq!(alice.max_sessions.unwrap().to_string(), sessions);
        }
        count
    };
    let (started, ended) = (AtomicBool::new(false), AtomicBool::new(false));
    let early = std::thread::scope(|scope| {
        let editing = scope.spawn(|| edits(&started));
        service.run();
        started.store(true, Ordering::SeqCst);
        editing.join().unwrap()
    });
    let late = std::thread::scope(|scope| {
        let editing = scope.spawn(|| edits(&ended));
        service.signal(Signal::SIGTERM);
        service.wait();
        ended.store(true, Ordering::SeqCst);
        editing.join().unwrap()
    });
    assert!(early > 3 && late > 3, "{early} and {late}");
}
