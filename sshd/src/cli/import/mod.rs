//! `hermitage account import`: a list of accounts, all of it or nothing.
//!
//! The whole file is read and judged before anything is changed, so that every fault in it is told at
//! once; then one transaction takes all lines. A list can be given again: lines that are so already are
//! said to be, which is also how somebody goes on after a power cut.

mod plan;
mod rows;

use super::context::Context;
use super::output::count;
use super::{Said, admin, password};
use anyhow::{Context as _, bail};
use hermitage_storage::accounts::{Account, BatchError, Step};
use hermitage_storage::disk;
use plan::Planned;
use rows::{Problem, Row};
use serde_json::json;
use std::fs::File;
use std::io::{self, Read};
use std::num::NonZero;
use std::path::{Path, PathBuf};
use std::thread;

/// Longest list in bytes.
const MAX_FILE: u64 = 16 << 20;

pub const HELP: &str = "\
The first line names the columns, in any order; only name is needed, and an empty field says nothing:

  name        login name
  key         SSH public keys; several in one quoted field with a line for each, or in several columns
  password    a password of her own; the file is as secret as they are
  class       a class of the configuration
  disk        size of the disk: 20GiB
  quota       what disk, saved memory and checkpoints may take together: 30GiB
  sessions    most sessions at once
  streams     most streams that a connection forwards
  linger      how long the machine stays after the last session: 10m
  max_linger  how long work may keep it awake: 8h
  policy      save, keep or discard
  memory      of its machine: 1GiB
  vcpus       virtual CPUs of its machine
  processes   most processes and threads in its machine
  cpu_weight, cpu_percent, io_rate, io_operations   as the options of account set
  expires     2027-06-30, 2027-06-30T18:00 (UTC) or never
  disabled    yes or no

Lines that begin with # are left out. Either all lines are taken or none; every fault is told with its line. A
line whose account is there and is so already counts as done. One that differs is a fault, or with --update
changes what the line says; keys are added and never taken away.

Example:
  name,key,class,expires
  alice,ssh-ed25519 AAAAC3NzaC1lZDI1NTE5AAAAI… alice@laptop,student,2027-06-30
  bob,ssh-ed25519 AAAAC3NzaC1lZDI1NTE5AAAAI… bob@home,student,2027-06-30

  hermitage account import course.csv --dry-run
  hermitage account import course.csv";

#[derive(Debug, clap::Args)]
pub struct Import {
    /// The list (- for standard input)
    #[arg(value_name = "FILE")]
    file: PathBuf,
    /// Only say what would be done
    #[arg(long)]
    dry_run: bool,
    /// Change accounts that are there to what their line says
    #[arg(long)]
    update: bool,
}

impl Import {
    /// Whether it is noted in the audit log.
    pub fn changes(&self) -> bool {
        !self.dry_run
    }
}

