//! The number of processes by account and class, as commands and lists say it.

use hermitage::admin::protocol::{AccountStatus, Enforcement, Reply, Request, Status};
use serde_json::json;

use crate::host::Host;
use crate::service::Service;

fn with_alice() -> Host {
    let host = Host::new();
    host.configure("[machines]\nprocesses = 900\n[class.small]\nprocesses = 100\n");
    host.run(&["account", "add", "alice"]).success();
    host
}

#[test]
fn a_number_of_processes_is_the_accounts_its_class_or_everybodys() {
    let host = with_alice();
    let limit = |name: &str| {
        let shown = host.json(&["account", "show", name]);
        (shown["limits"]["processes"].as_u64(), shown["own"]["processes"].as_u64())
    };
    let set = |to: &[&str]| host.run(&[&["account", "set", "alice"], to].concat());
    assert_eq!(limit("alice"), (Some(900), None));
    set(&["--class", "small"]).success();
    assert_eq!(limit("alice"), (Some(100), None));
    let text = host.run(&["account", "show", "alice"]).success().out;
    assert!(text.contains("processes at most 100 (class small or the configuration)"), "{text}");
    set(&["--processes", "60"]).success();
    assert_eq!(limit("alice"), (Some(60), Some(60)));
    set(&["--processes", "none"]).success();
    assert_eq!(limit("alice"), (None, Some(0)));
    let text = host.run(&["account", "show", "alice"]).success().out;
    assert!(text.contains("processes no limit (its own)"), "{text}");
    set(&["--processes", "default"]).success();
    assert_eq!(limit("alice"), (Some(100), None));
    set(&["--processes", "19"]).fails(2, "20 to 4194304, or 0 for no limit");
    set(&["--processes", "many"]).fails(2, "a number, \"none\" or \"default\"");

    host.run(&["account", "add", "bob", "--processes", "70"]).success();
    assert_eq!(limit("bob"), (Some(70), Some(70)));
    host.run(&["account", "add", "bob", "--processes", "71"]).fails(4, "--processes 71");
    let list = "name,processes\nbob,80\ncarol,none\n";
    host.run_with(&["account", "import", "-"], list)
        .fails(1, "its number of processes is 70, not 80");
    host.run_with(&["account", "import", "-", "--update"], list).success();
    assert_eq!((limit("bob").0, limit("carol")), (Some(80), (None, Some(0))));
    host.run_with(&["account", "import", "-"], "name,processes\ndave,5\n")
        .fails(1, "20 to 4194304");
}

#[test]
fn account_show_has_what_the_guest_counts_and_why_a_limit_does_not_hold() {
    let host = with_alice();
    let _service = Service::start(&host, |request| match request {
        Request::CountProcesses { account } if account == "alice" => Reply::Processes {
            count: Some(37),
            fault: Some("her machine's root has lifted it".into()),
        },
        _ => Reply::Status(Status {
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
                cgroup: None,
                size: None,
                unused: None,
            }],
            limits: Enforcement::default(),
        }),
    });
    let text = host.run(&["account", "show", "alice"]).success().out;
    let wanted = "processes 37 of 900; not enforced: her machine's root has lifted it\n";
    assert!(text.contains(wanted), "{text}");
    let machine = &host.json(&["account", "show", "alice"])["machine"];
    assert_eq!(machine["processes"], json!(37));
    assert_eq!(machine["processes_fault"], json!("her machine's root has lifted it"));
    // A list asks no guest.
    let listed = host.json(&["account", "list"]);
    assert_eq!(listed["accounts"][0]["machine"]["processes"], json!(null));
}
