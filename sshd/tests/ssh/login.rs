//! Who gets in, and who does not.

use std::time::{Duration, Instant};

use crate::harness::{Options, PASSWORD, Service, at, finish, stderr, stdout, wait_for};
use hermitage::admin::protocol::{Reply, Request};
use hermitage::time::now;
use hermitage_storage::accounts::Changes;

#[test]
fn a_key_runs_a_command_and_brings_its_exit_status() {
    let service = Service::start();
    service.account("alice");
    let output = service.ssh("alice", "echo out; echo err >&2; exit 3");
    assert_eq!(stdout(&output), "out\n", "{}", stderr(&output));
    assert_eq!(stderr(&output), "err\n");
    assert_eq!(output.status.code(), Some(3));
}

#[test]
fn a_password_logs_in_and_a_wrong_one_does_not() {
    let service = Service::start();
    service.account("alice");
    let right = service.ssh_by_password("alice", crate::harness::PASSWORD);
    assert_eq!(stdout(&right), "in\n", "{}", stderr(&right));
    let wrong = service.ssh_by_password("alice", "guess");
    assert_eq!(wrong.status.code(), Some(255));
    assert!(stderr(&wrong).contains("Permission denied"), "{}", stderr(&wrong));
    assert_eq!(stdout(&wrong), "");
}

#[test]
fn a_wrong_key_and_an_unknown_user_look_the_same() {
    let service = Service::start();
    service.account("alice");
    let attempt =
        |user: &str| finish(service.ssh_with_keys(&["stranger"]).args([&at(user), "echo in"]));
    let [known, unknown] = [attempt("alice"), attempt("nobody-here")];
    assert_eq!(known.status.code(), Some(255));
    assert_eq!(unknown.status.code(), Some(255));
    assert_eq!(
        stderr(&known).replace("alice", "USER"),
        stderr(&unknown).replace("nobody-here", "USER")
    );
}

#[test]
fn a_disabled_account_is_refused_and_its_sessions_end() {
    let service = Service::start();
    let account = service.account("alice");
    let mut ssh = service.ssh_with(&["-o", "BatchMode=yes", &at("alice"), "echo in; sleep 60"]);
    let session = std::thread::scope(|scope| {
        let running = scope.spawn(|| finish(&mut ssh));
        crate::harness::wait_for("the session", || {
            service.account_status("alice").filter(|status| status.sessions == 1)
        });
        std::thread::sleep(Duration::from_millis(300));
        service.accounts().set_disabled(account.id, true).unwrap();
        let changed = Request::AccountChanged { account: "alice".into() };
        assert_eq!(service.admin(&changed), Reply::Done);
        running.join().unwrap()
    });
    assert_eq!(session.status.code(), Some(255), "{}", stderr(&session));
    assert!(stderr(&session).contains("disabled"), "{}", stderr(&session));
    crate::harness::wait_for("the machine to rest", || service.at_rest("alice").then_some(()));
    let by_key = service.ssh("alice", "true");
    let by_password = service.ssh_by_password("alice", PASSWORD);
    for refused in [&by_key, &by_password] {
        assert_eq!(refused.status.code(), Some(255));
        assert!(stderr(refused).contains("this account is disabled"), "{}", stderr(refused));
    }
    service.accounts().set_disabled(account.id, false).unwrap();
    assert!(service.ssh("alice", "true").status.success(), "and back again");
}

/// Without anybody telling the service: it looks itself.
#[test]
fn an_account_whose_time_is_over_is_ended_and_refused_with_words() {
    let service = Service::start();
    let account = service.account("alice");
    let expire = |at: Option<i64>| {
        let changes = Changes { expires: Some(at), ..Changes::default() };
        service.accounts().change(account.id, &changes).unwrap();
    };
    expire(Some(now() + 4));
    let mut ssh = service.ssh_with(&["-o", "BatchMode=yes", &at("alice"), "echo in; sleep 60"]);
    let session = finish(&mut ssh);
    assert_eq!(stdout(&session), "in\n", "{}", stderr(&session));
    assert!(stderr(&session).contains("this account expired on 20"), "{}", stderr(&session));
    wait_for("the machine to rest", || service.at_rest("alice").then_some(()));

    let by_key = service.ssh("alice", "echo in");
    let by_password = service.ssh_by_password("alice", PASSWORD);
    for refused in [&by_key, &by_password] {
        assert_eq!((refused.status.code(), stdout(refused).as_str()), (Some(255), ""));
        assert!(stderr(refused).contains("expired on 20"), "{}", stderr(refused));
    }
    // Who has neither is told nothing.
    let guess = service.ssh_by_password("alice", "guess");
    assert!(stderr(&guess).contains("Permission denied"), "{}", stderr(&guess));
    assert!(!stderr(&guess).contains("expired"), "{}", stderr(&guess));
    let stranger = service.ssh_with_keys(&["stranger"]).args([&at("alice"), "true"]).output();
    assert!(!stderr(&stranger.unwrap()).contains("expired"));
    expire(None);
    assert!(service.ssh("alice", "true").status.success(), "and back again");
}

#[test]
fn an_account_disabled_for_a_time_opens_by_itself() {
    let service = Service::start();
    let account = service.account("alice");
    let until = now() + 3;
    service.accounts().disable_until(account.id, until).unwrap();
    let refused = service.ssh("alice", "true");
    assert!(stderr(&refused).contains("disabled until 20"), "{}", stderr(&refused));
    while now() < until {
        std::thread::sleep(Duration::from_millis(100));
    }
    assert!(service.ssh("alice", "true").status.success());
}

