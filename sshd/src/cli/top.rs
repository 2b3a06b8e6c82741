//! `hermitage top`: what machines take, as it changes.
//!
//! Processor and memory are what the host's kernel counts of each machine's process; nothing is asked of
//! guests.

mod sample;
mod screen;

use super::context::Context;
use super::{session, size, status};
use anyhow::bail;
use clap::ValueEnum;
use hermitage::admin::protocol::Status;
use sample::{Meter, Sample};
use screen::Screen;
use serde_json::{Value, json};
use std::io::{self, IsTerminal};
use std::thread::sleep;
use std::time::{Duration, Instant};

pub const HELP: &str = "\
Keys: c, m, d, s and n sort by CPU, memory, disk, sessions and name; q ends it.

CPU is in hundredths of one processor; HELD is the share of the time, in percent, that the machine stood still because
it is capped (account set --cpu-percent). Memory is what a machine has for itself, and its page tables; what it shares
with its base is no cost of its own. Disk is what is allocated on the host.

Examples:
  hermitage top
  hermitage top --json | jq '.accounts[] | select(.cpu_percent > 50) | .account'";

#[derive(Debug, clap::Args)]
pub struct Top {
    /// Show it once, for scripts; so it is where there is no terminal, and with --json
    #[arg(long)]
    once: bool,
    /// Seconds between two looks
    #[arg(long, value_name = "SECONDS", default_value_t = 2, value_parser = clap::value_parser!(u64).range(1..=3600))]
    interval: u64,
    /// What comes first
    #[arg(long, value_enum, default_value_t = Order::Cpu)]
    sort: Order,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum Order {
    Cpu,
    Memory,
    Disk,
    Sessions,
    Name,
}

/// An account, as it is shown.
#[derive(Clone, Debug, PartialEq)]
pub struct Row {
    account: String,
    state: String,
    why: String,
    sessions: u32,
    /// Hundredths of one processor. `None`: it has no machine, or is looked at for the first time.
    cpu: Option<f64>,
    /// Percent of the time that its cap held it back. `None` also where caps are not enforced.
    held: Option<f64>,
    memory: Option<u64>,
    /// `None`: it has no disk yet.
    disk: Option<u64>,
    /// Bytes a second, from its sessions' clients and to them.
    traffic: Option<(u64, u64)>,
}

/// Between the two looks of `--once`.
const SHORT: Duration = Duration::from_millis(500);

pub fn run(context: &Context, top: &Top) -> anyhow::Result<()> {
    let terminal = io::stdout().is_terminal() && io::stdin().is_terminal();
    if top.once || context.out.is_json() || !terminal {
        return once(context, top.sort);
    }
    let mut meter = Meter::new(context)?;
    let (mut order, interval) = (top.sort, Duration::from_secs(top.interval));
    // Before the screen is taken: it may fail with words.
    look(context, &mut meter)?;
    sleep(SHORT);
    let (status, mut rows) = look(context, &mut meter)?;
    let mut head = head(&status, &rows);
    let mut screen = Screen::take()?;
    loop {
        sort(&mut rows, order);
        screen.draw(&head, &rows, order)?;
        let next = Instant::now() + interval;
        match screen.key(next)? {
            screen::Key::Quit => return Ok(()),
            screen::Key::Sort(wanted) => order = wanted,
            screen::Key::Redraw => {}
            screen::Key::Time => {
                let (status, seen) = look(context, &mut meter)?;
                head = self::head(&status, &seen);
                rows = seen;
            }
        }
    }
}

fn once(context: &Context, order: Order) -> anyhow::Result<()> {
    let mut meter = Meter::new(context)?;
    look(context, &mut meter)?;
    sleep(SHORT);
    let (status, mut rows) = look(context, &mut meter)?;
    sort(&mut rows, order);
    let object = json!({
        "connections": status.connections,
        "accounts": rows.iter().map(object).collect::<Vec<_>>(),
    });
    context.out.show(&object, || {
        let lines: Vec<_> = std::iter::once(head(&status, &rows))
            .chain([screen::header(order)])
            .chain(rows.iter().map(screen::line))
            .collect();
        lines.join("\n")
    })
}

fn look(context: &Context, meter: &mut Meter) -> anyhow::Result<(Status, Vec<Row>)> {
    let Some(status) = status::query(context)? else {
        bail!("the service is not running (hermitage serve starts it)");
    };
    // One that does not say has no columns of it.
    let sessions = session::query(context, None).ok().flatten();
    let rows = meter.rows(&status, sessions.as_deref());
    Ok((status, rows))
}

fn head(status: &Status, rows: &[Row]) -> String {
    let sum = |of: fn(&Row) -> Option<u64>| rows.iter().filter_map(of).sum::<u64>();
    let machines = rows.iter().filter(|row| row.memory.is_some()).count();
    format!(
        "{machines} machines, {} sessions, {} connections; {:.0} % CPU, {} of memory, {} of disks",
        rows.iter().map(|row| row.sessions).sum::<u32>(),
        status.connections,
        rows.iter().filter_map(|row| row.cpu).sum::<f64>(),
        size::show(sum(|row| row.memory)),
        size::show(sum(|row| row.disk)),
    )
}

/// What there is most of first; names as in a dictionary.
fn sort(rows: &mut [Row], order: Order) {
    rows.sort_by(|a, b| {
        let most_first = match order {
            Order::Cpu => b.cpu.unwrap_or(-1.0).total_cmp(&a.cpu.unwrap_or(-1.0)),
            Order::Memory => b.memory.cmp(&a.memory),
            Order::Disk => b.disk.cmp(&a.disk),
            Order::Sessions => b.sessions.cmp(&a.sessions),
            Order::Name => std::cmp::Ordering::Equal,
        };
        most_first.then_with(|| a.account.cmp(&b.account))
    });
}

fn object(row: &Row) -> Value {
    let percent = |share: Option<f64>| share.map(|share| (share * 10.0).round() / 10.0);
    json!({
        "account": row.account,
        "state": row.state,
        "why": row.why,
        "sessions": row.sessions,
        "cpu_percent": percent(row.cpu),
        "held_percent": percent(row.held),
        "memory_bytes": row.memory,
        "disk_bytes": row.disk,
        "received_per_second": row.traffic.map(|(received, _)| received),
        "sent_per_second": row.traffic.map(|(_, sent)| sent),
    })
}

impl Row {
    fn new(account: &hermitage::admin::protocol::AccountStatus, sample: &Sample) -> Self {
        Self {
            account: account.account.clone(),
            state: account.state.clone(),
            why: account.why.clone(),
            sessions: account.sessions,
            cpu: sample.cpu,
            held: sample.held,
            memory: sample.memory,
            disk: sample.disk,
            traffic: sample.traffic,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn row(account: &str, cpu: Option<f64>, memory: Option<u64>) -> Row {
        let (state, why) = ("running".into(), String::new());
        let (account, sessions) = (account.into(), 0);
        let (held, disk, traffic) = (None, None, None);
        Row { account, state, why, sessions, cpu, held, memory, disk, traffic }
    }

    #[test]
    fn what_there_is_most_of_comes_first() {
        let mut rows =
            [row("c", None, None), row("b", Some(5.0), Some(7)), row("a", Some(5.0), Some(9))];
        let mut names = |order| -> String {
            sort(&mut rows, order);
            rows.iter().map(|row| row.account.as_str()).collect()
        };
        assert_eq!(names(Order::Cpu), "abc");
        assert_eq!(names(Order::Memory), "abc");
        assert_eq!(names(Order::Name), "abc");
        rows[2].memory = Some(100);
        let mut names = |order| -> String {
            sort(&mut rows, order);
            rows.iter().map(|row| row.account.as_str()).collect()
        };
        assert_eq!(names(Order::Memory), "cab");
    }
}
