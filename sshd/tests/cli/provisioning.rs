//! Lists of accounts, classes, ends and names: what an operator does to many accounts, or later.

use crate::host::{Host, KEYS};
use hermitage::time::now;
use hermitage_storage::accounts::{Policy, verify_password};
use serde_json::{Value, json};
use std::fs;
use std::io::Read;
use std::time::{Duration, Instant};

const CLASSES: &str = "[class.student]\ndisk = \"2GiB\"\nsessions = 3\npolicy = \"discard\"\n\
                       [class.staff]\nstreams = 7\nlinger = 5\n";

fn with_classes() -> Host {
    let host = Host::new();
    host.configure(CLASSES);
    host
}

/// One public key for each number.
fn key(number: u32) -> String {
    use base64ct::{Base64, Encoding};
    let mut blob = Vec::new();
    for field in [&b"ssh-ed25519"[..], &[[7; 28].as_slice(), &number.to_be_bytes()].concat()] {
        blob.extend((field.len() as u32).to_be_bytes());
        blob.extend(field);
    }
    format!("ssh-ed25519 {} user{number}@laptop", Base64::encode_string(&blob))
}

fn thousand(change: impl Fn(u32, &str) -> String) -> String {
    let mut list = "name,key,class,expires\n".to_owned();
    for number in 0..1000 {
        let line = format!("user{number},{},student,2099-06-30", key(number));
        list.push_str(&change(number, &line));
        list.push('\n');
    }
    list
}

#[test]
fn a_thousand_accounts_are_made_at_once_and_again_without_a_change() {
    let host = with_classes();
    let list = thousand(|_, line| line.to_owned());
    let import = |arguments: &[&str]| {
        let arguments = [&["account", "import", "-", "--json"], arguments].concat();
        let done = host.run_with(&arguments, &list).success();
        serde_json::from_str::<Value>(&done.out).unwrap()
    };
    let dry = import(&["--dry-run"]);
    assert_eq!((&dry["added"], &dry["dry_run"]), (&json!(1000), &json!(true)));
    assert_eq!(dry["lines"][699]["outcome"], "to be added");
    assert_eq!(host.accounts().list(true).unwrap().len(), 0);

    let begun = Instant::now();
    let done = import(&[]);
    let took = begun.elapsed();
    assert!(took < Duration::from_secs(5), "{took:?}");
    assert_eq!(done["added"], 1000);
    assert_eq!(
        done["lines"][999],
        json!({ "line": 1001, "account": "user999", "outcome": "added" })
    );
    let shown = host.json(&["account", "show", "user7"]);
    assert_eq!((&shown["class"], &shown["limits"]["max_sessions"]), (&json!("student"), &json!(3)));
    assert_eq!(shown["keys"][0]["comment"], "user7@laptop");
    assert_eq!(shown["expires"], "2099-06-30T00:00:00Z");

    let again = import(&[]);
    assert_eq!((&again["added"], &again["already_so"]), (&json!(0), &json!(1000)));
}

#[test]
fn one_wrong_line_changes_nothing_and_every_wrong_line_is_told() {
    let host = with_classes();
    let bad = |number, line: &str| match number {
        // The first line names the columns, and counting begins with one.
        698 => line.replace("student", "studnet"),
        900 => line.replace("user900,", "User900,"),
        950 => line.replace("user950,", "user949,"),
        _ => line.to_owned(),
    };
    let list = thousand(bad);
    let done = host.run_with(&["account", "import", "-"], &list);
    assert_eq!((done.code, done.out.as_str()), (1, ""));
    for (line, words) in [(700, "no class \"studnet\""), (902, "capital letter"), (952, "line 951")]
    {
        let said = done.err.lines().find(|said| said.starts_with(&format!("line {line}: ")));
        assert!(said.unwrap().contains(words), "{}", done.err);
    }
    assert!(done.err.contains("3 faults in the list; nothing was changed"), "{}", done.err);
    assert_eq!(host.accounts().list(true).unwrap().len(), 0);
    let done = host.run_with(&["account", "import", "-", "--json"], &list);
    let error: Value = serde_json::from_str(&done.err).unwrap();
    assert_eq!(error["lines"][0]["line"], 700);
    assert_eq!(error["lines"].as_array().unwrap().len(), 3);
}

