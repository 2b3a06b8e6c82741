//! What a person, and a program, would notice of having been asleep: nothing but the time of day.

use std::time::{Duration, SystemTime, UNIX_EPOCH};

use anyhow::{Context as _, Result, ensure};
use serde_json::Value;

use super::sleep::{back, wait_saved};
use crate::{
    harness::{
        Story, account::Account, process::Input, same, says, screen::Seen, terminal::Terminal,
    },
    runner::{Test, test},
};

pub const TESTS: [Test; 2] = [
    test("clocks_are_right_after_a_sleep", 300, clocks),
    test("screens_are_the_same_after_a_sleep", 400, screens),
];

/// How long a machine is left saved, beside the time that saving and resuming take.
const ASLEEP: Duration = Duration::from_secs(5);

/// What a busy emulated CPU may keep a program waiting for: less than [`ASLEEP`], or a jump would pass.
const HICCUP: f64 = 3.5;

/// How far a guest's time of day may be off, in seconds.
const WALL_CLOCK: f64 = 0.05;

/// Looks at the clocks all the time, and tells what it has seen after each line.
const CLOCKS: &str = r#"
import json, os, sys, threading, time
seen = {"gap": 0.0, "boot_gap": 0.0, "most": 0, "ticks": 0, "slept": [], "due": []}
def gaps():
    last = time.monotonic(), time.clock_gettime(time.CLOCK_BOOTTIME)
    while True:
        time.sleep(0.02)
        now = time.monotonic(), time.clock_gettime(time.CLOCK_BOOTTIME)
        seen["gap"] = max(seen["gap"], now[0] - last[0])
        seen["boot_gap"] = max(seen["boot_gap"], now[1] - last[1])
        last = now
def every_second():
    timer = os.timerfd_create(time.CLOCK_MONOTONIC)
    os.timerfd_settime(timer, initial=1, interval=1)
    while True:
        count = int.from_bytes(os.read(timer, 8), sys.byteorder)
        seen["most"] = max(seen["most"], count)
        seen["ticks"] += count
def sleeper(seconds):
    begun = time.monotonic()
    time.sleep(seconds)
    seen["slept"].append(time.monotonic() - begun)
def at(when):
    timer = os.timerfd_create(time.CLOCK_REALTIME)
    os.timerfd_settime(timer, flags=os.TFD_TIMER_ABSTIME, initial=when)
    os.read(timer, 8)
    seen["due"].append(time.time() - when)
for call, *arguments in [(gaps,), (every_second,), (sleeper, 6), (at, time.time() + 4)]:
    threading.Thread(target=call, args=arguments, daemon=True).start()
os.system("stty -echo")
print("@@ ready", flush=True)
for line in sys.stdin:
    seen["wall"] = time.time()
    print("@@", line.strip(), json.dumps(seen), "@@", flush=True)
"#;

fn clocks(story: &Story) -> Result<()> {
    let alice = story.account_with("alice", &["--linger 1"])?;
    let put = alice.login().exec_with("cat > clocks.py", Input::Bytes(CLOCKS.into()))?;
    put.success()?;
    let mut shell = alice.shell()?;
    shell.send("exec python3 clocks.py\n")?;
    shell.expect("@@ ready", 60)?;
    let forked = look(story, &mut shell)?;
    wall_clock("after a fork", &forked)?;
    shell.cut()?;
    wait_saved(story, &alice)?;
    story.sleep(ASLEEP);
    let mut shell = back(&alice)?;
    shell.expect("resumed from ", 90)?;
    let mut seen = look(story, &mut shell)?;
    wall_clock("after a sleep", &seen)?;
    for clock in ["gap", "boot_gap"] {
        let gap = number(&seen.0, clock)?;
        ensure!(gap < HICCUP, "{clock}: the clock that counts from boot jumped by {gap} s");
    }
    let most = number(&seen.0, "most")?;
    ensure!(most <= HICCUP, "a timer of one second went off {most} times at once");
    // It was due while the machine was asleep: it goes off at once, and once.
    let due = seen.0["due"].as_array().context("due")?;
    ensure!(due.len() == 1, "what was due at a time of day went off {} times", due.len());
    let late = due[0].as_f64().context("due")?;
    ensure!(late < ASLEEP.as_secs_f64() + 60.0, "and {late} s late");
    // Six seconds of its own time, whatever time it was asleep.
    while seen.0["slept"].as_array().is_some_and(Vec::is_empty) {
        story.sleep(Duration::from_millis(300));
        ensure!(std::time::Instant::now() < story.within(60), "a sleep of six seconds never ends");
        seen = look(story, &mut shell)?;
    }
    let slept = seen.0["slept"][0].as_f64().context("slept")?;
    ensure!((6.0..6.0 + HICCUP).contains(&slept), "a sleep of 6 s took {slept} s");
    Ok(())
}

