//! The command line: what there is to type, and what comes back.
//!
//! Commands change the database and the state directory themselves and then tell the running service,
//! if there is one, what to look at again: administration works while the service is down. Each can be
//! repeated: what is already so is said and is no error.

mod account;
mod account_add;
mod account_disk;
mod account_idle;
mod account_invite;
mod account_limits;
mod account_machine;
mod account_quota;
mod account_set;
mod account_show;
mod account_size;
mod account_usage;
mod admin;
mod archive;
mod audit;
mod backup;
mod base;
mod base_removal;
mod checkpoint;
mod config;
mod console;
mod context;
mod database;
mod date;
mod doctor;
mod hostkey;
mod image;
mod import;
mod key;
mod log;
mod manual;
mod output;
mod password;
mod rest;
mod session;
mod snapshot;
mod status;
mod template;
mod tool;
mod top;

use clap::{Parser, Subcommand};
use context::Context;
use hermitage::{process, size, span, time};
use hermitage_storage::accounts::AccountsError;
use std::path::PathBuf;
use std::process::ExitCode;

const EXIT_STATUS: &str = "\
Exit status:
  0  done, or already so
  1  failed (doctor: at least one finding is a failure)
  2  the command line is wrong
  3  there is no such account, class, key, base or image
  4  the name is taken, by an account that differs from what is asked for";

const EXAMPLES: &str = "\
First steps on a new host:
  hermitage doctor                                  what this host lacks, and what to do about it
  hermitage image build                             build the guest's kernel and root file system
  hermitage base build                              boot it once; machines are forked from that
  hermitage account add alice --key alice.pub       give alice an account
  hermitage serve                                   let her in: ssh -p 2222 alice@this-host
";

/// Shell accounts, each in a virtual machine of its own.
#[derive(Debug, Parser)]
#[command(name = "hermitage", version, after_help = EXAMPLES, after_long_help = format!("{EXAMPLES}\n{EXIT_STATUS}"))]
struct Cli {
    #[command(flatten)]
    global: Global,
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, clap::Args)]
struct Global {
    /// Configuration file [default: /etc/hermitage/hermitage.toml, if there is one]
    #[arg(long, global = true, value_name = "FILE", help_heading = "Everywhere")]
    config: Option<PathBuf>,
    /// Where accounts, disks and bases are kept, instead of what the configuration says
    #[arg(long, global = true, value_name = "DIR", help_heading = "Everywhere")]
    state_dir: Option<PathBuf>,
    /// Where the service's socket is, instead of what the configuration says
    #[arg(long, global = true, value_name = "DIR", help_heading = "Everywhere")]
    run_dir: Option<PathBuf>,
    /// Print JSON, for programs: one object, with field names that stay
    #[arg(long, global = true, help_heading = "Everywhere")]
    json: bool,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// Run the service: the SSH server and the accounts' machines
    Serve,
    /// Look whether this host can run machines, and say what to do if not
    #[command(after_help = doctor::HELP)]
    Doctor(doctor::Doctor),
    /// Show the running service, its machines and sessions
    Status,
    /// Show what machines take of processors, memory and disks, as it changes
    #[command(after_help = top::HELP)]
    Top(top::Top),
    /// Accounts: who may log in, with what, and how much they get
    #[command(subcommand)]
    Account(account::Command),
    /// Sessions that are going on: who is here, ending one, telling them something
    #[command(subcommand)]
    Session(session::Command),
    /// Show who was here: from where, by which key, for how long, and how it ended
    #[command(after_help = log::HELP)]
    Log(log::Log),
    /// The accounts' database: is it sound, copies of it, going back to one
    #[command(subcommand)]
    Database(database::Command),
    /// Base snapshots: what machines are forked from
    #[command(subcommand)]
    Base(base::Command),
    /// Snapshots: what is saved of the memory of accounts' machines
    #[command(subcommand)]
    Snapshot(snapshot::Command),
    /// Checkpoints: states of an account, files and memory, that it can go back to
    #[command(subcommand)]
    Checkpoint(checkpoint::Command),
    /// Backups: all accounts, again and again, into one directory
    #[command(subcommand)]
    Backup(backup::Command),
    /// Guest images: the kernel and root file system that bases are booted from
    #[command(subcommand)]
    Image(image::Command),
    /// Show this host's key, as users, known_hosts files and the DNS need it
    #[command(after_help = "\
Examples:
  hermitage hostkey shell.example.org
  hermitage hostkey shell.example.org --json | jq -r .known_hosts >> /etc/ssh/ssh_known_hosts")]
    Hostkey {
        /// The name that users log in to [default: this machine's]
        host: Option<String>,
    },
    /// Look at the configuration
    #[command(subcommand)]
    Config(config::Command),
    /// Print a shell's completions of this program's commands
    #[command(after_help = manual::COMPLETIONS_HELP)]
    Completions {
        /// bash, zsh, fish, elvish or powershell
        shell: clap_complete::Shell,
    },
    /// Write a manual page for each command
    #[command(after_help = manual::MAN_HELP)]
    Man {
        /// A directory, made if there is none
        dir: PathBuf,
    },
    /// Attach to the serial console of an account's running machine
    #[command(after_help = "Leave with Ctrl-], or with ~. at the start of a line.")]
    Console {
        /// The account's name
        account: String,
    },
}

