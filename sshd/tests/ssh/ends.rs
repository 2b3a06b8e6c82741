//! How sessions, machines and the service end.

use std::{
    io::{BufRead, BufReader, Read, Write},
    os::unix::net::UnixStream,
    process::{Child, Stdio},
    time::{Duration, Instant},
};

use hermitage::admin::protocol::{Reply, Request};
use hermitage_storage::accounts::Policy;
use nix::{
    sys::signal::{Signal, kill},
    unistd::Pid,
};

use crate::{
    harness::{Options, Service, at, finish, finish_child, stderr, stdout, wait_for},
    multiplexed::Master,
};

/// A session that has said a word and stays.
fn staying(service: &Service, user: &str, options: &[&str]) -> Child {
    let mut ssh = service.ssh_with(&["-o", "BatchMode=yes"]);
    ssh.args(options).args([&at(user), "echo here; sleep 25"]);
    let mut child = ssh.stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap();
    let mut line = [0; 4];
    child.stdout.as_mut().unwrap().read_exact(&mut line).unwrap();
    assert_eq!(&line, b"here");
    child
}

fn machine_pid(service: &Service, user: &str) -> Pid {
    let pid = service.account_status(user).and_then(|status| status.machine_pid);
    Pid::from_raw(pid.expect("a machine"))
}

fn is_alive(pid: Pid) -> bool {
    kill(pid, None).is_ok()
}

/// The master of a shared connection closes the channel of a client that has ended its input as soon as it sees
/// the end of output. A status after that is lost.
#[test]
fn the_status_comes_before_the_end_of_output() {
    let service = Service::start();
    service.account("alice");
    let position = |log: &str, word: &str| {
        log.lines().position(|line| line.contains(word)).unwrap_or_else(|| panic!("{word}: {log}"))
    };
    for (command, wanted, word) in
        [("exit 5", 5, "rtype exit-status"), ("kill -TERM $$", 255, "rtype exit-signal")]
    {
        let mut ssh = service.ssh_with(&["-o", "BatchMode=yes", "-vv"]);
        let output = finish(ssh.args([&at("alice"), command]));
        let log = stderr(&output);
        assert_eq!(output.status.code(), Some(wanted), "{log}");
        assert!(position(&log, word) < position(&log, "rcvd eof"), "{log}");
    }
}

#[test]
fn a_killed_machine_ends_its_own_sessions_with_words() {
    let service = Service::start();
    service.account("alice");
    service.account("bob");
    let [command, terminal] =
        [&[][..], &["-tt"]].map(|options| staying(&service, "alice", options));
    let mut other = staying(&service, "bob", &[]);
    kill(machine_pid(&service, "alice"), Signal::SIGKILL).unwrap();
    let output = finish_child(command);
    assert_eq!(output.status.code(), Some(255));
    assert!(stderr(&output).contains("your machine was killed (signal 9)"), "{}", stderr(&output));
    let output = finish_child(terminal);
    assert_eq!(output.status.code(), Some(255));
    assert!(stdout(&output).contains("your machine was killed (signal 9)"), "{}", stdout(&output));

    assert_eq!(stdout(&service.ssh("alice", "echo again")), "again\n");
    assert!(other.try_wait().unwrap().is_none(), "bob's session goes on");
    other.kill().unwrap();
    other.wait().unwrap();
}

#[test]
fn a_login_at_the_moment_a_machine_dies_gets_the_next_one() {
    let service = Service::start();
    service.account("alice");
    let master = Master::connect(&service, "alice");
    for _ in 0..10 {
        let output = finish(&mut master.session("echo in"));
        assert_eq!(stdout(&output), "in\n", "{}", stderr(&output));
        kill(machine_pid(&service, "alice"), Signal::SIGKILL).unwrap();
    }
}

#[test]
fn a_machine_lingers_is_taken_up_again_and_rests() {
    let service = Service::with(Options { machines: "linger = 2", ..Options::default() });
    service.account("alice");
    assert!(service.ssh("alice", "true").status.success());
    let first = machine_pid(&service, "alice");
    wait_for("the linger", || {
        service.account_status("alice").filter(|status| status.state == "lingering")
    });
    std::thread::sleep(Duration::from_secs(1));
    assert!(service.ssh("alice", "true").status.success());
    assert_eq!(machine_pid(&service, "alice"), first);
    std::thread::sleep(Duration::from_millis(1300));
    assert!(is_alive(first), "the linger began anew");
    wait_for("the machine to rest", || service.at_rest("alice").then_some(()));
    assert!(!is_alive(first));
    assert!(service.ssh("alice", "true").status.success());
    assert_ne!(machine_pid(&service, "alice"), first);
}

