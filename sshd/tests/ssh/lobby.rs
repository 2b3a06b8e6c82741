//! What the service answers itself, in place of a machine.

use std::{
    io::Write as _,
    process::{Command, Output, Stdio},
};

use hermitage_storage::accounts::PublicKey;

use crate::{
    harness::{Options, PASSWORD, Service, at, finish, finish_child, stderr, stdout, wait_for},
    keeping::hermitage,
    terminals::Shell,
};

/// Asks without a terminal.
pub fn ask(service: &Service, user: &str, argument: &[&str]) -> Output {
    finish(service.ssh_with(&["-T", "-o", "BatchMode=yes", &at(user)]).args(argument))
}

/// Asks without a terminal, with this as standard input.
fn say(service: &Service, user: &str, input: &str) -> Output {
    let mut ssh = service.ssh_with(&["-T", "-o", "BatchMode=yes", &at(user)]);
    ssh.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped());
    let mut child = ssh.spawn().unwrap();
    child.stdin.take().unwrap().write_all(input.as_bytes()).unwrap();
    finish_child(child)
}

pub fn refused(output: &Output) -> String {
    assert_eq!(output.status.code(), Some(255), "{}{}", stdout(output), stderr(output));
    assert_eq!(stdout(output), "");
    stderr(output)
}

#[test]
fn questions_are_answered_and_start_no_machine() {
    let service = Service::start();
    let alice = service.account("alice");
    let help = ask(&service, "alice+help", &[]);
    assert!(help.status.success(), "{}", stderr(&help));
    for word in ["+status", "+keys", "+passwd", "+hold", "+reset", "+new", "+take", "+fresh"] {
        assert!(stdout(&help).contains(word), "{}", stdout(&help));
    }
    let status = stdout(&ask(&service, "alice+status", &[]));
    for line in
        ["machine    stopped\n", "sessions   0 of at most", "of 10 GiB\n", "idle       saved"]
    {
        assert!(status.contains(line), "{line}: {status}");
    }
    let keys = stdout(&ask(&service, "alice+keys", &[]));
    let key = &service.accounts().keys(alice.id).unwrap()[0];
    assert!(keys.starts_with(&key.fingerprint) && keys.contains("\na password"), "{keys}");
    assert_eq!(service.account_status("alice"), None, "a machine was started");
    assert!(!service.log().contains("machine started"), "{}", service.log());
    // On record as what they were, and no shell.
    let accounts = service.accounts();
    let recorded = wait_for("the third line of the log", || {
        Some(accounts.sessions(alice.id, 10).unwrap()).filter(|recorded| recorded.len() == 3)
    });
    let kinds: Vec<_> = recorded.iter().map(|session| session.kind.as_str()).collect();
    assert_eq!(kinds, ["+keys", "+status", "+help"]);
    assert_eq!(accounts.last_shell(alice.id).unwrap(), None);
    assert!(service.log().contains("word=\"status\""), "{}", service.log());
}

#[test]
fn status_tells_of_a_machine_that_runs() {
    let service = Service::start();
    service.account("alice");
    let mut shell = Shell::open(&service, "alice");
    shell.run("echo here-$((1+1))", "here-2");
    let status = stdout(&ask(&service, "alice+status", &[]));
    assert!(status.contains("machine    running since 20"), "{status}");
    assert!(status.contains("sessions   1 of at most"), "{status}");
    assert!(status.contains("last shell 20"), "{status}");
    // Whoever only asks is no session of the machine's.
    assert_eq!(service.account_status("alice").unwrap().sessions, 1);
}

#[test]
fn a_hold_is_set_shown_and_taken_back() {
    let service = Service::with(Options { machines: "max_hold = 7200", ..Options::default() });
    let alice = service.account("alice");
    let held = || service.accounts().by_id(alice.id).unwrap().unwrap().hold_until;
    assert_eq!(stdout(&ask(&service, "alice+hold", &[])), "Your machine is not held.\n");
    let set = stdout(&ask(&service, "alice+hold", &["1h30m"]));
    assert!(set.starts_with("Your machine is held awake until 20"), "{set}");
    let in_seconds = held().unwrap() - hermitage::time::now();
    assert!((5300..=5400).contains(&in_seconds), "{in_seconds}");
    assert_eq!(stdout(&ask(&service, "alice+hold", &[])), set);
    assert_eq!(stdout(&ask(&service, "alice+hold", &["off"])), "The hold is taken back.\n");
    assert_eq!(held(), None);
    for (bad, words) in
        [("3h", "longer than a hold may be here: 2h"), ("soon", "2h"), ("0s", "off")]
    {
        let said = refused(&ask(&service, "alice+hold", &[bad]));
        assert!(said.contains(words), "{bad}: {said}");
    }
    assert_eq!(held(), None);
    assert_eq!(service.account_status("alice"), None, "a machine was started");
}

