//! What goes through a session comes out as it went in, in order, and whole.

use std::{
    fs::File,
    io::{BufRead, BufReader, Read, Write},
    process::{Command, Output, Stdio},
    time::{Duration, Instant},
};

use crate::{
    harness::{Service, at, finish, finish_child, stderr, stdout, wait_for},
    multiplexed::Master,
};

/// Bytes that look random and are the same each time.
fn noise(length: usize) -> Vec<u8> {
    let mut state = 0x9e37_79b9_7f4a_7c15u64;
    let mut bytes = Vec::with_capacity(length + 8);
    while bytes.len() < length {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        bytes.extend_from_slice(&state.to_le_bytes());
    }
    bytes.truncate(length);
    bytes
}

#[test]
fn sixty_four_mebibytes_go_there_and_back() {
    let service = Service::start();
    service.account("alice");
    let sent = noise(64 << 20);
    std::fs::write(service.path("sent"), &sent).unwrap();
    let mut ssh = service.ssh_with(&["-o", "BatchMode=yes", &at("alice"), "cat"]);
    let output = finish(ssh.stdin(File::open(service.path("sent")).unwrap()));
    assert!(output.status.success(), "{}", stderr(&output));
    assert_eq!(output.stdout.len(), sent.len());
    assert!(output.stdout == sent, "some byte changed");
}

#[test]
fn a_slow_program_and_a_slow_reader_lose_nothing() {
    let service = Service::start();
    service.account("alice");
    let sent = noise(24 << 20);
    std::fs::write(service.path("sent"), &sent).unwrap();
    let slow = "sleep 1; dd bs=64k status=none; sleep 0.2; echo end";
    let mut ssh = service.ssh_with(&["-o", "BatchMode=yes", &at("alice"), slow]);
    ssh.stdin(File::open(service.path("sent")).unwrap());
    let mut child = ssh.stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap();
    std::thread::sleep(Duration::from_millis(2500));
    let mut got = vec![];
    child.stdout.take().unwrap().read_to_end(&mut got).unwrap();
    assert!(child.wait().unwrap().success());
    assert!(got.ends_with(b"end\n"));
    assert!(got[..got.len() - 4] == sent);
}

#[test]
fn output_is_whole_before_the_exit_status() {
    let service = Service::start();
    service.account("alice");
    let expected: String = (1..=100_000).map(|n| format!("{n}\n")).collect();
    for _ in 0..5 {
        let output = service.ssh("alice", "seq 100000; seq 100000 >&2; exit 7");
        assert_eq!(output.status.code(), Some(7));
        assert!(stdout(&output) == expected);
        assert!(stderr(&output) == expected);
    }
}

#[test]
fn the_end_of_input_passes_and_output_may_follow_it() {
    let service = Service::start();
    service.account("alice");
    let line = "cat; sleep 0.3; echo after";
    let mut ssh = service.ssh_with(&["-o", "BatchMode=yes", &at("alice"), line]);
    let mut child =
        ssh.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap();
    child.stdin.take().unwrap().write_all(b"before\n").unwrap();
    let output = finish_child(child);
    assert_eq!(stdout(&output), "before\nafter\n");
}

#[test]
fn a_program_that_closes_its_output_goes_on_reading() {
    let service = Service::start();
    service.account("alice");
    std::fs::write(service.path("sent"), noise(3 << 20)).unwrap();
    let line = "exec >&-; wc -c >&2";
    let mut ssh = service.ssh_with(&["-o", "BatchMode=yes", &at("alice"), line]);
    let output = finish(ssh.stdin(File::open(service.path("sent")).unwrap()));
    assert_eq!(stderr(&output).trim(), (3 << 20).to_string());
}

/// A client's standard output is a pipe whose reader takes one line and goes. Its input stays open, as a
/// terminal does: if that had ended too, the client would close the channel. `typed` is what comes later.
fn first_line(mut ssh: Command, typed: &str) -> (String, Output) {
    let piped = || Stdio::piped();
    let mut child = ssh.stdin(piped()).stdout(piped()).stderr(piped()).spawn().unwrap();
    let mut typing = child.stdin.take().unwrap();
    let mut line = String::new();
    BufReader::new(child.stdout.take().unwrap()).read_line(&mut line).unwrap();
    if !typed.is_empty() {
        std::thread::sleep(Duration::from_millis(300));
        typing.write_all(typed.as_bytes()).unwrap();
    }
    (line, finish_child(child))
}

