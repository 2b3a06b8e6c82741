//! What the service writes into machines' control groups, in a folder that stands for the tree. That the
//! kernel does what the files say is a story of the lab.

use std::{fs, path::PathBuf};

use hermitage::admin::protocol::{Reply, Request};
use hermitage_storage::accounts::Changes;
use nix::sys::signal::Signal;

use crate::harness::{Options, Service, wait_for};

/// A service with a folder for its groups, and those of a former one in it.
fn service(left: &[&str]) -> (Service, PathBuf) {
    let mut service = Service::prepare(Options::default());
    let tree = service.path("cgroup");
    let machines = tree.join("machines");
    fs::create_dir_all(&machines).unwrap();
    left.iter().for_each(|name| fs::create_dir(machines.join(name)).unwrap());
    for group in [&tree, &machines] {
        fs::write(group.join("cgroup.controllers"), "cpuset cpu io memory pids\n").unwrap();
    }
    let config = service.path("hermitage.toml");
    let text = fs::read_to_string(&config).unwrap();
    let machines_table = format!("[machines]\ncgroup = {tree:?}\nrequire_limits = true\n");
    fs::write(&config, text.replacen("[machines]\n", &machines_table, 1)).unwrap();
    // As the kernel would: a group has its files from the start.
    service.run();
    (service, machines)
}

/// The files that the kernel makes in a group.
fn make_group(machines: &std::path::Path, account: uuid::Uuid) -> PathBuf {
    let group = machines.join(account.to_string());
    fs::create_dir_all(&group).unwrap();
    fs::write(group.join("cgroup.procs"), "").unwrap();
    group
}

#[test]
fn a_machine_is_limited_in_a_group_of_its_own_and_takes_other_limits_at_once() {
    let (service, machines) = service(&[]);
    let alice = service.account("alice");
    let group = make_group(&machines, alice.id);
    let read = |file: &str| fs::read_to_string(group.join(file)).unwrap_or_default();
    let change = |changes: &Changes| {
        service.accounts().change(alice.id, changes).unwrap();
        let changed = Request::AccountChanged { account: "alice".into() };
        assert_eq!(service.admin(&changed), Reply::Done);
    };
    change(&Changes { cpu_percent: Some(Some(20)), ..Changes::default() });
    assert!(service.ssh("alice", "true").status.success());
    assert_eq!((read("cpu.max"), read("cpu.weight")), ("10000 50000".into(), "100".into()));
    let status = service.account_status("alice").unwrap();
    assert_eq!(status.cgroup.as_deref(), group.to_str());
    // The process was told to go there before it was a machine.
    let pid = status.machine_pid.unwrap().to_string();
    assert_eq!(read("cgroup.procs").trim(), pid);
    change(&Changes {
        cpu_percent: Some(Some(50)),
        cpu_weight: Some(Some(7)),
        ..Changes::default()
    });
    wait_for("the running machine's other cap", || {
        (read("cpu.max") == "25000 50000" && read("cpu.weight") == "7").then_some(())
    });
    assert_eq!(service.account_status("alice").unwrap().machine_pid.unwrap().to_string(), pid);
    // A class, by the configuration that is read again.
    change(&Changes { cpu_percent: Some(None), ..Changes::default() });
    wait_for("no cap", || (read("cpu.max") == "max 50000").then_some(()));
    let config = service.path("hermitage.toml");
    let text = fs::read_to_string(&config).unwrap();
    fs::write(&config, text.replacen("[machines]\n", "[machines]\ncpu_percent = 80\n", 1)).unwrap();
    service.signal(Signal::SIGHUP);
    wait_for("everybody's cap", || (read("cpu.max") == "40000 50000").then_some(()));
}

#[test]
fn groups_that_a_former_service_left_are_removed() {
    let name = uuid::Uuid::from_u128(5).to_string();
    let (service, machines) = service(&[&name]);
    wait_for("the group to be gone", || (!machines.join(&name).exists()).then_some(()));
    assert_eq!(service.status().limits.path.as_deref(), machines.to_str());
}

#[test]
fn without_groups_machines_run_unless_limits_are_required() {
    let mut service = Service::prepare(Options {
        machines: "cgroup = \"/nowhere/at/all\"",
        ..Options::default()
    });
    service.account("alice");
    service.run();
    assert!(service.ssh("alice", "true").status.success());
    let limits = service.status().limits;
    assert!(limits.path.is_none() && limits.reason.unwrap().contains("/nowhere/at/all"));
    assert!(service.log().contains("not enforced"), "{}", service.log());

    let required = Service::prepare(Options {
        machines: "cgroup = \"/nowhere/at/all\"\nrequire_limits = true",
        ..Options::default()
    });
    let status = required.serve_command().status().unwrap();
    assert!(!status.success());
    assert!(required.log().contains("machines.require_limits"), "{}", required.log());
}
