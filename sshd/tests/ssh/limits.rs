//! What one client may take.

use std::{
    io::{BufRead, BufReader, Read, Write},
    net::TcpStream,
    process::Stdio,
    time::{Duration, Instant},
};

use crate::{
    abuse::{PYTHON, has_paramiko},
    harness::{Options, PASSWORD, Service, at, finish, resident_kib, stderr, stdout, wait_for},
};

#[test]
fn a_client_that_stops_reading_costs_no_memory_and_delays_nobody() {
    let service = Service::start();
    service.account("alice");
    service.account("bob");
    assert!(service.ssh("alice", "true").status.success());
    assert!(service.ssh("bob", "true").status.success());
    let before = resident_kib(service.pid());
    let mut flood: Vec<_> = ["yes", "yes >&2", "yes"]
        .iter()
        .map(|line| {
            let mut ssh = service.ssh_with(&["-o", "BatchMode=yes", &at("alice"), line]);
            // Nobody reads these pipes, so the client stops reading its connection.
            ssh.stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap()
        })
        .collect();
    let mut terminal = service.ssh_with(&["-o", "BatchMode=yes", "-tt", &at("alice"), "yes"]);
    flood.push(terminal.stdout(Stdio::piped()).spawn().unwrap());
    std::thread::sleep(Duration::from_secs(2));

    let mut echo = service
        .ssh_with(&["-o", "BatchMode=yes", &at("bob"), "cat"])
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .spawn()
        .unwrap();
    let (mut typing, mut shown) =
        (echo.stdin.take().unwrap(), BufReader::new(echo.stdout.take().unwrap()));
    let mut echoes = Vec::new();
    for number in 0..100 {
        let begun = Instant::now();
        typing.write_all(format!("{number}\n").as_bytes()).unwrap();
        let mut line = String::new();
        shown.read_line(&mut line).unwrap();
        assert_eq!(line.trim(), number.to_string());
        // The first one waits for the login.
        if number > 0 {
            echoes.push(begun.elapsed());
        }
        std::thread::sleep(Duration::from_millis(10));
    }
    drop(typing);
    // The middle one: a busy host may hold up any single one.
    echoes.sort_unstable();
    let middle = echoes[echoes.len() / 2];
    assert!(middle < Duration::from_millis(200), "echoes took {echoes:?}");
    let after = resident_kib(service.pid());
    assert!(after < before + 24 * 1024, "{before} KiB, then {after} KiB");
    for mut child in flood.into_iter().chain([echo]) {
        let _ = child.kill();
        child.wait().unwrap();
    }
}

#[test]
fn input_that_nobody_reads_is_bounded() {
    let service = Service::start();
    service.account("alice");
    assert!(service.ssh("alice", "true").status.success());
    let before = resident_kib(service.pid());
    let file = std::fs::File::create(service.path("zeros")).unwrap();
    file.set_len(256 << 20).unwrap();
    let mut ssh = service.ssh_with(&["-o", "BatchMode=yes", &at("alice"), "sleep 20"]);
    let zeros = std::fs::File::open(service.path("zeros")).unwrap();
    let mut child = ssh.stdin(zeros).spawn().unwrap();
    std::thread::sleep(Duration::from_secs(4));
    let after = resident_kib(service.pid());
    assert!(after < before + 16 * 1024, "{before} KiB, then {after} KiB");
    child.kill().unwrap();
    child.wait().unwrap();
}

#[test]
fn the_ninth_terminal_is_refused_in_words_and_a_closed_one_comes_back() {
    let service = Service::start();
    service.account("alice");
    let mut terminals: Vec<_> = (0..8)
        .map(|_| {
            let mut ssh = service.ssh_with(&["-o", "BatchMode=yes", "-tt", &at("alice")]);
            ssh.stdin(Stdio::piped()).stdout(Stdio::piped()).spawn().unwrap()
        })
        .collect();
    for terminal in &mut terminals {
        let mut prompt = [0; 6];
        terminal.stdout.as_mut().unwrap().read_exact(&mut prompt).unwrap();
        assert_eq!(&prompt, b"fake$ ");
    }
    let mut ninth = service.ssh_with(&["-o", "BatchMode=yes", "-tt", &at("alice"), "true"]);
    let output = finish(&mut ninth);
    assert!(stdout(&output).contains("all 8 terminals"), "{}", stdout(&output));
    assert_eq!(output.status.code(), Some(255));
    assert!(service.ssh("alice", "true").status.success(), "commands need no terminal");

    // One ends by itself, one loses its client: both terminals are free again.
    terminals[0].stdin.take().unwrap().write_all(b"exit\n").unwrap();
    terminals[0].wait().unwrap();
    terminals[1].kill().unwrap();
    terminals[1].wait().unwrap();
    let mut again: Vec<_> = (0..2)
        .map(|_| {
            wait_for("a free terminal", || {
                let line = "echo free; sleep 1";
                let mut ssh = service.ssh_with(&["-o", "BatchMode=yes", "-tt", &at("alice"), line]);
                let mut child = ssh.stdout(Stdio::piped()).spawn().unwrap();
                let mut line = String::new();
                let out = child.stdout.as_mut().unwrap();
                BufReader::new(out).read_line(&mut line).unwrap();
                match line.trim() {
                    "free" => Some(child),
                    _ => {
                        child.wait().unwrap();
                        None
                    }
                }
            })
        })
        .collect();
    for child in terminals.iter_mut().chain(&mut again) {
        let _ = child.kill();
        let _ = child.wait();
    }
}