#[test]
fn a_new_password_is_typed_twice_and_not_shown() {
    let service = Service::start();
    service.account("alice");
    let mut typing = Shell::open(&service, "alice+passwd");
    typing.expect("New password: ");
    typing.run("hunterr\x7f2 and more\r", "Again: ");
    typing.run("hunter2 and more\r", "Your password is changed.");
    assert_eq!(typing.wait(), 0);
    assert!(!typing.shown().contains("hunter"), "{}", typing.shown());
    assert_eq!(stdout(&service.ssh_by_password("alice", "hunter2 and more")), "in\n");
    assert_eq!(service.ssh_by_password("alice", PASSWORD).status.code(), Some(255));
    assert!(!service.log().contains("hunter"));

    let mut typing = Shell::open(&service, "alice+passwd");
    typing.expect("New password: ");
    typing.run("one and another\r", "Again: ");
    typing.run("one and an other\r", "not the same");
    assert_eq!(typing.wait(), 255);
    let short = refused(&say(&service, "alice+passwd", "short\n"));
    assert!(short.contains("needs 8"), "{short}");
    // A pipe's line is taken as it is.
    let piped = say(&service, "alice+passwd", "hunter3 and more \r\n");
    assert!(piped.status.success(), "{}", stderr(&piped));
    assert_eq!(stdout(&service.ssh_by_password("alice", "hunter3 and more ")), "in\n");
}

#[test]
fn only_who_may_all_sets_a_password_and_only_where_there_is_one() {
    let service = Service::start();
    let alice = service.account("alice");
    let mut keygen = Command::new("ssh-keygen");
    keygen.args(["-q", "-t", "ed25519", "-N", "", "-f"]).arg(service.path("bound"));
    assert!(keygen.status().unwrap().success());
    let line = std::fs::read_to_string(service.path("bound.pub")).unwrap();
    let key = PublicKey::parse_line(&format!("from=\"127.0.0.0/8\" {line}")).unwrap().unwrap();
    service.accounts().add_key(alice.id, &key).unwrap();
    let by_bound = |user: &str| {
        let mut ssh = service.ssh_with_keys(&["bound"]);
        finish(ssh.args(["-T", &at(user)]))
    };
    assert!(by_bound("alice+status").status.success());
    let said = refused(&by_bound("alice+passwd"));
    assert!(said.contains("by a key with options"), "{said}");
    service.accounts().set_password(alice.id, None).unwrap();
    let said = refused(&say(&service, "alice+passwd", "a long enough one\n"));
    assert!(said.contains("no password"), "{said}");
    assert_eq!(service.accounts().by_id(alice.id).unwrap().unwrap().password, None);
}

#[test]
fn a_reset_drops_a_machine_with_sessions_in_it_once_it_is_confirmed() {
    let service = Service::start();
    service.account("alice");
    let mut shell = Shell::open(&service, "alice");
    shell.run("echo here-$((1+1))", "here-2");
    assert!(refused(&say(&service, "alice+reset", "no\n")).contains("nothing was done"));
    shell.run("echo still-$((1+1))", "still-2");
    let mut asked = Shell::open(&service, "alice+reset");
    asked.expect("Type yes to go on: ");
    asked.run("yes\r", "dropped");
    assert_eq!(asked.wait(), 0);
    assert_eq!(shell.wait(), 255);
    wait_for("the machine to go", || service.account_status("alice").is_none().then_some(()));
    let again = ask(&service, "alice+reset", &["yes"]);
    assert!(again.status.success(), "{}", stderr(&again));
}

#[test]
fn words_are_for_the_service_alone() {
    let service = Service::start();
    service.account("alice");
    let mut sftp = service.ssh_with(&["-o", "BatchMode=yes", "-s", &at("alice+status"), "sftp"]);
    let said = refused(&finish(&mut sftp));
    assert!(said.contains("without a word"), "{said}");
    let said = refused(&ask(&service, "alice+status", &["rm -rf /"]));
    assert!(said.contains("takes no argument"), "{said}");
    let said = refused(&ask(&service, "alice+status+new", &[]));
    assert!(said.contains("no other word"), "{said}");
    let said = service.through("id", "localhost:22", "alice+status");
    assert!(said.contains("+status has no machine"), "{said}");
    assert_eq!(service.account_status("alice"), None);
}

