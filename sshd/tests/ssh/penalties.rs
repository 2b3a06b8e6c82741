//! Who keeps failing waits, and everybody else notices nothing.

use std::{
    io::{Read, Write},
    net::{SocketAddr, TcpStream},
    time::{Duration, Instant},
};

use socket2::{Domain, Socket, Type};

use crate::harness::{Options, PASSWORD, Service, resident_kib, stderr, stdout, wait_for};

/// A connection from one of this host's loopback addresses.
fn connect_from(service: &Service, from: [u8; 4]) -> std::io::Result<TcpStream> {
    let socket = Socket::new(Domain::IPV4, Type::STREAM, None)?;
    socket.bind(&SocketAddr::from((from, 0)).into())?;
    socket.connect(&SocketAddr::from(([127, 0, 0, 1], service.port)).into())?;
    Ok(socket.into())
}

/// All that the service says before the client does.
fn greeting(mut socket: TcpStream) -> String {
    socket.set_read_timeout(Some(Duration::from_secs(10))).unwrap();
    let mut bytes = [0; 256];
    let count = socket.read(&mut bytes).unwrap_or(0);
    String::from_utf8_lossy(&bytes[..count]).into_owned()
}

#[test]
fn a_source_that_keeps_failing_is_refused_and_others_are_not() {
    let service = Service::with(Options { ssh: "failure_delay_ms = 1", ..Options::default() });
    service.account("alice");
    for _ in 0..3 {
        let output = service.ssh_by_password_from("127.0.0.2", "alice", "guess");
        assert!(stderr(&output).contains("Permission denied"), "{}", stderr(&output));
    }
    let refused = service.ssh_by_password_from("127.0.0.2", "alice", PASSWORD);
    assert_eq!(refused.status.code(), Some(255));
    let words = greeting(connect_from(&service, [127, 0, 0, 2]).unwrap());
    assert!(words.starts_with("hermitage: too many failed logins from your address"), "{words}");
    let log = service.log();
    assert_eq!(log.matches("source refused").count(), 1, "{log}");
    assert!(log.contains("after failed logins"), "{log}");
    for other in ["127.0.0.1", "127.0.0.3"] {
        let output = service.ssh_by_password_from(other, "alice", PASSWORD);
        assert_eq!(stdout(&output), "in\n", "{}", stderr(&output));
    }
}

#[test]
fn a_penalty_passes() {
    let ssh = "failure_delay_ms = 1\nmax_penalty = 3";
    let service = Service::with(Options { ssh, ..Options::default() });
    service.account("alice");
    service.ssh_by_password_from("127.0.0.2", "alice", "guess");
    assert_eq!(
        service.ssh_by_password_from("127.0.0.2", "alice", PASSWORD).status.code(),
        Some(255)
    );
    wait_for("the penalty to pass", || {
        let output = service.ssh_by_password_from("127.0.0.2", "alice", PASSWORD);
        (stdout(&output) == "in\n").then_some(())
    });
}

#[test]
fn who_never_finishes_logging_in_is_refused() {
    let service = Service::with(Options { ssh: "login_grace = 1", ..Options::default() });
    let silent: Vec<_> = (0..2).map(|_| connect_from(&service, [127, 0, 0, 2]).unwrap()).collect();
    wait_for("the penalty", || service.log().contains("source refused").then_some(()));
    drop(silent);
    let words = greeting(connect_from(&service, [127, 0, 0, 2]).unwrap());
    assert!(words.contains("try again later"), "{words}");
}

/// 200 connections that never authenticate, 50 that stop in the middle of the handshake, and 1,000 failed
/// logins: whoever has the right key gets in, and afterwards everything is as before.
#[test]
fn a_siege_keeps_nobody_out() {
    let ssh = "failure_delay_ms = 1\nlogin_grace = 600";
    let service = Service::with(Options { ssh, ..Options::default() });
    service.account("alice");
    let login = || {
        let begun = Instant::now();
        let output = service.ssh("alice", "echo in");
        assert_eq!(stdout(&output), "in\n", "{}", stderr(&output));
        begun.elapsed()
    };
    let middle_of_five = || {
        let mut times: Vec<_> = (0..5).map(|_| login()).collect();
        times.sort_unstable();
        times[2]
    };
    login();
    let (before, memory) = (middle_of_five(), resident_kib(service.pid()));

    let mut besiegers = vec![];
    for n in 0..200 {
        besiegers.push(connect_from(&service, [127, 0, 1, 1 + n % 12]).unwrap());
    }
    for n in 0..50 {
        let mut socket = connect_from(&service, [127, 0, 2, 1 + n % 5]).unwrap();
        socket.write_all(b"SSH-2.0-slow\r\n\x00\x00\x05").unwrap();
        besiegers.push(socket);
    }
    wait_for("the connections", || (service.status().connections == 250).then_some(()));
    // Each failed login is one of a guesser's; refused ones never get to guessing.
    let mut refused = 0;
    for n in 0..1000 {
        let from = [127, 0, 3, 1 + (n % 4) as u8];
        if n < 16 {
            let from = format!("127.0.3.{}", from[3]);
            service.ssh_by_password_from(&from, "alice", "guess");
        } else {
            let words = greeting(connect_from(&service, from).unwrap());
            refused += u32::from(words.contains("too many failed logins"));
        }
    }
    assert!(refused > 950, "only {refused} of 984 guesses were refused");
    let during = middle_of_five();
    assert!(
        during < before * 2 + Duration::from_millis(200),
        "a login took {before:?} before and {during:?} during the siege"
    );
    drop(besiegers);
    wait_for("the connections to be gone", || (service.status().connections == 0).then_some(()));
    login();
    let after = resident_kib(service.pid());
    assert!(after < memory + 24 * 1024, "{memory} KiB before, {after} KiB after");
    assert!(!service.log().contains("panicked"), "{}", service.log());
}
