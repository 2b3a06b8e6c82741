//! The operator's commands: accounts, keys, console, doctor.

use anyhow::{Context as _, Result, ensure};
use serde_json::Value;

use crate::{
    harness::{Story, account::new_key, host::quote, same, says, ssh::Login},
    runner::{Test, test},
};

pub const TESTS: [Test; 8] = [
    test("account_add_list_show_remove", 240, account_life),
    test("account_commands_can_be_repeated", 240, idempotence),
    test("keys_are_added_and_taken_away", 240, keys),
    test("password_is_changed_and_taken_away", 240, passwords),
    test("removed_account_keeps_its_disk_until_purge", 300, removal),
    test("an_account_is_enlarged_and_renamed", 240, other_size_and_name),
    test("console_shows_the_boot_log", 240, console),
    test("doctor_finds_nothing_wrong_here", 240, doctor),
];

fn account_life(story: &Story) -> Result<()> {
    let host = story.host();
    let alice = story.account_with("alice", &["--disk", "2G"])?;
    let name = alice.name.as_str();
    let listed = |what: &str| -> Result<Option<Value>> {
        let list = host.hermitage_json(what)?;
        let accounts = list["accounts"].as_array().context("no accounts in the list")?;
        Ok(accounts.iter().find(|account| account["name"] == name).cloned())
    };
    let entry = listed("account list")?.context("the new account is not listed")?;
    same("its state", entry["state"].as_str(), Some("enabled"))?;
    let shown = host.hermitage_json(&format!("account show {name}"))?;
    same("its id, listed and shown", &entry["id"], &shown["id"])?;
    let text = host.run(&format!("hermitage account show {name}"))?;
    says("account show", &text, "2 GiB")?;
    says("account show", &text, "ed25519")?;
    alice.output("true")?;
    let shown = host.run(&format!("hermitage account show {name}"))?;
    says("account show after a login", &shown, "exec")?;
    // Each command opens the service's database. A lock that one of them broke would let the next one
    // take the write-ahead log away from under the service.
    let open = host.run("ls -l /proc/$(pgrep -xo hermitage)/fd | grep 'accounts\\.db'")?;
    ensure!(!open.contains("(deleted)"), "the service writes to deleted files: {open}");
    let status = host.run("hermitage status")?;
    says("status", &status, name)?;

    host.run(&format!("hermitage account remove {name} --purge"))?;
    ensure!(listed("account list --removed")?.is_none(), "a purged account is still listed");
    let again = host.try_run(&format!("hermitage account show {name}"))?;
    same("exit status for an unknown account", again.code(), Some(3))?;
    says("what is said of it", &again.err(), name)?;
    // What the story removed it need not remove again.
    story.forget_cleanup();
    Ok(())
}

fn idempotence(story: &Story) -> Result<()> {
    let host = story.host();
    let alice = story.account("alice")?;
    let name = &alice.name;
    for (command, changed) in [
        (format!("account disable {name}"), true),
        (format!("account disable {name}"), false),
        (format!("account enable {name}"), true),
        (format!("account enable {name}"), false),
    ] {
        let answer = host.hermitage_json(&command)?;
        same(&command, answer["changed"].as_bool(), Some(changed))?;
    }
    let again = host.hermitage_json(&format!("account add {name}"))?;
    same("adding it again", again["changed"].as_bool(), Some(false))?;
    let taken = host.try_run(&format!("hermitage account add {name} --disk 7G"))?;
    same("exit status for a name that is taken", taken.code(), Some(4))?;
    says("what is said of it", &taken.err(), name)?;
    for bad in ["Alice", "a b", "../x", "root", "1st", "", "a+b"] {
        let refused = host.try_run(&format!("hermitage account add -- {}", quote(bad)))?;
        ensure!(refused.code() != Some(0), "the name {bad:?} was taken");
    }
    alice.output("true").map(drop)
}

/// What is said of it is what the guest sees: more room and the new host name at the next start from the
/// disk, her files and her user's name as before; and until then her machine is resumed as it was.
fn other_size_and_name(story: &Story) -> Result<()> {
    let host = story.host();
    let alice = story.account_with("alice", &["--disk", "1G"])?;
    let renamed = story.unique("renamed");
    alice.output("echo kept > file")?;
    host.run(&format!("hermitage account stop {}", alice.name))?;
    host.run(&format!("hermitage account set {} --disk 3G", alice.name))?;
    story.afterwards(format!("hermitage account remove {renamed} --purge"));
    host.run(&format!("hermitage account rename {} {renamed}", alice.name))?;
    same("a login with the former name", alice.exec("true")?.code(), Some(255))?;

    let look = "whoami; hostname; cat ~/file; df -m --output=size / | tail -n 1";
    let seen = |name: &str| -> Result<(String, u64)> {
        let text = alice.login_as(name).exec(look)?.success()?;
        let (words, size) = text.trim_end().rsplit_once('\n').context("no size")?;
        Ok((words.to_owned(), size.trim().parse().with_context(|| format!("{size:?}"))?))
    };
    let host_name = |name: &str| name.replace('_', "-");
    let (words, size) = seen(&renamed)?;
    same("resumed", words, format!("{0}\n{1}\nkept", alice.name, host_name(&alice.name)))?;
    ensure!(size < 1024, "the file system grew under a machine that was resumed: {size} MiB");
    let (words, size) = seen(&format!("{renamed}+fresh"))?;
    same("started anew", words, format!("{0}\n{1}\nkept", alice.name, host_name(&renamed)))?;
    ensure!((2500..3072).contains(&size), "its file system has {size} MiB");
    host.run(&format!("hermitage account remove {renamed} --purge"))?;
    // Nobody has the former name any more.
    story.forget_cleanup();
    Ok(())
}

