//! The OpenSSH client, as somebody.

use std::{
    fs,
    os::unix::fs::PermissionsExt as _,
    path::{Path, PathBuf},
    process::Command,
};

use anyhow::{Context as _, Result};

use super::{
    Story,
    process::{self, Ended, Input, Running},
    terminal::Terminal,
};

/// A way to be somebody.
pub struct Login<'a> {
    story: &'a Story,
    name: String,
    auth: Auth,
    options: Vec<String>,
}

enum Auth {
    Key(PathBuf),
    Password(String),
}

impl<'a> Login<'a> {
    pub fn with_key(story: &'a Story, name: &str, key: &Path) -> Self {
        let auth = Auth::Key(key.to_owned());
        Self { story, name: name.to_owned(), auth, options: Vec::new() }
    }

    pub fn with_password(story: &'a Story, name: &str, password: &str) -> Self {
        let auth = Auth::Password(password.to_owned());
        Self { story, name: name.to_owned(), auth, options: Vec::new() }
    }

    /// With another `-o` option, or any other argument.
    pub fn option(mut self, option: &str) -> Self {
        self.options.push(option.to_owned());
        self
    }

    /// `ssh`, `scp` or `sftp` with what it takes to log in; the destination is for the caller to add.
    pub fn client(&self, program: &str) -> Result<Command> {
        let world = &self.story.world;
        let mut command = Command::new(program);
        command.env_remove("SSH_AUTH_SOCK").env_remove("DISPLAY").env("LC_ALL", "C.UTF-8");
        command.env("TERM", "xterm-256color");
        // The first value of an option is the one that counts.
        command.args(&self.options);
        command.args(["-F", "/dev/null", if program == "ssh" { "-p" } else { "-P" }]);
        command.arg(world.options.ssh_port.to_string());
        // One file for the whole run: a host key that changed would end every later login.
        let known = world.dir.path().join("known_hosts");
        for option in [
            &format!("UserKnownHostsFile={}", known.display()),
            "GlobalKnownHostsFile=/dev/null",
            "StrictHostKeyChecking=accept-new",
            "ConnectTimeout=30",
            "IdentitiesOnly=yes",
            "LogLevel=ERROR",
            "ControlPath=none",
        ] {
            command.args(["-o", option]);
        }
        match &self.auth {
            Auth::Key(key) => {
                command.arg("-i").arg(key);
                command.args(["-o", "PreferredAuthentications=publickey", "-o", "BatchMode=yes"]);
            }
            Auth::Password(password) => {
                command.env("SSH_ASKPASS", self.answer(password)?);
                command.env("SSH_ASKPASS_REQUIRE", "force");
                for option in ["PreferredAuthentications=password", "NumberOfPasswordPrompts=1"] {
                    command.args(["-o", option]);
                }
            }
        }
        Ok(command)
    }

    /// `ssh` up to the destination.
    pub fn ssh(&self, flags: &[&str]) -> Result<Command> {
        let mut command = self.client("ssh")?;
        command.args(flags).arg(self.destination());
        Ok(command)
    }

    pub fn destination(&self) -> String {
        format!("{}@{}", self.name, self.story.world.options.ssh_host)
    }

    /// A command without a terminal, run to its end.
    pub fn exec(&self, script: &str) -> Result<Ended> {
        self.exec_with(script, Input::Nothing)
    }

    pub fn exec_with(&self, script: &str, input: Input) -> Result<Ended> {
        self.start(script, input)?.wait(self.story.within(120))
    }

    /// A command without a terminal, in the background.
    pub fn start(&self, script: &str, input: Input) -> Result<Running> {
        let mut command = self.ssh(&["-T"])?;
        command.arg(script);
        process::start(&self.title(script), command, input)
    }

    /// A shell on a terminal of 80 × 24, after its first prompt.
    pub fn shell(&self) -> Result<Terminal<'a>> {
        self.shell_of(80, 24)
    }

    pub fn shell_of(&self, columns: u16, rows: u16) -> Result<Terminal<'a>> {
        let mut terminal = self.terminal(None, columns, rows)?;
        terminal.expect_prompt()?;
        Ok(terminal)
    }

    /// A shell or a command on a terminal, as soon as the client was started.
    pub fn terminal(&self, script: Option<&str>, columns: u16, rows: u16) -> Result<Terminal<'a>> {
        let mut command = self.ssh(&["-tt"])?;
        command.args(script);
        let title = self.title(script.unwrap_or("a shell"));
        Terminal::open(self.story, &title, command, columns, rows)
    }

    fn title(&self, script: &str) -> String {
        format!("ssh {}: {script}", self.name)
    }

    /// A program that prints the password, as ssh asks for it where there is nobody to type.
    fn answer(&self, password: &str) -> Result<PathBuf> {
        let path = self.story.path("askpass");
        let text = format!("#!/bin/sh\nprintf '%s\\n' {}\n", super::host::quote(password));
        fs::write(&path, text)
            .and_then(|()| fs::set_permissions(&path, fs::Permissions::from_mode(0o700)))
            .with_context(|| format!("can't write {}", path.display()))?;
        Ok(path)
    }
}
