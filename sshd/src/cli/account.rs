//! `hermitage account …`: making accounts, closing them, taking them away.

use super::context::Context;
use super::{
    NotFound, account_idle, account_machine, account_show, admin, key, password, size, span,
};
use anyhow::{Context as _, bail};
use clap::Subcommand;
use hermitage::admin::protocol::Request;
use hermitage_storage::accounts::{
    AccountName, Accounts, Change, DEFAULT_MAX_SESSIONS, NewAccount, Policy,
};
use hermitage_storage::disk::{self, DiskError};
use serde_json::json;
use std::path::PathBuf;
use std::thread;
use std::time::{Duration, Instant};

#[derive(Debug, Subcommand)]
pub enum Command {
    /// Make an account, with its disk
    #[command(after_help = "\
Examples:
  hermitage account add alice --key alice.pub
  ssh-add -L | hermitage account add bob --key -
  echo 'a long pass phrase' | hermitage account add carol --password-stdin")]
    Add(Add),
    /// List the accounts
    List {
        /// Also those that were removed and not yet purged
        #[arg(long)]
        removed: bool,
    },
    /// Show an account: its keys, disk, machine and last sessions
    Show { name: String },
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
    /// Close an account: its sessions end, it can't log in; everything is kept
    Disable { name: String },
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
    /// SSH public keys of an account
    #[command(subcommand)]
    Key(key::Command),
}

#[derive(Debug, clap::Args)]
pub struct Add {
    /// Login name: lowercase letters, digits, - and _
    name: String,
    /// File with SSH public keys, one a line (- for standard input); can be given again
    #[arg(long, value_name = "FILE")]
    key: Vec<PathBuf>,
    /// Read the password, a line, from standard input
    #[arg(long)]
    password_stdin: bool,
    /// Size of the disk, which takes only what is written to it
    #[arg(long, value_name = "SIZE", default_value = "10G", value_parser = size::parse)]
    disk: u64,
    /// Most sessions at once
    #[arg(long, value_name = "N", default_value_t = DEFAULT_MAX_SESSIONS)]
    max_sessions: u32,
    /// How long its machine stays after the last session [default: as configured]
    #[arg(long, value_name = "TIME", value_parser = span::parse)]
    linger: Option<u32>,
    /// How long work may keep its machine awake after the last session [default: as configured]
    #[arg(long, value_name = "TIME", value_parser = span::parse)]
    max_linger: Option<u32>,
    /// What happens to its machine when nobody is logged in: save, keep or discard
    #[arg(long, value_name = "POLICY", default_value = "save", value_parser = account_idle::parse_policy)]
    policy: Policy,
}

pub fn run(context: &Context, command: Command) -> anyhow::Result<()> {
    match command {
        Command::Add(add) => self::add(context, &add),
        Command::List { removed } => account_show::list(context, removed),
        Command::Show { name } => account_show::show(context, &name),
        Command::Passwd { name, none } => passwd(context, &name, none),
        Command::Disable { name } => set_disabled(context, &name, true),
        Command::Enable { name } => set_disabled(context, &name, false),
        Command::Start { name } => account_machine::start(context, &name),
        Command::Stop { name } => account_machine::stop(context, &name),
        Command::Reset { name } => account_machine::reset(context, &name),
        Command::FactoryReset { name, yes } => account_machine::factory_reset(context, &name, yes),
        Command::Policy(wanted) => account_idle::policy(context, &wanted),
        Command::Hold(hold) => account_idle::hold(context, &hold),
        Command::Remove { name, purge } => remove(context, &name, purge),
        Command::Key(command) => key::run(context, command),
    }
}

fn add(context: &Context, add: &Add) -> anyhow::Result<()> {
    let stdin_keys = add.key.iter().filter(|file| file.as_os_str() == "-").count();
    if stdin_keys + usize::from(add.password_stdin) > 1 {
        bail!("standard input can be read once: give keys or the password by it, not both");
    }
    let name = AccountName::parse(&add.name)?;
    let mut accounts = context.accounts()?;
    // Before a password is asked to be typed or keys are read.
    if accounts.by_name(name.as_str())?.is_some() {
        return Err(hermitage_storage::accounts::AccountsError::NameTaken(name.to_string()).into());
    }
    let mut new = NewAccount::new(name);
    for file in &add.key {
        new.keys.extend(key::read(file)?);
    }
    if add.password_stdin {
        new.password_hash = Some(password::hash(&password::read_line()?)?);
    }
    new.disk_bytes = add.disk;
    new.max_sessions = add.max_sessions;
    new.linger_s = add.linger;
    new.max_linger_s = add.max_linger;
    new.policy = add.policy;

    let account = accounts.create(&new)?;
    let provisioned = match context.provision(&account) {
        Ok(provisioned) => provisioned,
        Err(error) => {
            // All of the account or nothing.
            accounts.remove(account.id)?;
            accounts.purge(account.id)?;
            return Err(error).context("making the disk; no account was made");
        }
    };
    if !provisioned {
        context.out.note("its disk is made by the first: hermitage base build");
    }
    if new.keys.is_empty() && new.password_hash.is_none() {
        let name = &account.name;
        context.out.note(format!(
            "{name} can't log in yet: hermitage account key add {name} FILE, or hermitage account \
             passwd {name}"
        ));
    }
    context.detail(format!("account {}", account.id));
    new.keys.iter().for_each(|key| context.detail(format!("key {}", key.fingerprint())));
    admin::account_changed(context, &account.name);
    account_show::added(context, &accounts, &account)
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

fn set_disabled(context: &Context, name: &str, disabled: bool) -> anyhow::Result<()> {
    let accounts = context.accounts()?;
    let change = accounts.set_disabled(accounts.named(name)?.id, disabled)?;
    admin::account_changed(context, name);
    let state = if disabled { "disabled" } else { "enabled" };
    let object =
        json!({ "account": name, "disabled": disabled, "changed": change == Change::Done });
    context.out.show(&object, || match change {
        Change::Done => format!("{name} is {state}"),
        Change::AlreadySo => format!("{name} was {state} already"),
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