#[test]
fn garbage_on_the_port_ends_alone() {
    let service = Service::start();
    service.account("alice");
    let noise: Vec<u8> =
        (0..100_000u32).map(|n| (n.wrapping_mul(2_654_435_761) >> 13) as u8).collect();
    let mut greeted = b"SSH-2.0-x\r\n".to_vec();
    greeted.extend(&noise);
    let mut giant = b"SSH-2.0-x\r\n".to_vec();
    giant.extend([0xff; 4096]);
    for bytes in [&noise[..], &greeted, &giant, b"GET / HTTP/1.1\r\n\r\n", b""] {
        let mut socket = TcpStream::connect(("127.0.0.1", service.port)).unwrap();
        let _ = socket.write_all(bytes);
        let _ = socket.shutdown(std::net::Shutdown::Write);
        socket.set_read_timeout(Some(Duration::from_secs(10))).unwrap();
        let mut answer = vec![];
        let _ = socket.read_to_end(&mut answer);
        assert!(answer.starts_with(b"SSH-2.0-OpenSSH_compatible_Hermitage\r\n"));
    }
    assert!(service.ssh("alice", "true").status.success());
    assert!(!service.log().contains("panicked"), "{}", service.log());
    wait_for("the connections to be gone", || (service.status().connections == 0).then_some(()));
}

#[test]
fn who_does_not_log_in_in_time_is_cut_off() {
    let service = Service::with(Options { ssh: "login_grace = 1", ..Options::default() });
    // One says nothing, one stops in the middle of the key exchange.
    for greeting in [&b""[..], b"SSH-2.0-slow\r\n"] {
        let mut socket = TcpStream::connect(("127.0.0.1", service.port)).unwrap();
        socket.write_all(greeting).unwrap();
        socket.set_read_timeout(Some(Duration::from_secs(10))).unwrap();
        let begun = Instant::now();
        let mut answer = vec![];
        socket.read_to_end(&mut answer).unwrap();
        let elapsed = begun.elapsed();
        assert!(elapsed > Duration::from_millis(800), "{elapsed:?}");
        assert!(elapsed < Duration::from_secs(4), "{elapsed:?}");
    }
}

#[test]
fn an_authenticated_client_outlives_the_grace() {
    let service = Service::with(Options { ssh: "login_grace = 1", ..Options::default() });
    service.account("alice");
    let output = service.ssh("alice", "sleep 2.5; echo still here");
    assert_eq!(stdout(&output), "still here\n", "{}", stderr(&output));
}

#[test]
fn a_source_with_too_many_silent_connections_gets_no_more() {
    let options = Options { ssh: "max_unauthenticated_per_source = 3", ..Options::default() };
    let service = Service::with(options);
    service.account("alice");
    let silent: Vec<_> =
        (0..3).map(|_| TcpStream::connect(("127.0.0.1", service.port)).unwrap()).collect();
    wait_for("three connections", || (service.status().connections == 3).then_some(()));
    assert_eq!(service.ssh("alice", "true").status.code(), Some(255));
    drop(silent);
    wait_for("a place", || (service.status().connections == 0).then_some(()));
    assert!(service.ssh("alice", "true").status.success());
}

#[test]
fn guessing_passwords_ends_the_connection() {
    let service = Service::with(Options { ssh: "max_failures = 2", ..Options::default() });
    service.account("alice");
    let mut command = std::process::Command::new("sshpass");
    command.args(["-p", "guess", "ssh"]);
    service.client_options(&mut command);
    command.args(["-o", "PubkeyAuthentication=no", "-o", "NumberOfPasswordPrompts=3"]);
    command.args(["-o", "LogLevel=INFO", "-p"]).arg(service.port.to_string());
    // sshpass itself gives up at the second prompt, so the prompts are answered by ssh's helper.
    let helper = service.path("askpass");
    std::fs::write(&helper, "#!/bin/sh\necho guess\n").unwrap();
    std::fs::set_permissions(&helper, std::os::unix::fs::PermissionsExt::from_mode(0o755)).unwrap();
    let mut ssh = std::process::Command::new("ssh");
    ssh.args(command.get_args().skip(3)).args([&at("alice"), "echo in"]);
    ssh.env("SSH_ASKPASS", &helper).env("SSH_ASKPASS_REQUIRE", "force").stdin(Stdio::null());
    let output = finish(&mut ssh);
    assert_eq!(output.status.code(), Some(255));
    assert!(stderr(&output).contains("too many authentication failures"), "{}", stderr(&output));
    assert_eq!(service.log().matches("failed login").count(), 2);
}

