//! What people do with OpenSSH's own clients, and what is built on them: everyday habits, files with
//! awkward names, rsync, tar, git.

use std::{
    fs::{self, File},
    os::unix::fs::{PermissionsExt as _, symlink},
    path::Path,
    process::Command,
    time::{Duration, SystemTime},
};

use anyhow::{Context as _, Result, ensure};

use super::forwarding::{forward, key_agent};
use crate::{
    harness::{
        Story,
        host::quote,
        process::{self, Input},
        same, says,
        ssh::Login,
    },
    runner::{Test, skip, test},
};

pub const TESTS: [Test; 6] = [
    test("habits_of_ssh", 180, habits),
    test("output_that_nobody_takes_any_more", 180, head),
    test("through_one_machine_to_another", 240, through),
    test("trees_with_awkward_names", 300, trees),
    test("interrupted_transfers_go_on", 180, interrupted),
    test("git_there_and_back", 240, git),
];

/// Logins that share one connection, as `ControlMaster auto` in ~/.ssh/config has it.
pub fn shared<'a>(story: &Story, login: Login<'a>) -> Login<'a> {
    let path = format!("-oControlPath={}", story.path("shared").display());
    login.option("-oControlMaster=auto").option("-oControlPersist=20").option(&path)
}

/// `ssh` with all it takes to log in, as rsync and git want it.
fn remote_shell(login: &Login) -> Result<String> {
    let client = login.client("ssh")?;
    let words = client.get_args().map(|word| quote(&word.to_string_lossy()));
    Ok(["ssh".to_owned()].into_iter().chain(words).collect::<Vec<_>>().join(" "))
}

fn habits(story: &Story) -> Result<()> {
    let alice = story.account("alice")?;
    // -f: the client goes into the background, the command on.
    let mut command = alice.login().ssh(&["-f"])?;
    command.arg("sleep 1; touch done");
    process::run("ssh -f", command, Input::Nothing, story.within(60))?.success()?;
    story.wait_for("the background command", 60, || {
        Ok(alice.exec("test -e done")?.status.success().then_some(()))
    })?;

    let mut terminal = alice.login().terminal(Some("test -t 0 && tty; exit 7"), 80, 24)?;
    let (status, shown) = terminal.wait_end(60)?;
    says("-t with a command", &shown, "/dev/pts/")?;
    same("its status", status, 7)?;

    // Ctrl-Z and its jobs.
    let mut shell = alice.shell()?;
    shell.send("sleep 1000\n")?;
    story.wait_for("sleep to run", 30, || {
        Ok(alice.exec("pgrep -x sleep")?.status.success().then_some(()))
    })?;
    shell.send("\x1a")?;
    shell.expect("Stopped", 30)?;
    says("jobs", &shell.run("bg >/dev/null 2>&1; jobs")?, "Running")?;
    shell.run("kill %1")?;

    // Who was here last, unless she does not want to be told.
    let beside = alice.login_as(&format!("{}+new", alice.name));
    says("a new shell", &beside.terminal(None, 80, 24)?.expect("$ ", 90)?, "Last login: 20")?;
    alice.output("touch .hushlogin")?;
    let greeting = beside.terminal(None, 80, 24)?.expect("$ ", 90)?;
    ensure!(!greeting.contains("Last login") && !greeting.contains("sudo"), "hushed: {greeting}");

    // ~. drops the link; the shell stays where it was, and is there again.
    let first = shell.run("echo $$")?;
    shell.send("\r~.")?;
    same("status after ~.", shell.wait_end(30)?.0, 255)?;
    let mut shell = alice.shell()?;
    same("the shell after ~.", shell.run("echo $$")?, first)
}

