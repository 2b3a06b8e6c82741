//! Memory and CPUs of accounts' machines, as operators set and see them.

use crate::host::Host;
use crate::service::Service;
use hermitage::admin::protocol::{AccountStatus, Enforcement, Reply, Status};
use hermitage_storage::base::{MEMORY_BLOCK, Machine, Size};
use serde_json::json;

const LEAST: Size = Size { memory_bytes: 4 * MEMORY_BLOCK, vcpus: 1 };
const MOST: Size = Size { memory_bytes: 16 * MEMORY_BLOCK, vcpus: 4 };

/// With alice and a base whose machines are between these two.
fn with_alice() -> Host {
    let host = Host::new();
    host.configure("[class.big]\nmemory = \"1GiB\"\nvcpus = 2\n[class.huge]\nmemory = \"8GiB\"\n");
    host.run(&["account", "add", "alice"]).success();
    let new = host.path("new-base");
    let base = host.write_base_of(&new, 1, Machine::new(LEAST, MOST));
    std::fs::rename(new, host.state().base(&base)).unwrap();
    host.state().set_current_base(&base).unwrap();
    host
}

#[test]
fn a_machine_has_what_its_account_its_class_or_its_base_says() {
    let host = with_alice();
    let size = || {
        let limits = host.json(&["account", "show", "alice"])["limits"].clone();
        (limits["memory_bytes"].as_u64().unwrap() / MEMORY_BLOCK, limits["vcpus"].as_u64().unwrap())
    };
    assert_eq!(size(), (4, 1));
    host.run(&["account", "set", "alice", "--class", "big"]).success();
    assert_eq!(size(), (8, 2));
    host.run(&["account", "set", "alice", "--memory", "1536M", "--vcpus", "3"]).success();
    assert_eq!(size(), (12, 3));
    let text = host.run(&["account", "show", "alice"]).success().out;
    assert!(text.contains("1.5 GiB of memory, 3 CPUs (its own)"), "{text}");
    host.run(&["account", "set", "alice", "--memory", "default"]).success();
    assert_eq!(size(), (8, 3));
    // What a class promises and the base does not have.
    host.run(&["account", "set", "alice", "--class", "huge"]).success();
    assert_eq!(size(), (16, 3));
    let own = host.json(&["account", "show", "alice"])["own"].clone();
    assert_eq!((&own["memory_bytes"], &own["vcpus"]), (&json!(null), &json!(3)));
}

#[test]
fn what_no_machine_can_have_is_refused_with_what_to_do() {
    let host = with_alice();
    let set = |option: &str, value: &str| host.run(&["account", "set", "alice", option, value]);
    set("--memory", "100M").fails(2, "multiple of 128 MiB");
    set("--memory", "4GiB").fails(
        1,
        "hermitage base build --memory-mib 512 --vcpus 1 --max-memory-mib 4096 --max-vcpus 4",
    );
    set("--memory", "128M")
        .fails(1, "hermitage base build --memory-mib 128 --vcpus 1 --max-memory-mib 2048");
    set("--vcpus", "0").fails(2, "1 to 32");
    set("--vcpus", "5").fails(1, "--max-memory-mib 2048 --max-vcpus 5");
    host.run(&["account", "add", "bob", "--vcpus", "5"]).fails(1, "have 1 to 4 CPUs, not 5");
    let list = "name,memory,vcpus\nbob,1GiB,2\ncarol,1,2\n";
    host.run_with(&["account", "import", "-"], list).fails(1, "memory: \"1\"");
    // Without a base nobody knows yet.
    let host = Host::new();
    host.run_with(&["account", "import", "-"], "name,memory,vcpus\nbob,1GiB,2\n").success();
    host.run(&["account", "set", "bob", "--vcpus", "5"]).success();
    let bob = host.accounts().named("bob").unwrap();
    assert_eq!((bob.memory_bytes, bob.vcpus), (Some(1 << 30), Some(5)));
}

#[test]
fn less_memory_than_is_in_use_is_refused_and_the_rest_is_for_the_next_start() {
    let host = with_alice();
    host.run(&["account", "set", "alice", "--memory", "2GiB", "--vcpus", "2"]).success();
    let group = tempfile::tempdir().unwrap();
    let used = |mib: u64| {
        // Of what is cached the kernel gives back what is wanted.
        let text = format!("anon {}\nfile 1999999999\nshmem 4096\n", (mib << 20) - 4096);
        std::fs::write(group.path().join("memory.stat"), text).unwrap();
    };
    std::fs::write(group.path().join("cpu.stat"), "usage_usec 5\n").unwrap();
    let folder = group.path().display().to_string();
    let _service = Service::start(&host, move |_| {
        Reply::Status(Status {
            version: "0.1.0".into(),
            pid: 4711,
            since: 0,
            listen: vec![],
            base: None,
            connections: 1,
            accounts: vec![AccountStatus {
                account: "alice".into(),
                state: "running".into(),
                since: 60,
                why: "1 session".into(),
                machine_pid: Some(4712),
                base: None,
                sessions: 1,
                awake: None,
                cgroup: Some(folder.clone()),
                size: Some(Size { memory_bytes: 2 << 30, vcpus: 2 }),
                unused: Some("there is no CPU 3".into()),
            }],
            limits: Enforcement::default(),
        })
    });
    used(700);
    let half = ["account", "set", "alice", "--memory", "512M"];
    let refused = host.run(&half).fails(1, "uses 700 MiB of memory, more than 512 MiB");
    assert!(refused.err.contains("hermitage account reset alice"), "{}", refused.err);
    assert_eq!(host.accounts().named("alice").unwrap().memory_bytes, Some(2 << 30));
    used(300);
    let done = host.run(&half).success();
    let kept = "has 2 GiB of memory, 2 CPUs and keeps it until it next starts from its disk";
    assert!(done.err.contains(kept), "{}", done.err);
    let text = host.run(&["account", "show", "alice"]).success().out;
    assert!(text.contains("512 MiB of memory, 2 CPUs (its own)"), "{text}");
    assert!(text.contains("this one has 2 GiB of memory"), "{text}");
    assert!(text.contains("not all of it is in use: there is no CPU 3"), "{text}");
    let more = host.run(&["account", "set", "alice", "--memory", "2GiB", "--vcpus", "4"]).success();
    assert!(more.err.contains("started or resumed the next time"), "{}", more.err);
}