/// One that sends all its guesses at once is not heard on the later ones, and is not let in by the right one.
#[test]
fn guesses_sent_ahead_are_not_heard() {
    if !has_paramiko() {
        return;
    }
    let service = Service::with(Options { ssh: "max_failures = 2", ..Options::default() });
    service.account("alice");
    let script = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/ssh/guesses.py");
    let mut client = std::process::Command::new(PYTHON);
    client.arg(script).arg(service.port.to_string()).args(["alice", "8"]);
    let output = finish(client.args(["guess", "another", PASSWORD, PASSWORD, "guess"]));
    assert!(output.status.success(), "{}", stderr(&output));
    let log = service.log();
    assert_eq!(log.matches("failed login").count(), 16);
    assert!(!log.contains("login by"), "{log}");
}

#[test]
fn an_account_has_so_many_sessions() {
    let options = Options { ssh: "max_unauthenticated_per_source = 100", ..Options::default() };
    let service = Service::with(options);
    service.account("alice");
    let lots = hermitage_storage::accounts::DEFAULT_MAX_SESSIONS as usize;
    let mut sessions: Vec<_> = (0..lots)
        .map(|_| {
            let mut ssh = service.ssh_with(&["-o", "BatchMode=yes", &at("alice"), "sleep 30"]);
            ssh.spawn().unwrap()
        })
        .collect();
    wait_for("all sessions", || {
        service.account_status("alice").filter(|status| status.sessions as usize == lots)
    });
    let output = service.ssh("alice", "true");
    assert_eq!(output.status.code(), Some(255));
    assert!(stderr(&output).contains("all of its 32 sessions"), "{}", stderr(&output));
    for child in &mut sessions {
        child.kill().unwrap();
        child.wait().unwrap();
    }
    wait_for("the sessions to end", || {
        service.account_status("alice").filter(|status| status.sessions == 0)
    });
    assert!(service.ssh("alice", "true").status.success());
}

#[test]
fn nothing_remains_of_ended_sessions() {
    let service = Service::with(Options { machines: "linger = 0", ..Options::default() });
    service.account("alice");
    let used = || {
        let proc = std::path::PathBuf::from(format!("/proc/{}", service.pid()));
        let count = |what| std::fs::read_dir(proc.join(what)).unwrap().count();
        count("fd")
    };
    let session = || {
        let mut ssh = service.ssh_with(&["-o", "BatchMode=yes", "-tt", &at("alice"), "true"]);
        assert!(finish(&mut ssh).status.success());
        assert!(service.ssh("alice", "true").status.success());
        wait_for("the machine to rest", || service.at_rest("alice").then_some(()));
        wait_for("the connections to end", || (service.status().connections == 0).then_some(()));
    };
    session();
    let before = used();
    for _ in 0..5 {
        session();
    }
    // The status request that is being answered may still have its socket.
    assert!(used() <= before + 1, "{before} descriptors, then {}", used());
}

/// Promised are machines of the base's size, a hundred gigabytes here; nothing of it is used.
#[test]
fn a_full_host_refuses_machines_with_words_and_keeps_those_that_run() {
    use hermitage_storage::base::Machine;
    let text = std::fs::read_to_string("/proc/meminfo").unwrap();
    let kib: u64 = text.split_whitespace().nth(1).unwrap().parse().unwrap();
    // Two fit into a host's memory twice, a third does not.
    let mut service = Service::prepare(Options {
        ssh: "",
        machines: "memory_overcommit = 2\nsave_overcommit = 0\nlinger = 0\nmin_available_mib = 0",
    });
    let memory_bytes = kib * 1000 / 4096 * 4096;
    service.install_base(Machine { memory_bytes, vcpus: 1, most: None });
    service.run();
    for name in ["alice", "bob", "carol"] {
        service.account(name);
    }
    let mut shells: Vec<_> = ["alice", "bob"]
        .map(|name| {
            let mut ssh = service.ssh_with(&[&at(name), "sleep 60"]);
            let shell = ssh.spawn().unwrap();
            wait_for("a session", || service.account_status(name).filter(|s| s.sessions == 1));
            shell
        })
        .into_iter()
        .collect();
    let refused = service.ssh("carol", "echo in");
    assert!(stderr(&refused).contains("no room for one more machine"), "{}", stderr(&refused));
    assert_eq!(stdout(&refused), "");
    assert!(service.log().contains("machines.memory_overcommit"), "{}", service.log());
    assert_eq!(stdout(&service.ssh("bob", "echo in")), "in\n", "who has a machine gets in");
    shells[0].kill().unwrap();
    shells[0].wait().unwrap();
    wait_for("room", || service.ssh("carol", "true").status.success().then_some(()));
    shells[1].kill().unwrap();
    shells[1].wait().unwrap();
}