/// `ssh host command | head`: the program's next write fails, and nothing else.
fn head(story: &Story) -> Result<()> {
    let alice = story.account("alice")?;
    let gone = || {
        story.wait_for("yes to be gone", 30, || {
            Ok((alice.exec("pgrep -x yes")?.code() == Some(1)).then_some(()))
        })
    };
    same("in the machine", alice.output("yes | head -n 3 | wc -l")?.as_str(), "3")?;
    gone()?;

    // The client's input stays open, as a terminal does: otherwise it closes the channel by itself.
    let open = story.path("never");
    let mut fifo = Command::new("mkfifo");
    fifo.arg(&open);
    process::run("mkfifo", fifo, Input::Nothing, story.within(10))?.success()?;
    let open = quote(&open.display().to_string());
    let first_line = |login: &Login, script: &str| {
        let (shell, to, script) = (remote_shell(login)?, login.destination(), quote(script));
        let mut piped = Command::new("bash");
        piped
            .arg("-c")
            .arg(format!("{shell} {to} {script} 0<>{open} | head -n 1; echo ${{PIPESTATUS[0]}}"));
        let ended = process::run("ssh | head", piped, Input::Nothing, story.within(30))?;
        Ok::<_, anyhow::Error>((ended.out(), ended.err()))
    };
    // 255: ssh's word for a signal.
    same("of yes", first_line(&alice.login(), "exec yes")?.0.as_str(), "y\n255\n")?;
    gone()?;
    // 141: the shell's word for SIGPIPE. (The client drops errors that come together with the end.)
    let script = "yes; echo $? >&2; sleep 1; exit 3";
    let (shown, errors) = first_line(&alice.login(), script)?;
    same("of a shell", (shown.as_str(), errors.as_str()), ("y\n3\n", "141\n"))?;
    // Who does not care goes on as long as it likes, and is not heard.
    let script = "trap '' PIPE; yes 2>/dev/null; for n in $(seq 50); do echo $n; done 2>/dev/null; \
                  echo stubborn >&2; sleep 1";
    let (shown, errors) = first_line(&alice.login(), script)?;
    same("of one without SIGPIPE", (shown.as_str(), errors.as_str()), ("y\n0\n", "stubborn\n"))?;

    // On a shared connection too, one after another.
    let login = shared(story, alice.login());
    for _ in 0..2 {
        same("of a shared one", first_line(&login, "exec yes")?.0.as_str(), "y\n255\n")?;
        gone()?;
    }
    same("what comes after", alice.output("echo here")?.as_str(), "here")
}

/// `ssh -J` through alice's machine to bob's, and git from hers to his with a key that is not in hers. A
/// machine has no network: what hers reaches is the service itself, which the client has it listen for.
fn through(story: &Story) -> Result<()> {
    let (alice, bob) = (story.account("alice")?, story.account("bob")?);
    let (host, port) = (&story.world.options.ssh_host, story.world.options.ssh_port);
    let _client = forward(&alice, &["-R", &format!("7022:{host}:{port}")])?;
    story.wait_for("the port in the machine", 60, || {
        Ok(alice.exec("ss -ltn | grep :7022")?.status.success().then_some(()))
    })?;

    // What -J starts takes options from a configuration only.
    let config = story.path("config");
    let known = story.path("known");
    let text = format!(
        "Host *\n IdentitiesOnly yes\n BatchMode yes\n LogLevel ERROR\n UserKnownHostsFile {}\n \
         GlobalKnownHostsFile /dev/null\n StrictHostKeyChecking accept-new\n\
         Host gate\n HostName {host}\n Port {port}\n User {}\n IdentityFile {}\n\
         Host behind\n HostName localhost\n Port 7022\n User {}\n IdentityFile {}\n",
        known.display(),
        alice.name,
        alice.key.display(),
        bob.name,
        bob.key.display(),
    );
    fs::write(&config, text)?;
    let mut jump = Command::new("ssh");
    jump.arg("-F").arg(&config).args(["-J", "gate", "behind", "cat > came; hostname; exit 6"]);
    let ended =
        process::run("ssh -J", jump, Input::Bytes(b"by way of her\n".to_vec()), story.within(90))?;
    same("the status behind the jump", ended.code(), Some(6))?;
    same("whose machine that is", ended.out().trim(), bob.output("hostname")?.as_str())?;
    same("what came there", bob.output("cat came")?.as_str(), "by way of her")?;

    let who = "git -c user.name=bob -c user.email=bob@localhost";
    bob.output(&format!(
        "{who} init -q hers; cd hers; {who} commit -q --allow-empty -m 'for alice'"
    ))?;
    let (_agent, socket) = key_agent(story, &bob)?;
    let mut inside = alice.login().ssh(&["-A", "-T"])?;
    inside.env("SSH_AUTH_SOCK", &socket).arg(format!(
        "export GIT_SSH_COMMAND='ssh -o StrictHostKeyChecking=accept-new -o LogLevel=ERROR'; \
         git clone -q ssh://{}@localhost:7022/~/hers && git -C hers log --format=%s",
        bob.name
    ));
    let told = process::run("git in the machine", inside, Input::Nothing, story.within(90))?;
    same("what was cloned", told.success()?.as_str(), "for alice\n")
}

