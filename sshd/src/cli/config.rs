//! `hermitage config check|show`.

use super::context::Context;
use clap::Subcommand;
use hermitage::config::{Config, DEFAULT_PATH};
use serde_json::json;
use std::path::Path;

/// The commented default.
const DOCUMENTED: &str = include_str!("../../../config/hermitage.toml");

#[derive(Debug, Subcommand)]
pub enum Command {
    /// Look whether the configuration is right, without changing anything
    #[command(after_help = "\
The running service reads it again at SIGHUP: systemctl reload hermitage.

Examples:
  hermitage config check
  hermitage --config new.toml config check")]
    Check,
    /// Show the configuration as it counts, defaults included
    Show {
        /// The defaults instead, with what each setting does; fit for a first configuration file
        #[arg(long)]
        defaults: bool,
    },
}

pub fn run(context: &Context, command: &Command) -> anyhow::Result<()> {
    match command {
        Command::Check => check(context),
        Command::Show { defaults: false } => show(context, &context.config, None),
        Command::Show { defaults: true } => show(context, &Config::default(), Some(DOCUMENTED)),
    }
}

/// One that is not right was refused before any command: what is left are the files it names.
fn check(context: &Context) -> anyhow::Result<()> {
    hermitage::server::check_files(&context.config)?;
    let file = match &context.source.file {
        Some(file) => Some(file.as_path()),
        None => Some(Path::new(DEFAULT_PATH)).filter(|path| path.exists()),
    };
    let object = json!({ "right": true, "file": file });
    context.out.show(&object, || match file {
        Some(file) => format!("{} is right", file.display()),
        None => format!("there is no {DEFAULT_PATH}: the defaults count"),
    })
}

fn show(context: &Context, config: &Config, text: Option<&str>) -> anyhow::Result<()> {
    let written = match text {
        Some(text) => text.to_owned(),
        None => toml::to_string_pretty(config)?,
    };
    context.out.show(&serde_json::to_value(config)?, || written)
}