/// By how many seconds the serving machine's clock is ahead of this one's, at least and at most: they may
/// be two machines.
fn ahead(story: &Story) -> Result<(f64, f64)> {
    let mut host = story.host().talk("while read -r line; do date +%s.%N; done")?;
    let mut best = (f64::MIN, f64::MAX);
    for answers in 1..=12 {
        let end = story.within(60);
        let before = now()?;
        host.write(b"\n")?;
        let told = loop {
            let text = String::from_utf8(host.out_so_far()?).context("odd time")?;
            if text.matches('\n').count() == answers {
                break text
                    .lines()
                    .last()
                    .context("no time")?
                    .parse::<f64>()
                    .context("odd time")?;
            }
            ensure!(std::time::Instant::now() < end, "the serving machine does not tell its time");
            std::thread::sleep(Duration::from_millis(1));
        };
        let after = now()?;
        if after - before < best.1 - best.0 {
            best = (told - after, told - before);
        }
    }
    host.kill();
    Ok(best)
}

/// What the program tells, and how far its time of day is off, at least.
fn look(story: &Story, shell: &mut Terminal) -> Result<(Value, f64)> {
    let mut best: Option<(Value, f64, f64)> = None;
    let (least, most) = ahead(story)?;
    for _ in 0..8 {
        // A screen that is redrawn shows the answers before: each has a name of its own.
        let name = story.unique("look");
        let before = now()?;
        shell.send(&format!("{name}\n"))?;
        shell.expect(&format!("@@ {name} {{"), 60)?;
        let text = shell.expect(" @@", 60)?;
        let after = now()?;
        let answer: Value = serde_json::from_str(&format!("{{{text}")).with_context(|| text)?;
        let wall = number(&answer, "wall")?;
        let off = (wall - (after + most)).max(before + least - wall).max(0.0);
        if best.as_ref().is_none_or(|(.., took)| after - before < *took) {
            best = Some((answer, off, after - before));
        }
    }
    let (answer, off, took) = best.context("it was never asked")?;
    let took = took + most - least;
    ensure!(took < 1.0, "the quickest of its answers took {took} s: too long to tell the time by");
    Ok((answer, off))
}

fn wall_clock(when: &str, (_, off): &(Value, f64)) -> Result<()> {
    println!("    {when}: {off:.3} s off at least");
    ensure!(*off <= WALL_CLOCK, "{when} the guest's time of day is {off} s off at least");
    Ok(())
}

fn number(answer: &Value, name: &str) -> Result<f64> {
    answer[name].as_f64().with_context(|| format!("no {name} in {answer}"))
}

fn now() -> Result<f64> {
    Ok(SystemTime::now().duration_since(UNIX_EPOCH)?.as_secs_f64())
}

