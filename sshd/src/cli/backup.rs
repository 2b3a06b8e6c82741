//! `hermitage backup …`: all accounts, again and again, into one directory.

use super::audit::CopyNote;
use super::context::Context;
use super::output::{count, table};
use super::rest::{self, Held};
use super::{Said, admin, archive, size, status, time};
use anyhow::Context as _;
use clap::Subcommand;
use hermitage::admin::protocol::Request;
use hermitage::limits::Limits;
use hermitage::watch::Copied;
use hermitage_storage::accounts::{Account, Accounts, Policy};
use hermitage_storage::archive::{Wish, describe};
use hermitage_storage::backup::{self, Backup, Writer};
use hermitage_storage::disk::DiskError;
use hermitage_storage::incoming;
use hermitage_storage::rest::AtRest;
use serde_json::json;
use std::path::PathBuf;

const HELP: &str = "\
A backup's directory holds runs; what has not changed between two is there once. It is as secret as all accounts
together, and best kept on another disk.

Machines that run go on: the service copies the disk of each as it is at one moment (hermitage account export --help). With
--memory those in which nobody is logged in are put to rest instead, and of the others the memory is copied as well.

Examples:
  hermitage backup create /backup/hermitage             each night
  hermitage backup prune /backup/hermitage --keep 30
  hermitage backup verify /backup/hermitage
  hermitage backup restore /backup/hermitage alice --name alice-before";

#[derive(Debug, Subcommand)]
#[command(after_help = HELP)]
pub enum Command {
    /// Make a run: all accounts as they are now, and the database
    Create {
        /// The directory; made if it is not there
        dir: PathBuf,
        /// Only this account; can be given again
        #[arg(long, value_name = "NAME")]
        account: Vec<String>,
        /// Also machines' memory
        #[arg(long)]
        memory: bool,
        /// End sessions and put machines that run to rest, instead of copying their disks
        #[arg(long)]
        stop: bool,
    },
    /// List the runs, or the accounts of one
    List { dir: PathBuf, run: Option<String> },
    /// Read everything that a run names and check it
    Verify {
        dir: PathBuf,
        /// [default: all runs]
        run: Option<String>,
    },
    /// Make an account of what a run has of it; or the database
    Restore {
        dir: PathBuf,
        #[arg(required_unless_present = "database")]
        account: Option<String>,
        /// Of this run [default: the last]
        #[arg(long, value_name = "RUN")]
        run: Option<String>,
        /// Under another name
        #[arg(long, value_name = "NEW")]
        name: Option<String>,
        /// Leave the memory out, should there be some: start from the files
        #[arg(long)]
        no_memory: bool,
        /// Instead of an account, the accounts database, into this file
        #[arg(long, value_name = "FILE", conflicts_with_all = ["account", "name", "no_memory"])]
        database: Option<PathBuf>,
    },
    /// Delete old runs, and what only they have
    Prune {
        dir: PathBuf,
        /// Runs to keep, the last ones
        #[arg(long, value_name = "N", value_parser = clap::value_parser!(u32).range(1..))]
        keep: u32,
    },
}

impl Command {
    /// Whether it is noted in the audit log ([`super::audit`]).
    pub fn changes(&self) -> bool {
        match self {
            Self::List { .. } | Self::Verify { .. } => false,
            Self::Create { .. } | Self::Restore { .. } | Self::Prune { .. } => true,
        }
    }
}

pub fn run(context: &Context, command: Command) -> anyhow::Result<()> {
    match command {
        Command::Create { dir, account, memory, stop } => {
            create(context, &dir, &account, &How { memory, stop })
        }
        Command::List { dir, run: None } => list(context, &dir),
        Command::List { dir, run: Some(run) } => list_run(context, &dir, &run),
        Command::Verify { dir, run } => verify(context, &dir, run.as_deref()),
        Command::Restore { dir, run, database: Some(file), .. } => {
            let backup = Backup::open(&dir)?;
            let run = backup.run(run.as_deref())?;
            backup.database(&run, &file)?;
            let object = json!({ "run": run.id, "database": file });
            context
                .out
                .show(&object, || format!("the database of {} is {}", run.id, file.display()))
        }
        Command::Restore { dir, account, run, name, no_memory, .. } => {
            let account = account.unwrap_or_default();
            let wish =
                Wish { name: name.as_deref(), memory: !no_memory, room: rest::room(context)? };
            restore(context, &dir, &account, run.as_deref(), &wish)
        }
        Command::Prune { dir, keep } => prune(context, &dir, keep),
    }
}

