//! What accounts may take on the host, as operators set and see it.

use crate::host::Host;
use serde_json::json;

/// With a base, and a disk of alice that a MiB is written of.
fn with_alice(configuration: &str) -> Host {
    let host = Host::new();
    host.configure(configuration);
    host.install_vmm(1);
    host.run(&["base", "build", "--image", &host.image().display().to_string()]).success();
    host.run(&["account", "add", "alice", "--disk", "8M", "--class", "student"]).success();
    write(&host, 1);
    host
}

fn write(host: &Host, mib: usize) {
    let disk = host.state().disk(host.accounts().named("alice").unwrap().id);
    let disk = std::fs::File::options().write(true).open(disk).unwrap();
    std::os::unix::fs::FileExt::write_all_at(&disk, &vec![1; mib << 20], 0).unwrap();
}

#[test]
fn a_quota_is_the_accounts_own_or_its_class_or_everybodys() {
    let host = with_alice("[machines]\nquota_mib = 7\n[class.student]\nquota = \"4M\"\n");
    let limit =
        |host: &Host| host.json(&["account", "show", "alice"])["limits"]["quota_bytes"].clone();
    assert_eq!(limit(&host), 4 << 20);
    host.run(&["account", "set", "alice", "--class", "none"]).success();
    assert_eq!(limit(&host), 7 << 20);
    host.run(&["account", "set", "alice", "--quota", "3M"]).success();
    let shown = host.json(&["account", "show", "alice"]);
    assert_eq!(
        (&shown["limits"]["quota_bytes"], &shown["own"]["quota_bytes"]),
        (&json!(3 << 20), &json!(3 << 20))
    );
    assert!(shown["quota_used_bytes"].as_u64().unwrap() >= 1 << 20);
    let text = host.run(&["account", "show", "alice"]).success().out;
    assert!(text.contains("of 3 MiB (disk 1") && text.contains(" % (its own)"), "{text}");
    let list = host.run(&["account", "list"]).success().out;
    assert!(list.contains("QUOTA") && list.contains(" % "), "{list}");
    host.run(&["account", "set", "alice", "--quota", "none"]).success();
    assert_eq!(limit(&host), json!(null));
    host.run(&["account", "set", "alice", "--quota", "none"]).success();
    host.run(&["account", "set", "alice", "--quota", "default"]).success();
    assert_eq!(limit(&host), 7 << 20);
    host.run(&["account", "set", "alice", "--quota", "5"]).fails(2, "1M or more");
    // And an account that is asked for again is compared with it too.
    let add = ["account", "add", "alice", "--quota", "none"];
    host.run(&add).fails(4, "its quota is default, not none");
    host.run(&["account", "add", "bob", "--disk", "8M", "--quota", "9M"]).success();
    assert_eq!(host.accounts().named("bob").unwrap().quota_bytes, Some(9 << 20));
}

#[test]
fn a_quota_is_not_made_less_than_what_is_there() {
    let host = with_alice("[class.student]\nquota = \"20M\"\n[class.guest]\nquota = \"2M\"\n");
    write(&host, 3);
    for lower in [["--quota", "2M"], ["--class", "guest"]] {
        let done = host.run(&[&["account", "set", "alice"], &lower[..]].concat());
        let done = done.fails(1, "more than a quota of 2 MiB");
        assert!(
            done.err.contains("alice takes 3") && done.err.contains("nothing was changed"),
            "{}",
            done.err
        );
    }
    let list = "name,quota\nalice,2M\n";
    host.run_with(&["account", "import", "-", "--update"], list)
        .fails(1, "more than a quota of 2 MiB");
    host.run_with(&["account", "import", "-", "--update"], "name,quota\nalice,5M\n").success();
    assert_eq!(host.accounts().named("alice").unwrap().quota_bytes, Some(5 << 20));
    // Who is over it already may be given more, though not yet enough.
    write(&host, 7);
    host.run(&["account", "set", "alice", "--quota", "6M"]).success();
    host.run(&["account", "set", "alice", "--quota", "5M"]).fails(1, "alice takes 7");
    let found = host.run(&["doctor"]);
    assert!(found.out.contains("1 account over it: alice 7"), "{}", found.out);
}

#[test]
fn what_an_archive_brings_counts_and_its_quota_comes_along() {
    let host = with_alice("[class.student]\n");
    write(&host, 3);
    host.run(&["account", "set", "alice", "--quota", "5M"]).success();
    let file = host.path("alice.hermitage").display().to_string();
    // Files alone, out of the account's folder: an export takes nothing of the quota.
    host.run(&["account", "export", "alice", "-o", &file]).success();
    host.run(&["account", "restore", &file, "--name", "again"]).success();
    assert_eq!(host.accounts().named("again").unwrap().quota_bytes, Some(5 << 20));
    host.run(&["account", "set", "alice", "--quota", "default"]).success();
    let file = host.path("2.hermitage").display().to_string();
    host.run(&["account", "export", "alice", "-o", &file]).success();
    host.configure("[machines]\nquota_mib = 2\n[class.student]\n");
    let done = host.run(&["account", "restore", &file, "--name", "third"]).success();
    assert!(done.err.contains("third takes 3") && done.err.contains("of 2 MiB"), "{}", done.err);
}