/// An editor, a pager and an interpreter on a terminal each; then asleep, then back, then taken over by
/// somebody with a larger window.
fn screens(story: &Story) -> Result<()> {
    let alice = story.account_with("alice", &["--linger 1"])?;
    alice.output("seq 1 500 > numbers; printf 'int main() {\\n  return 42;\\n}\\n' > main.c")?;
    let mut editor = open(&alice, "alice")?;
    editor.send("echo before the editor\n")?;
    editor.expect("before the editor\r\n", 30)?;
    editor.send("vim -N -u NONE -c 'syntax on|set mouse=a ttymouse=sgr title' main.c\n")?;
    editor.expect("return", 60)?;
    editor.send("Go// typed before\x1b:2\r0w")?;
    let edited = editor.screen()?;
    says("the editor", &edited.screen.contents(), "// typed before")?;
    ensure!(edited.colour_of("return") != edited.colour_of("main"), "the editor shows no colours");
    ensure!(edited.screen.bracketed_paste(), "the editor did not switch bracketed paste on");
    same(
        "mouse reports",
        edited.screen.mouse_protocol_mode() == vt100::MouseProtocolMode::None,
        false,
    )?;
    says("the title", &edited.title, "main.c")?;

    let mut pager = open(&alice, "new")?;
    pager.send("less -N numbers\n")?;
    pager.expect("\x1b[?1049h", 60)?;
    pager.send("250g")?;
    let paged = pager.screen()?;
    says("the pager", &paged.screen.contents(), "250")?;

    let mut python = open(&alice, "new")?;
    python.send("python3 -q\n")?;
    python.expect(">>> ", 60)?;
    python.send("import os; kept = [1, 2]; os.getpid()\n")?;
    python.expect(">>> ", 30)?;
    let typed = python.screen()?;

    for shell in [python, pager, editor] {
        shell.cut()?;
        // In this order.
        story.sleep(Duration::from_millis(300));
    }
    wait_saved(story, &alice)?;
    let mut editor = alice.login().terminal(None, 80, 24)?.watch(80, 24);
    editor.expect("resumed from ", 90)?;
    unchanged("the editor", &edited, &editor.screen()?)?;
    let mut pager = alice.login().terminal(None, 80, 24)?.watch(80, 24);
    pager.expect("272", 90)?;
    unchanged("the pager", &paged, &pager.screen()?)?;
    let mut python = alice.login().terminal(None, 80, 24)?.watch(80, 24);
    python.expect(">>> ", 90)?;
    unchanged("the interpreter", &typed, &python.screen()?)?;
    python.send("kept, os.getpid()\n")?;
    python.expect("([1, 2], ", 30)?;
    let pid = python.expect(")", 30)?;
    says("the process before", &typed.screen.contents(), pid.trim())?;
    pager.send("q")?;
    pager.expect("$ ", 30)?;

    // Nobody else gets in between; then it is taken over, in another window.
    drop((pager, python));
    let mut taker = named(&alice, "take").terminal(None, 100, 30)?.watch(100, 30);
    taker.expect("typed before", 60)?;
    let (_, words) = editor.wait_end(60)?;
    says("who had it", &words, "taken over by a login from")?;
    ensure!(!editor_is_drawn(&words), "the editor's modes are left on: {words:?}");
    let larger = taker.screen()?;
    says("the editor in a larger window", &larger.screen.contents(), "// typed before")?;
    ensure!(larger.screen.alternate_screen(), "it is not on the alternate screen");
    same("the cursor's place", larger.screen.cursor_position(), edited.screen.cursor_position())?;
    same("a word's colour", larger.colour_of("return"), edited.colour_of("return"))?;
    ensure!(larger.screen.bracketed_paste(), "bracketed paste is off");
    taker.send("u:wq\r")?;
    taker.expect("$ ", 60)?;
    same("after undo", alice.output("cat main.c")?.as_str(), "int main() {\n  return 42;\n}")?;
    says("behind the editor", &taker.screen()?.screen.contents(), "before the editor")
}

/// Whether the last word about a mode that an editor switches on is that it is on.
fn editor_is_drawn(words: &str) -> bool {
    let last = |on: &str, off: &str| words.rfind(on) > words.rfind(off);
    last("\x1b[?2004h", "\x1b[?2004l") || last("\x1b[?1006h", "\x1b[?1006l")
}

fn named<'a>(alice: &Account<'a>, word: &str) -> crate::harness::ssh::Login<'a> {
    alice.login_as(&format!("{}+{word}", alice.name))
}

fn open<'a>(alice: &Account<'a>, word: &str) -> Result<Terminal<'a>> {
    let login = if word == "new" { named(alice, word) } else { alice.login() };
    let mut terminal = login.terminal(None, 80, 24)?.watch(80, 24);
    terminal.expect_prompt()?;
    Ok(terminal)
}

fn unchanged(what: &str, before: &Seen, after: &Seen) -> Result<()> {
    same(what, after.all(), before.all())
}