#[derive(Clone, Copy)]
struct How {
    memory: bool,
    stop: bool,
}

fn create(
    context: &Context,
    dir: &std::path::Path,
    only: &[String],
    how: &How,
) -> anyhow::Result<()> {
    let accounts = context.accounts()?;
    let wanted = match only {
        [] => accounts.list(false)?,
        only => only.iter().map(|name| accounts.named(name)).collect::<Result<_, _>>()?,
    };
    let mut writer = Writer::begin(Backup::open_or_make(dir)?, time::now())?;
    let (mut added, mut unchanged) = (0, 0);
    let mut in_use = vec![];
    let mut left_out = vec![];
    for account in &wanted {
        let note = CopyNote::of(context, Copied::Backup, account, dir.display());
        let outcome = add(context, &accounts, account, how, &mut writer);
        // Of one that is as it was nothing was read, night for night.
        if !outcome.as_ref().is_ok_and(|(one, _)| one.unchanged) {
            note.over(outcome.as_ref().map(|(one, _)| one.written));
        }
        match outcome {
            Ok((one, copied)) => {
                added += 1;
                unchanged += usize::from(one.unchanged);
                in_use.extend(copied.then_some(&account.name));
            }
            // The others are to be had all the same.
            Err(error) => {
                let reason = format!("{error:#}");
                context.out.note(format!("{} is left out: {reason}", account.name));
                left_out.push(json!({ "account": account.name, "reason": reason }));
                writer.leave_out(&account.name, reason);
            }
        }
    }
    let id = time::name(time::now());
    let written = writer.finish(&accounts, context.state.root(), &id, env!("CARGO_PKG_VERSION"))?;
    let object = json!({
        "run": written.run.id,
        "accounts": added,
        "unchanged": unchanged,
        "in_use": in_use,
        "left_out": left_out,
        "written_bytes": written.bytes,
    });
    context.out.show(&object, || {
        let copied = match in_use.len() {
            0 => String::new(),
            copied => format!("{copied} copied while in use, "),
        };
        format!(
            "{}: {}, {unchanged} of them unchanged, {copied}{} written",
            written.run.id,
            count(added, "account"),
            size::show(written.bytes),
        )
    })?;
    if left_out.is_empty() { Ok(()) } else { Err(Said.into()) }
}

/// True: its machine goes on, and its disk was copied.
fn add(
    context: &Context,
    accounts: &Accounts,
    account: &Account,
    how: &How,
    writer: &mut Writer,
) -> anyhow::Result<(backup::Added, bool)> {
    let runs = || matches!(AtRest::take(&context.state, account.id), Err(DiskError::InUse(_)));
    // For its memory one that nobody uses is put to rest; it is resumed by the next login as after any linger.
    let stopped = (how.stop || how.memory) && runs() && (how.stop || idle(context, account)?);
    let held = match stopped {
        true => Held::Rest(rest::take(context, account, true)?),
        false => rest::take_or_copy(context, account, how.memory)?,
    };
    let copied = held.is_in_use();
    let version = env!("CARGO_PKG_VERSION");
    let added = describe(accounts, account, held.kept(), how.memory, version, time::now())
        .map_err(Into::into)
        .and_then(|manifest| writer.add(manifest, held.kept()));
    drop(held);
    let policy = Limits::of(&context.config, account).policy;
    let awake = policy == Policy::Keep || account.hold_at(time::now()).is_some();
    if stopped && awake {
        let start = Request::StartAccount { account: account.name.clone() };
        if let Err(error) = admin::tell(context, &start) {
            context.out.note(format!("{}'s machine was to run on: {error:#}", account.name));
        }
    }
    Ok((added?, copied))
}

/// Whether a machine runs in which nobody is logged in.
fn idle(context: &Context, account: &Account) -> anyhow::Result<bool> {
    let service = status::query(context)?;
    let machines = service.iter().flat_map(|service| &service.accounts);
    let mut hers = machines.filter(|machine| machine.account == account.name);
    Ok(hers.next().is_some_and(|machine| machine.sessions == 0))
}

