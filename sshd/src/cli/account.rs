//! `hermitage account …`: what there is to do with accounts, passwords, and taking accounts away.

use super::context::Context;
use super::{
    NotFound, account_add, account_idle, account_invite, account_machine, account_set,
    account_show, account_usage, admin, archive, import, key, password, size,
};
use anyhow::Context as _;
use clap::Subcommand;
use hermitage::admin::protocol::Request;
use hermitage_storage::accounts::Accounts;
use hermitage_storage::disk::{self, DiskError};
use serde_json::json;
use std::thread;
use std::time::{Duration, Instant};

#[derive(Debug, Subcommand)]
pub enum Command {
    /// Make an account, with its disk
    #[command(after_help = account_add::HELP)]
    Add(account_add::Add),
    /// Make the accounts that a CSV file lists: all of them, or none
    #[command(after_help = import::HELP)]
    Import(import::Import),
    /// List the accounts
    List {
        /// Also those that were removed and not yet purged
        #[arg(long)]
        removed: bool,
    },
    /// Show an account: its keys, disk, machine and last sessions
    Show { name: String },
    /// Show what an account used: sessions, time, processors, bytes, disk; day by day
    #[command(after_help = account_usage::HELP)]
    Usage(account_usage::Usage),
    /// Set an account's password (asked for, or a line on standard input)
    #[command(after_help = "\
Examples:
  hermitage account passwd alice
  echo 'a long pass phrase' | hermitage account passwd alice
  hermitage account passwd alice --none")]
    Passwd {
        name: String,
        /// Take the password away: keys only
        #[arg(long)]
        none: bool,
    },
    /// Change an account's class, disk, limits or end
    #[command(after_help = account_set::SET_HELP)]
    Set(account_set::Set),
    /// Say from when on an account is closed
    #[command(after_help = account_set::EXPIRE_HELP)]
    Expire(account_set::Expire),
    /// Give an account another name
    #[command(after_help = account_set::RENAME_HELP)]
    Rename { old: String, new: String },
    /// Make a code by which an account's owner sets her own key or password, once
    #[command(after_help = account_invite::HELP)]
    Invite(account_invite::Invite),
    /// Close an account: its sessions end, it can't log in; everything is kept
    #[command(after_help = account_set::DISABLE_HELP)]
    Disable(account_set::Disable),
    /// Open an account that was closed
    Enable { name: String },
    /// Start the account's machine, or resume what was saved of it
    Start { name: String },
    /// End the account's sessions and put its machine to rest: saved, if that is its policy
    Stop { name: String },
    /// Drop the memory of the account's machine; the next login starts from the disk
    Reset { name: String },
    /// Drop the memory and every file: the account gets a new disk
    FactoryReset {
        name: String,
        /// Yes, delete the files
        #[arg(long)]
        yes: bool,
    },
    /// What happens to the machine when nobody is logged in
    #[command(after_help = account_idle::POLICY_HELP)]
    Policy(account_idle::Wanted),
    /// Keep the machine awake for a time, whatever works in it
    #[command(after_help = account_idle::HOLD_HELP)]
    Hold(account_idle::Hold),
    /// Take an account away. Its disk is kept until --purge
    #[command(after_help = "\
The name is free at once. The disk stays in STATE_DIR/removed until the same command is given with
--purge, which deletes it for good.")]
    Remove {
        name: String,
        /// Also delete the disk, for good; of accounts of that name removed before, too
        #[arg(long)]
        purge: bool,
    },
    /// Write an account, its files too, into one file: to keep it, or to bring it to another host
    #[command(after_help = archive::EXPORT_HELP)]
    Export(archive::Export),
    /// Make an account of such a file
    #[command(after_help = archive::RESTORE_HELP)]
    Restore(archive::Restore),
    /// SSH public keys of an account
    #[command(subcommand)]
    Key(key::Command),
}

impl Command {
    /// Whether it is noted in the audit log ([`super::audit`]).
    pub fn changes(&self) -> bool {
        match self {
            Self::List { .. } | Self::Show { .. } | Self::Usage(_) => false,
            Self::Import(import) => import.changes(),
            Self::Key(command) => command.changes(),
            Self::Add(_)
            | Self::Passwd { .. }
            | Self::Set(_)
            | Self::Expire(_)
            | Self::Rename { .. }
            | Self::Invite(_)
            | Self::Disable(_)
            | Self::Enable { .. }
            | Self::Start { .. }
            | Self::Stop { .. }
            | Self::Reset { .. }
            | Self::FactoryReset { .. }
            | Self::Policy(_)
            | Self::Hold(_)
            | Self::Remove { .. }
            | Self::Export(_)
            | Self::Restore(_) => true,
        }
    }
}