#[test]
fn who_asks_too_often_waits() {
    let service = Service::start();
    service.account("alice");
    service.account("bob");
    // One connection is enough, and none is ended for it.
    let control = format!("ControlPath={}", service.path("control").display());
    let ask = || {
        let options = ["-T", "-o", "BatchMode=yes", "-o", "ControlMaster=auto", "-o", &control];
        let mut ssh = service.ssh_with(&options);
        finish(ssh.args(["-o", "ControlPersist=5", &at("alice+help")]))
    };
    let answers: Vec<Output> = (0..14).map(|_| ask()).collect();
    let refusals = answers.iter().filter(|answer| !answer.status.success()).count();
    assert!((1..=4).contains(&refusals), "{refusals}");
    assert!(answers[..10].iter().all(|answer| answer.status.success()));
    assert!(stderr(&answers[13]).contains("ask again in"), "{}", stderr(&answers[13]));
    assert!(self::ask(&service, "bob+help", &[]).status.success(), "another account's questions");
}

#[test]
fn a_user_keeps_her_files_and_memory_while_she_works() {
    let service = Service::with(Options { machines: "linger = 60", ..Options::default() });
    let alice = service.account("alice");
    assert!(stdout(&ask(&service, "alice+checkpoint", &[])).starts_with("No checkpoints."));
    let mut shell = Shell::open(&service, "alice");
    shell.run("echo i-was-he''re", "i-was-here");
    let made = ask(&service, "alice+checkpoint", &["one"]);
    assert_eq!(
        stdout(&made),
        "one has your files and memory as they are now.\n",
        "{}",
        stderr(&made)
    );
    let state = || service.account_status("alice").map(|status| status.state);
    assert_eq!(state().as_deref(), Some("running"));
    shell.run("echo st''ill", "still");
    shell.cut(&service);
    wait_for("the machine to linger", || state().filter(|state| state == "lingering"));
    // Nobody is there, and what works in it goes on.
    assert!(ask(&service, "alice+checkpoint", &["two"]).status.success());
    assert_eq!(state().as_deref(), Some("lingering"));
    let listed = stdout(&ask(&service, "alice+checkpoint", &[]));
    assert!(listed.starts_with("one ") && listed.ends_with("files and memory\n"), "{listed}");
    for (name, words) in [("one", "already"), ("three", "you take 2 at most"), ("../x", "no name")]
    {
        let said = refused(&ask(&service, "alice+checkpoint", &[name]));
        assert!(said.contains(words) && !said.contains("/tmp"), "{said}");
    }
    assert_eq!(service.state().checkpoints_dir(alice.id).read_dir().unwrap().count(), 2);
    let taken = wait_for("the audit log", || {
        let copies = crate::watching::audited(&service, "copy");
        // What was refused, too, but for a name that is none.
        (copies.len() == 4).then_some(copies)
    });
    let told: Vec<_> =
        taken.iter().map(|copy| (copy["place"].as_str(), copy.get("error"))).collect();
    assert!(matches!(told[..2], [(Some("one"), None), (Some("two"), None)]), "{told:?}");
    assert!(told[2..].iter().all(|(_, error)| error.is_some()), "{told:?}");
    assert!(taken[0]["bytes"].is_u64() && taken[0].get("uid").is_none(), "{}", taken[0]);
    assert_eq!((&taken[0]["what"], &taken[0]["account"]), (&"checkpoint".into(), &"alice".into()));
    // And goes on where she was; or, taken back by her operator, where she was then.
    let mut shell = Shell::open(&service, "alice");
    shell.expect("still");
    shell.cut(&service);
    let back = hermitage(&service, &["checkpoint", "restore", "alice", "one", "--stop"]);
    assert!(back.status.success(), "{}", stderr(&back));
    let mut shell = Shell::open(&service, "alice");
    let shown = shell.expect("i-was-here");
    assert!(shown.contains("resumed from") && !shown.contains("still"), "{shown}");
}

