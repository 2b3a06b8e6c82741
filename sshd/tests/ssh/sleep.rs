//! Machines that are saved when nobody is there, and come back: what serve does with files, tags and
//! states. That memory really comes back is tested in the lab.

use std::{path::PathBuf, time::Duration};

use hermitage::admin::protocol::{Reply, Request};
use hermitage_storage::{
    accounts::{Account, Policy},
    base::BaseId,
    disk,
};
use nix::sys::signal::Signal;

use crate::{
    fake_fork_server::REFUSAL,
    harness::{Options, Service, stderr, stdout, wait_for},
    terminals::Shell,
};

const QUICK: Options = Options { ssh: "", machines: "linger = 0" };

fn wait_state(service: &Service, user: &str, state: &str) {
    wait_for(state, || service.account_status(user).filter(|status| status.state == state));
}

fn snapshot(service: &Service, account: &Account) -> PathBuf {
    service.state().snapshot(account.id)
}

fn tag(service: &Service, account: &Account) -> Option<[u8; 16]> {
    disk::tag(&std::fs::File::open(service.state().disk(account.id)).unwrap()).unwrap()
}

/// A shell in which `n=word` was typed, cut off, its machine saved.
fn leave(service: &Service, user: &str) {
    let mut shell = Shell::open(service, user);
    shell.run("echo i-was-he''re", "i-was-here");
    shell.cut(service);
    wait_state(service, user, "saved");
}

/// The login that takes up what [`leave`] left.
fn come_back(service: &Service, user: &str) -> (String, Shell) {
    let mut shell = Shell::open(service, user);
    let line = shell.expect("[redrawn ");
    shell.expect("i-was-here");
    shell.run("echo $RESUMED.", "yes.");
    (line, shell)
}

#[test]
fn a_machine_is_saved_and_resumed_with_its_terminals() {
    let service = Service::with(QUICK);
    let account = service.account("alice");
    leave(&service, "alice");
    assert!(snapshot(&service, &account).exists());
    assert!(tag(&service, &account).is_some());
    let (line, shell) = come_back(&service, "alice");
    assert!(line.starts_with("resumed from ") && line.contains(" s ago ("), "{line:?}");
    wait_for("the snapshot to go", || (!snapshot(&service, &account).exists()).then_some(()));
    assert_eq!(tag(&service, &account), None);
    // And again: what was resumed is saved, and what follows is told once.
    shell.cut(&service);
    wait_state(&service, "alice", "saved");
    let (_, shell) = come_back(&service, "alice");
    let mut beside = Shell::open(&service, "alice");
    beside.run("echo -$RESUMED-", "--");
    assert!(!beside.shown().contains("resumed from"));
    assert_eq!(shell.exit(), 7);
}

#[test]
fn the_order_of_terminals_outlives_the_service() {
    let mut service = Service::with(Options { machines: "linger = 60", ..Options::default() });
    service.account("alice");
    let mut shells: Vec<Shell> = (0..3).map(|_| Shell::open(&service, "alice")).collect();
    for (n, shell) in shells.iter_mut().enumerate() {
        shell.run(&format!("echo i-was-he''re-{n}"), &format!("i-was-here-{n}"));
    }
    let mut shells: Vec<Option<Shell>> = shells.into_iter().map(Some).collect();
    for n in [1, 2, 0] {
        shells[n].take().unwrap().cut(&service);
    }
    service.signal(Signal::SIGTERM);
    assert!(service.wait().success());
    service.run();
    let mut taken = vec![];
    for n in [0, 2, 1] {
        let mut shell = Shell::open(&service, "alice");
        shell.expect(&format!("i-was-here-{n}"));
        taken.push(shell);
    }
}

#[test]
fn the_service_saves_its_machines_before_it_ends() {
    let mut service = Service::start();
    let [alice, bob] = ["alice", "bob"].map(|name| service.account(name));
    let mut hers = Shell::open(&service, "alice");
    hers.run("echo i-was-he''re", "i-was-here");
    assert!(service.ssh("bob", "true").status.success());
    service.signal(Signal::SIGTERM);
    hers.expect("the service is stopping");
    assert!(service.wait().success());
    for account in [&alice, &bob] {
        assert!(snapshot(&service, account).exists(), "{}", account.name);
    }
    service.run();
    come_back(&service, "alice");
}