/// OpenSSH's client says so to servers named OpenSSH, and russh does not know the request: this is what fails when
/// either changes.
#[test]
fn a_program_whose_output_the_client_takes_no_more_of_is_told() {
    let service = Service::start();
    service.account("alice");
    let ssh = |line| service.ssh_with(&["-o", "BatchMode=yes", &at("alice"), line]);
    let (line, _) = first_line(ssh("exec yes"), "");
    assert_eq!(line, "y\n");
    wait_for("the sessions log", || {
        let account = service.accounts().named("alice").unwrap();
        let outcome =
            service.accounts().sessions(account.id, 1).unwrap().first()?.outcome.clone()?;
        // The Unix socket that stands in for the guest's gives who waits for room the error without the signal.
        assert!(outcome == "signal PIPE" || outcome == "exit status 1", "{outcome}");
        Some(())
    });

    // Only its standard output is over: its status and its errors are still wanted, its input goes on. (The client
    // drops errors that come together with the end, once its output is closed.)
    let (line, ended) = first_line(ssh("yes 2>/dev/null; echo after >&2; sleep 0.5; exit 3"), "");
    assert_eq!(line, "y\n");
    assert_eq!((stderr(&ended).as_str(), ended.status.code()), ("after\n", Some(3)));
    let reading = ssh("trap '' PIPE; yes 2>/dev/null; head -n 1 >&2; sleep 0.5; exit 4");
    let (_, ended) = first_line(reading, "typed later\n");
    assert_eq!((stderr(&ended).as_str(), ended.status.code()), ("typed later\n", Some(4)));

    assert!(!service.log().contains("unknown channel request"), "it is no news for the log");
    assert_eq!(stdout(&service.ssh("alice", "echo still here")), "still here\n");
}

/// Nobody knows which of two is meant; neither is touched.
#[test]
fn of_two_sessions_on_a_connection_none_loses_its_output() {
    let service = Service::start();
    service.account("alice");
    let master = Master::connect(&service, "alice");
    let session = |line: &str| master.session(line);
    let mut cat = session("cat").stdin(Stdio::piped()).stdout(Stdio::piped()).spawn().unwrap();
    let mut typing = cat.stdin.take().unwrap();
    let mut shown = BufReader::new(cat.stdout.take().unwrap());
    let mut echo = |text: &str| {
        typing.write_all(format!("{text}\n").as_bytes()).unwrap();
        let mut line = String::new();
        shown.read_line(&mut line).unwrap();
        assert_eq!(line.trim(), text);
    };
    echo("before");
    let mut yes = session("exec yes").stdin(Stdio::piped()).stdout(Stdio::piped()).spawn().unwrap();
    let _typing = yes.stdin.take();
    BufReader::new(yes.stdout.take().unwrap()).read_line(&mut String::new()).unwrap();
    std::thread::sleep(Duration::from_millis(500));
    echo("after");
    for child in [&mut yes, &mut cat] {
        child.kill().unwrap();
        child.wait().unwrap();
    }
    wait_for("both to be gone", || {
        service.account_status("alice").filter(|status| status.sessions == 0)
    });
    // From then on there is one at a time again, also where the one before has ended by itself.
    for _ in 0..3 {
        let script = "yes 2>/dev/null; echo after >&2; sleep 0.5; exit 3";
        let (line, ended) = first_line(session(script), "");
        assert_eq!((line.as_str(), stderr(&ended).as_str()), ("y\n", "after\n"));
    }
}

#[test]
fn a_program_that_ignores_its_input_ends_all_the_same() {
    let service = Service::start();
    service.account("alice");
    std::fs::write(service.path("sent"), noise(32 << 20)).unwrap();
    let mut ssh = service.ssh_with(&["-o", "BatchMode=yes", &at("alice"), "echo done; exit 4"]);
    let output = finish(ssh.stdin(File::open(service.path("sent")).unwrap()));
    assert_eq!(stdout(&output), "done\n");
    assert_eq!(output.status.code(), Some(4));
}

#[test]
fn a_shell_without_a_terminal_reads_commands() {
    let service = Service::start();
    service.account("alice");
    let mut ssh = service.ssh_with(&["-o", "BatchMode=yes", "-T", &at("alice")]);
    let mut child =
        ssh.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap();
    child.stdin.take().unwrap().write_all(b"echo one\ntty\nexit 9\n").unwrap();
    let output = finish_child(child);
    assert_eq!(stdout(&output), "one\nnot a tty\n");
    assert_eq!(output.status.code(), Some(9));
}

#[test]
fn a_signal_that_ended_the_program_is_told() {
    let service = Service::start();
    service.account("alice");
    let output = service.ssh("alice", "kill -TERM $$");
    // OpenSSH's client has no better word for an exit-signal.
    assert_eq!(output.status.code(), Some(255), "{}", stderr(&output));
    wait_for("the sessions log", || {
        let account = service.accounts().named("alice").unwrap();
        let sessions = service.accounts().sessions(account.id, 1).unwrap();
        let outcome = sessions.first()?.outcome.as_deref()?;
        assert_eq!(outcome, "signal TERM");
        Some(())
    });
}

#[test]
fn commands_on_a_terminal_have_its_size_type_and_exit_status() {
    let service = Service::start();
    service.account("alice");
    let line = "stty size; echo $TERM; tty >/dev/null && echo tty; exit 6";
    let mut ssh = service.ssh_with(&["-o", "BatchMode=yes", "-tt", &at("alice"), line]);
    let output = finish(ssh.env("TERM", "xterm-256color"));
    assert_eq!(stdout(&output), "0 0\r\nxterm-256color\r\ntty\r\n", "{}", stderr(&output));
    assert_eq!(output.status.code(), Some(6));
}

