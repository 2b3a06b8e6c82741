//! What goes through a session, and that all of it arrives: windows, bytes, streams, statuses.

use std::{
    fs::{self, File},
    time::Duration,
};

use anyhow::{Context as _, Result, ensure};

use crate::{
    harness::{
        Story,
        process::{self, Input},
        same, says,
        terminal::Terminal,
    },
    runner::{Test, test},
};

pub const TESTS: [Test; 12] = [
    test("window_size_follows_the_client", 180, window_size),
    test("bytes_survive_exec_both_ways", 1200, bytes_survive_exec),
    test("bytes_survive_a_raw_terminal", 180, bytes_survive_a_terminal),
    test("output_is_whole_before_the_status", 240, output_is_whole),
    test("exit_codes_and_signals", 180, exit_codes),
    test("stdout_and_stderr_stay_apart", 180, streams_apart),
    test("end_of_input_reaches_the_program", 180, end_of_input),
    test("environment_by_allow_list", 180, environment),
    test("interrupt_reaches_the_program", 180, interrupt),
    test("eight_terminals_and_no_ninth", 300, eight_terminals),
    test("many_commands_at_once", 300, many_commands),
    test("an_idle_session_lives_and_changes_its_keys", 180, long_life),
];

/// Seconds after which the client of [`long_life`] wants new keys.
const NEW_KEYS: u64 = 5;

/// With the client's keepalives, and keys that it changes by the clock while nothing else is sent.
fn long_life(story: &Story) -> Result<()> {
    let idle = story.world.options.idle_seconds;
    let alice = story.account("alice")?;
    let log = story.path("client.log");
    let login = alice.login().option("-v").option(&format!("-E{}", log.display()));
    let login = login.option("-oServerAliveInterval=2").option("-oServerAliveCountMax=3");
    let mut shell = login.option(&format!("-oRekeyLimit=default {NEW_KEYS}")).shell()?;
    shell.run("kept=$RANDOM; echo $kept > kept")?;
    let machine = alice.running_machine()?;
    story.sleep(Duration::from_secs(idle));
    let (said, status) = shell.run_status("test \"$kept\" = \"$(cat kept)\"", 30)?;
    ensure!(status == 0, "after {idle} s another shell was there: {said}");
    same("its machine", alice.running_machine()?, machine)?;
    let log = fs::read_to_string(&log).context("can't read the client's log")?;
    let exchanges = log.matches("SSH2_MSG_NEWKEYS received").count() as u64;
    let wanted = 1 + idle / NEW_KEYS / 2;
    ensure!(exchanges >= wanted, "{exchanges} exchanges of keys in {idle} s, not {wanted}:\n{log}");
    Ok(())
}

fn window_size(story: &Story) -> Result<()> {
    let alice = story.account("alice")?;
    let mut shell = alice.login().shell_of(101, 37)?;
    same("the size at login", shell.run("stty size")?.trim(), "37 101")?;
    // A program that waits, not the shell's own prompt: readline keeps a trap until the next line, and whether
    // that line overtakes the change of the window is the client's affair.
    shell.send(
        "sh -c 'trap \"echo changed: \\$(stty size)\" WINCH; echo set\"\"tled; while :; do sleep 0.1; done'\n",
    )?;
    shell.expect("settled", 30)?;
    shell.resize(132, 50)?;
    shell.expect("changed: 50 132", 30)?;
    shell.resize(20, 5)?;
    shell.expect("changed: 5 20", 30).map(drop)
}

/// Random bytes through `cat`: what comes back is what went in, and the guest has seen the same.
fn bytes_survive_exec(story: &Story) -> Result<()> {
    let alice = story.account("alice")?;
    let size = story.world.options.transfer_mib << 20;
    let path = story.path("random");
    make_random(story, size, &path)?;
    let wanted = process::hash(&mut File::open(&path)?)?;

    let mut echo = alice.login().ssh(&["-T"])?;
    echo.arg("cat");
    let mut out = tempfile::tempfile()?;
    let running =
        process::start_into("ssh: cat", echo, Input::File(File::open(&path)?), out.try_clone()?)?;
    running.wait(story.deadline)?.success()?;
    same("length that came back", out.metadata()?.len(), size as u64)?;
    same("what came back", process::hash(&mut out)?, wanted.clone())?;

    let seen = alice.login().start("sha256sum", Input::File(File::open(&path)?))?;
    let seen = seen.wait(story.deadline)?.success()?;
    same("what the guest saw", seen.split_whitespace().next(), Some(wanted.as_str()))?;
    fs::remove_file(&path).context("can't remove the random file")
}