#[test]
fn a_class_limits_the_sessions_of_its_accounts() {
    let classes = "[class.student]\nsessions = 1\n";
    let service = Service::with(Options { machines: classes, ..Options::default() });
    let account = service.account("alice");
    let class = |class: Option<&str>| {
        let changes = Changes { class: Some(class.map(str::to_owned)), ..Changes::default() };
        service.accounts().change(account.id, &changes).unwrap();
    };
    class(Some("student"));
    let mut long = service.ssh_with(&[&at("alice"), "echo in; sleep 30"]).spawn().unwrap();
    wait_for("the session", || service.account_status("alice").filter(|s| s.sessions == 1));
    let second = service.ssh("alice", "true");
    assert!(stderr(&second).contains("all of its 1 sessions"), "{}", stderr(&second));
    class(None);
    assert!(service.ssh("alice", "true").status.success());
    long.kill().unwrap();
    long.wait().unwrap();
}

#[test]
fn a_removed_key_does_not_log_in_any_more() {
    let service = Service::start();
    let account = service.account("alice");
    assert!(service.ssh("alice", "true").status.success());
    let keys = service.accounts().keys(account.id).unwrap();
    service.accounts().remove_key(account.id, &keys[0].fingerprint).unwrap();
    assert_eq!(service.ssh("alice", "true").status.code(), Some(255));
}

#[test]
fn an_agent_full_of_keys_gets_to_the_right_one() {
    let service = Service::start();
    service.account("alice");
    let others: Vec<String> = (0..12).map(|number| format!("other{number}")).collect();
    for name in &others {
        let mut keygen = std::process::Command::new("ssh-keygen");
        keygen.args(["-q", "-t", "ed25519", "-N", "", "-f"]).arg(service.path(name));
        assert!(keygen.status().unwrap().success());
    }
    let keys: Vec<&str> = others.iter().map(String::as_str).chain(["id"]).collect();
    let mut ssh = service.ssh_with_keys(&keys);
    let begun = Instant::now();
    let output = finish(ssh.args([&at("alice"), "echo in"]));
    assert_eq!(stdout(&output), "in\n", "{}", stderr(&output));
    assert!(begun.elapsed() < Duration::from_secs(5), "offers are not penalised");
}

#[test]
fn the_host_key_outlives_the_service() {
    let mut service = Service::start();
    service.account("alice");
    assert!(service.ssh("alice", "true").status.success());
    service.signal(nix::sys::signal::Signal::SIGTERM);
    assert!(service.wait().success());
    let known = std::fs::read_to_string(service.path("known_hosts")).unwrap();
    service.run();
    let port = service.port;
    // The port is new, so the key is compared rather than the entry.
    assert!(service.ssh("alice", "true").status.success());
    let after = std::fs::read_to_string(service.path("known_hosts")).unwrap();
    let key = |text: &str| text.split_whitespace().nth(2).unwrap().to_owned();
    assert_eq!(key(&known), key(after.lines().last().unwrap()), "port {port}");
}

#[test]
fn environment_passes_by_list() {
    let service = Service::with(Options { ssh: "accept_env = [\"GIT_*\"]", ..Options::default() });
    service.account("alice");
    let mut command = service.ssh_with(&["-o", "BatchMode=yes"]);
    command
        .arg("-o")
        .arg("SetEnv=\"LC_TEST=a b\" GIT_AUTHOR_NAME=Al LD_PRELOAD=/tmp/x.so PATH=/tmp");
    let output =
        finish(command.args([&at("alice"), "echo $LC_TEST,$GIT_AUTHOR_NAME,$LD_PRELOAD,$PATH"]));
    assert_eq!(stdout(&output), "a b,Al,,/usr/bin:/bin:/usr/sbin:/sbin\n", "{}", stderr(&output));
}

#[test]
fn a_banner_is_shown_before_the_login_and_keeps_nobody_out() {
    let mut service = Service::prepare(Options::default());
    let banner = service.path("banner");
    std::fs::write(&banner, "").unwrap();
    service.configure(&format!("banner = {banner:?}"));
    service.account("alice");
    service.run();
    let login = || {
        let mut ssh = std::process::Command::new("ssh");
        ssh.args(["-F", "/dev/null", "-o", "BatchMode=yes", "-o", "StrictHostKeyChecking=no"]);
        ssh.arg("-o").arg(format!("UserKnownHostsFile={}", service.path("known_hosts").display()));
        ssh.arg("-p").arg(service.port.to_string()).arg("-i").arg(service.path("id"));
        finish(ssh.args([&at("alice"), "echo in"]))
    };
    for text in ["For members only.", "Closed on Sundays."] {
        std::fs::write(&banner, format!("{text}\n")).unwrap();
        let output = login();
        assert_eq!(stdout(&output), "in\n", "{}", stderr(&output));
        assert!(stderr(&output).contains(&format!("{text}\r\n")), "{}", stderr(&output));
    }
    // Without the file a login goes on without its words, and the log says so.
    std::fs::remove_file(&banner).unwrap();
    assert!(login().status.success());
    assert!(service.log().contains("ssh.banner can't be shown"));
}