pub fn run(context: &Context, command: Command) -> anyhow::Result<()> {
    match command {
        Command::Add(add) => account_add::run(context, &add),
        Command::Import(import) => import::run(context, &import),
        Command::List { removed } => account_show::list(context, removed),
        Command::Show { name } => account_show::show(context, &name),
        Command::Usage(usage) => account_usage::run(context, &usage),
        Command::Passwd { name, none } => passwd(context, &name, none),
        Command::Set(set) => account_set::set(context, &set),
        Command::Invite(invite) => account_invite::run(context, &invite),
        Command::Expire(expire) => account_set::expire(context, &expire),
        Command::Rename { old, new } => account_set::rename(context, &old, &new),
        Command::Disable(disable) => account_set::disable(context, &disable),
        Command::Enable { name } => account_set::enable(context, &name),
        Command::Start { name } => account_machine::start(context, &name),
        Command::Stop { name } => account_machine::stop(context, &name),
        Command::Reset { name } => account_machine::reset(context, &name),
        Command::FactoryReset { name, yes } => account_machine::factory_reset(context, &name, yes),
        Command::Policy(wanted) => account_idle::policy(context, &wanted),
        Command::Hold(hold) => account_idle::hold(context, &hold),
        Command::Remove { name, purge } => remove(context, &name, purge),
        Command::Export(wanted) => archive::export(context, &wanted),
        Command::Restore(wanted) => archive::restore(context, &wanted),
        Command::Key(command) => key::run(context, command),
    }
}

fn passwd(context: &Context, name: &str, none: bool) -> anyhow::Result<()> {
    let accounts = context.accounts()?;
    let account = accounts.named(name)?;
    let hash = if none { None } else { Some(password::hash(&password::ask(name)?)?) };
    accounts.set_password(account.id, hash.as_deref())?;
    admin::account_changed(context, name);
    context.out.show(&json!({ "account": name, "has_password": !none }), || {
        if none {
            format!("{name} has no password any more")
        } else {
            format!("{name} has a new password")
        }
    })
}

fn remove(context: &Context, name: &str, purge: bool) -> anyhow::Result<()> {
    let mut accounts = context.accounts()?;
    if let Some(account) = accounts.by_name(name)? {
        // Closed first, so that nobody starts the machine again while it is waited for.
        accounts.set_disabled(account.id, true)?;
        admin::account_changed(context, name);
        let stop = Request::StopAccount { account: name.to_owned() };
        if let Err(error) = admin::tell(context, &stop) {
            context.out.note(format!("stopping the machine: {error:#}"));
        }
        accounts.remove(account.id)?;
        admin::account_changed(context, name);
    }
    let removed = accounts.removed(name)?;
    if removed.is_empty() {
        return Err(NotFound(format!("there is no account \"{name}\", also no removed one")).into());
    }
    for account in &removed {
        wait_unused(context, || disk::retire(&context.state, account.id))?;
    }
    let freed = if purge { self::purge(context, &accounts, name)? } else { 0 };
    let object = json!({
        "account": name,
        "removed": true,
        "purged": purge,
        "freed_bytes": freed,
        "ids": removed.iter().map(|account| account.id).collect::<Vec<_>>(),
    });
    context.out.show(&object, || {
        if purge {
            return format!("{name} is removed and purged; {} freed", size::show(freed));
        }
        let places: Vec<_> = removed
            .iter()
            .map(|account| context.state.removed_dir(account.id))
            .filter(|place| place.exists())
            .map(|place| place.display().to_string())
            .collect();
        if places.is_empty() {
            return format!("{name} is removed; it had no disk");
        }
        format!(
            "{name} is removed; its disk is kept in {}\nto delete it for good: hermitage account remove \
             {name} --purge",
            places.join(", ")
        )
    })
}

fn purge(context: &Context, accounts: &Accounts, name: &str) -> anyhow::Result<u64> {
    let mut freed = 0;
    for account in accounts.removed(name)? {
        freed += disk::purge(&context.state, account.id)?;
        accounts.purge(account.id)?;
    }
    Ok(freed)
}

/// A machine that was told to stop still has its disk until it has powered off.
fn wait_unused(
    context: &Context,
    mut call: impl FnMut() -> Result<(), DiskError>,
) -> anyhow::Result<()> {
    let deadline = Instant::now() + context.config.machines.stop_timeout() + Duration::from_secs(5);
    loop {
        match call() {
            Err(DiskError::InUse(_)) if Instant::now() < deadline => {
                thread::sleep(Duration::from_millis(100));
            }
            Err(error @ DiskError::InUse(_)) => {
                return Err(error).context(
                    "the account is removed, but its machine still runs; give the same command again \
                     when it has ended",
                );
            }
            done => return Ok(done?),
        }
    }
}
