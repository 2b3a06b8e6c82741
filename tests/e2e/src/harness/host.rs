//! The serving machine, by root's hands.

use std::{process::Command, time::Instant};

use anyhow::{Context as _, Result};
use serde_json::Value;

use super::{
    Story,
    process::{self, Ended, Input, Running},
};

pub struct Host<'a> {
    story: &'a Story,
    deadline: Instant,
}

impl<'a> Host<'a> {
    pub fn new(story: &'a Story, deadline: Instant) -> Self {
        Self { story, deadline }
    }

    /// Runs a bash script and returns what it wrote; fails if it does.
    pub fn run(&self, script: &str) -> Result<String> {
        self.try_run(script)?.success()
    }

    /// Runs a bash script, however it ends.
    pub fn try_run(&self, script: &str) -> Result<Ended> {
        self.start(script)?.wait(self.deadline)
    }

    /// Starts a bash script. It travels on standard input, so that no quoting on the way there can
    /// change it; a function makes bash read all of it before it begins.
    pub fn start(&self, script: &str) -> Result<Running> {
        let whole = format!("main() {{\n{script}\n}}\nmain </dev/null\nexit $?\n");
        self.bash(script, Input::Bytes(whole.into_bytes()))
    }

    /// Starts a bash script of one line that reads what is then written to it.
    pub fn talk(&self, line: &str) -> Result<Running> {
        let mut running = self.bash(line, Input::Pipe)?;
        running.write(format!("{line}\n").as_bytes())?;
        Ok(running)
    }

    fn bash(&self, script: &str, input: Input) -> Result<Running> {
        let mut command = Command::new("sh");
        command.arg("-c").arg(format!("{} \"$@\"", self.story.world.options.exec));
        command.args(["e2e", "bash", "-s"]);
        process::start(&format!("on the host: {script}"), command, input)
    }

    /// Runs `hermitage ARGUMENTS --json` and parses what it prints.
    pub fn hermitage_json(&self, arguments: &str) -> Result<Value> {
        let text = self.run(&format!("hermitage {arguments} --json"))?;
        serde_json::from_str(&text)
            .with_context(|| format!("`hermitage {arguments} --json` printed {text:?}"))
    }
}

/// One word for a shell, whatever is in it.
pub fn quote(text: &str) -> String {
    format!("'{}'", text.replace('\'', r"'\''"))
}

#[cfg(test)]
mod tests {
    use super::quote;

    #[test]
    fn quotes_survive_a_shell() {
        for text in ["plain", "two words", "it's", "$HOME `id` \\ \" \n!"] {
            let mut command = std::process::Command::new("sh");
            command.arg("-c").arg(format!("printf %s {}", quote(text)));
            assert_eq!(String::from_utf8_lossy(&command.output().unwrap().stdout), text);
        }
    }
}
