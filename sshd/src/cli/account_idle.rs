//! `hermitage account policy|hold`: what happens to an account's machine while nobody is logged in.

use super::account_limits::{self, Own};
use super::context::Context;
use super::{admin, span, time};
use anyhow::bail;
use clap::ArgGroup;
use hermitage::limits::Limits;
use hermitage_storage::accounts::{Account, Change, Policy};
use serde_json::json;

pub const POLICY_HELP: &str = "\
Policies:
  save     its memory is saved; the next login goes on where the last one left off
  keep     it keeps running
  discard  it is powered off; only the files are kept

A machine stays for its linger first. With \"save\", work in it (processor time, connections) or a hold keeps it
awake beyond that: work for --max-linger at most, then it is paused with the machine.

Examples:
  hermitage account policy alice                     show what is set
  hermitage account policy alice keep
  hermitage account policy alice --linger 10m --max-linger 8h
  hermitage account policy alice --max-linger 0s     work does not count; it is paused
  hermitage account policy alice --max-linger default";

pub const HOLD_HELP: &str = "\
A held machine is not saved when nobody is logged in. It ends by itself; a stop by an operator, the end of the
service and closing the account end the machine all the same.

Examples:
  hermitage account hold alice 2h
  hermitage account hold alice --off";

#[derive(Debug, clap::Args)]
pub struct Wanted {
    name: String,
    /// save, keep or discard, or "default": as its class says, or save
    #[arg(value_parser = account_limits::policy)]
    policy: Option<Own<Policy>>,
    /// How long the machine stays after the last session, or "default"
    #[arg(long, value_name = "TIME", value_parser = parse_setting)]
    linger: Option<Setting>,
    /// How long work may keep it awake after the last session, or "default"
    #[arg(long, value_name = "TIME", value_parser = parse_setting)]
    max_linger: Option<Setting>,
}

#[derive(Debug, clap::Args)]
#[command(group(ArgGroup::new("what").required(true).args(["time", "off"])))]
pub struct Hold {
    name: String,
    /// For how long from now: 30m, 2h, 1d
    #[arg(value_parser = span::parse_with_units)]
    time: Option<u32>,
    /// Take the hold back
    #[arg(long)]
    off: bool,
}

/// A time of the account's own, or as configured.
#[derive(Clone, Copy, Debug)]
enum Setting {
    Own(u32),
    Default,
}

impl Setting {
    fn seconds(self) -> Option<u32> {
        match self {
            Setting::Own(seconds) => Some(seconds),
            Setting::Default => None,
        }
    }
}

/// For clap: what `--policy` takes.
pub fn parse_policy(name: &str) -> Result<Policy, String> {
    Policy::parse(name).ok_or_else(|| "it is save, keep or discard".into())
}

fn parse_setting(text: &str) -> Result<Setting, String> {
    match text {
        "default" => Ok(Setting::Default),
        text => span::parse(text).map(Setting::Own),
    }
}

pub fn policy(context: &Context, wanted: &Wanted) -> anyhow::Result<()> {
    let accounts = context.accounts()?;
    let id = accounts.named(&wanted.name)?.id;
    let mut changes = vec![];
    if let Some(policy) = &wanted.policy {
        changes.push(accounts.set_policy(id, policy.value())?);
    }
    if let Some(linger) = wanted.linger {
        changes.push(accounts.set_linger(id, linger.seconds())?);
    }
    if let Some(limit) = wanted.max_linger {
        changes.push(accounts.set_max_linger(id, limit.seconds())?);
    }
    let changed = changes.contains(&Change::Done);
    if changed {
        admin::account_changed(context, &wanted.name);
    }
    let account = accounts.named(&wanted.name)?;
    let object = json!({
        "account": account.name,
        "policy": Limits::of(&context.config, &account).policy.as_str(),
        "linger_seconds": account.linger_s,
        "max_linger_seconds": account.max_linger_s,
        "changed": changed,
    });
    context.out.show(&object, || policy_text(context, &account))
}

fn policy_text(context: &Context, account: &Account) -> String {
    let limits = Limits::of(&context.config, account);
    let seconds = |span: std::time::Duration| span.as_secs().try_into().unwrap_or(u32::MAX);
    let linger = span::show(seconds(limits.linger));
    let name = &account.name;
    match (limits.policy, seconds(limits.max_linger)) {
        (Policy::Save, 0) => {
            format!(
                "{name}'s machine is saved {linger} after the last session, whatever works in it"
            )
        }
        (Policy::Save, limit) => format!(
            "{name}'s machine is saved {linger} after the last session; work keeps it awake for {} at most",
            span::show(limit)
        ),
        (Policy::Keep, _) => format!("{name}'s machine keeps running when nobody is logged in"),
        (Policy::Discard, _) => {
            format!("{name}'s machine is powered off {linger} after the last session")
        }
    }
}

pub fn hold(context: &Context, hold: &Hold) -> anyhow::Result<()> {
    let accounts = context.accounts()?;
    let account = accounts.named(&hold.name)?;
    let now = time::now();
    let until = match hold.time {
        Some(0) => bail!("a hold of no time is none; take one back with --off"),
        Some(seconds) if u64::from(seconds) > context.config.machines.max_hold => bail!(
            "{} is longer than a hold may be: {} (machines.max_hold). A machine that should always run has \
             the policy keep",
            span::show(seconds),
            span::show(context.config.machines.max_hold.try_into().unwrap_or(u32::MAX)),
        ),
        Some(seconds) => Some(now + i64::from(seconds)),
        None => None,
    };
    let held = account.hold_at(now).is_some();
    let change = accounts.set_hold(account.id, until)?;
    if change == Change::Done {
        admin::account_changed(context, &hold.name);
    }
    let object = json!({
        "account": hold.name,
        "held_until": until.map(time::rfc3339),
        // One that had ended was none any more.
        "changed": until.is_some() && change == Change::Done || until.is_none() && held,
    });
    let name = &hold.name;
    context.out.show(&object, || match until {
        Some(until) => {
            format!("{name}'s machine is held awake until {} UTC", time::short(until))
        }
        None if held => format!("{name}'s machine is held no more"),
        None => format!("{name}'s machine was not held"),
    })
}
