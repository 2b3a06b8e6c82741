//! What programs read of the commands with `--json`: the names of fields and the types of their values, as
//! they are written down in `shapes.txt`. A field may come; one that goes, or changes its type, breaks
//! somebody's script. `HERMITAGE_WRITE_SHAPES=1` writes the file anew.

use crate::host::{Host, KEYS};
use serde_json::Value;
use std::collections::{BTreeMap, BTreeSet};
use std::fmt::Write;

type Types = BTreeMap<String, BTreeSet<&'static str>>;

fn look(value: &Value, path: &str, types: &mut Types) {
    let name = match value {
        Value::Null => "null",
        Value::Bool(_) => "boolean",
        Value::Number(_) => "number",
        Value::String(_) => "string",
        Value::Array(_) => "array",
        Value::Object(_) => "object",
    };
    types.entry(path.to_owned()).or_default().insert(name);
    match value {
        Value::Array(items) => {
            items.iter().for_each(|item| look(item, &format!("{path}[]"), types))
        }
        Value::Object(fields) => {
            fields.iter().for_each(|(name, field)| look(field, &format!("{path}.{name}"), types));
        }
        _ => {}
    }
}

#[test]
fn programs_find_the_fields_they_know() {
    let host = Host::new();
    host.configure("[class.student]\nsessions = 3\n");
    let base = host.install_vmm(1);
    let image = host.image().display().to_string();
    host.run(&["base", "build", "--image", &image]).success();
    let mut shapes: BTreeMap<String, Types> = BTreeMap::new();
    let mut see = |what: &str, arguments: &[&str], input: &str| {
        let done = host.run_with(&[arguments, &["--json"]].concat(), input).success();
        look(&serde_json::from_str(&done.out).unwrap(), "", shapes.entry(what.into()).or_default());
    };
    let end =
        ["--class", "student", "--expires", "2099-01-01", "--linger", "5", "--max-linger", "5"];
    let own = ["--sessions", "3", "--streams", "3", "--policy", "keep", "--disk", "1G"];
    let add = ["account", "add", "alice", "--key", "-"];
    see("account add", &[&add[..], &end, &own].concat(), KEYS);
    see("account add", &["account", "add", "bob", "--disk", "1G"], "");
    host.save_on("alice", &base);
    log_in(&host);
    see("account hold", &["account", "hold", "alice", "2h"], "");
    see("account show", &["account", "show", "alice"], "");
    see("account usage", &["account", "usage", "alice"], "");
    see("account usage", &["account", "usage", "bob"], "");
    see("account usage of all", &["account", "usage"], "");
    see("account hold", &["account", "hold", "alice", "--off"], "");
    see("account disable", &["account", "disable", "bob", "--until", "2099-01-01"], "");
    see("account list", &["account", "list"], "");
    see("account disable", &["account", "disable", "bob"], "");
    see("account enable", &["account", "enable", "bob"], "");
    see("account show", &["account", "show", "bob"], "");
    see("account invite", &["account", "invite", "bob"], "");
    see("account show", &["account", "show", "bob"], "");
    see("account invite", &["account", "invite", "bob", "--revoke"], "");
    see("account set", &["account", "set", "bob", "--sessions", "2"], "");
    see("account expire", &["account", "expire", "bob", "2099-01-01"], "");
    see("account expire", &["account", "expire", "bob", "never"], "");
    see("account policy", &["account", "policy", "bob", "keep", "--linger", "5"], "");
    see("account policy", &["account", "policy", "bob", "--max-linger", "5"], "");
    see("account passwd", &["account", "passwd", "bob"], "a long pass phrase\n");
    see("account rename", &["account", "rename", "bob", "rob"], "");
    see("account stop", &["account", "stop", "alice"], "");
    see("account reset", &["account", "reset", "alice"], "");
    see("account factory-reset", &["account", "factory-reset", "alice", "--yes"], "");
    see("account import", &["account", "import", "-"], "name,disk\ncarol,1G\n");
    let dated = KEYS.lines().find(|line| line.starts_with("ssh-ed25519")).unwrap();
    see("account key add", &["account", "key", "add", "rob", "-", "--expires", "1d"], dated);
    see("account key add", &["account", "key", "add", "carol", "-"], KEYS);
    see("account key list", &["account", "key", "list", "alice"], "");
    see("account key list", &["account", "key", "list", "rob"], "");
    see("account key remove", &["account", "key", "remove", "carol", "alice@laptop"], "");
    see("account remove", &["account", "remove", "carol"], "");
    see("account list", &["account", "list", "--removed"], "");
    see("account remove", &["account", "remove", "carol", "--purge"], "");
    see("database backup", &["database", "backup"], "");
    see("database list", &["database", "list"], "");
    see("database check", &["database", "check"], "");
    see("database restore", &["database", "restore"], "");

    let mut text = String::new();
    for (command, types) in &shapes {
        writeln!(text, "{command}").unwrap();
        for (path, types) in types.iter().filter(|(path, _)| !path.is_empty()) {
            let types: Vec<_> = types.iter().copied().collect();
            writeln!(text, "  {path} {}", types.join("|")).unwrap();
        }
    }
    let file = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/cli/shapes.txt");
    if std::env::var_os("HERMITAGE_WRITE_SHAPES").is_some() {
        std::fs::write(file, &text).unwrap();
    }
    let known = std::fs::read_to_string(file).unwrap_or_default();
    let missing: Vec<_> = known.lines().filter(|line| !text.lines().any(|l| l == *line)).collect();
    assert!(missing.is_empty(), "what programs know is gone: {missing:#?}");
    if text != known {
        eprintln!("fields came that are not written down yet: HERMITAGE_WRITE_SHAPES=1 does it");
    }
}

/// As the service records it.
fn log_in(host: &Host) {
    use hermitage_storage::accounts::{Intent, MachineState, NewSession, Used, day_of};
    let accounts = host.accounts();
    let account = accounts.named("alice").unwrap().id;
    let new = NewSession { account, source: "192.0.2.1:1", kind: "shell", login: "password" };
    let first = accounts.session_started(&new).unwrap();
    accounts.session_ended(first, "exit status 0", None).unwrap();
    accounts.session_started(&new).unwrap();
    let mut accounts = accounts;
    let used = Used { disk_bytes: Some(4096), awake_s: 60, ..Used::default() };
    accounts.add_usage(day_of(hermitage::time::now()), &[(account, used)]).unwrap();
    let saved = Intent {
        account,
        state: MachineState::Saved,
        pid: None,
        base: None,
        detail: Some("its memory is saved".into()),
        terminals: None,
        paused: None,
        since: 0,
    };
    accounts.record_intent(&saved).unwrap();
}
