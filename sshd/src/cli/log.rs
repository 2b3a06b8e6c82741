//! `hermitage log`: who was here.

use super::context::Context;
use super::output::table;
use super::{span, time};
use hermitage_storage::accounts::{LogQuery, SessionRecord};
use serde_json::{Value, json};
use std::collections::HashMap;
use uuid::Uuid;

pub const HELP: &str = "\
Every session the service has had: shells, commands, file transfers and forwarded connections. What was
refused, and what operators did, is in the audit log (docs/watching.md).

Examples:
  hermitage log --since 1d
  hermitage log alice -n 100 --json | jq -r '.sessions[].source'";

#[derive(Debug, clap::Args)]
pub struct Log {
    /// Only of this account
    account: Option<String>,
    /// Only what went on in this time, to now: 30m, 2h, 7d
    #[arg(long, value_name = "TIME", value_parser = span::parse_with_units)]
    since: Option<u32>,
    /// At most so many, the latest
    #[arg(short = 'n', value_name = "COUNT", default_value_t = 50)]
    most: u32,
}

pub fn run(context: &Context, log: &Log) -> anyhow::Result<()> {
    let accounts = context.accounts()?;
    let account = match &log.account {
        // Of one that was removed and not yet purged, too.
        Some(name) => Some(match accounts.by_name(name)? {
            Some(account) => account.id,
            None => match accounts.removed(name)?.first() {
                Some(account) => account.id,
                None => accounts.named(name)?.id,
            },
        }),
        None => None,
    };
    let since = log.since.map(|seconds| time::now().saturating_sub(seconds.into()));
    let mut sessions = accounts.session_log(&LogQuery { account, since, most: log.most })?;
    // The latest last, as in any log.
    sessions.reverse();
    let mut names: HashMap<Uuid, String> = HashMap::new();
    for account in accounts.list(true)? {
        names.insert(account.id, account.name);
    }
    let name = |session: &SessionRecord| {
        names.get(&session.account).cloned().unwrap_or_else(|| session.account.to_string())
    };
    let objects: Vec<_> = sessions.iter().map(|session| object(session, name(session))).collect();
    context.out.show(&json!({ "sessions": objects }), || {
        if sessions.is_empty() {
            return "no sessions".into();
        }
        let columns =
            ["ACCOUNT", "KIND", "FROM", "STARTED", "LASTED", "MACHINE", "BY", "HOW IT ENDED"];
        let mut table = table(columns);
        for session in &sessions {
            table.add_row([
                name(session),
                session.kind.clone(),
                session.source.clone(),
                time::short(session.started),
                lasted(session),
                session.machine.clone().unwrap_or_else(|| "-".into()),
                session.login.clone().unwrap_or_else(|| "-".into()),
                session.outcome.clone().unwrap_or_default(),
            ]);
        }
        table.trim_fmt()
    })
}

fn lasted(session: &SessionRecord) -> String {
    match session.ended {
        Some(ended) => {
            let seconds = ended.saturating_sub(session.started).max(0);
            span::show(seconds.try_into().unwrap_or(u32::MAX))
        }
        None => "goes on".into(),
    }
}

fn object(session: &SessionRecord, account: String) -> Value {
    json!({
        "id": session.id,
        "account": account,
        "account_id": session.account,
        "kind": session.kind,
        "source": session.source,
        "login": session.login,
        "machine": session.machine,
        "started": time::rfc3339(session.started),
        "ended": session.ended.map(time::rfc3339),
        "seconds": session.ended.map(|ended| ended.saturating_sub(session.started).max(0)),
        "outcome": session.outcome,
    })
}
