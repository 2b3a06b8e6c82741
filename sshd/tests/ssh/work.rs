//! Machines that something works in, or that are held, while nobody is logged in. What a guest sees of
//! its processes is tested in the lab.

use std::time::{Duration, Instant};

use hermitage::admin::protocol::{AccountStatus, Request};
use hermitage_storage::accounts::{Account, Policy};
use nix::sys::signal::Signal;

use crate::{
    harness::{Options, Service, wait_for},
    terminals::Shell,
};

const QUICK: Options = Options { ssh: "", machines: "linger = 0" };

fn wait_state(service: &Service, user: &str, state: &str) {
    wait_for(state, || service.account_status(user).filter(|status| status.state == state));
}

fn wait_awake(service: &Service, user: &str) -> AccountStatus {
    wait_for("it to be awake", || service.account_status(user).filter(|s| s.awake.is_some()))
}

fn now() -> i64 {
    hermitage::time::now()
}

/// As the commands do it.
fn told(service: &Service, account: &Account) {
    service.admin(&Request::AccountChanged { account: account.name.clone() });
}

fn leave(service: &Service, user: &str) {
    let mut shell = Shell::open(service, user);
    shell.run("echo i-was-he''re", "i-was-here");
    shell.cut(service);
}

#[test]
fn work_keeps_a_machine_awake_until_it_is_done() {
    let service = Service::with(QUICK);
    service.account("busy2");
    leave(&service, "busy2");
    let status = wait_awake(&service, "busy2");
    assert_eq!(status.state, "lingering");
    // A guest's words, without its escape sequences.
    assert_eq!(status.awake.as_deref(), Some("make [2J (pid 812), 97 % CPU"));
    assert!(status.why.starts_with("awake: make"), "{}", status.why);
    wait_state(&service, "busy2", "saved");
    let why = service.account_status("busy2").unwrap().why;
    assert!(why.starts_with("idle for 0 s; its memory is saved ("), "{why}");
    // Nothing was at work when it was saved.
    let mut shell = Shell::open(&service, "busy2");
    let line = shell.expect("[redrawn ");
    assert!(line.starts_with("resumed from ") && !line.contains("paused"), "{line:?}");
}

#[test]
fn who_comes_back_is_told_what_kept_it_awake() {
    let service = Service::with(QUICK);
    service.account("busy");
    leave(&service, "busy");
    wait_awake(&service, "busy");
    let mut shell = Shell::open(&service, "busy");
    let line = shell.expect("[redrawn ");
    assert!(
        line.starts_with("still running: make [2J (pid 812) kept this machine awake\r\n"),
        "{line:?}"
    );
    assert_eq!(service.account_status("busy").unwrap().awake, None);
    shell.cut(&service);
    // An operator's stop stops all the same.
    wait_awake(&service, "busy");
    service.admin(&Request::StopAccount { account: "busy".into() });
    let why = service.account_status("busy").unwrap().why;
    assert!(why.starts_with("an operator stopped this machine; "), "{why}");
}

#[test]
fn work_ends_at_the_limit_and_is_named_when_it_goes_on() {
    let mut service = Service::with(Options { machines: "linger = 0\nmax_linger = 3", ..QUICK });
    service.account("busy");
    leave(&service, "busy");
    let begun = Instant::now();
    wait_awake(&service, "busy");
    wait_state(&service, "busy", "saved");
    assert!(begun.elapsed() > Duration::from_secs(2), "{:?}", begun.elapsed());
    let why = service.account_status("busy").unwrap().why;
    assert!(why.contains("for 3 s, as long as work may keep it awake"), "{why}");
    assert!(why.contains("make [2J (pid 812) is paused"), "{why}");
    // On record: the next service knows as well.
    service.signal(Signal::SIGTERM);
    assert!(service.wait().success());
    service.run();
    let mut shell = Shell::open(&service, "busy");
    let line = shell.expect("[redrawn ");
    assert!(line.contains(" ms); make [2J (pid 812) was paused meanwhile"), "{line:?}");
}

#[test]
fn work_may_not_count_for_an_account() {
    let service = Service::with(QUICK);
    let account = service.account("busy");
    service.accounts().set_max_linger(account.id, Some(0)).unwrap();
    leave(&service, "busy");
    wait_state(&service, "busy", "saved");
    let mut shell = Shell::open(&service, "busy");
    let line = shell.expect("[redrawn ");
    assert!(line.contains("make [2J (pid 812) was paused meanwhile"), "{line:?}");
    shell.cut(&service);
    // Nor for one whose machine is discarded.
    service.accounts().set_policy(account.id, Policy::Discard).unwrap();
    wait_for("the stop", || service.at_rest("busy").then_some(()));
}

#[test]
fn a_guest_that_does_not_answer_is_idle() {
    let service = Service::with(QUICK);
    service.account("mute");
    leave(&service, "mute");
    wait_state(&service, "mute", "saved");
    assert!(service.log().contains("does not say what it does"));
}

#[test]
fn a_hold_keeps_an_idle_machine_until_it_ends() {
    let mut service = Service::with(QUICK);
    let account = service.account("alice");
    service.accounts().set_hold(account.id, Some(now() + 3600)).unwrap();
    leave(&service, "alice");
    let status = wait_awake(&service, "alice");
    assert!(status.awake.unwrap().starts_with("held until 2"), "{}", status.why);
    let mut shell = Shell::open(&service, "alice");
    let line = shell.expect("[redrawn ");
    assert!(
        line.contains("still running: its operator's hold kept this machine awake"),
        "{line:?}"
    );
    shell.cut(&service);
    wait_awake(&service, "alice");

    // The service's end saves regardless; the hold is there again with the machine.
    service.signal(Signal::SIGTERM);
    assert!(service.wait().success());
    assert!(service.state().snapshot(account.id).exists());
    service.run();
    leave(&service, "alice");
    wait_awake(&service, "alice");

    // Taken back.
    service.accounts().set_hold(account.id, None).unwrap();
    told(&service, &account);
    wait_state(&service, "alice", "saved");

    // And one that ends by itself, told of while the machine lingers.
    service.accounts().set_linger(account.id, Some(60)).unwrap();
    leave(&service, "alice");
    service.accounts().set_linger(account.id, Some(0)).unwrap();
    service.accounts().set_hold(account.id, Some(now() + 3)).unwrap();
    told(&service, &account);
    wait_awake(&service, "alice");
    wait_state(&service, "alice", "saved");
}