/// Files as nobody should name them, but people do.
fn make_tree(at: &Path, newlines: bool) -> Result<()> {
    fs::create_dir_all(at.join("deep/er"))?;
    let mut names = vec!["two  words", "ünï côdé ☃", "-dash", "it's \"quoted\" $HOME `x`", "*"];
    if newlines {
        names.push("new\nline");
    }
    for name in names {
        fs::write(at.join("deep").join(name), format!("content of {name}\n"))?;
    }
    fs::write(at.join("empty"), "")?;
    fs::write(at.join("deep/er/secret"), "only mine\n")?;
    fs::set_permissions(at.join("deep/er/secret"), fs::Permissions::from_mode(0o400))?;
    let holes = File::create(at.join("holes"))?;
    holes.set_len(3 << 20)?;
    let long_ago = SystemTime::UNIX_EPOCH + Duration::from_secs(1_000_000_000);
    holes.set_modified(long_ago)?;
    Ok(())
}

/// Names, kinds, modes, times and content.
fn listing(story: &Story, at: &Path) -> Result<String> {
    let mut command = Command::new("bash");
    command.current_dir(at).arg("-c").arg(
        "find . -mindepth 1 -type d -printf '%p\\0' -o -printf '%p %y %m %Ts %l\\0' | LC_ALL=C sort -z | \
         tr '\\0\\n' '\\n?'; find . -type f -print0 | LC_ALL=C sort -z | xargs -0 sha256sum -z | \
         tr '\\0\\n' '\\n?'",
    );
    process::run("find", command, Input::Nothing, story.within(30))?.success()
}

fn trees(story: &Story) -> Result<()> {
    let alice = story.account("alice")?;
    let login = shared(story, alice.login());
    let (tree, plain) = (story.path("tree"), story.path("plain"));
    make_tree(&tree, true)?;
    // The old protocol's lines end at a newline.
    make_tree(&plain, false)?;
    for (what, flags, from) in
        [("scp", &["-rp"][..], &tree), ("scp -O", &["-O", "-rp"][..], &plain)]
    {
        let (there, back) = (story.unique("there"), story.path("back"));
        let remote = format!("{}:{there}", login.destination());
        for (from, to) in [
            (from.display().to_string(), remote.clone()),
            (remote.clone(), back.display().to_string()),
        ] {
            let mut command = login.client("scp")?;
            command.arg("-q").args(flags).args([from, to]);
            process::run(what, command, Input::Nothing, story.within(120))?.success()?;
        }
        same(what, listing(story, &back)?, listing(story, from)?)?;
    }

    let (there, back) = (story.unique("there"), story.path("back"));
    fs::create_dir(&back)?;
    let batch = format!(
        "mkdir {there}\nput -rp {} {there}\nget -rp {there} {}\n-get {there}/tree/none {}\n\
         -put {} /root/mine\n",
        tree.display(),
        back.display(),
        back.display(),
        tree.join("empty").display(),
    );
    let mut command = login.client("sftp")?;
    command.args(["-q", "-b", "-"]).arg(login.destination());
    let ended = process::run("sftp", command, Input::Bytes(batch.into_bytes()), story.within(120))?;
    says("a file that is not there", &ended.err(), "not found")?;
    says("a folder that is root's", &ended.err(), "Permission denied")?;
    ended.success()?;
    let name = tree.file_name().context("the tree has no name")?;
    same("sftp", listing(story, &back.join(&there).join(name))?, listing(story, &tree)?)?;
    let mut denied = login.client("scp")?;
    denied.arg(tree.join("empty")).arg(format!("{}:/root/mine", login.destination()));
    let ended = process::run("scp", denied, Input::Nothing, story.within(60))?;
    ensure!(!ended.status.success(), "scp wrote into root's folder");
    says("scp", &ended.err(), "Permission denied")?;

    // Links, attributes and times; the second time there is nothing to do, then what is gone goes.
    symlink("deep/two  words", tree.join("link")).context("a link")?;
    let shell = remote_shell(&login)?;
    let remote = format!("{}:mirror/", login.destination());
    let sync = |from: &str, to: &str| {
        let mut command = Command::new("rsync");
        command.args(["-aAX", "--delete", "--partial", "-i", "-e", &shell, from, to]);
        process::run("rsync", command, Input::Nothing, story.within(120))?.success()
    };
    let local = format!("{}/", tree.display());
    says("the first rsync", &sync(&local, &remote)?, "link")?;
    same("what the second rsync did", sync(&local, &remote)?.as_str(), "")?;
    fs::remove_file(tree.join("empty"))?;
    says("the third rsync", &sync(&local, &remote)?, "*deleting")?;
    let back = story.path("mirror");
    sync(&remote, &format!("{}/", back.display()))?;
    same("rsync there and back", listing(story, &back)?, listing(story, &tree)?)?;

    let back = story.path("untarred");
    fs::create_dir(&back)?;
    let mut command = Command::new("bash");
    let (to, quoted) = (login.destination(), quote(&back.display().to_string()));
    command.current_dir(&tree).arg("-c").arg(format!(
        "set -o pipefail; tar -cSf - . | {shell} {to} 'mkdir tarred && tar -xSpf - -C tarred' && \
         {shell} {to} 'tar -cSf - -C tarred .' | tar -xSpf - -C {quoted}"
    ));
    process::run("tar over ssh", command, Input::Nothing, story.within(120))?.success()?;
    same("tar there and back", listing(story, &back)?, listing(story, &tree)?)?;
    let used = alice.output("du -k tarred/holes | cut -f1")?;
    ensure!(used.parse::<u32>().is_ok_and(|kib| kib < 100), "holes take {used} KiB there");
    Ok(())
}