/// What has no memory to keep, and what can't be saved.
#[test]
fn a_checkpoint_of_a_machine_that_is_not_saved_changes_nothing() {
    let service = Service::with(Options { machines: "linger = 60", ..Options::default() });
    service.account("unsaveable");
    let made = ask(&service, "unsaveable+checkpoint", &["files"]);
    assert_eq!(stdout(&made), "files has your files as they are now.\n", "{}", stderr(&made));
    let mut shell = Shell::open(&service, "unsaveable");
    shell.run("echo he''re", "here");
    let said = refused(&ask(&service, "unsaveable+checkpoint", &["both"]));
    let words = "your machine could not be copied: the host could not do it; its operator finds";
    assert!(said.contains(words) && !said.contains("space left"), "{said}");
    // Who asks this way finds it here.
    let asked = hermitage(&service, &["checkpoint", "create", "unsaveable", "both"]);
    let told = stderr(&asked);
    let words = "unsaveable's machine was not copied: its memory can't be copied: no space left";
    assert!(told.contains(words) && !told.contains("disk"), "{told}");
    let listed = stdout(&ask(&service, "unsaveable+checkpoint", &[]));
    assert_eq!(listed.lines().count(), 1, "{listed}");
    shell.run("echo st''ill", "still");
}

/// Asks again when that is what she is told.
fn ask_in_turn(service: &Service, user: &str, argument: &str) -> Output {
    wait_for("a turn", || {
        let answer = ask(service, user, &[argument]);
        (!stderr(&answer).contains("ask again in")).then_some(answer)
    })
}

#[test]
fn a_user_goes_back_to_her_checkpoints_and_drops_them() {
    let service = Service::with(Options { machines: "linger = 60", ..Options::default() });
    let alice = service.account("alice");
    let mut shell = Shell::open(&service, "alice");
    shell.run("echo at-fi''rst", "at-first");
    assert!(ask_in_turn(&service, "alice+checkpoint", "one").status.success());
    shell.run("echo and-th''en", "and-then");
    // Nothing happens by mistake, and nothing from inside.
    for (question, words) in [
        ("restore one", "the word was not \"yes\""),
        ("restore", "which one?"),
        ("restore one two", "it takes NAME"),
        ("restore none yes", "no checkpoint \"none\""),
        ("drop none", "no checkpoint \"none\""),
        ("restore ../one yes", "no name"),
    ] {
        let said = refused(&ask_in_turn(&service, "alice+checkpoint", question));
        assert!(said.contains(words), "{question}: {said}");
    }
    for question in ["restore one yes", "drop one"] {
        let inside = service.ssh("alice", &format!("ask! 1 checkpoint {question}"));
        let said = stdout(&inside);
        assert!(said.starts_with("Refused ") && said.contains("over ssh: ssh alice+"), "{said}");
    }
    shell.run("echo st''ill", "still");

    let back = ask_in_turn(&service, "alice+checkpoint", "restore one yes");
    let said = stdout(&back);
    let words = "Your files and memory are as they were in one. What they were before is the checkpoint before-";
    assert!(said.starts_with(words), "{said}{}", stderr(&back));
    assert_eq!(shell.wait(), 255);
    let mut shell = Shell::open(&service, "alice");
    let shown = shell.expect("at-first");
    assert!(shown.contains("resumed from") && !shown.contains("and-then"), "{shown}");

    // What that replaced is hers to go back to as well; a third copy of that kind is one too many.
    let kept = said.trim_end().trim_end_matches('.').rsplit(' ').next().unwrap().to_owned();
    assert!(
        ask_in_turn(&service, "alice+checkpoint", &format!("restore {kept} yes")).status.success()
    );
    assert_eq!(shell.wait(), 255);
    let mut shell = Shell::open(&service, "alice");
    shell.expect("still");
    let said = refused(&ask_in_turn(&service, "alice+checkpoint", "restore one yes"));
    assert!(said.contains("are kept already"), "{said}");
    shell.run("echo un''touched", "untouched");
    let dropped = ask_in_turn(&service, "alice+checkpoint", &format!("drop {kept}"));
    assert_eq!(stdout(&dropped), format!("{kept} is deleted.\n"));
    assert!(!service.state().checkpoints_dir(alice.id).join(&kept).exists());
    assert!(ask_in_turn(&service, "alice+checkpoint", "restore one yes").status.success());
    let audited = wait_for("the audit log", || {
        let copies = crate::watching::audited(&service, "copy");
        let done = copies.iter().filter(|copy| copy.get("error").is_none());
        let kinds: Vec<_> = done.map(|copy| copy["what"].as_str().unwrap().to_owned()).collect();
        (kinds.len() == 5).then_some(kinds)
    });
    assert_eq!(audited, ["checkpoint", "go-back", "go-back", "drop-checkpoint", "go-back"]);
}