#[test]
fn a_list_tells_what_differs_and_changes_it_if_asked() {
    let host = with_classes();
    let run = |list: &str, arguments: &[&str]| {
        host.run_with(&[&["account", "import", "-"], arguments].concat(), list)
    };
    let first = format!("name,key,class,password\nalice,{},student,first password\n", key(1));
    run(&first, &[]).success();
    let alice = host.accounts().named("alice").unwrap();
    assert!(verify_password(alice.password.as_deref(), b"first password"));
    assert!(run(&first, &[]).success().out.contains("line 2: alice: already so"));
    assert_eq!(host.accounts().named("alice").unwrap(), alice, "not even a new hash");

    let second = format!(
        "name,key,class,password,expires,disabled\nalice,{},staff,other password,2099-01-01,yes\n",
        key(2)
    );
    let told = run(&second, &[]);
    for words in
        ["class is student, not staff", "key SHA256:", "password", "end is never", "--update"]
    {
        assert!(told.err.contains(words), "{words}: {}", told.err);
    }
    assert_eq!((told.code, host.accounts().named("alice").unwrap()), (1, alice));
    assert!(run(&second, &["--update"]).success().out.contains("alice: changed"));
    let shown = host.json(&["account", "show", "alice"]);
    assert_eq!((&shown["class"], &shown["state"]), (&json!("staff"), &json!("disabled")));
    assert_eq!(shown["keys"].as_array().unwrap().len(), 2, "keys are added only");
    let alice = host.accounts().named("alice").unwrap();
    assert!(verify_password(alice.password.as_deref(), b"other password"));
    assert!(run(&second, &["--update"]).success().out.contains("already so"));

    let disk = "name,disk\nalice,50GiB\n";
    run(disk, &["--update"]).fails(1, "account set alice --disk 50GiB");
    let other = format!("name,key\nalice,\"restrict {}\"\n", key(2));
    run(&other, &["--update"]).fails(1, "other options");
}

#[test]
fn a_disk_that_can_not_be_made_undoes_the_list() {
    let host = with_classes();
    host.install_vmm(1);
    let image = host.image().display().to_string();
    host.run(&["base", "build", "--image", &image]).success();
    let list = "name,disk\nalice,1G\nbob,4096\n";
    host.run_with(&["account", "import", "-"], list).fails(1, "no account was made");
    assert!(host.accounts().list(true).unwrap().is_empty());
    assert_eq!(fs::read_dir(host.state().accounts_dir()).unwrap().count(), 0);
    assert_eq!(fs::read_dir(host.state().removed_accounts_dir()).unwrap().count(), 0);
    host.run_with(&["account", "import", "-"], "name,class\nalice,student\n").success();
    let alice = host.accounts().named("alice").unwrap();
    assert_eq!(fs::metadata(host.state().disk(alice.id)).unwrap().len(), 2 << 30);
}

#[test]
fn a_class_counts_where_the_account_has_nothing_of_its_own() {
    let host = with_classes();
    let added = host.json(&["account", "add", "alice", "--class", "student", "--sessions", "9"]);
    assert_eq!(added["limits"]["max_sessions"], 9);
    assert_eq!(added["limits"]["disk_bytes"], 2u64 << 30);
    assert_eq!((&added["policy"], &added["own"]["policy"]), (&json!("discard"), &Value::Null));
    assert_eq!(added["own"]["max_sessions"], 9);
    let text = host.run(&["account", "show", "alice"]).success().out;
    assert!(text.contains("at most 9 (its own)") && text.contains("class student"), "{text}");
    assert!(host.run(&["account", "list"]).success().out.contains("student"));

    let set = host.json(&["account", "set", "alice", "--class", "staff", "--sessions", "default"]);
    assert_eq!(set["changed"], true);
    assert_eq!(
        (&set["limits"]["max_sessions"], &set["limits"]["max_streams"]),
        (&json!(32), &json!(7))
    );
    assert_eq!(set["policy"], "save");
    let again = ["account", "set", "alice", "--class", "staff", "--sessions", "default"];
    assert_eq!(host.json(&again)["changed"], false);
    host.run(&["account", "set", "alice", "--class", "pupil"]).fails(3, "staff, student");
    host.run(&["account", "set", "alice"]).fails(1, "nothing is asked for");
    host.run(&["account", "set", "nobody", "--class", "none"]).fails(3, "no account");
    host.run(&["account", "set", "alice", "--sessions", "0"]).fails(2, "1 or more");

    // A class that was taken out of the configuration takes nobody's account away.
    host.configure("");
    let text = host.run(&["account", "show", "alice"]).success().out;
    assert!(text.contains("staff, which the configuration does not have"), "{text}");
    assert_eq!(host.json(&["account", "show", "alice"])["limits"]["max_streams"], 128);
}

