//! Accounts that have used up what they may take on the host.

use hermitage_storage::accounts::Account;

use crate::{
    harness::{Options, Service, at, finish, stderr, stdout, wait_for},
    keeping::{done, hermitage},
    terminals::Shell,
};

const MIB: usize = 1 << 20;

/// Makes so much of the account's disk written to. Its guest does that, as far as the host sees.
fn fill(service: &Service, account: &Account, mib: usize) {
    let disk = std::fs::File::options().write(true).open(service.state().disk(account.id)).unwrap();
    disk.set_len(0).unwrap();
    std::os::unix::fs::FileExt::write_all_at(&disk, &vec![1; mib * MIB], 0).unwrap();
    disk.set_len((64 * MIB) as u64).unwrap();
}

fn told(service: &Service, scarce: bool) -> usize {
    service.log().matches(&format!("guest told: DiskRoom {{ scarce: {scarce} }}")).count()
}

fn wait_told(service: &Service, scarce: bool, times: usize) {
    let what = format!("a guest to be told {scarce} for the {times}. time");
    wait_for(&what, || (told(service, scarce) == times).then_some(()));
}

#[test]
fn a_guest_at_its_quota_gets_no_new_space_until_there_is_less() {
    let service = Service::with(Options { machines: "linger = 60", ..Options::default() });
    let (alice, bob) = (service.account("alice"), service.account("bob"));
    let _alices = Shell::open(&service, "alice");
    let _bobs = Shell::open(&service, "bob");
    fill(&service, &alice, 10);
    fill(&service, &bob, 10);
    wait_for("alice's machine", || service.account_status("alice").filter(|s| s.sessions == 1));
    assert_eq!(told(&service, true), 0, "nobody has a quota");
    // It counts at once, for who has one.
    let refused = hermitage(&service, &["account", "set", "alice", "--quota", "8M"]);
    let words = stderr(&refused);
    assert!(
        words.contains("alice takes 10 MiB (disk 10 MiB)") && words.contains("8 MiB"),
        "{words}"
    );
    done(&service, &["account", "set", "alice", "--quota", "16M"]);
    fill(&service, &alice, 15);
    wait_told(&service, true, 1);
    // She gets in all the same, and is told why she can't write.
    let mut shell = Shell::open(&service, "alice+new");
    shell
        .expect("your quota is used up: 15 MiB of 16 MiB (disk 15 MiB); programs get no new space");
    shell.run("echo in-$((1+1))", "in-2");
    assert_eq!(stdout(&service.ssh("alice", "echo clean")), "clean\n", "and nothing else sees it");
    let status = finish(service.ssh_with(&["-T", "-o", "BatchMode=yes"]).arg(at("alice+status")));
    assert!(stdout(&status).contains("quota      15 MiB of 16 MiB, 93 %"), "{}", stdout(&status));
    fill(&service, &alice, 9);
    wait_told(&service, false, 1);
    // More of it makes room as well.
    fill(&service, &alice, 20);
    wait_told(&service, true, 2);
    done(&service, &["account", "set", "alice", "--quota", "none"]);
    wait_told(&service, false, 2);
    assert_eq!(told(&service, true), 2, "bob was never told");
    let told = wait_for("four events", || {
        let log = std::fs::read_to_string(service.path("state/audit.jsonl")).unwrap();
        let told = log.lines().filter(|line| line.contains(r#""event":"quota-"#));
        Some(told.map(str::to_owned).collect::<Vec<_>>()).filter(|told| told.len() == 4)
    });
    assert!(told[0].contains(r#""quota-reached""#) && told[0].contains(r#""quota":16777216"#));
    assert!(told[3].contains(r#""quota-free""#) && !told[3].contains(r#""quota":"#));
}

/// What a guest believes when it is saved is what it believes when it is resumed.
#[test]
fn a_machine_that_was_saved_at_its_quota_is_told_when_it_is_resumed() {
    let service = Service::with(Options { machines: "linger = 0", ..Options::default() });
    let alice = service.account("alice");
    fill(&service, &alice, 10);
    done(&service, &["account", "set", "alice", "--quota", "10M"]);
    let mut shell = Shell::open(&service, "alice");
    shell.expect("your quota is used up");
    wait_told(&service, true, 1);
    shell.run("echo i-was-he''re", "i-was-here");
    shell.cut(&service);
    // The save is not refused, whatever the quota says: memory would be lost.
    wait_for("the save", || service.account_status("alice").filter(|s| s.state == "saved"));
    let shown = done(&service, &["account", "show", "alice"]);
    assert!(shown.contains("saved memory") && shown.contains(" of 10 MiB"), "{shown}");
    done(&service, &["account", "set", "alice", "--quota", "100M"]);
    let mut shell = Shell::open(&service, "alice");
    let line = shell.expect("[redrawn ");
    assert!(line.starts_with("resumed from") && !line.contains("quota"), "{line:?}");
    wait_told(&service, false, 1);
}

#[test]
fn a_checkpoint_that_does_not_fit_is_refused_before_anything_ends() {
    let service = Service::with(Options { machines: "linger = 60", ..Options::default() });
    let alice = service.account("alice");
    fill(&service, &alice, 6);
    done(&service, &["account", "set", "alice", "--quota", "10M"]);
    let mut shell = Shell::open(&service, "alice");
    shell.run("echo in-$((1+1))", "in-2");
    let refused = hermitage(&service, &["checkpoint", "create", "alice", "one", "--stop"]);
    let words = stderr(&refused);
    assert!(words.contains("6 MiB more, and 6 MiB of 10 MiB of the quota"), "{words}");
    shell.run("echo still-$((1+1))", "still-2");
    drop(shell);
    let mut ask = service.ssh_with(&["-T", "-o", "BatchMode=yes", &at("alice+checkpoint"), "one"]);
    let words = wait_for("nobody else to be there", || {
        Some(stderr(&finish(&mut ask))).filter(|words| !words.contains("log out"))
    });
    assert!(words.contains("your quota does not allow it: it would take 6 MiB more"), "{words}");
    assert_eq!(hermitage_storage::checkpoint::list(&service.state(), alice.id).unwrap().len(), 0);
    done(&service, &["account", "set", "alice", "--quota", "16M"]);
    done(&service, &["checkpoint", "create", "alice", "one", "--stop"]);
    let refused = hermitage(&service, &["checkpoint", "restore", "alice", "one"]);
    assert!(stderr(&refused).contains("kept as one more checkpoint"), "{}", stderr(&refused));
    // What there is stays whole, and usable.
    done(&service, &["account", "set", "alice", "--quota", "default"]);
    done(&service, &["checkpoint", "restore", "alice", "one"]);
}
