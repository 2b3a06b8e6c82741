//! `hermitage status`.

use super::context::Context;
use super::output::{count, table};
use super::{Said, admin, time};
use anyhow::bail;
use hermitage::admin::protocol::{Reply, Request, Status};
use serde_json::json;

pub fn run(context: &Context) -> anyhow::Result<()> {
    match query(context)? {
        Some(status) => {
            let mut object = serde_json::to_value(&status)?;
            object["running"] = json!(true);
            context.out.show(&object, || text(&status))
        }
        None => {
            context.out.show(&json!({ "running": false }), || {
                "the service is not running (hermitage serve starts it)".to_owned()
            })?;
            Err(Said.into())
        }
    }
}

/// `None`: it is not running.
pub fn query(context: &Context) -> anyhow::Result<Option<Status>> {
    match admin::ask(context, &Request::Status)?.map(|answer| answer.reply) {
        None => Ok(None),
        Some(Reply::Status(status)) => Ok(Some(status)),
        Some(Reply::Error { message }) => bail!("the service answered: {message}"),
        Some(_) => bail!("the service gave no status"),
    }
}

fn text(status: &Status) -> String {
    let mut text = format!(
        "hermitage {} (process {}), running since {}, on {}\nbase {}, {}\n",
        status.version,
        status.pid,
        time::short(status.since),
        status.listen.join(" "),
        status.base.as_deref().unwrap_or("none"),
        count(status.connections as usize, "connection"),
    );
    text.push_str(&match (&status.limits.path, &status.limits.reason) {
        (Some(path), _) => format!("limits of machines are enforced in {path}\n"),
        (None, reason) => {
            let reason = reason.as_deref().unwrap_or("the service does not say why");
            format!("limits of machines are NOT enforced: {reason}\n")
        }
    });
    if !status.accounts.is_empty() {
        let mut table = table(["ACCOUNT", "STATE", "SINCE", "SESSIONS", "PROCESS", "WHY"]);
        for account in &status.accounts {
            table.add_row([
                account.account.clone(),
                account.state.clone(),
                time::short(account.since),
                account.sessions.to_string(),
                account.machine_pid.map_or("-".into(), |pid| pid.to_string()),
                account.why.clone(),
            ]);
        }
        text.push_str(&format!("\n{}", table.trim_fmt()));
    }
    text
}