#[test]
fn two_logins_at_once_start_one_machine() {
    let service = Service::start();
    service.account("slow");
    let outputs: Vec<_> = std::thread::scope(|scope| {
        let logins: Vec<_> =
            (0..4).map(|_| scope.spawn(|| service.ssh("slow", "echo in"))).collect();
        logins.into_iter().map(|login| login.join().unwrap()).collect()
    });
    assert!(outputs.iter().all(|output| stdout(output) == "in\n"));
    assert_eq!(service.log().matches("fake machine").count(), 1);
}

#[test]
fn a_client_that_goes_away_hangs_up_its_program() {
    let service = Service::start();
    service.account("alice");
    for options in [&[][..], &["-tt"]] {
        let noted = service.path("noted");
        let line = format!(
            "trap 'echo hung up > {}; exit' HUP; echo here; sleep 20 & wait",
            noted.display()
        );
        let mut ssh = service.ssh_with(&["-o", "BatchMode=yes"]);
        ssh.args(options).args([&at("alice"), &line]);
        let mut child = ssh.stdout(Stdio::piped()).spawn().unwrap();
        let mut word = [0; 4];
        child.stdout.as_mut().unwrap().read_exact(&mut word).unwrap();
        child.kill().unwrap();
        child.wait().unwrap();
        wait_for("the hang-up", || std::fs::read_to_string(&noted).ok().filter(|n| !n.is_empty()));
        std::fs::remove_file(&noted).unwrap();
    }
}

#[test]
fn the_service_stops_its_machines_in_order() {
    let mut service = Service::start();
    service.account("alice");
    service.account("bob");
    let session = staying(&service, "alice", &[]);
    assert!(service.ssh("bob", "true").status.success());
    let machines = [machine_pid(&service, "alice"), machine_pid(&service, "bob")];
    let begun = Instant::now();
    service.signal(Signal::SIGTERM);
    let output = finish_child(session);
    assert!(stderr(&output).contains("the service is stopping"), "{}", stderr(&output));
    assert!(service.wait().success());
    assert!(begun.elapsed() < Duration::from_secs(10), "{:?}", begun.elapsed());
    assert!(!machines.iter().any(|pid| is_alive(*pid)));
    let ended = "machine ended machine=";
    let log = service.log();
    let in_order = |line: &&str| line.contains(ended) && line.contains("was stopped");
    assert_eq!(log.lines().filter(in_order).count(), 2);
    assert!(!service.path("run/admin.sock").exists());
    let intents = service.accounts().intents().unwrap();
    assert!(intents.iter().all(|intent| intent.state.as_str() == "saved"), "{intents:?}");
}

#[test]
fn a_killed_service_leaves_nothing_in_the_way_of_the_next() {
    let mut service = Service::start();
    let account = service.account("alice");
    let mut session = staying(&service, "alice", &[]);
    let machine = machine_pid(&service, "alice");
    service.signal(Signal::SIGKILL);
    service.wait();
    wait_for("the machine to end", || (!is_alive(machine)).then_some(()));
    session.wait().unwrap();
    service.run();
    assert_eq!(stdout(&service.ssh("alice", "echo in")), "in\n");
    let sessions = service.accounts().sessions(account.id, 10).unwrap();
    assert_eq!(sessions.last().unwrap().outcome.as_deref(), Some("the service ended"));
}

#[test]
fn a_machine_of_a_killed_service_is_waited_for() {
    let mut service = Service::start();
    let account = service.account("alice");
    service.signal(Signal::SIGKILL);
    service.wait();
    let disk = hermitage_storage::disk::open_locked(&service.state().disk(account.id)).unwrap();
    service.run();
    let begun = Instant::now();
    let output = std::thread::scope(|scope| {
        let login = scope.spawn(|| service.ssh("alice", "echo in"));
        std::thread::sleep(Duration::from_secs(2));
        drop(disk);
        login.join().unwrap()
    });
    assert_eq!(stdout(&output), "in\n", "{}", stderr(&output));
    assert!(begun.elapsed() > Duration::from_secs(2));
}

#[test]
fn a_guest_that_does_not_power_off_is_killed() {
    let options = Options { machines: "linger = 0\nstop_timeout = 2", ..Options::default() };
    let service = Service::with(options);
    let account = service.account("stubborn");
    service.accounts().set_policy(account.id, Policy::Discard).unwrap();
    assert!(service.ssh("stubborn", "true").status.success());
    wait_for("the kill", || service.log().contains("killing the machine").then_some(()));
    wait_for("the end", || service.account_status("stubborn").is_none().then_some(()));
    assert!(service.ssh("stubborn", "true").status.success());
}

