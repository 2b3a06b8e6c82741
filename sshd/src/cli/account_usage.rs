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

Without a name: what each account used in those days together, the one with the most processor time first.

Examples:
  hermitage account usage --days 7
  hermitage account usage alice
  hermitage account usage alice --days 365 --json | jq '.total.cpu_seconds'";

/// Days that `account show` sums up.
pub const SHOWN: u32 = 7;

#[derive(Debug, clap::Args)]
pub struct Usage {
    /// [default: all accounts]
    name: Option<String>,
    /// The last so many days, today among them
    #[arg(long, value_name = "N", default_value_t = 30, value_parser = clap::value_parser!(u32).range(1..=36_500))]
    days: u32,
}

pub fn run(context: &Context, usage: &Usage) -> anyhow::Result<()> {
    let accounts = context.accounts()?;
    let Some(name) = &usage.name else { return all(context, &accounts, usage.days) };
    // Of one that was removed and not yet purged, too.
    let account = match accounts.by_name(name)? {
        Some(account) => account,
        None => match accounts.removed(name)?.into_iter().next() {
            Some(account) => account,
            None => accounts.named(name)?,
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

fn all(context: &Context, accounts: &Accounts, days: u32) -> anyhow::Result<()> {
    let mut used = Vec::new();
    for (id, together) in accounts.usage_of_all(since(days))? {
        // One may be purged in between.
        if let Some(account) = accounts.by_id(id)? {
            used.push((account.name, together));
        }
    }
    used.sort_by(|(a, one), (b, other)| {
        other.used.cpu_ms.cmp(&one.used.cpu_ms).then_with(|| a.cmp(b))
    });
    let object = |(name, together): &(String, UsedDay)| {
        let mut object = json_of(together);
        object["account"] = json!(name);
        object
    };
    let objects = json!({ "accounts": used.iter().map(object).collect::<Vec<_>>() });
    context.out.show(&objects, || {
        if used.is_empty() {
            return "nobody used anything in that time, or it is not known any more".into();
        }
        let mut table = table(columns("ACCOUNT"));
        for (name, together) in &used {
            table.add_row(cells(name.clone(), together));
        }
        table.trim_fmt()
    })
}

/// The first of the last so many days.
fn since(days: u32) -> i64 {
    day_of(time::now()) - i64::from(days) + 1
}

/// The last so many days, the last first.
pub fn of(accounts: &Accounts, account: Uuid, days: u32) -> anyhow::Result<Vec<UsedDay>> {
    Ok(accounts.usage(account, since(days))?)
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
    let mut table = table(columns("DAY"));
    // The latest last, as in any log.
    for day in days.iter().rev() {
        table.add_row(cells(date(day.day), day));
    }
    table.add_row(cells("together".into(), &total(days)));
    table.trim_fmt()
}

fn columns(first: &'static str) -> [&'static str; 7] {
    [first, "SESSIONS", "AWAKE", "CPU", "RECEIVED", "SENT", "ON DISK"]
}

fn cells(first: String, day: &UsedDay) -> [String; 7] {
    let used = &day.used;
    [
        first,
        day.sessions.to_string(),
        shown(used.awake_s),
        format!("{:.1} s", used.cpu_ms as f64 / 1000.0),
        size::show(used.received),
        size::show(used.sent),
        used.disk_bytes.map_or("-".into(), size::show),
    ]
}

fn date(day: i64) -> String {
    time::short(first_second(day)).chars().take(10).collect()
}

fn shown(seconds: u64) -> String {
    span::show(seconds.try_into().unwrap_or(u32::MAX))
}
