//! What is asked from inside of a machine: `ask! COUNT WORD ARGUMENT` has the fake agent ask (fake_agent.rs).

use std::time::{Duration, Instant};

use hermitage_guest_proto::ASKING;
use hermitage_storage::base::{MEMORY_BLOCK, Machine, Size};

use crate::{
    harness::{Options, Service, at, finish, resident_kib, stderr, stdout, wait_for},
    terminals::Shell,
};

fn ask(service: &Service, user: &str, questions: &str) -> String {
    let output = service.ssh(user, &format!("ask! {questions}"));
    assert!(output.status.success(), "{}", stderr(&output));
    stdout(&output)
}

/// The words of the one question's refusal.
fn refused(service: &Service, user: &str, question: &str) -> String {
    let said = ask(service, user, &format!("1 {question}"));
    assert!(said.starts_with("Refused ") && said.lines().count() == 1, "{said}");
    said
}

fn lobby(service: &Service, user: &str) -> bool {
    finish(&mut service.ssh_with(&["-T", "-o", "BatchMode=yes", &at(user)])).status.success()
}

#[test]
fn questions_from_inside_are_answered_for_the_machines_account() {
    let service = Service::start();
    let alice = service.account("alice");
    service.account("bob");
    let help = ask(&service, "alice", "1 help");
    assert!(help.starts_with("Done ") && help.contains("ssh alice+help@"), "{help}");
    for name in ["alice", "bob"] {
        let status = ask(&service, name, "1 status");
        let wanted = format!("Done \"account    {name}\\nmachine    running since 20");
        assert!(status.starts_with(&wanted), "{status}");
        // Whoever asks is no session of the machine's; her command is.
        assert!(status.contains("sessions   1 of at most"), "{status}");
    }
    let keys = ask(&service, "alice", "1 keys");
    assert!(keys.contains(&service.accounts().keys(alice.id).unwrap()[0].fingerprint), "{keys}");
    let held = || service.accounts().by_id(alice.id).unwrap().unwrap().hold_until;
    let set = ask(&service, "alice", "1 hold 1h");
    assert!(set.starts_with("Done \"Your machine is held awake until 20"), "{set}");
    assert!((3500..=3600).contains(&(held().unwrap() - hermitage::time::now())));
    assert_eq!(ask(&service, "alice", "1 hold off"), "Done \"The hold is taken back.\\n\"\n");
    assert_eq!(held(), None);
    assert!(ask(&service, "alice", "1 checkpoint").contains("No checkpoints."));
    let said = ask(&service, "alice", "1 checkpoint one");
    assert_eq!(said, "Done \"one has your files and memory as they are now.\\n\"\n");
    let said = refused(&service, "alice", "checkpoint one");
    assert!(said.contains("already"), "{said}");

    // On record by the way that they came.
    let log = service.log();
    assert!(log.contains("source=\"from inside\" word=\"keys\""), "{log}");
    let recorded = wait_for("the lines of the log", || {
        let all = service.accounts().sessions(alice.id, 50).unwrap();
        let inside: Vec<_> = all.into_iter().filter(|one| one.source == "from inside").collect();
        (inside.len() == 8 && inside.iter().all(|one| one.outcome.is_some())).then_some(inside)
    });
    let mut kinds: Vec<_> = recorded.iter().map(|one| one.kind.as_str()).collect();
    kinds.sort_unstable();
    let wanted = [
        "+checkpoint",
        "+checkpoint",
        "+checkpoint",
        "+help",
        "+hold",
        "+hold",
        "+keys",
        "+status",
    ];
    assert_eq!(kinds, wanted);
    let hold = |line: &&str| line.contains("\"source\":\"from inside\",\"kind\":\"+hold\"");
    wait_for("beginning and end of two holds in the audit log", || {
        let audit = std::fs::read_to_string(service.path("state/audit.jsonl")).unwrap();
        (audit.lines().filter(hold).count() == 4).then_some(())
    });
}

