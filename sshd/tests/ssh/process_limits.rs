//! What guests are told of how many processes there may be. That a kernel keeps it is a story of the lab.

use std::{fs, process::Child};

use hermitage::admin::protocol::{Reply, Request};
use hermitage_guest_proto::KNOWS_PROCESSES;
use hermitage_storage::accounts::Changes;
use hermitage_storage::base::{MEMORY_BLOCK, Machine, Size};
use nix::sys::signal::Signal;

use crate::harness::{Options, Service, at, wait_for};

/// A service whose base has agents of that version.
fn service(agent: u16) -> Service {
    let mut service = Service::prepare(Options { ssh: "", machines: "linger = 0" });
    let size = Size { memory_bytes: 4 * MEMORY_BLOCK, vcpus: 1 };
    service.install_base_of(agent, Machine::new(size, size));
    service.run();
    service
}

fn limit(service: &Service, name: &str, most: Option<u32>) {
    let account = service.accounts().named(name).unwrap();
    let changes = Changes { processes: Some(most), ..Changes::default() };
    service.accounts().change(account.id, &changes).unwrap();
    let changed = Request::AccountChanged { account: name.into() };
    assert_eq!(service.admin(&changed), Reply::Done);
}

/// Somebody who is logged in.
struct Session(Child);

impl Session {
    fn of(service: &Service, name: &str) -> Self {
        let child = service.ssh_with(&[&at(name), "sleep 60"]).spawn().unwrap();
        let session = Self(child);
        wait_for("a session", || {
            service.account_status(name).filter(|status| status.sessions == 1)
        });
        session
    }
}

impl Drop for Session {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

fn count(service: &Service, name: &str) -> (Option<u32>, Option<String>) {
    match service.admin(&Request::CountProcesses { account: name.into() }) {
        Reply::Processes { count, fault } => (count, fault),
        other => panic!("{other:?}"),
    }
}

fn told(most: &str) -> String {
    format!("most: {most} }}")
}

#[test]
fn a_limit_is_told_with_the_account_and_every_change_to_the_running_machine() {
    let service = service(KNOWS_PROCESSES);
    service.account("alice");
    let counting = Request::CountProcesses { account: "alice".into() };
    assert_eq!(service.admin(&counting), Reply::NotRunning);
    limit(&service, "alice", Some(60));
    let session = Session::of(&service, "alice");
    wait_for("her program", || service.log().contains("told: Exec").then_some(()));
    let log = service.log();
    let first = log.find("told: LimitProcesses { question: 1, most: Some(60) }").unwrap();
    assert!(log.find("told: Attach").unwrap() < first);
    assert!(first < log.find("told: Exec").unwrap(), "before any program");
    assert_eq!(count(&service, "alice"), (Some(37), None));

    limit(&service, "alice", Some(200));
    wait_for("the raise", || service.log().contains(&told("Some(200)")).then_some(()));
    limit(&service, "alice", Some(0));
    wait_for("the end of it", || service.log().contains(&told("None")).then_some(()));
    // Everybody's, by the configuration that is read again.
    limit(&service, "alice", None);
    let config = service.path("hermitage.toml");
    let text = fs::read_to_string(&config).unwrap();
    fs::write(&config, text.replacen("[machines]\n", "[machines]\nprocesses = 900\n", 1)).unwrap();
    service.signal(Signal::SIGHUP);
    wait_for("everybody's", || service.log().contains(&told("Some(900)")).then_some(()));
    assert_eq!(service.log().matches("told: LimitProcesses").count(), 4, "each once");
    drop(session);
}

#[test]
fn a_resumed_machine_hears_of_its_limit_before_it_goes_on() {
    let service = service(KNOWS_PROCESSES);
    service.account("alice");
    limit(&service, "alice", Some(60));
    assert!(service.ssh("alice", "true").status.success());
    wait_for("her machine to be saved", || service.at_rest("alice").then_some(()));
    limit(&service, "alice", Some(70));
    let before = service.log().len();
    let session = Session::of(&service, "alice");
    let log = service.log()[before..].to_owned();
    let limited = log.find(&told("Some(70)")).expect("the other limit");
    assert!(limited < log.find("told: Resume").expect("a resume"), "{log}");
    assert_eq!(count(&service, "alice"), (Some(37), None));
    drop(session);
    // One whose limit was taken away meanwhile hears of that.
    wait_for("her machine to be saved", || service.at_rest("alice").then_some(()));
    limit(&service, "alice", None);
    let before = service.log().len();
    assert!(service.ssh("alice", "true").status.success());
    let log = service.log()[before..].to_owned();
    assert!(log.find(&told("None")).unwrap() < log.find("told: Resume").unwrap(), "{log}");
}

#[test]
fn an_agent_from_before_is_told_nothing_and_the_operator_why() {
    let service = service(KNOWS_PROCESSES - 1);
    service.account("alice");
    let session = Session::of(&service, "alice");
    assert_eq!(count(&service, "alice"), (None, None), "nothing that could be missed");
    limit(&service, "alice", Some(60));
    let fault = wait_for("a reason", || count(&service, "alice").1);
    assert!(fault.contains("from before there were such limits"), "{fault}");
    drop(session);
    // Nor when it comes back.
    wait_for("her machine to be saved", || service.at_rest("alice").then_some(()));
    assert!(service.ssh("alice", "true").status.success());
    let log = service.log();
    assert!(log.contains("told: Resume") && !log.contains("Processes {"), "{log}");
}

#[test]
fn what_a_guest_says_of_its_limit_is_shown_and_harms_nobody() {
    let service = service(KNOWS_PROCESSES);
    for (name, words) in [
        ("lifter", "her machine's root has lifted it"),
        ("faulty", "there is  [31mno pids.max"),
        ("mute", "its agent does not say"),
    ] {
        service.account(name);
        limit(&service, name, Some(60));
        let session = Session::of(&service, name);
        assert_eq!(count(&service, name).1.as_deref(), Some(words), "{name}");
        drop(session);
    }
    assert!(service.log().contains("the number of processes is not limited"));
}