#[test]
fn a_login_while_the_machine_stops_gets_the_next_one() {
    let options = Options { machines: "linger = 0\nstop_timeout = 2", ..Options::default() };
    let service = Service::with(options);
    let account = service.account("stubborn");
    service.accounts().set_policy(account.id, Policy::Discard).unwrap();
    assert!(service.ssh("stubborn", "true").status.success());
    wait_for("the stop", || {
        service.account_status("stubborn").filter(|status| status.state == "stopping")
    });
    assert_eq!(stdout(&service.ssh("stubborn", "echo in")), "in\n");
}

#[test]
fn an_agent_that_breaks_the_protocol_ends_its_own_machine() {
    let service = Service::start();
    service.account("hostile");
    service.account("bob");
    let mut other = staying(&service, "bob", &[]);
    let session = staying(&service, "hostile", &[]);
    let output = finish_child(session);
    assert_eq!(output.status.code(), Some(255));
    assert!(stderr(&output).contains("its agent failed"), "{}", stderr(&output));
    assert!(other.try_wait().unwrap().is_none());
    assert!(!service.log().contains("panicked"));
    other.kill().unwrap();
    other.wait().unwrap();
}

#[test]
fn a_machine_that_does_not_come_up_is_told_in_words() {
    let service = Service::with(Options { machines: "start_timeout = 2", ..Options::default() });
    service.account("broken");
    service.account("unready");
    let output = service.ssh("broken", "true");
    assert_eq!(output.status.code(), Some(255));
    assert!(stderr(&output).contains("its file system  [31mis damaged"), "{}", stderr(&output));
    let output = service.ssh("unready", "true");
    assert!(stderr(&output).contains("could not start your machine"), "{}", stderr(&output));
    let status = service.account_status("unready").unwrap();
    assert_eq!(status.state, "failed");
}

#[test]
fn a_guest_that_is_lost_before_it_is_ready_costs_a_wait_and_no_login() {
    let service = Service::with(Options { machines: "start_timeout = 2", ..Options::default() });
    for (name, reason) in [
        ("stumbling", "the machine was not ready within 2s"),
        ("tripping", "ended before it was ready"),
    ] {
        service.account(name);
        assert_eq!(stdout(&service.ssh(name, "echo in")), "in\n", "{}", service.log());
        let log = service.log();
        let told = log.lines().rfind(|line| line.contains("forking another")).unwrap();
        assert!(told.contains(name) && told.contains(reason), "{told}");
    }
    let audit = std::fs::read_to_string(service.path("state/audit.jsonl")).unwrap();
    assert_eq!(audit.matches("\"machine-retried\"").count(), 2, "{audit}");
    assert_eq!(audit.matches("\"machine-failed\"").count(), 0, "{audit}");
}

/// Takes as long as a guest is waited for: half a minute.
#[test]
fn who_meets_a_machine_that_hangs_is_told_the_way_out_of_it() {
    let service = Service::with(Options { machines: "stop_timeout = 1", ..Options::default() });
    service.account("hanging");
    let output = service.ssh("hanging", "true");
    assert_eq!(output.status.code(), Some(255));
    assert!(stderr(&output).contains("ssh hanging+fresh@"), "{}", stderr(&output));
    assert_eq!(stdout(&service.ssh("hanging+fresh", "echo in")), "in\n", "{}", service.log());
}

#[test]
fn a_killed_fork_server_is_started_again() {
    let service = Service::with(Options { machines: "linger = 1", ..Options::default() });
    service.account("alice");
    assert!(service.ssh("alice", "true").status.success());
    let log = service.log();
    let pid = log.split("fork server ready").nth(1).unwrap().split("pid=").nth(1).unwrap();
    let pid: i32 = pid.split_whitespace().next().unwrap().parse().unwrap();
    kill(Pid::from_raw(pid), Signal::SIGKILL).unwrap();
    wait_for("the loss", || service.log().contains("lost the fork server").then_some(()));
    service.account("bob");
    assert!(service.ssh("bob", "true").status.success());
    wait_for("alice's machine to stop", || service.at_rest("alice").then_some(()));
    assert!(service.ssh("alice", "true").status.success());
}