fn keys(story: &Story) -> Result<()> {
    let host = story.host();
    let alice = story.account("alice")?;
    let (second, line) = new_key(story, "laptop")?;
    let login = Login::with_key(story, &alice.name, &second);
    same("before the key is known", login.exec("true")?.code(), Some(255))?;
    let add =
        format!("printf '%s\\n' {} | hermitage account key add {} -", quote(&line), alice.name);
    host.run(&add)?;
    host.run(&add).context("adding it again")?;
    login.exec("true")?.success()?;
    let listed = host.hermitage_json(&format!("account key list {}", alice.name))?;
    same("keys listed", listed["keys"].as_array().map(Vec::len), Some(2))?;

    host.run(&format!("hermitage account key remove {} laptop", alice.name))?;
    same("after the key was taken away", login.exec("true")?.code(), Some(255))?;
    alice.output("true").context("her other key")?;
    let bad =
        host.try_run(&format!("echo not-a-key | hermitage account key add {} -", alice.name))?;
    ensure!(bad.code() != Some(0), "`not-a-key` was taken for a key");
    says("what is said of it", &bad.err(), "standard input")
}

fn passwords(story: &Story) -> Result<()> {
    let alice = story.account("alice")?;
    let with = |password: &str| Login::with_password(story, &alice.name, password).exec("true");
    alice.set_password("the first one")?;
    with("the first one")?.success()?;
    alice.set_password("the second one")?;
    same("the former password", with("the first one")?.code(), Some(255))?;
    with("the second one")?.success()?;
    story.host().run(&format!("hermitage account passwd {} --none", alice.name))?;
    same("after it was taken away", with("the second one")?.code(), Some(255))?;
    let short =
        story.host().try_run(&format!("echo short | hermitage account passwd {}", alice.name))?;
    ensure!(short.code() != Some(0), "a password of five characters was taken");
    alice.output("true").map(drop)
}

fn removal(story: &Story) -> Result<()> {
    let host = story.host();
    let alice = story.account("alice")?;
    let mut shell = alice.shell()?;
    shell.run("echo hers > note; sync")?;
    let kept = format!("{}/removed/{}", story.world.options.state_dir.display(), alice.id);
    host.run(&format!("hermitage account remove {}", alice.name))?;
    shell.wait_end(60).context("her session after the removal")?;
    same("a login of a removed account", alice.exec("true")?.code(), Some(255))?;
    host.run(&format!("test -s {kept}/disk.img")).context("the kept disk")?;
    ensure!(alice.machine()?.is_none(), "the machine still runs");
    host.run(&format!("hermitage account remove {} --purge", alice.name))?;
    host.run(&format!("test ! -e {kept}")).context("the purged disk")?;
    let status = host.run("hermitage status --json")?;
    ensure!(!status.contains(&alice.id.to_string()), "the service still tells of her: {status}");
    story.forget_cleanup();
    Ok(())
}

fn console(story: &Story) -> Result<()> {
    let alice = story.account("alice")?;
    let stopped = story.host().try_run(&format!("hermitage console {}", alice.name))?;
    ensure!(stopped.code() != Some(0), "a console without a machine");
    says("what is said of it", &stopped.err(), &alice.name)?;
    let mut shell = alice.shell()?;
    shell.run("echo from the inside | sudo tee /dev/ttyS0")?;
    let shown = story
        .host()
        .try_run(&format!("sleep 4 | timeout 20 hermitage console {} 2>&1", alice.name))?;
    says("the console", &shown.out(), "Linux version")?;
    says("the console", &shown.out(), "from the inside")
}

fn doctor(story: &Story) -> Result<()> {
    let ended = story.host().try_run("hermitage doctor --json")?;
    let report: Value = serde_json::from_str(&ended.out()).with_context(|| {
        format!("`hermitage doctor --json` printed {:?} {:?}", ended.out(), ended.err())
    })?;
    ensure!(ended.code() == Some(0), "doctor finds faults on a machine that serves: {report}");
    ensure!(
        report.to_string().to_lowercase().contains("kvm"),
        "doctor does not tell of KVM: {report}"
    );
    Ok(())
}