impl Command {
    /// Whether it is noted in the audit log ([`audit`]).
    fn changes(&self) -> bool {
        match self {
            Self::Account(command) => command.changes(),
            Self::Database(command) => command.changes(),
            Self::Base(command) => command.changes(),
            Self::Snapshot(command) => command.changes(),
            Self::Checkpoint(command) => command.changes(),
            Self::Backup(command) => command.changes(),
            Self::Image(command) => command.changes(),
            Self::Doctor(doctor) => doctor.fix,
            // What these two ask of the service it notes itself.
            Self::Session(_) | Self::Console { .. } => false,
            Self::Serve
            | Self::Status
            | Self::Top(_)
            | Self::Log(_)
            | Self::Hostkey { .. }
            | Self::Config(_)
            | Self::Completions { .. }
            | Self::Man { .. } => false,
        }
    }
}

/// Something that was named and isn't there.
#[derive(Debug, thiserror::Error)]
#[error("{0}")]
struct NotFound(String);

/// A name that belongs to something else.
#[derive(Debug, thiserror::Error)]
#[error("{0}")]
struct Taken(String);

/// The command has said itself what failed.
#[derive(Debug, thiserror::Error)]
#[error("failed")]
struct Said;

pub fn main() -> ExitCode {
    process::leave_no_core();
    let cli = Cli::parse();
    let json = cli.global.json;
    let words = std::env::args_os().skip(1).map(|word| word.to_string_lossy().into_owned());
    let note = cli.command.changes().then(|| audit::Note::new(words));
    match run(cli, note) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) if error.is::<Said>() => ExitCode::FAILURE,
        Err(error) => {
            if json {
                eprintln!("{}", serde_json::json!({ "error": format!("{error:#}") }));
            } else {
                eprintln!("hermitage: {error:#}");
            }
            ExitCode::from(exit_status(&error))
        }
    }
}

fn exit_status(error: &anyhow::Error) -> u8 {
    if error.is::<NotFound>() {
        return 3;
    }
    if error.is::<Taken>() {
        return 4;
    }
    match error.downcast_ref::<AccountsError>() {
        Some(AccountsError::Unknown(_)) => 3,
        Some(AccountsError::NameTaken(_)) => 4,
        _ => 1,
    }
}

fn run(cli: Cli, note: Option<audit::Note>) -> anyhow::Result<()> {
    let context = Context::new(&cli.global)?;
    let outcome = carry_out(&context, cli.command);
    if let Some(note) = note {
        note.write(&context, &outcome);
    }
    outcome
}

fn carry_out(context: &Context, command: Command) -> anyhow::Result<()> {
    match command {
        Command::Serve => serve(context),
        Command::Doctor(doctor) => doctor::run(context, &doctor),
        Command::Status => status::run(context),
        Command::Top(top) => top::run(context, &top),
        Command::Account(command) => account::run(context, command),
        Command::Database(command) => database::run(context, command),
        Command::Session(command) => session::run(context, command),
        Command::Log(query) => log::run(context, &query),
        Command::Base(command) => base::run(context, command),
        Command::Snapshot(command) => snapshot::run(context, command),
        Command::Checkpoint(command) => checkpoint::run(context, command),
        Command::Backup(command) => backup::run(context, command),
        Command::Image(command) => image::run(context, command),
        Command::Hostkey { host } => hostkey::run(context, host),
        Command::Config(command) => config::run(context, &command),
        Command::Completions { shell } => manual::completions(shell),
        Command::Man { dir } => manual::pages(context, &dir),
        Command::Console { account } => console::run(context, &account),
    }
}

fn serve(context: &Context) -> anyhow::Result<()> {
    hermitage::logging::start("info");
    let source = context.source.clone();
    hermitage::server::run(context.config.clone(), Box::new(move || source.read()))
}

#[cfg(test)]
mod tests {
    use super::*;
    use clap::CommandFactory;

    #[test]
    fn the_command_line_is_consistent() {
        Cli::command().debug_assert();
    }

    /// The file says what the program does: with its comments as settings, nothing changes.
    #[test]
    fn the_documented_configuration_is_the_default() {
        use hermitage::config::Config;
        const SECTIONS: [&str; 6] = ["ssh", "machines", "audit", "history", "metrics", "classes"];
        const DOCUMENTED: &str = include_str!("../../../config/hermitage.toml");
        // What has no default is there as an example.
        let examples =
            ["libexec_dir", "banner", "user_ca_keys", "revoked_keys", "address", "cgroup"];
        let setting = |line: &str| {
            let name = line.strip_prefix('#').and_then(|line| line.split_once(" = "));
            name.is_some_and(|(name, _)| !name.contains(' ') && !examples.contains(&name))
        };
        let set: Vec<_> =
            DOCUMENTED.lines().map(|line| if setting(line) { &line[1..] } else { line }).collect();
        assert!(set.iter().filter(|line| line.contains(" = ")).count() >= 18, "{set:?}");
        let default = format!("{:?}", Config::default());
        for text in [DOCUMENTED.to_owned(), set.join("\n")] {
            let file = tempfile::NamedTempFile::new().unwrap();
            std::fs::write(file.path(), text).unwrap();
            let loaded = Config::load(Some(file.path())).unwrap();
            assert_eq!(format!("{loaded:?}"), default);
        }
        // And every field of the program is in the file.
        let fields = default.split([' ', '{', '(']).filter_map(|word| word.strip_suffix(':'));
        for field in fields.filter(|field| !SECTIONS.contains(field)) {
            assert!(DOCUMENTED.contains(&format!("#{field} = ")), "{field} is not documented");
        }
    }

    /// A password on a command line is in the process list and the shell's history.
    #[test]
    fn no_option_takes_a_password() {
        fn look(command: &clap::Command) {
            for argument in command.get_arguments() {
                let name = argument.get_id().as_str();
                assert!(
                    !name.contains("password") || !argument.get_action().takes_values(),
                    "{} {name}",
                    command.get_name()
                );
            }
            command.get_subcommands().for_each(look);
        }
        look(&Cli::command());
    }
}