fn list(context: &Context, dir: &std::path::Path) -> anyhow::Result<()> {
    let backup = Backup::open(dir)?;
    let ids = backup.runs()?;
    let runs: Vec<_> = ids.iter().map(|id| (id, backup.run(Some(id)))).collect();
    let object = json!({
        "runs": runs.iter().map(|(id, run)| match run {
            Ok(run) => json!({
                "run": id,
                "created": time::rfc3339(run.content.created),
                "accounts": run.content.accounts.len(),
                "left_out": run.content.left_out.len(),
            }),
            Err(error) => json!({ "run": id, "damage": error.to_string() }),
        }).collect::<Vec<_>>(),
    });
    context.out.show(&object, || {
        if runs.is_empty() {
            return "no runs".to_owned();
        }
        let mut table = table(["RUN", "MADE", "ACCOUNTS", "LEFT OUT"]);
        for (id, run) in &runs {
            match run {
                Ok(run) => table.add_row([
                    (*id).clone(),
                    time::short(run.content.created),
                    run.content.accounts.len().to_string(),
                    run.content.left_out.len().to_string(),
                ]),
                Err(error) => {
                    table.add_row([(*id).clone(), "-".into(), "-".into(), error.to_string()])
                }
            };
        }
        table.trim_fmt()
    })
}

fn list_run(context: &Context, dir: &std::path::Path, id: &str) -> anyhow::Result<()> {
    let content = Backup::open(dir)?.run(Some(id))?.content;
    let names: Vec<&str> = content.accounts.iter().map(|one| one.name.as_str()).collect();
    let object = json!({
        "run": id,
        "created": time::rfc3339(content.created),
        "accounts": names,
        "left_out": content.left_out,
    });
    context.out.show(&object, || {
        let left_out = content.left_out.iter();
        let left_out = left_out.map(|one| format!("{}: left out: {}", one.name, one.reason));
        names.iter().map(|name| (*name).to_owned()).chain(left_out).collect::<Vec<_>>().join("\n")
    })
}

fn verify(context: &Context, dir: &std::path::Path, id: Option<&str>) -> anyhow::Result<()> {
    let backup = Backup::open(dir)?;
    let ids = match id {
        Some(id) => vec![id.to_owned()],
        None => backup.runs()?,
    };
    let mut damaged = 0;
    let mut lines = vec![];
    let mut objects = vec![];
    for id in &ids {
        let checked = backup.run(Some(id)).and_then(|run| backup.verify(&run));
        damaged += usize::from(checked.is_err());
        lines.push(match &checked {
            Ok(bytes) => format!("{id}  whole: {} read", size::show(*bytes)),
            Err(error) => format!("{id}  damaged: {error}"),
        });
        objects.push(json!({
            "run": id,
            "whole": checked.is_ok(),
            "bytes": checked.as_ref().ok(),
            "damage": checked.as_ref().err().map(ToString::to_string),
        }));
    }
    let none = || "no runs".to_owned();
    context.out.show(&json!({ "runs": objects }), || {
        if lines.is_empty() { none() } else { lines.join("\n") }
    })?;
    if damaged == 0 { Ok(()) } else { Err(Said.into()) }
}

fn restore(
    context: &Context,
    dir: &std::path::Path,
    account: &str,
    run: Option<&str>,
    wish: &Wish,
) -> anyhow::Result<()> {
    let backup = Backup::open(dir)?;
    let run = backup.run(run)?;
    let reader = backup.account(&run, account)?;
    let mut accounts = context.accounts()?;
    incoming::sweep(&context.state, &accounts).context("removing what a former restore left")?;
    let what = format!("{account} of {}", run.id);
    let place = format!("{} of {}", run.id, dir.display());
    archive::bring_back(context, &mut accounts, reader, wish, (&what, &place))
}

fn prune(context: &Context, dir: &std::path::Path, keep: u32) -> anyhow::Result<()> {
    let backup = Backup::open_alone(dir)?;
    let pruned = backup::prune(&backup, keep as usize)?;
    let object = json!({
        "removed": pruned.removed,
        "kept": pruned.kept,
        "freed_bytes": pruned.freed,
    });
    context.out.show(&object, || {
        format!(
            "{} deleted, {} kept, {} freed",
            count(pruned.removed.len(), "run"),
            pruned.kept,
            size::show(pruned.freed)
        )
    })
}
