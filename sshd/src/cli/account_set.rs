//! `hermitage account set|expire|disable|enable|rename`: what an operator changes of an account.

use super::account_limits::{Own, Wanted, expiry};
use super::context::Context;
use super::{account_disk, account_quota, account_show, account_size, admin, date, time};
use anyhow::bail;
use hermitage::closing;
use hermitage_storage::accounts::{AccountName, Accounts, Change, Changes};
use serde_json::json;

pub const SET_HELP: &str = "\
What is not given stays as it is. Sessions and streams count from the next session or connection on, linger and
policy at once, and so do the shares of processors and i/o and the number of processes, in a machine that runs, which
loses nothing. A disk can be enlarged, while its machine does not run; nothing on it is lost. It can't be made smaller.
A quota counts at once; it can't be made less than what the account takes. More memory and CPUs come when the machine is started or resumed
the next time, up to what its base has (hermitage base list); with less it starts from its disk the next time, and
memory can't be made less than what the machine uses.

Examples:
  hermitage account set alice --class student
  hermitage account set alice --quota 30GiB
  hermitage account set alice --disk 20GiB --sessions 8
  hermitage account set alice --memory 2GiB --vcpus 2
  hermitage account set alice --cpu-percent 50 --io-rate 20MiB
  hermitage account set alice --processes 500
  hermitage account set alice --sessions default --expires never";

pub const EXPIRE_HELP: &str = "\
Then its sessions end and its machine is saved, as by account disable; everything is kept.

Examples:
  hermitage account expire alice 2027-06-30      nobody logs in from the beginning of that day on (UTC)
  hermitage account expire alice 2027-06-30T18:00
  hermitage account expire alice 90d             from now on
  hermitage account expire alice never";

pub const DISABLE_HELP: &str = "\
Examples:
  hermitage account disable alice
  hermitage account disable alice --until 2027-01-07   open again by itself on that day (UTC)
  hermitage account disable alice --until 24h";

pub const RENAME_HELP: &str = "\
Keys, password, limits, disk and saved memory stay. Who is logged in stays logged in. In her machine the user's
name and home directory stay what they were, because her files have them; the host name there changes when it
next starts from its disk. The old name is free at once.";

#[derive(Debug, clap::Args)]
pub struct Set {
    name: String,
    #[command(flatten)]
    wanted: Wanted,
}

#[derive(Debug, clap::Args)]
pub struct Expire {
    name: String,
    /// When, or "never"
    #[arg(value_name = "TIME", value_parser = expiry)]
    when: Own<i64>,
}

#[derive(Debug, clap::Args)]
pub struct Disable {
    name: String,
    /// Open it again then, by itself
    #[arg(long, value_name = "TIME", value_parser = date::parse)]
    until: Option<i64>,
}

pub fn set(context: &Context, set: &Set) -> anyhow::Result<()> {
    if set.wanted.is_empty() {
        bail!("nothing is asked for; hermitage account set --help says what there is to change");
    }
    set.wanted.check(context)?;
    let mut accounts = context.accounts()?;
    let account = accounts.named(&set.name)?;
    let mut changes = set.wanted.changes();
    account_quota::check(context, &account, &changes).map_err(anyhow::Error::msg)?;
    let resized = account_size::check(context, &account, &changes)?;
    if let Some(bytes) = set.wanted.disk {
        account_disk::enlarge(context, &account, bytes)?;
        changes.disk_bytes = Some(bytes);
    }
    let changed = accounts.change(account.id, &changes)?;
    if !changed.is_empty() {
        admin::account_changed(context, &set.name);
    }
    if let Some(when) = resized.filter(|_| !changed.is_empty()) {
        context.out.note(when);
    }
    account_show::changed(context, &accounts, account.id, &changed)
}