#[test]
fn adding_again_says_what_is_so_and_what_is_not() {
    let host = with_classes();
    let key_one = key(1);
    let add = ["account", "add", "alice", "--key", "-", "--class", "student"];
    let run =
        |arguments: &[&str], input: &str| host.run_with(&[&add[..], arguments].concat(), input);
    assert!(run(&[], &key_one).success().out.contains("is added"));
    let again = run(&["--json"], &key_one).success();
    assert_eq!(serde_json::from_str::<Value>(&again.out).unwrap()["changed"], false);
    assert!(run(&[], &key_one).success().out.contains("is there already"));
    let other = run(&["--sessions", "9", "--expires", "2099-01-01"], &key(2));
    other.fails(4, "account set alice --sessions 9 --expires 2099-01-01T00:00:00Z");
    run(&[], &key(2)).fails(4, "1 key is given here not among its keys");
    host.run_with(&["account", "add", "alice", "--password-stdin"], "a pass phrase\n")
        .fails(4, "account passwd alice");
    let alice = host.accounts().named("alice").unwrap();
    assert_eq!((alice.max_sessions, alice.expires, alice.password), (None, None, None));
}

#[test]
fn an_end_is_set_shown_and_taken_back() {
    let host = Host::new();
    host.run(&["account", "add", "alice", "--expires", "90d"]).success();
    let expires = host.accounts().named("alice").unwrap().expires.unwrap() - now();
    assert!((90 * 86_400 - 60..=90 * 86_400).contains(&expires), "{expires}");
    let set = host.json(&["account", "expire", "alice", "2099-06-30"]);
    let wanted = json!({ "account": "alice", "expires": "2099-06-30T00:00:00Z", "changed": true });
    assert_eq!(set, wanted);
    let text = host.run(&["account", "show", "alice"]).success().out;
    assert!(text.contains("enabled, expires 2099-06-30 00:00 UTC"), "{text}");
    let over = host.run(&["account", "expire", "alice", "2020-01-01"]).success().out;
    assert!(over.contains("is expired since 2020-01-01"), "{over}");
    assert_eq!(host.json(&["account", "show", "alice"])["state"], "expired");
    assert!(host.run(&["account", "list"]).success().out.contains("expired"));
    // It is open, but that does not help.
    let enabled = host.run(&["account", "enable", "alice"]).success().out;
    assert!(enabled.contains("account expire alice never"), "{enabled}");
    assert_eq!(host.json(&["account", "expire", "alice", "never"])["expires"], Value::Null);
    assert_eq!(host.json(&["account", "show", "alice"])["state"], "enabled");
    host.run(&["account", "expire", "alice", "soon"]).fails(2, "2027-06-30");
    host.run(&["account", "expire", "bob", "never"]).fails(3, "no account");
}

#[test]
fn a_closed_account_opens_again_by_itself() {
    let host = Host::new();
    host.run(&["account", "add", "alice"]).success();
    let disable = host.json(&["account", "disable", "alice", "--until", "2099-01-01"]);
    assert_eq!(disable["disabled_until"], "2099-01-01T00:00:00Z");
    let text = host.run(&["account", "show", "alice"]).success().out;
    assert!(text.contains("disabled until 2099-01-01 00:00 UTC"), "{text}");
    host.run(&["account", "disable", "alice", "--until", "2020-01-01"]).fails(1, "is past");
    host.run(&["account", "disable", "alice", "--until", "1s"]).success();
    std::thread::sleep(Duration::from_millis(1100));
    assert_eq!(host.json(&["account", "show", "alice"])["state"], "enabled");
    assert_eq!(host.json(&["account", "show", "alice"])["disabled_until"], Value::Null);
}

#[test]
fn keys_have_labels_and_ends() {
    let host = Host::new();
    host.run(&["account", "add", "alice"]).success();
    let add = ["account", "key", "add", "alice", "-"];
    let more =
        ["--label", "a borrowed laptop", "--expires", "2099-06-30T18:00", "--options", "no-pty"];
    host.run_with(&[&add[..], &more].concat(), &key(1)).success();
    let key_one = &host.json(&["account", "key", "list", "alice"])["keys"][0];
    assert_eq!(key_one["comment"], "a borrowed laptop");
    assert_eq!(key_one["expires"], "2099-06-30T18:00:00Z");
    assert_eq!(key_one["options"], "no-pty,expiry-time=\"20990630180000\"");
    let own = format!("expiry-time=\"20300101\" {}", key(2));
    host.run_with(&[&add[..], &["--expires", "1d"]].concat(), &own).fails(1, "twice");
    host.run_with(&add, &own).success();
    let second = &host.json(&["account", "key", "list", "alice"])["keys"][1];
    assert_eq!(second["expires"], "2030-01-01T00:00:00Z");
    host.run_with(&add, KEYS).success();
    assert_eq!(host.json(&["account", "key", "list", "alice"])["keys"][3]["expires"], Value::Null);
}