fn bytes_survive_a_terminal(story: &Story) -> Result<()> {
    let alice = story.account("alice")?;
    // No escape character: `~.` in the data would end the client.
    let login = alice.login().option("-oEscapeChar=none");
    let script = "stty raw -echo; echo ready; head -c 4096 | sha256sum";
    let mut terminal = login.terminal(Some(script), 80, 24)?;
    terminal.expect("ready", 90)?;
    let bytes: Vec<u8> = (0..4096usize).map(|n| ((n * 31 + n / 256) % 256) as u8).collect();
    let path = story.path("bytes");
    fs::write(&path, &bytes)?;
    terminal.send_bytes(&bytes)?;
    terminal.expect(&process::hash(&mut File::open(&path)?)?, 60)?;
    same("exit status", terminal.wait_end(30)?.0, 0)
}

fn output_is_whole(story: &Story) -> Result<()> {
    let alice = story.account("alice")?;
    let wanted: String = (1..=100_000).map(|n| format!("{n}\n")).collect();
    for round in 0..5 {
        let ended = alice.exec("seq 1 100000; exit 3")?;
        same("exit status", ended.code(), Some(3))?;
        ensure!(
            ended.out() == wanted,
            "round {round}: {} bytes of {} before the exit status",
            ended.stdout.len(),
            wanted.len()
        );
    }
    for round in 0..5 {
        let mut terminal = alice.login().terminal(Some("seq 1 20000; exit 4"), 80, 24)?;
        let (status, shown) = terminal.wait_end(90)?;
        same("exit status on a terminal", status, 4)?;
        let wanted: String = (1..=20_000).map(|n| format!("{n}\r\n")).collect();
        ensure!(
            shown.starts_with(&wanted),
            "round {round}: {} bytes of {} before the end, last {:?}",
            shown.len(),
            wanted.len(),
            shown.get(shown.len().saturating_sub(40)..)
        );
    }
    Ok(())
}

fn exit_codes(story: &Story) -> Result<()> {
    let alice = story.account("alice")?;
    for code in [0, 1, 42, 255] {
        same("exit status", alice.exec(&format!("exit {code}"))?.code(), Some(code))?;
    }
    same("a command nobody has", alice.exec("no-such-command")?.code(), Some(127))?;
    let ended = alice.login().option("-oLogLevel=DEBUG1").exec("kill -TERM $$")?;
    same("ssh's status after a signal", ended.code(), Some(255))?;
    says("the client's log", &ended.err(), "rtype exit-signal")
}

fn streams_apart(story: &Story) -> Result<()> {
    let alice = story.account("alice")?;
    let script = "for n in 1 2 3; do echo out $n; echo err $n >&2; done; exit 9";
    let ended = alice.exec(script)?;
    same("stdout", ended.out().as_str(), "out 1\nout 2\nout 3\n")?;
    same("stderr", ended.err().as_str(), "err 1\nerr 2\nerr 3\n")?;
    same("exit status", ended.code(), Some(9))
}

fn end_of_input(story: &Story) -> Result<()> {
    let alice = story.account("alice")?;
    let login = alice.login();
    let ended = login.exec_with("wc -c; echo after", Input::Bytes(vec![b'x'; 100_000]))?;
    same("what wc counted", ended.success()?.as_str(), "100000\nafter\n")?;
    // A program that closes its input early does not hang the client, nor lose its own output.
    let ended = login.exec_with("exec <&-; echo done", Input::Bytes(vec![b'x'; 3_000_000]))?;
    same("output of a program that reads nothing", ended.success()?.as_str(), "done\n")?;
    // A shell without a terminal reads its commands from the stream.
    let mut command = login.ssh(&["-T"])?;
    command.env("LC_ALL", "C");
    let input = Input::Bytes(b"echo from $0-less shell; exit 5\n".to_vec());
    let ended = process::run("ssh -T", command, input, story.within(120))?;
    says("a shell on streams", &ended.out(), "-less shell")?;
    same("its exit status", ended.code(), Some(5))
}

