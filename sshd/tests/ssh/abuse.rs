//! Messages that break the protocol, on the real port, after a login: each by a connection of its own. It ends or
//! goes on; whatever else there is does not notice.
//!
//! Paramiko encrypts and signs what it is given, whatever that is. Where it is not installed the test says so.

use std::process::{Command, Stdio};

use crate::harness::{Service, resident_kib, stdout, wait_for};

/// Debian's own: other Pythons don't have its modules.
pub const PYTHON: &str = "/usr/bin/python3";

/// What stays allocated after all of it, at most: buffers that the allocator keeps.
const KEPT_KIB: u64 = 48 << 10;

/// What must not go on: the service can't know any more what the client means. The rest it may ignore (RFC 4254, 5.2
/// of data beyond the window; RFC 4253, 11.4 of unknown messages), as long as it costs nothing.
const END: [&str; 6] = [
    "a_packet_too_long",
    "a_string_longer_than_its_message",
    "a_message_cut_short",
    "an_empty_key_exchange",
    "a_key_exchange_cut_short",
    "a_packet_of_noise",
];

#[test]
fn a_broken_protocol_hurts_nobody_else() {
    let Some(became) = abuse(&[]) else { return };
    assert_eq!(became.lines().count(), 20, "{became}");
    for name in END {
        assert!(became.contains(&format!("{name} ended")), "{name} goes on:\n{became}");
    }
}

/// For longer runs, and to repeat one: `HERMITAGE_NOISE=SEED,ROUNDS`.
#[test]
fn noise_hurts_nobody_else() {
    let choice = std::env::var("HERMITAGE_NOISE").unwrap_or_else(|_| "1,25".into());
    let (seed, rounds) = choice.split_once(',').expect("HERMITAGE_NOISE=SEED,ROUNDS");
    let Some(became) = abuse(&[seed, rounds]) else { return };
    assert_eq!(became.lines().count(), rounds.parse::<usize>().unwrap(), "{became}");
}

/// Says so where there is none.
pub fn has_paramiko() -> bool {
    let there = Command::new(PYTHON).args(["-c", "import paramiko"]).stderr(Stdio::null()).status();
    let there = there.is_ok_and(|status| status.success());
    if !there {
        eprintln!("skipped: {PYTHON} has no paramiko here (Debian's python3-paramiko)");
    }
    there
}

/// Runs the script beside somebody else's session, to whom nothing may happen. What became of its connections;
/// None where it can't run.
fn abuse(choice: &[&str]) -> Option<String> {
    if !has_paramiko() {
        return None;
    }
    let service = Service::start();
    service.account("alice");
    service.account("bob");
    let mut bystander = service
        .ssh_with(&[])
        .args(["bob@127.0.0.1", "cat"])
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .spawn()
        .unwrap();
    let machines = |name: &str| wait_for("a machine", || service.account_status(name)?.machine_pid);
    let bobs = machines("bob");
    let before = resident_kib(service.pid());

    let script = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/ssh/abuse.py");
    let mut abuse = Command::new(PYTHON);
    abuse.arg(script).args([&service.port.to_string(), "alice"]).arg(service.path("id"));
    let abuse = abuse.args(choice).stderr(Stdio::piped());
    let output = abuse.output().unwrap();
    assert!(output.status.success(), "{output:?}");
    let became = stdout(&output);
    println!("{became}");

    assert!(service.ssh("alice", "true").status.success());
    wait_for("the connections to be gone", || (service.status().connections == 1).then_some(()));
    assert_eq!(machines("bob"), bobs, "bob's machine is another one");
    drop(bystander.stdin.take());
    assert!(bystander.wait().unwrap().success(), "bob's session has ended");
    let log = service.log();
    assert!(!log.contains("panicked"), "{log}");
    let after = resident_kib(service.pid());
    assert!(after < before + KEPT_KIB, "{before} KiB before, {after} KiB after");
    Some(became)
}
