//! Logins, one after another, leave nothing in the service but their line in the log of sessions.
//!
//! `HERMITAGE_ROUNDS=10000 cargo test -p hermitage --test ssh endurance` is the long way.

use std::thread;

use crate::harness::{Service, resident_kib, stderr, stdout, wait_for};

/// Logins before the first look: threads and buffers that come once are there then.
const WARM: usize = 60;
const CLIENTS: usize = 4;
/// What memory may grow by, in KiB: allocators keep some of it, whatever the number of rounds.
const KEPT: u64 = 12 * 1024;

/// What would pile up, were something left behind.
#[derive(Debug)]
struct Held {
    descriptors: usize,
    children: usize,
}

fn held(service: &Service) -> Held {
    let proc = format!("/proc/{}", service.pid());
    let descriptors = std::fs::read_dir(format!("{proc}/fd")).unwrap().count();
    let children = std::fs::read_dir(format!("{proc}/task"))
        .unwrap()
        .filter_map(|task| std::fs::read_to_string(task.ok()?.path().join("children")).ok())
        .map(|children| children.split_whitespace().count())
        .sum();
    Held { descriptors, children }
}

fn log_in(service: &Service, rounds: usize) {
    thread::scope(|scope| {
        for client in 0..CLIENTS {
            scope.spawn(move || {
                for _ in (client..rounds).step_by(CLIENTS) {
                    let output = service.ssh("alice", "echo in");
                    assert_eq!(stdout(&output), "in\n", "{}", stderr(&output));
                }
            });
        }
    });
    wait_for("the connections to be gone", || (service.status().connections == 0).then_some(()));
}

#[test]
fn logins_leave_nothing_behind() {
    let rounds = std::env::var("HERMITAGE_ROUNDS").map_or(240, |rounds| rounds.parse().unwrap());
    let service = Service::start();
    let account = service.account("alice");
    log_in(&service, WARM);
    let (before, memory) = (held(&service), resident_kib(service.pid()));
    log_in(&service, rounds);
    // Descriptors of what has just ended may be closed a moment later; also of what ended before.
    wait_for("the descriptors of before", || {
        let now = held(&service);
        let more = now.descriptors > before.descriptors || now.children > before.children;
        (!more).then_some(())
    });
    let after = resident_kib(service.pid());
    assert!(after < memory + KEPT, "{memory} KiB before, {after} KiB after {rounds} logins");
    // Their ends are written down beside what comes next.
    let accounts = service.accounts();
    let sessions = wait_for("the ends of all sessions", || {
        let sessions = accounts.sessions(account.id, u32::MAX).unwrap();
        sessions.iter().all(|session| session.ended.is_some()).then_some(sessions)
    });
    assert_eq!(sessions.len(), WARM + rounds);
}
