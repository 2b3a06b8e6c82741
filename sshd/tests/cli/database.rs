//! The database under operators' feet: copies, damage, going back, and commands that are killed.

use crate::host::{Host, KEYS};
use hermitage_storage::accounts::Accounts;
use serde_json::{Value, json};
use std::fs;
use std::path::PathBuf;
use std::process::Stdio;
use std::time::{Duration, Instant};

fn with_accounts(count: usize) -> Host {
    let host = Host::new();
    let names: Vec<_> = (0..count).map(|number| format!("user{number}\n")).collect();
    let list = format!("name\n{}", names.concat());
    host.run_with(&["account", "import", "-"], &list).success();
    host
}

fn copy_path(host: &Host) -> PathBuf {
    let done = host.json(&["database", "backup"]);
    PathBuf::from(done["path"].as_str().unwrap())
}

#[test]
fn a_damaged_database_is_found_and_a_copy_takes_its_place() {
    let host = with_accounts(200);
    assert_eq!(host.json(&["database", "check"])["sound"], true);
    let copy = copy_path(&host);
    host.run(&["account", "add", "later"]).success();
    let path = host.state().database();
    let mut bytes = fs::read(&path).unwrap();
    let middle = bytes.len() / 2;
    bytes[middle..middle + 3000].fill(0x5a);
    fs::write(&path, &bytes).unwrap();

    let checked = host.run(&["database", "check", "--json"]);
    let object: Value = serde_json::from_str(&checked.out).unwrap();
    assert_eq!((checked.code, &object["sound"]), (1, &json!(false)), "{}", checked.out);
    host.run(&["database", "check"]).fails_saying("hermitage database restore");
    host.run(&["doctor"]).fails_saying("hermitage database restore");
    host.run(&["database", "backup"]).fails(1, "damaged");

    let restored = host.json(&["database", "restore"]);
    assert_eq!((&restored["restored"], &restored["accounts"]), (&json!(copy), &json!(200)));
    assert_eq!(host.json(&["database", "check"])["sound"], true);
    assert_eq!(host.json(&["account", "list"])["accounts"].as_array().unwrap().len(), 200);
    host.run(&["account", "show", "later"]).fails(3, "no account");
    let kept = PathBuf::from(restored["replaced"].as_str().unwrap());
    assert_eq!(fs::read(&kept).unwrap(), bytes);
    let listed = host.json(&["database", "list"]);
    let sound: Vec<_> =
        listed["copies"].as_array().unwrap().iter().map(|copy| &copy["sound"]).collect();
    assert_eq!(sound, [&json!(false), &json!(true)], "{listed}");
    host.run(&["database", "restore", kept.to_str().unwrap()]).fails(1, "is damaged");
}

#[test]
fn a_restore_is_for_when_nobody_uses_the_database() {
    let host = with_accounts(1);
    host.run(&["database", "restore"]).fails(3, "no sound copy");
    let copy = copy_path(&host);
    let lock = host.state().lock_service().unwrap().unwrap();
    host.run(&["database", "restore"]).fails(1, "stop it first");
    drop(lock);
    host.run(&["database", "restore", "yesterday.db"]).fails(3, "yesterday.db");
    let database = host.state().database().display().to_string();
    host.run(&["database", "restore", &database]).fails(1, "the database itself");
    host.run(&["account", "add", "later"]).success();
    // Something of hers is on the disk.
    let later = host.accounts().named("later").unwrap().id;
    fs::create_dir(host.state().account_dir(later)).unwrap();
    let name = copy.file_name().unwrap().to_str().unwrap();
    let restored = host.run_soon(&["database", "restore", name, "--json"]).out;
    let restored: Value = serde_json::from_str(&restored).unwrap();
    assert_eq!(restored["unknown_disks"], json!([later.to_string()]));
    // And back: nothing is lost by a restore.
    let replaced = restored["replaced"].as_str().unwrap();
    host.run(&["database", "restore", replaced]).success();
    assert_eq!(host.json(&["account", "show", "later"])["id"], json!(later));
}