fn environment(story: &Story) -> Result<()> {
    let alice = story.account("alice")?;
    let login = alice.login().option(
        "-oSetEnv=LC_HERMITAGE=yes LANG=de_DE.UTF-8 LD_PRELOAD=/evil.so BASH_ENV=/evil FOO=bar",
    );
    let env = login.exec("env")?.success()?;
    let has = |line: &str| env.lines().any(|l| l == line);
    ensure!(has("LC_HERMITAGE=yes") && has("LANG=de_DE.UTF-8"), "locale did not pass: {env}");
    ensure!(!env.contains("evil") && !env.contains("FOO="), "too much passed: {env}");
    ensure!(has(&format!("USER={}", alice.name)), "no USER: {env}");
    ensure!(has(&format!("HOME=/home/{}", alice.name)), "no HOME: {env}");
    let here = env.lines().find_map(|line| line.strip_prefix("SSH_CONNECTION="));
    let here: Vec<&str> = here.unwrap_or_default().split(' ').collect();
    ensure!(here.len() == 4 && here[1].parse::<u16>().is_ok(), "SSH_CONNECTION is {here:?}");
    let mut shell = alice.shell()?;
    same("TERM on a terminal", shell.run("echo $TERM")?.trim(), "xterm-256color")
}

fn interrupt(story: &Story) -> Result<()> {
    let alice = story.account("alice")?;
    let mut shell = alice.shell()?;
    shell.send("echo star''ted; sleep 1000; echo status $?\n")?;
    shell.expect("started", 30)?;
    story.sleep(Duration::from_millis(500));
    shell.send("\x03")?;
    // Ctrl-C ends the whole list in an interactive bash; the shell itself goes on.
    shell.run("true").context("the shell after ctrl-c")?;
    same("status after ctrl-c", shell.run("sleep 0; echo $?")?.trim(), "0")
}

fn eight_terminals(story: &Story) -> Result<()> {
    let alice = story.account("alice")?;
    let mut shells: Vec<Terminal<'_>> = Vec::new();
    for n in 0..8 {
        shells.push(alice.shell().with_context(|| format!("terminal {}", n + 1))?);
    }
    for (n, shell) in shells.iter_mut().enumerate() {
        same("its output", shell.run(&format!("echo I am {n}"))?.trim(), &format!("I am {n}"))?;
    }
    let mut ninth = alice.login().terminal(None, 80, 24)?;
    let (status, shown) = ninth.wait_end(60)?;
    says("the ninth terminal", &shown, "terminals")?;
    says("the ninth terminal", &shown, "in use")?;
    ensure!(status != 0, "the ninth terminal's exit status is 0");
    // Commands without a terminal still run, and a terminal that was left can be had again.
    same("a command meanwhile", alice.output("echo yes")?.as_str(), "yes")?;
    let mut first = shells.remove(0);
    first.send("exit\n")?;
    first.wait_end(30)?;
    alice.shell().context("a terminal after one was left")?.run("true")?;
    for shell in &mut shells {
        shell.run("true")?;
    }
    Ok(())
}

fn many_commands(story: &Story) -> Result<()> {
    let alice = story.account("alice")?;
    alice.output("true")?;
    // On connections of their own.
    let script = |n: usize| format!("read line; echo {n} $line; exit {n}");
    let mut running = Vec::new();
    for n in 1..=12 {
        let input = Input::Bytes(format!("in {n}\n").into_bytes());
        running.push((n, alice.login().start(&script(n), input)?));
    }
    for (n, command) in running {
        let ended = command.wait(story.within(120))?;
        same("output", ended.out().trim(), &format!("{n} in {n}"))?;
        same("status", ended.code(), Some(n as i32))?;
    }
    // On one connection, started while all others still wait for their input.
    let control = story.path("mux");
    let login = alice.login().option(&format!("-oControlPath={}", control.display()));
    let master = login.ssh(&["-N", "-M"])?;
    let _master = process::start("ssh -M", master, Input::Nothing)?;
    story.wait_for("the shared connection", 60, || Ok(control.exists().then_some(())))?;
    let mut running = Vec::new();
    for n in 1..=24 {
        running.push((n, login.start(&script(n), Input::Pipe)?));
    }
    for (n, command) in &mut running {
        command.write(format!("in {n}\n").as_bytes())?;
        command.close_input();
    }
    for (n, command) in running {
        let ended = command.wait(story.within(120))?;
        same("output", ended.out().trim(), &format!("{n} in {n}"))?;
        same("status", ended.code(), Some(n as i32))?;
    }
    Ok(())
}

pub fn make_random(story: &Story, size: usize, path: &std::path::Path) -> Result<()> {
    use std::io::Write as _;
    let mut file = File::create(path).with_context(|| format!("can't make {}", path.display()))?;
    let mut left = size;
    let mut block = vec![0u8; 1 << 20];
    while left > 0 {
        for word in block.chunks_exact_mut(8) {
            word.copy_from_slice(&story.world.random().to_le_bytes());
        }
        let n = left.min(block.len());
        file.write_all(&block[..n]).context("can't write random bytes")?;
        left -= n;
    }
    Ok(())
}