#[test]
fn the_terminal_follows_the_window() {
    let service = Service::start();
    service.account("alice");
    // `script` gives the client a terminal, whose size is changed under it.
    let client = service.ssh_with(&["-o", "BatchMode=yes", "-tt", &at("alice")]);
    let mut line = format!("stty rows 30 cols 100; {:?}", client.get_program());
    for arg in client.get_args() {
        line.push_str(&format!(" {arg:?}"));
    }
    line.push_str(
        " 'stty size; while [ \"$(stty size)\" = \"30 100\" ]; do sleep 0.05; done; stty size'",
    );
    let line = format!(
        "(sleep 1; stty rows 41 cols 132 < /dev/tty; kill -WINCH $(pgrep -P $PPID ssh)) 2>/dev/null & {line}"
    );
    let mut script = Command::new("script");
    script.args(["-qec", &line, "/dev/null"]).stdin(Stdio::null());
    let output = finish(&mut script);
    // `script` types an end of file for its own empty input, whose echo may come anywhere.
    let shown = stdout(&output).replace("^@", "").replace("^D", "");
    let sizes: Vec<&str> = shown.lines().filter(|line| line.len() > 4).collect();
    assert!(shown.contains("30 100\r\n") && sizes.last() == Some(&"41 132"), "{shown}");
}

#[test]
fn terminal_output_is_whole_before_the_exit_status() {
    let service = Service::start();
    service.account("alice");
    for _ in 0..5 {
        let line = "seq 20000; exit 5";
        let mut ssh = service.ssh_with(&["-o", "BatchMode=yes", "-tt", &at("alice"), line]);
        let output = finish(&mut ssh);
        let expected: String = (1..=20_000).map(|n| format!("{n}\r\n")).collect();
        assert!(stdout(&output) == expected, "{} bytes", output.stdout.len());
        assert_eq!(output.status.code(), Some(5));
    }
}

#[test]
fn files_go_by_sftp_and_scp() {
    let service = Service::start();
    service.account("alice");
    let sent = noise(5 << 20);
    std::fs::write(service.path("sent"), &sent).unwrap();
    for mode in ["-s", "-O"] {
        let target = service.path(&format!("got{mode}"));
        let mut scp = Command::new("scp");
        service.client_options(&mut scp);
        scp.args(["-q", mode, "-o", "BatchMode=yes", "-i"]).arg(service.path("id"));
        scp.arg("-P").arg(service.port.to_string()).arg(service.path("sent"));
        scp.arg(format!("{}:{}", at("alice"), target.display()));
        let output = finish(&mut scp);
        assert!(output.status.success(), "scp {mode}: {}", stderr(&output));
        assert!(std::fs::read(&target).unwrap() == sent);
    }
}

#[test]
fn many_sessions_share_one_connection_and_one_machine() {
    let service = Service::start();
    service.account("alice");
    let master = Master::connect(&service, "alice");
    let outputs: Vec<_> = std::thread::scope(|scope| {
        let running: Vec<_> = (0..10)
            .map(|number| {
                let mut ssh = master.session(&format!("echo {number}; sleep 1"));
                scope.spawn(move || finish(&mut ssh))
            })
            .collect();
        wait_for("ten sessions", || {
            service.account_status("alice").filter(|status| status.sessions == 10)
        });
        running.into_iter().map(|thread| thread.join().unwrap()).collect()
    });
    for (number, output) in outputs.iter().enumerate() {
        assert_eq!(stdout(output), format!("{number}\n"), "{}", stderr(output));
    }
    assert_eq!(service.log().matches("fake machine").count(), 1);
}

#[test]
fn one_program_that_ignores_its_input_does_not_stop_the_others_of_its_connection() {
    let service = Service::start();
    service.account("alice");
    let master = Master::connect(&service, "alice");
    let session = |line: &str| master.session(line);
    std::fs::write(service.path("sent"), noise(64 << 20)).unwrap();
    let sent = || File::open(service.path("sent")).unwrap();
    let mut deaf = session("sleep 20").stdin(sent()).spawn().unwrap();
    std::thread::sleep(Duration::from_secs(1));

    let mut echo = session("cat").stdin(Stdio::piped()).stdout(Stdio::piped()).spawn().unwrap();
    let mut typing = echo.stdin.take().unwrap();
    let mut shown = BufReader::new(echo.stdout.take().unwrap());
    for number in 0..50 {
        let begun = Instant::now();
        typing.write_all(format!("{number}\n").as_bytes()).unwrap();
        let mut line = String::new();
        shown.read_line(&mut line).unwrap();
        assert_eq!(line.trim(), number.to_string());
        let elapsed = begun.elapsed();
        assert!(elapsed < Duration::from_secs(1), "an echo took {elapsed:?}");
    }
    let output = finish(&mut session("seq 1000000 | tail -n 1"));
    assert_eq!(stdout(&output), "1000000\n");

    // When the deaf one has ended, input is as fast as ever.
    deaf.kill().unwrap();
    let counted = finish(session("wc -c").stdin(sent()));
    assert_eq!(stdout(&counted).trim(), (64 << 20).to_string());
    for child in [&mut echo, &mut deaf] {
        let _ = child.kill();
        child.wait().unwrap();
    }
}