#[test]
fn a_copy_elsewhere_is_complete_and_replaces_nothing() {
    let host = with_accounts(3);
    let target = host.path("elsewhere.db").display().to_string();
    host.run(&["database", "backup", &target]).success();
    host.run(&["database", "backup", &target]).fails(1, "elsewhere.db");
    assert_eq!(host.json(&["database", "check", &target])["sound"], true);
    fs::remove_dir_all(host.path("state")).unwrap();
    assert_eq!(host.json(&["database", "restore", &target])["accounts"], 3);
    assert_eq!(host.json(&["account", "list"])["accounts"].as_array().unwrap().len(), 3);
}

/// Every command that writes, ended by SIGKILL at whatever moment: the database opens clean, the account is
/// as before the command or as after it, and the same command goes through.
#[test]
fn a_command_that_is_killed_leaves_a_sound_database() {
    let host = Host::new();
    host.configure("[class.student]\nsessions = 3\n");
    host.install_vmm(1);
    let image = host.image().display().to_string();
    host.run(&["base", "build", "--image", &image]).success();
    host.run_with(&["account", "add", "alice", "--disk", "1G", "--key", "-"], KEYS).success();
    let list: String = (0..40).map(|number| format!("listed{number},1G\n")).collect();
    let list = format!("name,disk\n{list}");
    let key = KEYS.lines().find(|line| line.starts_with("ssh-ed25519")).unwrap();
    let fingerprint =
        host.json(&["account", "key", "list", "alice"])["keys"][0]["fingerprint"].clone();
    let fingerprint = fingerprint.as_str().unwrap();
    let commands: &[(&[&str], &str)] = &[
        (&["account", "add", "bob", "--disk", "1G", "--key", "-"], KEYS),
        (&["account", "import", "-"], &list),
        (&["account", "set", "alice", "--class", "student", "--disk", "2G"], ""),
        (&["account", "expire", "alice", "2099-01-01"], ""),
        (&["account", "disable", "alice", "--until", "2099-01-01"], ""),
        (&["account", "enable", "alice"], ""),
        (&["account", "policy", "alice", "keep"], ""),
        (&["account", "hold", "alice", "2h"], ""),
        (&["account", "passwd", "alice"], "a long pass phrase\n"),
        (&["account", "key", "remove", "alice", fingerprint], ""),
        (&["account", "key", "add", "alice", "-"], key),
        (&["account", "rename", "alice", "al"], ""),
        (&["account", "rename", "al", "alice"], ""),
        (&["database", "backup"], ""),
        (&["account", "remove", "bob", "--purge"], ""),
    ];
    let mut killed = 0;
    let whole = time_of_a_command(&host);
    let moments = commands.len() as u32 * 3;
    for (number, (arguments, input)) in commands.iter().enumerate() {
        // Moments all over what such a command takes here, others in each command.
        for round in 0..3 {
            let mut child = host
                .command(arguments)
                .stdin(Stdio::piped())
                .stdout(Stdio::null())
                .stderr(Stdio::null())
                .spawn()
                .unwrap();
            let begun = Instant::now();
            let _ = std::io::Write::write_all(&mut child.stdin.take().unwrap(), input.as_bytes());
            let moment = whole * (round * commands.len() as u32 + number as u32 + 1) / moments;
            std::thread::sleep(moment.saturating_sub(begun.elapsed()));
            child.kill().unwrap();
            killed += usize::from(child.wait().unwrap().code().is_none());
            let accounts = Accounts::open(&host.state().database()).unwrap();
            assert!(accounts.damage().unwrap().is_empty(), "{arguments:?}");
            let now = accounts.list(true).unwrap();
            assert!(now.iter().any(|account| ["alice", "al"].contains(&account.name.as_str())));
            let listed = now.iter().filter(|account| account.name.starts_with("listed")).count();
            assert!([0, 40].contains(&listed), "{listed} accounts of the list after {arguments:?}");
        }
        // What has been done before the kill is not found again by these.
        let repeated = host.run_with(arguments, input);
        let gone = matches!(arguments[1], "rename" | "remove" | "key");
        assert!(
            repeated.code == 0 || gone && repeated.code == 3,
            "{arguments:?}: {}",
            repeated.err
        );
        for account in host.accounts().list(false).unwrap() {
            assert!(host.state().disk(account.id).exists(), "{} after {arguments:?}", account.name);
        }
    }
    assert!(killed >= commands.len(), "{killed} were killed: the others were quicker");
    let left = fs::read_dir(host.state().accounts_dir()).unwrap().count();
    assert_eq!(left, host.accounts().list(false).unwrap().len(), "folders that are nobody's");
}

