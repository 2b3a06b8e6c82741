//! Manual pages and shell completions, made from the same definitions that parse the command line.

use super::Cli;
use super::context::Context;
use super::output::count;
use anyhow::Context as _;
use clap::CommandFactory;
use clap_complete::Shell;
use serde_json::json;
use std::fs;
use std::io::{self, Write};
use std::path::Path;

pub const COMPLETIONS_HELP: &str = "\
Examples:
  hermitage completions bash > /etc/bash_completion.d/hermitage
  hermitage completions zsh > /usr/local/share/zsh/site-functions/_hermitage
  hermitage completions fish > ~/.config/fish/completions/hermitage.fish";

pub const MAN_HELP: &str = "\
Examples:
  hermitage man /usr/local/share/man/man8 && man hermitage-account-add";

const NAME: &str = "hermitage";

pub fn completions(shell: Shell) -> anyhow::Result<()> {
    let mut script = Vec::new();
    clap_complete::generate(shell, &mut Cli::command(), NAME, &mut script);
    match io::stdout().lock().write_all(&script) {
        Err(error) if error.kind() != io::ErrorKind::BrokenPipe => Err(error.into()),
        _ => Ok(()),
    }
}

pub fn pages(context: &Context, dir: &Path) -> anyhow::Result<()> {
    fs::create_dir_all(dir).with_context(|| format!("making {}", dir.display()))?;
    let mut command = Cli::command().disable_help_subcommand(true);
    command.build();
    let written = page(&command, dir)?;
    let object = json!({ "dir": dir, "pages": written });
    context.out.show(&object, || format!("{} in {}", count(written, "page"), dir.display()))
}

/// A page for the command and each below it. How many there were.
fn page(command: &clap::Command, dir: &Path) -> anyhow::Result<usize> {
    // `hermitage-account-add`, since it was built.
    let name = command.get_display_name().unwrap_or(command.get_name());
    let mut text = Vec::new();
    let source = format!("hermitage {}", env!("CARGO_PKG_VERSION"));
    clap_mangen::Man::new(command.clone()).section("8").source(source).render(&mut text)?;
    // Its name for what stands after the options, which are examples and notes.
    let text = String::from_utf8(text)?.replace("\n.SH EXTRA\n", "\n.SH NOTES\n");
    let path = dir.join(format!("{name}.8"));
    fs::write(&path, text).with_context(|| format!("writing {}", path.display()))?;
    let mut written = 1;
    for below in command.get_subcommands().filter(|below| !below.is_hide_set()) {
        written += page(below, dir)?;
    }
    Ok(written)
}