/// Half a file is there already; the other half follows.
fn interrupted(story: &Story) -> Result<()> {
    let alice = story.account("alice")?;
    let login = shared(story, alice.login());
    let (whole, back) = (story.path("whole"), story.path("back"));
    super::session::make_random(story, 1 << 20, &whole)?;
    let bytes = fs::read(&whole)?;
    let half = &bytes[..400_000];
    login.exec_with("cat > up", Input::Bytes(half.to_vec()))?.success()?;
    fs::write(&back, half)?;
    let mut command = login.client("sftp")?;
    command.args(["-q", "-b", "-"]).arg(login.destination());
    let batch = format!("reput {} up\nreget up {}\n", whole.display(), back.display());
    process::run("sftp", command, Input::Bytes(batch.into_bytes()), story.within(120))?
        .success()?;
    ensure!(fs::read(&back)? == bytes, "what came back is not what went");

    // rsync takes up what an interrupted one has left.
    login.exec_with("cat > again", Input::Bytes(half.to_vec()))?.success()?;
    let mut command = Command::new("rsync");
    let to = format!("{}:again", login.destination());
    command.args(["--partial", "--append-verify", "--stats", "-e", &remote_shell(&login)?]);
    command.arg(&whole).arg(to);
    let told = process::run("rsync", command, Input::Nothing, story.within(120))?.success()?;
    let sent = told.lines().find_map(|line| line.strip_prefix("Literal data: "));
    let sent = sent.and_then(|rest| rest.replace(',', "").split(' ').next()?.parse::<usize>().ok());
    same("bytes that rsync had to send", sent, Some(bytes.len() - half.len()))?;
    let sum = process::hash(&mut File::open(&whole)?)?;
    same("what is there", alice.output("sha256sum < again | cut -d' ' -f1")?, sum)
}

fn git(story: &Story) -> Result<()> {
    if Command::new("git").arg("--version").output().is_err() {
        return skip("there is no git on this machine");
    }
    let alice = story.account("alice")?;
    let login = shared(story, alice.login());
    let shell = remote_shell(&login)?;
    let home = story.path("git");
    fs::create_dir(&home)?;
    let run = |at: &Path, script: &str| {
        let mut command = Command::new("bash");
        command.current_dir(at).args(["-ec", script]).env("GIT_SSH_COMMAND", &shell);
        command.env("HOME", &home).env("GIT_CONFIG_NOSYSTEM", "1");
        for who in ["AUTHOR", "COMMITTER"] {
            command.env(format!("GIT_{who}_NAME"), "e2e");
            command.env(format!("GIT_{who}_EMAIL"), "e2e@localhost");
        }
        process::run(script, command, Input::Nothing, story.within(120))?.success()
    };
    alice.output("git init -q --bare -b main 'my project.git'")?;
    let url = format!("{}:my project.git", login.destination());
    run(
        &home,
        &format!(
            "git init -q -b main one; cd one; for n in $(seq 20); do echo $n > \"file $n\"; done; \
             git add .; git commit -qm first; git remote add origin {0}; git push -q -u origin main; \
             cd ..; git clone -q {0} two",
            quote(&url)
        ),
    )?;
    run(&home.join("two"), "echo more > more; git add more; git commit -qm second; git push -q")?;
    let told = run(&home.join("one"), "git fetch -q; git log --format=%s origin/main")?;
    same("what was fetched", told.as_str(), "second\nfirst\n")
}
