//! `hermitage checkpoint …`: states of an account that it can go back to.

use super::admin::InUse;
use super::audit::CopyNote;
use super::context::Context;
use super::output::table;
use super::rest::Held;
use super::{NotFound, account_quota, admin, rest, size, time};
use anyhow::Context as _;
use clap::Subcommand;
use hermitage::checkpoints;
use hermitage::watch::Copied;
use hermitage_storage::accounts::{Account, Accounts};
use hermitage_storage::checkpoint::{
    self, About, Checkpoint, CheckpointError, Known, Name, RolledBack,
};
use hermitage_storage::disk;
use serde_json::{Value, json};

const HELP: &str = "\
A checkpoint is an account's files and the memory of its machine as they were at one moment. It shares
what it can with the account on XFS and Btrfs, and is a full copy elsewhere. A machine that runs goes on: its users
notice a pause as long as its memory takes to be written. Going back to one needs it at rest, and keeps the state
that is replaced as a checkpoint named before-DATE-TIME.

Examples:
  hermitage checkpoint create alice                     named by date and time
  hermitage checkpoint create alice clean               under a name of its own
  hermitage checkpoint restore alice clean --stop";

#[derive(Debug, Subcommand)]
#[command(after_help = HELP)]
pub enum Command {
    /// Keep the account as it is now
    Create {
        account: String,
        /// [default: date and time]
        name: Option<String>,
        /// End its sessions and put its machine to rest first, if it runs, instead of copying both while it goes on
        #[arg(long)]
        stop: bool,
    },
    /// List an account's checkpoints
    List { account: String },
    /// Make the account what it was then; what it is now is kept
    Restore {
        account: String,
        name: String,
        /// End its sessions and put its machine to rest first, if it runs
        #[arg(long)]
        stop: bool,
    },
    /// Delete one
    Drop { account: String, name: String },
}

impl Command {
    /// Whether it is noted in the audit log ([`super::audit`]).
    pub fn changes(&self) -> bool {
        match self {
            Self::List { .. } => false,
            Self::Create { .. } | Self::Restore { .. } | Self::Drop { .. } => true,
        }
    }
}

pub fn run(context: &Context, command: Command) -> anyhow::Result<()> {
    match command {
        Command::Create { account, name, stop } => create(context, &account, name.as_deref(), stop),
        Command::List { account } => list(context, &account),
        Command::Restore { account, name, stop } => restore(context, &account, &name, stop),
        Command::Drop { account, name } => drop(context, &account, &name),
    }
}

fn create(context: &Context, account: &str, name: Option<&str>, stop: bool) -> anyhow::Result<()> {
    let accounts = context.accounts()?;
    let account = accounts.named(account)?;
    let name = match name {
        Some(name) => Name::parse(name)?,
        None => checkpoints::dated(&context.state, &account, "")?,
    };
    let note = CopyNote::of(context, Copied::Checkpoint, &account, &name);
    let taken = take(context, &accounts, &account, &name, stop);
    note.over(taken.as_ref().map(|taken| taken.one.allocated));
    let Taken { about, one, in_use } = taken?;
    context.out.show(&json_of(&account, &one), || {
        let what = if about.memory.is_some() { "files and memory" } else { "files" };
        let goes_on = if in_use { "; her machine goes on" } else { "" };
        format!("{name}: {what} of {}, {}{goes_on}", account.name, size::show(one.allocated))
    })
}

fn take(
    context: &Context,
    accounts: &Accounts,
    account: &Account,
    name: &Name,
    stop: bool,
) -> anyhow::Result<Taken> {
    // Before sessions are ended or a machine stands still for nothing; and again with what was saved then.
    fits(context, account, None, "another checkpoint")?;
    let held = match stop {
        true => Held::Rest(rest::take(context, account, true)?),
        false => rest::take_or_copy(context, account, true)?,
    };
    let now = time::now();
    let made = match &held {
        Held::Rest(at_rest) => {
            fits(context, account, None, "another checkpoint")?;
            let (known, room) = (known(accounts, account)?, rest::room(context)?);
            checkpoint::create(&context.state, at_rest, name, known, now, room)
        }
        Held::Copy(InUse { disk_path, memory, .. }) => {
            let saved = memory.as_ref().map_or(0, |memory| memory.header.file_bytes());
            let taken = disk::allocated(disk_path).context("looking at the copy of the disk")?;
            account_quota::refuse(context, account, taken + saved, "another checkpoint")?;
            let memory = memory.as_ref().map(|memory| memory.path.as_path());
            let copies = checkpoint::InUse { disk: disk_path, memory };
            // In which order she left her terminals is not known while she is there.
            let known = Known::default();
            checkpoint::create_in_use(&context.state, account.id, &copies, name, known, now)
        }
    };
    let about =
        made.with_context(|| format!("taking the checkpoint {name} of {}", account.name))?;
    Ok(Taken { about, one: find(context, account, name)?, in_use: held.is_in_use() })
}

struct Taken {
    about: About,
    one: Checkpoint,
    /// Its machine goes on.
    in_use: bool,
}