#[test]
fn what_is_not_for_inside_is_refused_and_hostile_words_are_only_words() {
    let service = Service::start();
    let alice = service.account("alice");
    for word in ["passwd", "reset", "reset yes"] {
        let said = refused(&service, "alice", word);
        assert!(said.contains("over ssh: ssh alice+"), "{said}");
    }
    let said = refused(&service, "alice", "redeem");
    assert!(said.contains("there is no") && said.contains("hermitage help"), "{said}");
    let said = refused(&service, "alice", "status now");
    assert!(said.contains("hermitage status takes no argument"), "{said}");
    for question in ["hold 2h\x1b[2J", "checkpoint a\nb", &format!("hold {}", "x".repeat(65))] {
        let said = refused(&service, "alice", question);
        assert!(said.contains("printable characters"), "{said}");
    }
    let said = refused(&service, "alice", "a\x1b]0;own\x07\nsource=127.0.0.1");
    assert!(said.contains("a ]0;own  source"), "{said}");
    for question in ["xxx…", &format!("hold {}", "x".repeat(90_000))] {
        let said = refused(&service, "alice", question);
        assert!(said.contains("too long"), "{said}");
    }
    assert!(!service.log().lines().any(|line| line.starts_with("source=127")));
    let account = service.accounts().by_id(alice.id).unwrap().unwrap();
    assert_eq!(account.hold_until, None);
    assert!(!service.state().checkpoints_dir(alice.id).exists());
}

#[test]
fn a_flood_of_questions_is_held_back_and_delays_nobody() {
    let service = Service::start();
    service.account("alice");
    service.account("bob");
    assert!(service.ssh("alice", "true").status.success());
    assert!(service.ssh("bob", "true").status.success());
    let before = resident_kib(service.pid());
    let mut flood = service.ssh_with(&["-o", "BatchMode=yes", &at("alice"), "ask! 20000 status"]);
    let begun = Instant::now();
    let flood = std::thread::spawn(move || finish(&mut flood));
    while !flood.is_finished() {
        let asked = Instant::now();
        assert!(service.ssh("bob", "true").status.success());
        assert!(asked.elapsed() < Duration::from_secs(3), "{:?}", asked.elapsed());
    }
    let flood = flood.join().unwrap();
    let answers = stdout(&flood);
    let done = answers.lines().filter(|line| line.starts_with("Done ")).count();
    let most = 10 + begun.elapsed().as_secs() as usize / 3;
    assert!((1..=most).contains(&done), "{done} of at most {most}");
    // Few are looked at at a time, whatever her agent should have held back.
    assert!(answers.contains("Refused \"too many questions wait for their answers already"));
    // One line for each that was looked at, none for the others.
    let noted = service.log().matches("source=\"from inside\"").count();
    assert!((done..=most).contains(&noted), "{noted} in the log, {done} answered");
    let after = resident_kib(service.pid());
    assert!(after < before + 16 * 1024, "{before} KiB, then {after} KiB");
    // One after the other they are refused as they are over ssh, where her questions are not held back.
    let said = ask(&service, "alice", "1 status");
    let slow = (0..12).map(|_| ask(&service, "alice", "1 help")).collect::<String>();
    assert!((said + &slow).contains("too many questions at once; ask again in "), "{slow}");
    assert!(lobby(&service, "alice+status"));
    assert!(ask(&service, "bob", "1 status").starts_with("Done "));
}

#[test]
fn a_machine_that_goes_away_with_its_questions_leaves_nothing() {
    let service = Service::start();
    service.account("alice");
    service.account("bob");
    for _ in 0..3 {
        assert_eq!(service.ssh("alice", "ask! end status").status.code(), Some(255));
    }
    assert!(ask(&service, "bob", "1 status").starts_with("Done "));
    // Room for hers is there again, should she have to wait for it first.
    wait_for("an answer", || ask(&service, "alice", "1 status").starts_with("Done ").then_some(()));
    assert!(!service.log().contains("panicked"), "{}", service.log());
}

/// What was asked of the service that saved the machine is no business of the one that resumes it. An agent that
/// knows of questions is told so; an older one would power off.
#[test]
fn a_resumed_machine_is_told_that_its_questions_are_forgotten() {
    for (version, knows) in [(ASKING, true), (ASKING - 1, false)] {
        let mut service = Service::prepare(Options { ssh: "", machines: "linger = 0" });
        let size = Size { memory_bytes: 4 * MEMORY_BLOCK, vcpus: 1 };
        service.install_base_of(version, Machine::new(size, size));
        service.run();
        service.account("alice");
        let mut shell = Shell::open(&service, "alice");
        shell.run("echo here-$((1+1))", "here-2");
        shell.cut(&service);
        wait_for("the save", || {
            service.account_status("alice").filter(|status| status.state == "saved")
        });
        assert!(!service.log().contains("guest told: Answer"));
        let _shell = Shell::open(&service, "alice");
        // That comes after it, when she is let in.
        let log = wait_for("her window", || {
            let log = service.log();
            log.contains("guest told: Resize").then_some(log)
        });
        let told = log.find("guest told: Answer(Answer { number: 0, status: Unasked");
        assert_eq!(told.is_some(), knows, "{log}");
        let resumed = log.find("guest told: Resume").unwrap();
        assert!(told.is_none_or(|told| resumed < told));
    }
}
