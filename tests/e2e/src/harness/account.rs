//! An account for one story: made by the operator's commands, removed at the story's end.

use std::{fs, path::PathBuf, process::Command};

use anyhow::{Context as _, Result, bail};
use serde_json::Value;

use super::{
    Story,
    host::quote,
    process::{self, Ended, Input},
    ssh::Login,
    terminal::Terminal,
};

pub struct Account<'a> {
    story: &'a Story,
    pub name: String,
    pub key: PathBuf,
    /// Names its folders on the host; it outlives the name.
    pub id: String,
}

impl<'a> Account<'a> {
    pub fn add(story: &'a Story, hint: &str, arguments: &[&str]) -> Result<Self> {
        let name = story.unique(hint);
        let (key, public) = new_key(story, hint)?;
        story.afterwards(format!("hermitage account remove {name} --purge"));
        let answer = story
            .host()
            .run(&format!(
                "printf '%s\\n' {} | hermitage account add {name} --key - {} --json",
                quote(&public),
                arguments.join(" ")
            ))
            .with_context(|| format!("adding the account {name}"))?;
        let answer: Value = serde_json::from_str(&answer)
            .with_context(|| format!("`account add --json` printed {answer:?}"))?;
        let id = answer["id"].as_str().context("`account add --json` gave no id")?.to_owned();
        Ok(Self { story, name, key, id })
    }

    /// An account that was made of this one, and has its key.
    pub fn restored_as(&self, name: String) -> Result<Self> {
        let shown = self.story.host().hermitage_json(&format!("account show {name}"))?;
        let id = shown["id"].as_str().context("`account show --json` gave no id")?.to_owned();
        Ok(Self { story: self.story, name, key: self.key.clone(), id })
    }

    pub fn login(&self) -> Login<'a> {
        Login::with_key(self.story, &self.name, &self.key)
    }

    /// With the same key and another login name.
    pub fn login_as(&self, name: &str) -> Login<'a> {
        Login::with_key(self.story, name, &self.key)
    }

    pub fn exec(&self, script: &str) -> Result<Ended> {
        self.login().exec(script)
    }

    /// Runs a command that must succeed; what it printed, without the last line's end.
    pub fn output(&self, script: &str) -> Result<String> {
        Ok(self.exec(script)?.success()?.trim_end_matches('\n').to_owned())
    }

    pub fn shell(&self) -> Result<Terminal<'a>> {
        self.login().shell()
    }

    pub fn set_password(&self, password: &str) -> Result<()> {
        let script =
            format!("printf '%s\\n' {} | hermitage account passwd {}", quote(password), self.name);
        self.story.host().run(&script).map(drop)
    }

    pub fn disable(&self) -> Result<()> {
        self.story.host().run(&format!("hermitage account disable {}", self.name)).map(drop)
    }

    pub fn enable(&self) -> Result<()> {
        self.story.host().run(&format!("hermitage account enable {}", self.name)).map(drop)
    }

    /// Ends the sessions and stops the machine in order, as an operator would.
    pub fn stop_machine(&self) -> Result<()> {
        self.disable()?;
        self.story.wait_for(&format!("the machine of {} to stop", self.name), 60, || {
            Ok(self.machine()?.is_none().then_some(()))
        })?;
        self.enable()
    }

    /// The process of the account's machine, on the host: whoever has its disk open and is no service.
    pub fn machine(&self) -> Result<Option<i32>> {
        let disk = self.disk();
        let text = self.story.host().run(&self.machine_script())?;
        let mut pids = text.split_whitespace();
        match (pids.next(), pids.next()) {
            (None, _) => Ok(None),
            (Some(pid), None) => Ok(Some(pid.parse().context("odd process id")?)),
            (Some(_), Some(_)) => bail!("several processes have {disk} open: {text:?}"),
        }
    }

    /// Prints that process's id, for a script on the host.
    pub fn machine_script(&self) -> String {
        // The service opens the disk too, on its way to the machine.
        format!(
            "for fd in $(find /proc/[0-9]*/fd -lname {disk} 2>/dev/null); do \
               pid=${{fd#/proc/}}; pid=${{pid%%/*}}; \
               read -r comm < /proc/$pid/comm && [ \"$comm\" != hermitage ] && echo $pid; \
             done | sort -u",
            disk = self.disk()
        )
    }

    pub fn running_machine(&self) -> Result<i32> {
        self.machine()?.with_context(|| format!("no machine of {} is running", self.name))
    }

    /// The account's disk on the host.
    pub fn disk(&self) -> String {
        let state = self.story.world.options.state_dir.display();
        format!("{state}/accounts/{}/disk.img", self.id)
    }
}

/// A new key pair: the private key's file and the public key's line.
pub fn new_key(story: &Story, hint: &str) -> Result<(PathBuf, String)> {
    let path = story.path(hint);
    let mut command = Command::new("ssh-keygen");
    command.args(["-q", "-t", "ed25519", "-N", "", "-C", hint, "-f"]).arg(&path);
    process::run("ssh-keygen", command, Input::Nothing, story.within(30))?.success()?;
    let public = path.with_extension("pub");
    let line =
        fs::read_to_string(&public).with_context(|| format!("can't read {}", public.display()))?;
    Ok((path, line.trim().to_owned()))
}