fn list(context: &Context, account: &str) -> anyhow::Result<()> {
    let account = context.accounts()?.named(account)?;
    let all = checkpoint::list(&context.state, account.id)?;
    let object = json!({
        "checkpoints": all.iter().map(|one| json_of(&account, one)).collect::<Vec<_>>(),
    });
    context.out.show(&object, || {
        if all.is_empty() {
            let name = &account.name;
            return format!("no checkpoints (hermitage checkpoint create {name} makes one)");
        }
        let mut table = table(["NAME", "TAKEN", "HOLDS", "TAKES", ""]);
        for one in &all {
            let (taken, holds, kept) = match &one.about {
                Ok(about) => (
                    time::short(about.created),
                    if about.memory.is_some() { "files, memory" } else { "files" }.to_owned(),
                    if about.kept { "kept by a restore" } else { "" }.to_owned(),
                ),
                Err(reason) => ("-".into(), "-".into(), reason.clone()),
            };
            table.add_row([one.name.to_string(), taken, holds, size::show(one.allocated), kept]);
        }
        table.trim_fmt()
    })
}

fn restore(context: &Context, account: &str, name: &str, stop: bool) -> anyhow::Result<()> {
    let accounts = context.accounts()?;
    let account = accounts.named(account)?;
    let name = Name::parse(name)?;
    let source = find(context, &account, &name)?;
    let note = CopyNote::of(context, Copied::GoBack, &account, &name);
    let done = go_back(context, &accounts, &account, &source, stop);
    note.over(done.as_ref().map(|_| source.allocated));
    let done = done?;
    // What the service remembers of the last machine is of another.
    admin::account_changed(context, &account.name);
    let memory = done.about.memory.is_some();
    let object = json!({
        "account": account.name,
        "checkpoint": name.as_str(),
        "memory": memory,
        "kept": done.kept.as_str(),
        "dropped": done.dropped.as_ref().map(Name::as_str),
    });
    if let Some(dropped) = &done.dropped {
        context.out.note(format!("{dropped}, the oldest kept state, had to make room"));
    }
    context.out.show(&object, || {
        let how = if memory { "resumes it" } else { "starts from its files" };
        format!(
            "{} is as it was in {name}; the next login {how}\nwhat it was before is the checkpoint {}",
            account.name, done.kept
        )
    })
}

fn go_back(
    context: &Context,
    accounts: &Accounts,
    account: &Account,
    source: &Checkpoint,
    stop: bool,
) -> anyhow::Result<RolledBack> {
    let name = &source.name;
    // Before sessions are ended for nothing.
    let keeping = "what is replaced, kept as one more checkpoint,";
    fits(context, account, Some(source), keeping)?;
    let at_rest = rest::take(context, account, stop)?;
    fits(context, account, Some(source), keeping)?;
    let known = known(accounts, account)?;
    let keep = checkpoints::dated(&context.state, account, "before-")?;
    let (now, room) = (time::now(), rest::room(context)?);
    let done = checkpoint::rollback(&context.state, at_rest, name, &keep, known, now, room)
        .with_context(|| format!("going back to the checkpoint {name} of {}", account.name))?;
    accounts.record_intent(&checkpoints::gone_back(account, name, &done.about))?;
    Ok(done)
}

fn drop(context: &Context, account: &str, name: &str) -> anyhow::Result<()> {
    let account = context.accounts()?.named(account)?;
    let name = Name::parse(name)?;
    let one = find(context, &account, &name)?;
    let note = CopyNote::of(context, Copied::DropCheckpoint, &account, &name);
    let removed = checkpoint::remove(&context.state, account.id, &name).map_err(Into::into);
    note.over(removed.as_ref().map(|()| one.allocated));
    removed?;
    let object = json!({ "account": account.name, "checkpoint": name.as_str(), "dropped": true });
    context
        .out
        .show(&object, || format!("{name} is deleted, which was {}", size::show(one.allocated)))
}

/// Whether the quota has room for a copy of the disk, or of a checkpoint. The memory of the former is linked.
fn fits(
    context: &Context,
    account: &Account,
    source: Option<&Checkpoint>,
    what: &str,
) -> anyhow::Result<()> {
    let more = match source {
        Some(source) => source.allocated,
        None => account_quota::of(context, account).used.disk,
    };
    account_quota::refuse(context, account, more, what)
}

fn find(context: &Context, account: &Account, name: &Name) -> anyhow::Result<Checkpoint> {
    checkpoint::find(&context.state, account.id, name).map_err(|error| match error {
        CheckpointError::Unknown(_) => NotFound(error.to_string()).into(),
        error => error.into(),
    })
}

fn known(accounts: &Accounts, account: &Account) -> anyhow::Result<Known> {
    Ok(checkpoints::known(accounts.intent(account.id)?))
}

fn json_of(account: &Account, one: &Checkpoint) -> Value {
    let about = one.about.as_ref();
    json!({
        "account": account.name,
        "name": one.name.as_str(),
        "created": about.ok().map(|about| time::rfc3339(about.created)),
        "memory": about.ok().map(|about| about.memory.is_some()),
        "base": about.ok().and_then(|about| about.memory.as_ref()).map(|memory| &memory.base),
        "kept": about.ok().map(|about| about.kept),
        "allocated_bytes": one.allocated,
        "damage": about.err(),
    })
}
