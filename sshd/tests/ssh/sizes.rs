//! What machines are given of memory and CPUs. That a guest takes it into use is a story of the lab.

use hermitage::admin::protocol::{Reply, Request};
use hermitage_storage::accounts::Changes;
use hermitage_storage::base::{MEMORY_BLOCK, Machine, Size};

use crate::harness::{Options, Service, wait_for};

const LEAST: Size = Size { memory_bytes: 4 * MEMORY_BLOCK, vcpus: 1 };
const MOST: Size = Size { memory_bytes: 32 * MEMORY_BLOCK, vcpus: 4 };

/// A service whose current base has machines between these two.
fn service() -> Service {
    let mut service = Service::prepare(Options { ssh: "", machines: "linger = 0" });
    service.install_base(Machine::new(LEAST, MOST));
    service.run();
    service
}

fn give(service: &Service, name: &str, memory: u64, vcpus: u8) {
    let account = service.account(name);
    let changes = Changes {
        memory_bytes: Some(Some(memory)),
        vcpus: Some(Some(vcpus)),
        ..Changes::default()
    };
    service.accounts().change(account.id, &changes).unwrap();
    let changed = Request::AccountChanged { account: name.into() };
    assert_eq!(service.admin(&changed), Reply::Done);
}

#[test]
fn an_account_has_the_memory_and_cpus_it_was_given_and_others_have_the_bases() {
    let service = service();
    give(&service, "alice", 8 * MEMORY_BLOCK, 2);
    assert!(service.ssh("alice", "true").status.success());
    let log = service.log();
    let asked = format!("Some(Shape {{ memory_bytes: {}, vcpus: 2 }})", 8 * MEMORY_BLOCK);
    assert!(log.contains(&asked), "{log}");
    let told = format!("Take(Resources {{ memory_bytes: {}, vcpus: 2 }})", 8 * MEMORY_BLOCK);
    let (attach, take) = (log.find("told: Attach").unwrap(), log.find(&told).unwrap());
    assert!(attach < take, "the disk first, then what is to spare");

    service.account("bob");
    assert!(service.ssh("bob", "true").status.success());
    let log = service.log();
    let asked = format!("Some(Shape {{ memory_bytes: {}, vcpus: 1 }})", LEAST.memory_bytes);
    assert!(log.contains(&asked), "{log}");
    assert_eq!(log.matches("told: Take").count(), 1, "bob's has nothing to take");
}

#[test]
fn more_than_the_base_has_is_what_the_base_has_and_a_guests_excuse_is_shown() {
    let service = service();
    give(&service, "greedy", 100 * MEMORY_BLOCK, 9);
    let mut ssh = service.ssh_with(&[&crate::harness::at("greedy"), "sleep 60"]);
    let mut shell = ssh.spawn().unwrap();
    let status = wait_for("an excuse", || {
        service.account_status("greedy").filter(|status| status.unused.is_some())
    });
    assert_eq!(status.size, Some(MOST));
    assert_eq!(status.unused.as_deref(), Some("there is  [31mno CPU 3"));
    shell.kill().unwrap();
    shell.wait().unwrap();
}

#[test]
fn what_an_agent_says_of_nothing_that_it_was_asked_is_not_heard() {
    let service = service();
    service.account("liar");
    let mut ssh = service.ssh_with(&[&crate::harness::at("liar"), "sleep 60"]);
    let mut shell = ssh.spawn().unwrap();
    let status = wait_for("a session", || {
        service.account_status("liar").filter(|status| status.sessions == 1)
    });
    assert_eq!((status.size, status.unused), (Some(LEAST), None));
    assert!(!service.log().contains("of what nobody asked"), "{}", service.log());
    shell.kill().unwrap();
    shell.wait().unwrap();
}