#[test]
fn what_does_not_belong_to_the_disk_is_never_resumed() {
    let service = Service::with(QUICK);
    let account = service.account("alice");
    let path = snapshot(&service, &account);
    let reasons: [(&str, &dyn Fn()); 4] = [
        ("the disk was used since", &|| {
            let disk = std::fs::File::open(service.state().disk(account.id)).unwrap();
            disk::clear_tag(&disk).unwrap();
        }),
        ("it was not taken with this disk", &|| {
            let disk = std::fs::File::open(service.state().disk(account.id)).unwrap();
            disk::set_tag(&disk, [9; 16]).unwrap();
        }),
        ("its header was altered", &|| {
            let mut bytes = std::fs::read(&path).unwrap();
            bytes[60] ^= 1;
            std::fs::write(&path, bytes).unwrap();
        }),
        ("it is not a snapshot", &|| std::fs::write(&path, vec![b'x'; 8192]).unwrap()),
    ];
    for (reason, damage) in reasons {
        leave(&service, "alice");
        damage();
        let mut shell = Shell::open(&service, "alice");
        let line = shell.expect("; your files are all here");
        assert!(line.starts_with("cold start: ") && line.contains(reason), "{line:?}");
        shell.run("echo -$RESUMED-", "--");
        assert!(!path.exists() && service.state().unusable_snapshot(account.id).exists());
        assert_eq!(tag(&service, &account), None);
        assert_eq!(shell.exit(), 7);
        wait_state(&service, "alice", "saved");
        service.admin(&Request::ResetAccount { account: "alice".into() });
    }
}

#[test]
fn a_snapshot_the_machine_refuses_is_set_aside() {
    let service = Service::with(QUICK);
    let account = service.account("refused");
    leave(&service, "refused");
    let mut shell = Shell::open(&service, "refused");
    let line = shell.expect("; your files are all here");
    assert!(line.contains("its data was altered"), "{line:?}");
    shell.run("echo -$RESUMED-", "--");
    assert!(service.state().unusable_snapshot(account.id).exists());
}

#[test]
fn a_machine_that_can_not_be_saved_runs_on_and_is_told_of_at_last() {
    for (user, reason) in [("unsaveable", "no space left"), ("unfrozen", "does not answer")] {
        let service = Service::with(Options { machines: "linger = 1", ..Options::default() });
        let account = service.account(user);
        let mut shell = Shell::open(&service, user);
        shell.run("kept=yes; echo don''e", "done");
        shell.cut(&service);
        // After the first failure it lingers again, with everything there.
        wait_for("the failure", || service.log().contains("can't save").then_some(()));
        let mut shell = Shell::open(&service, user);
        shell.run("echo -$kept-", "-yes-");
        shell.cut(&service);
        wait_for("the stop", || service.account_status(user).is_none().then_some(()));
        assert!(!snapshot(&service, &account).exists());
        assert!(!service.state().new_snapshot(account.id).exists());
        let mut shell = Shell::open(&service, user);
        let line = shell.expect("; your files are all here");
        assert!(line.contains("could not be saved") && line.contains(reason), "{line:?}");
    }
}

#[test]
fn a_login_calls_off_a_save_or_waits_for_it() {
    let service = Service::with(QUICK);
    service.account("slowsave");
    let mut shell = Shell::open(&service, "slowsave");
    shell.run("kept=yes; echo don''e", "done");
    shell.cut(&service);
    wait_state(&service, "slowsave", "saving");
    let mut shell = Shell::open(&service, "slowsave");
    shell.run("echo -$kept-$RESUMED-", "-yes--");
    // One that an operator asked for is finished first.
    let request = Request::StopAccount { account: "slowsave".into() };
    std::thread::scope(|scope| {
        let stopping = scope.spawn(|| service.admin(&request));
        shell.expect("an operator stopped");
        wait_state(&service, "slowsave", "saving");
        let mut back = Shell::open(&service, "slowsave");
        back.run("echo -$RESUMED-", "-yes-");
        assert_eq!(stopping.join().unwrap(), Reply::Done);
    });
}

#[test]
fn ten_logins_at_once_resume_one_machine() {
    // On a busy host the first of them is done before the last one has come: it has to linger that long.
    let service = Service::with(Options { machines: "linger = 4", ..QUICK });
    service.account("alice");
    leave(&service, "alice");
    let before = service.log().matches("fake machine").count();
    let outputs: Vec<_> = std::thread::scope(|scope| {
        let logins: Vec<_> =
            (0..10).map(|_| scope.spawn(|| service.ssh("alice", "echo in"))).collect();
        logins.into_iter().map(|login| login.join().unwrap()).collect()
    });
    for output in &outputs {
        assert_eq!(stdout(output), "in\n", "{}", stderr(output));
    }
    assert_eq!(service.log().matches("fake machine").count(), before + 1);
}