/// That reads the database and writes nothing: those that write take longer.
fn time_of_a_command(host: &Host) -> Duration {
    let time = |_| {
        let begun = Instant::now();
        host.run(&["account", "show", "alice"]).success();
        begun.elapsed()
    };
    (0..5).map(time).min().unwrap()
}

/// So many rows that the middle of them is met.
#[test]
fn a_list_whose_import_is_killed_is_taken_whole_or_not_at_all() {
    const ROWS: usize = 300;
    let host = Host::new();
    let list = |round: u32| {
        let names: String = (0..ROWS).map(|row| format!("r{round}-{row}\n")).collect();
        format!("name\n{names}")
    };
    let begun = Instant::now();
    host.run_with(&["account", "import", "-"], &list(0)).success();
    let whole = begun.elapsed();
    let (mut none, mut all) = (0, 0);
    for round in 1..=20 {
        let mut child = host
            .command(&["account", "import", "-"])
            .stdin(Stdio::piped())
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .spawn()
            .unwrap();
        let begun = Instant::now();
        std::io::Write::write_all(&mut child.stdin.take().unwrap(), list(round).as_bytes())
            .unwrap();
        std::thread::sleep((whole * round / 20).saturating_sub(begun.elapsed()));
        let _ = child.kill();
        child.wait().unwrap();
        let accounts = host.accounts();
        assert!(accounts.damage().unwrap().is_empty());
        let prefix = format!("r{round}-");
        let taken = accounts.list(true).unwrap();
        match taken.iter().filter(|account| account.name.starts_with(&prefix)).count() {
            0 => none += 1,
            ROWS => all += 1,
            some => panic!("{some} of {ROWS} accounts of the list are there"),
        }
    }
    assert!(none > 0, "none was killed early enough, {all} were not");
}

#[test]
fn two_admins_at_once_are_one_after_the_other() {
    let host = with_accounts(1);
    let lists = ["a", "b"].map(|admin| {
        let own: String = (0..20).map(|number| format!("{admin}{number},3\n")).collect();
        format!("name,sessions\n{own}shared,3\n")
    });
    std::thread::scope(|scope| {
        for list in &lists {
            scope.spawn(|| {
                for _ in 0..5 {
                    // One may meet what the other made between its look and its turn.
                    let done = host.run_with(&["account", "import", "-"], list);
                    assert!(done.code == 0 || done.err.contains("\"shared\""), "{}", done.err);
                }
                for sessions in ["4", "5"] {
                    host.run(&["account", "set", "user0", "--sessions", sessions]).success();
                    host.run_with(&["account", "key", "add", "user0", "-"], KEYS).success();
                }
            });
        }
    });
    let accounts = host.accounts();
    assert_eq!(accounts.list(true).unwrap().len(), 42);
    let user = accounts.named("user0").unwrap();
    assert_eq!((user.max_sessions, accounts.keys(user.id).unwrap().len()), (Some(5), 7));
    assert!(accounts.damage().unwrap().is_empty());
}
