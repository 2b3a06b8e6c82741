//! What an operator keeps of an account, and makes of it.

use anyhow::{Context as _, Result};

use crate::{
    harness::{Story, same, says},
    runner::{Test, test},
};

pub const TESTS: [Test; 2] = [
    test("checkpoint_brings_shell_and_files_back", 240, back_to_a_checkpoint),
    test("archive_becomes_an_account_of_another_name", 240, another_name),
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