#[test]
fn a_new_base_counts_for_new_machines() {
    let service = Service::start();
    service.account("alice");
    service.account("bob");
    let mut session = staying(&service, "alice", &[]);
    let next = hermitage_storage::base::BaseId::parse(&"1e".repeat(16)).unwrap();
    service.state().set_current_base(&next).unwrap();
    assert!(service.ssh("bob", "true").status.success());
    assert_eq!(service.account_status("bob").unwrap().base.unwrap(), "1e".repeat(16));
    assert_eq!(service.account_status("alice").unwrap().base.unwrap(), "0f".repeat(16));
    assert!(session.try_wait().unwrap().is_none());
    session.kill().unwrap();
    session.wait().unwrap();
}

#[test]
fn an_operator_stops_a_machine_and_reads_its_console() {
    let service = Service::start();
    service.account("alice");
    let none = service.admin(&Request::Console { account: "alice".into() });
    assert!(matches!(none, Reply::Error { message } if message.contains("log in as alice")));

    let session = staying(&service, "alice", &[]);
    let mut console = UnixStream::connect(service.path("run/admin.sock")).unwrap();
    console.write_all(b"{\"op\":\"console\",\"account\":\"alice\"}\nhello\n").unwrap();
    let mut lines = BufReader::new(console.try_clone().unwrap()).lines();
    assert_eq!(lines.next().unwrap().unwrap(), "{\"reply\":\"done\"}");
    assert_eq!(lines.next().unwrap().unwrap(), "fake boot log");
    assert_eq!(lines.next().unwrap().unwrap(), "HELLO");

    let stopped = service.admin(&Request::StopAccount { account: "alice".into() });
    assert_eq!(stopped, Reply::Done);
    assert_eq!(service.account_status("alice").unwrap().state, "saved");
    let output = finish_child(session);
    assert!(stderr(&output).contains("an operator stopped"), "{}", stderr(&output));
    assert!(lines.next().is_none(), "the console ends with the machine");
}

#[test]
fn what_is_no_admin_request_is_answered() {
    let service = Service::start();
    let long = "x".repeat(10_000);
    for line in ["nonsense", "{\"op\":\"reboot\"}", long.as_str()] {
        let mut stream = UnixStream::connect(service.path("run/admin.sock")).unwrap();
        let _ = stream.write_all(format!("{line}\n").as_bytes());
        let mut reply = String::new();
        let _ = BufReader::new(stream).read_line(&mut reply);
        // What was not read of an overlong line may reset the connection before the answer is seen.
        assert!(reply.contains("error") || line.len() > 4096, "{line}: {reply}");
    }
    assert_eq!(service.status().accounts, []);
}

#[test]
fn with_the_disk_full_no_machine_is_started() {
    let mut service = Service::start();
    service.account("alice");
    assert!(service.ssh("alice", "true").status.success());
    service.signal(Signal::SIGTERM);
    service.wait();
    let path = service.path("hermitage.toml");
    let config = std::fs::read_to_string(&path).unwrap();
    let full = config.replace("min_free_mib = 1\n", "min_free_mib = 999999999999\n");
    std::fs::write(&path, full).unwrap();
    service.run();
    let output = service.ssh("alice", "true");
    assert_eq!(output.status.code(), Some(255));
    assert!(stderr(&output).contains("disk is nearly full"), "{}", stderr(&output));
}

#[test]
fn a_guest_is_told_that_the_hosts_disk_is_nearly_full() {
    let machines = "guest_floor_mib = 999999999999";
    let service = Service::with(Options { machines, ..Options::default() });
    service.account("alice");
    assert!(service.ssh("alice", "true").status.success());
    wait_for("the guest to be told", || {
        service.log().contains("guest told: DiskRoom { scarce: true }").then_some(())
    });
}

#[test]
fn start_up_says_what_is_missing() {
    let refused = |service: &Service| {
        let output = finish(service.serve_command().stderr(Stdio::piped()));
        assert_eq!(output.status.code(), Some(1));
        stderr(&output)
    };
    let service = Service::prepare(Options::default());
    std::fs::remove_file(service.path("state/current-base")).unwrap();
    assert!(refused(&service).contains("hermitage base build"));

    let service = Service::prepare(Options::default());
    std::fs::remove_file(service.path("libexec/hermitage-vmm")).unwrap();
    assert!(refused(&service).contains("HERMITAGE_LIBEXEC"));

    let running = Service::start();
    assert!(refused(&running).contains("another hermitage serve"));

    let service = Service::prepare(Options::default());
    let path = service.path("hermitage.toml");
    let config = std::fs::read_to_string(&path).unwrap();
    let taken = format!("127.0.0.1:{}", running.port);
    std::fs::write(&path, config.replace("127.0.0.1:0", &taken)).unwrap();
    let words = refused(&service);
    assert!(words.contains(&format!("can't listen on {taken}")), "{words}");
}
