//! What an operator keeps of an account, and makes of it.

use anyhow::{Context as _, Result, ensure};

use crate::{
    harness::{Story, host::quote, same, says},
    runner::{Test, test},
    stories::space::in_order,
};

pub const TESTS: [Test; 4] = [
    test("checkpoint_brings_shell_and_files_back", 240, back_to_a_checkpoint),
    test("a_machine_in_use_is_kept_as_it_is_and_goes_on", 300, kept_in_use),
    test("archive_becomes_an_account_of_another_name", 240, another_name),
    test("an_account_in_use_is_exported_and_backed_up", 420, while_in_use),
];

fn back_to_a_checkpoint(story: &Story) -> Result<()> {
    let alice = story.account("alice")?;
    let operator = |words: &str| story.host().run(&format!("hermitage checkpoint {words} --stop"));
    let mut shell = alice.login().terminal(None, 80, 24)?;
    shell.run("n=first; echo $n > note; echo $n > /dev/shm/note")?;
    operator(&format!("create {} clean", alice.name))?;
    shell.wait_end(60).context("her session when she was stopped")?;
    let look = "echo $n $(cat note /dev/shm/note)";
    let mut shell = alice.login().terminal(None, 80, 24)?;
    // Taken up, with the prompt that was there.
    shell.send("\n")?;
    same("before", shell.run(look)?.trim(), "first first first")?;
    shell.run("n=second; echo $n > note; echo $n > /dev/shm/note")?;
    let told = operator(&format!("restore {} clean", alice.name))?;
    says("what the operator is told", &told, "resumes it")?;
    shell.wait_end(60).context("her session when she was taken back")?;
    let mut shell = alice.login().terminal(None, 80, 24)?;
    shell.send("\n")?;
    same("at the checkpoint", shell.run(look)?.trim(), "first first first")?;
    shell.cut()
}

/// Lines for some 20 s, and nothing that is asked of it: a command that somebody waits for.
const LINES: &str = "i=0; while [ $i -lt 40 ]; do i=$((i + 1)); echo $i; sleep 0.5; done";

fn kept_in_use(story: &Story) -> Result<()> {
    let alice = story.account("alice")?;
    let host = story.host();
    let mut shell = alice.login().terminal(None, 80, 24)?;
    // Of the file nothing is synced.
    shell.run("n=first; echo $n > /dev/shm/note; head -c 8000000 /dev/urandom > kept; sha256sum kept > sum")?;
    shell.run("while :; do date +%s > alive; sleep 0.2; done & echo")?;
    let machine = alice.running_machine()?;
    std::thread::scope(|scope| -> Result<()> {
        let command = scope.spawn(|| alice.login().exec(LINES)?.success());
        let made = host.run(&format!("hermitage checkpoint create {} used", alice.name))?;
        says("what the operator is told", &made, "files and memory")?;
        says("what the operator is told", &made, "her machine goes on")?;
        let asked = alice.login_as(&format!("{}+checkpoint", alice.name)).exec("hers")?;
        says(
            "what she is told",
            &asked.success()?,
            "hers has your files and memory as they are now",
        )?;
        same("her shell", shell.run("echo $n; kill -0 $! && echo lives")?.trim(), "first\nlives")?;
        let lines = command.join().map_err(|_| anyhow::anyhow!("the thread panicked"))??;
        let all: Vec<String> = (1..=40).map(|n| n.to_string()).collect();
        same("her command's lines", lines.lines().collect::<Vec<_>>().join(" "), all.join(" "))
    })?;
    same("her machine", alice.running_machine()?, machine)?;
    shell.run("n=second; echo $n > /dev/shm/note; echo other > kept; sync")?;

    // By her operator, and by herself.
    for (name, after) in [("used", "third"), ("hers", "fourth")] {
        if name == "used" {
            let back = format!("hermitage checkpoint restore {} used --stop", alice.name);
            says("what the operator is told", &host.run(&back)?, "resumes it")?;
        } else {
            let asked = alice.login_as(&format!("{}+checkpoint", alice.name));
            let told = asked.exec("restore hers yes")?.success()?;
            says("what she is told", &told, "Your files and memory are as they were in hers.")?;
        }
        shell.wait_end(60).context("her session when she was taken back")?;
        shell = alice.login().terminal(None, 80, 24)?;
        shell.send("\n")?;
        let found = shell
            .run("echo $n $(cat /dev/shm/note); sha256sum -c sum; kill -0 $! && echo lives")?;
        same(name, found.trim(), "first first\nkept: OK\nlives")?;
        // What works in it goes on, and knows the time.
        story.wait_for("her program to go on", 60, || {
            // The file is empty for the moment in which the program writes it.
            let lag = alice.exec("echo $(($(date +%s) - $(cat alive)))")?;
            let lag = lag.out().trim().parse().unwrap_or(i64::MAX);
            Ok((-2..5).contains(&lag).then_some(()))
        })?;
        shell.run(&format!("n={after}; echo $n > /dev/shm/note; echo other > kept; sync"))?;
    }
    shell.cut()?;
    host.run(&format!("hermitage account stop {}", alice.name))?;
    in_order(story, &alice)
}