#[test]
fn policies_say_what_happens_to_a_machine() {
    let service = Service::with(QUICK);
    let account = service.account("alice");
    service.accounts().set_policy(account.id, Policy::Discard).unwrap();
    assert!(service.ssh("alice", "true").status.success());
    wait_for("the stop", || service.account_status("alice").is_none().then_some(()));
    assert!(!snapshot(&service, &account).exists());

    service.accounts().set_policy(account.id, Policy::Keep).unwrap();
    assert!(service.ssh("alice", "true").status.success());
    wait_state(&service, "alice", "lingering");
    std::thread::sleep(Duration::from_secs(1));
    let status = service.account_status("alice").unwrap();
    assert_eq!(status.state, "lingering");
    assert!(status.why.contains("keep it running"), "{}", status.why);
    // Changed while it runs.
    service.accounts().set_policy(account.id, Policy::Save).unwrap();
    wait_state(&service, "alice", "saved");
}

#[test]
fn a_fresh_login_drops_what_was_saved() {
    let service = Service::with(QUICK);
    let account = service.account("alice");
    leave(&service, "alice");
    let mut shell = Shell::open(&service, "alice+fresh");
    shell.run("echo -$RESUMED-", "--");
    assert!(!snapshot(&service, &account).exists());
    let mut refused = Shell::open(&service, "alice+fresh");
    refused.expect("+fresh needs your other session to be closed first");
}

#[test]
fn what_is_saved_waits_for_a_base_that_can_not_be_used_for_now() {
    let mut service = Service::with(QUICK);
    let account = service.account("alice");
    leave(&service, "alice");
    service.signal(Signal::SIGTERM);
    service.wait();
    let refusal = service.path("refusal");
    std::fs::write(&refusal, "").unwrap();
    service.run_with(&[(REFUSAL, refusal.to_str().unwrap())]);
    for _ in 0..2 {
        let output = service.ssh("alice", "true");
        assert_eq!(output.status.code(), Some(255));
        assert!(stderr(&output).contains("could not start your machine"), "{}", stderr(&output));
        assert!(snapshot(&service, &account).exists(), "{}", service.log());
    }
    std::fs::remove_file(&refusal).unwrap();
    come_back(&service, "alice");
}

#[test]
fn a_machine_is_resumed_on_the_base_it_was_saved_on() {
    let service = Service::with(QUICK);
    service.account("alice");
    service.account("bob");
    leave(&service, "alice");
    let next = BaseId::parse(&"1e".repeat(16)).unwrap();
    std::fs::create_dir_all(service.state().base(&next)).unwrap();
    service.state().set_current_base(&next).unwrap();
    let (_, _shell) = come_back(&service, "alice");
    assert_eq!(service.account_status("alice").unwrap().base.unwrap(), "0f".repeat(16));
    assert!(service.ssh("bob", "true").status.success());
}

#[test]
fn a_service_killed_at_any_moment_of_a_save_leaves_no_stale_memory() {
    let mut service = Service::with(QUICK);
    let account = service.account("slowsave");
    for moment in [0, 300, 900, 1900, 2050, 2400] {
        let mut shell = Shell::open(&service, "slowsave+new");
        shell.run("echo i-was-he''re", "i-was-here");
        shell.cut(&service);
        wait_state(&service, "slowsave", "saving");
        std::thread::sleep(Duration::from_millis(moment));
        service.signal(Signal::SIGKILL);
        service.wait();
        service.run();
        // Either all of it or nothing, and the tag is consumed before anything runs (the machine
        // itself checks that).
        assert_eq!(stdout(&service.ssh("slowsave", "echo in")), "in\n", "after {moment} ms");
        assert_eq!(tag(&service, &account), None);
        service.admin(&Request::ResetAccount { account: "slowsave".into() });
    }
}

#[test]
fn what_does_not_fit_into_the_services_end_is_stopped_and_the_rest_is_saved() {
    let machines = "save_timeout = 1";
    let mut service = Service::with(Options { machines, ..Options::default() });
    let users = ["alice", "bob", "carol", "slowsave"];
    let accounts = users.map(|name| service.account(name));
    let mut shells = users.map(|name| Shell::open(&service, name));
    for shell in &mut shells {
        shell.run("kept=yes; echo don''e", "done");
    }
    service.signal(Signal::SIGTERM);
    for shell in &mut shells {
        shell.expect("the service is stopping");
    }
    assert!(service.wait().success());
    service.run();
    for (user, account) in users.iter().zip(&accounts) {
        let fits = *user != "slowsave";
        assert_eq!(snapshot(&service, account).exists(), fits, "{user}");
        let mut shell = Shell::open(&service, user);
        if fits {
            shell.run("echo -$kept-$RESUMED-", "-yes-");
        } else {
            let line = shell.expect("; your files are all here");
            assert!(line.contains("cold start"), "{line:?}");
        }
    }
}