pub fn expire(context: &Context, expire: &Expire) -> anyhow::Result<()> {
    let mut accounts = context.accounts()?;
    let name = &expire.name;
    let id = accounts.named(name)?.id;
    let expires = match expire.when {
        Own::Value(seconds) => Some(seconds),
        Own::Default => None,
    };
    let changes = Changes { expires: Some(expires), ..Changes::default() };
    let changed = !accounts.change(id, &changes)?.is_empty();
    // Also if it was so before: a service that did not hear of it the first time does now.
    admin::account_changed(context, name);
    let object = json!({
        "account": name,
        "expires": expires.map(time::rfc3339),
        "changed": changed,
    });
    context.out.show(&object, || match (expires, changed) {
        (None, true) => format!("{name} does not expire any more"),
        (None, false) => format!("{name} did not expire before, either"),
        (Some(at), true) if at <= time::now() => {
            format!("{name} is expired since {} UTC; its sessions end", time::short(at))
        }
        (Some(at), true) => format!("{name} expires on {} UTC", time::short(at)),
        (Some(at), false) => format!("{name} expired on {} UTC before", time::short(at)),
    })
}

pub fn disable(context: &Context, disable: &Disable) -> anyhow::Result<()> {
    let accounts = context.accounts()?;
    let name = &disable.name;
    let id = accounts.named(name)?.id;
    let change = match disable.until {
        None => accounts.set_disabled(id, true)?,
        Some(until) if until <= time::now() => {
            bail!("{} UTC is past; nothing was changed", time::short(until))
        }
        Some(until) => accounts.disable_until(id, until)?,
    };
    say_state(context, &accounts, name, change)
}

pub fn enable(context: &Context, name: &str) -> anyhow::Result<()> {
    let accounts = context.accounts()?;
    let change = accounts.set_disabled(accounts.named(name)?.id, false)?;
    say_state(context, &accounts, name, change)
}

fn say_state(
    context: &Context,
    accounts: &Accounts,
    name: &str,
    change: Change,
) -> anyhow::Result<()> {
    admin::account_changed(context, name);
    let account = accounts.named(name)?;
    let disabled = account.is_disabled_at(time::now());
    let until = account.disabled_until.filter(|_| disabled);
    let object = json!({
        "account": name,
        "disabled": disabled,
        "disabled_until": until.map(time::rfc3339),
        "changed": change == Change::Done,
    });
    context.out.show(&object, || {
        let until = until.map_or(String::new(), |at| format!(" until {} UTC", time::short(at)));
        let state = if disabled { "disabled" } else { "enabled" };
        let mut text = match change {
            Change::Done => format!("{name} is {state}{until}"),
            Change::AlreadySo => format!("{name} was {state}{until} already"),
        };
        // Opening it is not enough then.
        if !disabled && let Some(closed) = account.closed_at(time::now()) {
            text.push_str(&format!(
                ", but {}: hermitage account expire {name} never, or another time",
                closing::words(closed)
            ));
        }
        text
    })
}

pub fn rename(context: &Context, old: &str, new: &str) -> anyhow::Result<()> {
    let name = AccountName::parse(new)?;
    let mut accounts = context.accounts()?;
    let account = match accounts.by_name(old)? {
        Some(account) => account,
        // The same command again.
        None => return Err(gone(&accounts, old, new)),
    };
    let change = accounts.rename(account.id, &name)?;
    admin::account_changed(context, new);
    let account = accounts.named(new)?;
    let object = json!({
        "account": new,
        "former": old,
        "hostname": account.hostname,
        "guest_name": account.guest_name(),
        "changed": change == Change::Done,
    });
    context.out.show(&object, || {
        if change == Change::AlreadySo {
            return format!("{old} is its name already");
        }
        let mut text = format!("{old} is {new} now: ssh {new}@…");
        if account.guest_name() != new {
            text.push_str(&format!(
                "\nin her machine the user is still {}, with the same home directory",
                account.guest_name()
            ));
        }
        if context.state.snapshot(account.id).exists() {
            text.push_str(
                "\nits saved machine goes on with the host name it had; it changes when the machine next \
                 starts from its disk",
            );
        }
        text
    })
}

fn gone(accounts: &Accounts, old: &str, new: &str) -> anyhow::Error {
    match accounts.by_name(new) {
        Ok(Some(_)) => super::NotFound(format!(
            "there is no account \"{old}\", but there is \"{new}\": was it renamed before?"
        ))
        .into(),
        _ => hermitage_storage::accounts::AccountsError::Unknown(old.to_owned()).into(),
    }
}