pub fn run(context: &Context, import: &Import) -> anyhow::Result<()> {
    let text = read(&import.file)?;
    let (rows, mut problems) = rows::parse(&text);
    let mut accounts = context.accounts()?;
    let planned = plan::plan(context, &accounts, &rows, import.update, &mut problems)?;
    if !problems.is_empty() {
        return Err(refuse(context, problems));
    }
    let outcomes: Vec<(&Row, &'static str)> = rows
        .iter()
        .zip(&planned)
        .map(|(row, planned)| (row, planned.outcome(import.dry_run)))
        .collect();
    if !import.dry_run {
        let (touched, steps) = steps(&rows, planned)?;
        let taken = match accounts.batch(&steps) {
            Ok(taken) => taken,
            Err(BatchError { step: None, source }) => return Err(source.into()),
            // Somebody else was quicker.
            Err(BatchError { step: Some(step), source }) => {
                let line = touched.get(step).map_or(0, |row| row.line);
                return Err(refuse(context, vec![Problem { line, words: source.to_string() }]));
            }
        };
        if let Err(error) = make_disks(context, &rows, &accounts) {
            let made = steps.iter().zip(&taken).filter(|(step, _)| matches!(step, Step::Create(_)));
            undo(context, &mut accounts, made.map(|(_, account)| account))?;
            return Err(error).context("making a disk; no account was made");
        }
        if context.state.current_base()?.is_none() {
            context.out.note("their disks are made by the first: hermitage base build");
        }
        for (step, account) in steps.iter().zip(&taken) {
            if matches!(step, Step::Change(..)) {
                admin::account_changed(context, &account.name);
            }
        }
    }
    report(context, import.dry_run, &outcomes)
}

fn read(file: &Path) -> anyhow::Result<Vec<u8>> {
    let stdin = file.as_os_str() == "-";
    let shown = if stdin { "standard input".into() } else { file.display().to_string() };
    let read = || -> anyhow::Result<Vec<u8>> {
        let mut text = Vec::new();
        let source: Box<dyn Read> =
            if stdin { Box::new(io::stdin()) } else { Box::new(File::open(file)?) };
        if source.take(MAX_FILE + 1).read_to_end(&mut text)? as u64 > MAX_FILE {
            bail!("it has more than {MAX_FILE} bytes; give it in parts");
        }
        Ok(text)
    };
    read().with_context(|| format!("reading the list of accounts from {shown}"))
}

/// The steps that change something, with their rows. Passwords are hashed here, after all else is known
/// to be right: it is most of the work.
fn steps(rows: &[Row], planned: Vec<Planned>) -> anyhow::Result<(Vec<&Row>, Vec<Step>)> {
    let (mut touched, mut steps) = (Vec::new(), Vec::new());
    for (row, planned) in rows.iter().zip(planned) {
        if let Planned(Some(step)) = planned {
            touched.push(row);
            steps.push(step);
        }
    }
    let hashes =
        in_parallel(&touched, |row| row.password.as_deref().map(password::hash).transpose());
    for (step, hash) in steps.iter_mut().zip(hashes) {
        let hash = hash?;
        match step {
            Step::Create(new) => new.password_hash = hash,
            // One that fits already is left as it is.
            Step::Change(_, changes) if changes.password.is_some() => changes.password = hash,
            Step::Change(..) => {}
        }
    }
    Ok((touched, steps))
}

/// Each item's answer, in order, by as many threads as there are processors.
fn in_parallel<T: Sync, R: Send>(items: &[T], call: impl Fn(&T) -> R + Sync) -> Vec<R> {
    let threads = thread::available_parallelism().map_or(1, NonZero::get).min(8);
    let share = items.len().div_ceil(threads).max(1);
    thread::scope(|scope| {
        let call = &call;
        let parts: Vec<_> = items
            .chunks(share)
            .map(|part| scope.spawn(move || part.iter().map(call).collect::<Vec<_>>()))
            .collect();
        let join = |part: thread::ScopedJoinHandle<Vec<R>>| match part.join() {
            Ok(answers) => answers,
            Err(panic) => std::panic::resume_unwind(panic),
        };
        parts.into_iter().flat_map(join).collect()
    })
}

fn make_disks(
    context: &Context,
    rows: &[Row],
    accounts: &hermitage_storage::accounts::Accounts,
) -> anyhow::Result<()> {
    for row in rows {
        context.provision(&accounts.named(row.name.as_str())?)?;
    }
    Ok(())
}

/// As if the accounts had never been made.
fn undo<'a>(
    context: &Context,
    accounts: &mut hermitage_storage::accounts::Accounts,
    made: impl Iterator<Item = &'a Account>,
) -> anyhow::Result<()> {
    let mut ids = Vec::new();
    for account in made {
        disk::retire(&context.state, account.id)?;
        disk::purge(&context.state, account.id)?;
        ids.push(account.id);
    }
    Ok(accounts.forget(&ids)?)
}

fn refuse(context: &Context, mut problems: Vec<Problem>) -> anyhow::Error {
    problems.sort_by_key(|problem| problem.line);
    let summary = format!("{} in the list; nothing was changed", count(problems.len(), "fault"));
    if context.out.is_json() {
        let lines: Vec<_> = problems
            .iter()
            .map(|problem| json!({ "line": problem.line, "error": problem.words }))
            .collect();
        eprintln!("{}", json!({ "error": summary, "lines": lines }));
    } else {
        for problem in &problems {
            eprintln!("line {}: {}", problem.line, problem.words);
        }
        eprintln!("hermitage: {summary}");
    }
    Said.into()
}

fn report(
    context: &Context,
    dry_run: bool,
    outcomes: &[(&Row, &'static str)],
) -> anyhow::Result<()> {
    let of = |wanted: &str| outcomes.iter().filter(|(_, outcome)| *outcome == wanted).count();
    let (added, changed, already) =
        (of("added") + of("to be added"), of("changed") + of("to be changed"), of("already so"));
    let lines: Vec<_> = outcomes
        .iter()
        .map(|(row, outcome)| json!({ "line": row.line, "account": row.name.as_str(), "outcome": outcome }))
        .collect();
    let object = json!({
        "dry_run": dry_run,
        "added": added,
        "changed": changed,
        "already_so": already,
        "lines": lines,
    });
    context.out.show(&object, || {
        let mut text = String::new();
        for (row, outcome) in outcomes {
            text.push_str(&format!("line {}: {}: {outcome}\n", row.line, row.name));
        }
        let would = if dry_run { "; nothing was changed (--dry-run)" } else { "" };
        text.push_str(&format!(
            "{}: {added} added, {changed} changed, {already} already so{would}",
            count(outcomes.len(), "account")
        ));
        text
    })
}