fn another_name(story: &Story) -> Result<()> {
    let alice = story.account("alice")?;
    alice.output("echo hers > note; sync")?;
    let name = story.unique("bob");
    let file = format!("/tmp/{name}.hermitage");
    story.afterwards(format!("rm -f {file}; hermitage account remove {name} --purge"));
    story.host().run(&format!(
        "hermitage account export {} --stop -o - > {file} && \
         hermitage account restore - --name {name} < {file}",
        alice.name
    ))?;
    let told =
        alice.login_as(&name).exec("whoami; cat note; sudo -n id -un; hostname")?.success()?;
    let wanted = format!("{name}\nhers\nroot\n{name}\n");
    same("what bob finds", told.as_str(), wanted.as_str())?;
    same("and alice", alice.output("whoami; cat note")?.as_str(), &format!("{}\nhers", alice.name))
}

/// Writes for as long as it lives: files again and again, and in between a line to two logs, one after the other.
const WRITER: &str = "
i=0
while :; do
    i=$((i + 1))
    head -c 200000 /dev/urandom > busy$((i % 40))
    [ $((i % 7)) != 0 ] || rm -f busy$((i * 3 % 40))
    echo $i >> first
    echo $i >> second
done";

fn while_in_use(story: &Story) -> Result<()> {
    let alice = story.account("alice")?;
    let host = story.host();
    alice.output("head -c 24000000 /dev/urandom > kept; sha256sum kept > sum; sync")?;
    alice.output(&format!("printf %s {} > writer", quote(WRITER)))?;
    let mut shell = alice.login().terminal(None, 80, 24)?;
    shell.run("n=here; sh writer & echo")?;
    let machine = alice.running_machine()?;
    let lines = || -> Result<usize> { Ok(alice.output("wc -l < first")?.trim().parse()?) };
    story.wait_for("her program to write", 60, || Ok((lines()? > 20).then_some(())))?;

    let file = format!("/tmp/{}.hermitage", alice.name);
    let dir = format!("/tmp/{}.backup", alice.name);
    story.afterwards(format!("rm -rf {file} {dir}"));
    let exported = format!("account export {} -o {file}", alice.name);
    let restored = format!("account restore {file}");
    let kept = format!("backup create {dir} --account {}", alice.name);
    let brought = format!("backup restore {dir} {}", alice.name);
    for (put_away, bring_back, told) in [
        (exported, restored, "as its disk was while in use"),
        (kept, brought, "1 copied while in use"),
    ] {
        let before = lines()?;
        let said = host.run(&format!("hermitage {put_away}"))?;
        says(&put_away, &said, told)?;
        let after = lines()?;
        // She is where she was, and so is her program.
        same("her shell", shell.run("echo $n; kill -0 $! && echo lives")?.trim(), "here\nlives")?;
        same("her machine", alice.running_machine()?, machine)?;
        story.wait_for("her program to go on", 60, || Ok((lines()? > after).then_some(())))?;
        let beside =
            host.run(&format!("ls -A $(dirname {}) | grep -c '^.new-' || true", alice.disk()))?;
        same("left in her folder", beside.trim(), "0")?;

        let name = story.unique("bob");
        story.afterwards(format!("hermitage account remove {name} --purge"));
        host.run(&format!("hermitage {bring_back} --name {name}"))?;
        let bob = alice.restored_as(name)?;
        in_order(story, &bob)?;
        let found = bob.login();
        found.exec("sha256sum -c sum")?.success().context("what was synced before")?;
        // Of one instant: nothing that was written by then is missing, though nobody had synced it, and of two
        // lines one after the other the second is not there without the first.
        let count = |name: &str| -> Result<usize> {
            let script = format!("awk 'NR != $1 {{ exit 1 }} END {{ print NR }}' {name}");
            Ok(found.exec(&script)?.success().context("a gap")?.trim().parse()?)
        };
        let (first, second) = (count("first")?, count("second")?);
        ensure!((before..=after).contains(&first), "{first} lines, {before} before, {after} after");
        ensure!(first == second || first == second + 1, "{first} and then {second} lines");
    }
    shell.run("kill $!")?;
    shell.cut()
}