#[test]
fn a_disk_is_enlarged_and_never_cut_off() {
    let host = Host::new();
    host.install_vmm(1);
    let image = host.image().display().to_string();
    host.run(&["base", "build", "--image", &image]).success();
    host.run(&["account", "add", "alice", "--disk", "1G"]).success();
    let alice = host.accounts().named("alice").unwrap();
    let disk = host.state().disk(alice.id);
    let start = || {
        let mut bytes = [0; 8192];
        fs::File::open(&disk).unwrap().read_exact(&mut bytes).unwrap();
        bytes
    };
    let before = start();
    let set = host.json(&["account", "set", "alice", "--disk", "2GiB"]);
    assert_eq!(set["limits"]["disk_bytes"], 2u64 << 30);
    assert_eq!(fs::metadata(&disk).unwrap().len(), 2 << 30);
    assert_eq!(start(), before);
    assert_eq!(host.json(&["account", "set", "alice", "--disk", "2GiB"])["changed"], false);
    host.run(&["account", "set", "alice", "--disk", "1GiB"]).fails(1, "2 GiB (");
    host.run(&["account", "set", "alice", "--disk", "2147487745"]).fails(1, "4096");
    // While a machine has it.
    let lock = hermitage_storage::disk::open_locked(&disk).unwrap();
    host.run(&["account", "set", "alice", "--disk", "3G", "--sessions", "2"])
        .fails(1, "account stop alice");
    let alice = host.accounts().named("alice").unwrap();
    assert_eq!((alice.disk_bytes, alice.max_sessions), (2 << 30, None), "all or nothing");
    drop(lock);
    host.run_soon(&["account", "set", "alice", "--disk", "3G", "--policy", "keep"]);
    assert_eq!(host.accounts().named("alice").unwrap().policy, Some(Policy::Keep));
}

#[test]
fn a_renamed_account_is_the_same_account() {
    let host = Host::new();
    host.run_with(&["account", "add", "alice", "--key", "-"], KEYS).success();
    host.run(&["account", "add", "bob"]).success();
    let before = host.json(&["account", "show", "alice"]);
    let renamed = host.json(&["account", "rename", "alice", "al_ice"]);
    let wanted = json!({
        "account": "al_ice", "former": "alice", "hostname": "al-ice", "guest_name": "alice",
        "changed": true,
    });
    assert_eq!(renamed, wanted);
    let after = host.json(&["account", "show", "al_ice"]);
    assert_eq!((&after["id"], &after["keys"]), (&before["id"], &before["keys"]));
    let text = host.run(&["account", "show", "al_ice"]).success().out;
    assert!(text.contains("the user is alice"), "{text}");
    host.run(&["account", "rename", "al_ice", "bob"]).fails(4, "already an account \"bob\"");
    host.run(&["account", "rename", "alice", "al_ice"]).fails(3, "was it renamed before?");
    host.run(&["account", "rename", "al_ice", "Alice"]).fails(1, "capital letter");
    host.run(&["account", "rename", "nobody", "carol"]).fails(3, "no account \"nobody\"");
    assert_eq!(host.json(&["account", "rename", "al_ice", "al_ice"])["changed"], false);
}

#[test]
fn an_invitation_is_made_made_anew_and_taken_back() {
    let host = Host::new();
    host.run(&["account", "add", "alice"]).success();
    let first = host.json(&["account", "invite", "alice", "--expires", "24h"]);
    let second = host.json(&["account", "invite", "alice"]);
    let code = |object: &Value| object["code"].as_str().unwrap().to_owned();
    assert_ne!(code(&first), code(&second));
    let (accounts, now) = (host.accounts(), now());
    let alice = accounts.named("alice").unwrap().id;
    assert!(!accounts.is_invitation(alice, &code(&first), now).unwrap());
    assert!(accounts.is_invitation(alice, &code(&second), now).unwrap());
    assert!(!accounts.is_invitation(alice, &code(&second), now + 8 * 86_400).unwrap());
    assert!(host.json(&["account", "show", "alice"])["invited_until"].is_string());
    let text = host.run(&["account", "show", "alice"]).success().out;
    assert!(text.contains("invited   by a code"), "{text}");
    let database = fs::read(host.state().database()).unwrap();
    let shown = code(&second);
    for part in [shown.as_bytes(), shown.replace('-', "").as_bytes()] {
        assert!(!database.windows(part.len()).any(|window| window == part), "kept as it is");
    }
    assert_eq!(host.json(&["account", "invite", "alice", "--revoke"])["changed"], true);
    assert_eq!(host.json(&["account", "invite", "alice", "--revoke"])["changed"], false);
    assert!(!accounts.is_invitation(alice, &code(&second), now).unwrap());
    host.run(&["account", "invite", "alice", "--expires", "2020-01-01"]).fails(1, "is past");
    host.run(&["account", "invite", "bob"]).fails(3, "no account");
    host.run(&["account", "disable", "alice"]).success();
    let noted = host.run(&["account", "invite", "alice"]).success();
    assert!(noted.err.contains("this account is disabled"), "{}", noted.err);
}
