//! What `docs/operating.md` tells an operator to type, typed in its order.

use anyhow::{Context as _, Result, ensure};

use crate::{
    harness::{Story, account::new_key, host::quote, says},
    runner::{Test, test},
};

pub const TESTS: [Test; 1] = [test("the_operating_guide_does_what_it_says", 600, guide)];

const GUIDE: &str = include_str!("../../../../docs/operating.md");

/// What a block has to say, by a word of its commands. `NAME` is the account's.
const SAYS: [(&str, &str); 9] = [
    ("account show", "ed25519"),
    ("hostkey", "ssh-ed25519"),
    ("import course.csv", "already"),
    ("account set", "12 GiB"),
    ("audit.jsonl", "\"event\""),
    ("snapshot list", "NAME"),
    ("checkpoint list", "before-"),
    ("backup list", "NAME"),
    ("database check", "sound"),
];

fn guide(story: &Story) -> Result<()> {
    let host = story.host();
    let name = story.unique("guide");
    let (_, key) = new_key(story, "guide")?;
    let folder = format!("/tmp/{name}");
    let accounts = [name.clone(), format!("{name}-before"), format!("{name}-again")];
    let students = [format!("{name}-1"), format!("{name}-2")];
    for account in accounts.iter().chain(&students) {
        story.afterwards(format!("hermitage account remove {account} --purge 2>/dev/null; true"));
    }
    story.afterwards(format!("rm -rf {folder}"));
    let mut list = String::from("name,key,expires\n");
    for student in &students {
        list += &format!("{student},{key},2099-06-30\n");
    }
    host.run(&format!(
        "mkdir -m 700 {folder} && cd {folder} && echo {} > {name}.pub && printf %s {} > course.csv",
        quote(&key),
        quote(&list)
    ))?;

    let blocks: Vec<_> = GUIDE.split("```sh\n").skip(1).map(block).collect::<Result<_>>()?;
    ensure!(blocks.len() >= 13, "the guide has {} blocks of commands", blocks.len());
    let mut unsaid: Vec<_> = SAYS.into_iter().collect();
    for commands in blocks {
        // The guide's user is called alice; this host may have one.
        let commands = commands.replace("alice", &name);
        let said = host
            .run(&format!("cd {folder} && set -e\n{commands}"))
            .with_context(|| format!("the guide's\n{commands}"))?;
        unsaid.retain(|(word, _)| !commands.contains(word));
        for (word, words) in SAYS.iter().filter(|(word, _)| commands.contains(word)) {
            says(word, &said, &words.replace("NAME", &name))?;
        }
    }
    ensure!(unsaid.is_empty(), "the guide has no {unsaid:?}");
    Ok(())
}

fn block(text: &'static str) -> Result<&'static str> {
    Ok(text.split_once("```").context("a block of the guide has no end")?.0)
}
