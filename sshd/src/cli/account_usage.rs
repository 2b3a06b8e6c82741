//! `hermitage account usage`: what an account used, day by day.

use super::context::Context;
use super::output::{count, table};
use super::{size, span, time};
use hermitage::history;
use hermitage_storage::accounts::{Accounts, UsedDay, day_of, first_second};
use serde_json::{Value, json};
use uuid::Uuid;

pub const HELP: &str = "\
A line for each day (UTC) on which there was something: sessions that began, how long its machine ran and what it had
of processors, bytes from and to its sessions' clients, and what it took on the host when last looked at. The service
writes it down once a minute; a day without a line had nothing. How long it is kept says [history] of the
configuration.

Examples:
  hermitage account usage alice
  hermitage account usage alice --days 365 --json | jq '.total.cpu_seconds'";

/// Days that `account show` sums up.
pub const SHOWN: u32 = 7;

#[derive(Debug, clap::Args)]
pub struct Usage {
    name: String,
    /// The last so many days, today among them
    #[arg(long, value_name = "N", default_value_t = 30, value_parser = clap::value_parser!(u32).range(1..=36_500))]
    days: u32,
}

pub fn run(context: &Context, usage: &Usage) -> anyhow::Result<()> {
    let accounts = context.accounts()?;
    // Of one that was removed and not yet purged, too.
    let account = match accounts.by_name(&usage.name)? {
        Some(account) => account,
        None => match accounts.removed(&usage.name)?.into_iter().next() {
            Some(account) => account,
            None => accounts.named(&usage.name)?,
        },
    };
    let days = of(&accounts, account.id, usage.days)?;
    let object = json!({
        "account": account.name,
        "days": days.iter().map(day_json).collect::<Vec<_>>(),
        "total": json_of(&total(&days)),
    });
    context.out.show(&object, || text(&account.name, usage.days, &days))
}

/// The last so many days, the last first.
pub fn of(accounts: &Accounts, account: Uuid, days: u32) -> anyhow::Result<Vec<UsedDay>> {
    let since = day_of(time::now()) - i64::from(days) + 1;
    Ok(accounts.usage(account, since)?)
}

/// For `account show`: `in 7 days 12 sessions, awake 3h, 12m of processors`.
pub fn summary(days: &[UsedDay]) -> String {
    let total = total(days);
    let (sessions, used) = (total.sessions, total.used);
    let sessions = count(sessions.try_into().unwrap_or(usize::MAX), "session");
    let (awake, cpu) = (shown(used.awake_s), shown(used.cpu_ms / 1000));
    format!("in {SHOWN} days {sessions}, awake {awake}, {cpu} of processors")
}

pub fn day_json(day: &UsedDay) -> Value {
    let mut object = json_of(day);
    object["date"] = json!(date(day.day));
    object
}

fn json_of(day: &UsedDay) -> Value {
    let used = &day.used;
    json!({
        "sessions": day.sessions,
        "awake_seconds": used.awake_s,
        "cpu_seconds": used.cpu_ms as f64 / 1000.0,
        "received_bytes": used.received,
        "sent_bytes": used.sent,
        "disk_bytes": used.disk_bytes,
    })
}

fn total(days: &[UsedDay]) -> UsedDay {
    let sessions = days.iter().fold(0u64, |sum, day| sum.saturating_add(day.sessions));
    let used = history::sum(days.iter().map(|day| &day.used));
    UsedDay { day: 0, sessions, used }
}

fn text(name: &str, asked: u32, days: &[UsedDay]) -> String {
    if days.is_empty() {
        let asked = count(asked as usize, "day");
        return format!("{name} used nothing in the last {asked}, or it is not known any more");
    }
    let mut table = table(["DAY", "SESSIONS", "AWAKE", "CPU", "RECEIVED", "SENT", "ON DISK"]);
    let mut row = |day: String, used_day: &UsedDay| {
        let used = &used_day.used;
        table.add_row([
            day,
            used_day.sessions.to_string(),
            shown(used.awake_s),
            format!("{:.1} s", used.cpu_ms as f64 / 1000.0),
            size::show(used.received),
            size::show(used.sent),
            used.disk_bytes.map_or("-".into(), size::show),
        ]);
    };
    // The latest last, as in any log.
    days.iter().rev().for_each(|day| row(date(day.day), day));
    row("together".into(), &total(days));
    table.trim_fmt()
}

fn date(day: i64) -> String {
    time::short(first_second(day)).chars().take(10).collect()
}

fn shown(seconds: u64) -> String {
    span::show(seconds.try_into().unwrap_or(u32::MAX))
}
