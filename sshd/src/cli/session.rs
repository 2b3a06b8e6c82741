//! `hermitage session list|kill|message`: the sessions that are going on.

use super::context::Context;
use super::output::{count, table};
use super::{NotFound, admin, size, span, time};
use anyhow::bail;
use clap::Subcommand;
use hermitage::admin::protocol::{Reply, Request, SessionStatus};
use serde_json::{Value, json};
use std::io::Read;

#[derive(Debug, Subcommand)]
pub enum Command {
    /// List the sessions: who is here, from where, since when, and how long idle
    List {
        /// Only of this account
        account: Option<String>,
    },
    /// End sessions; their users are told
    #[command(after_help = "\
As if the client had gone: a shell stays on its terminal for the next login, commands end.
--account also closes the account's connections.

Examples:
  hermitage session kill 7
  hermitage session kill --account alice")]
    Kill {
        /// Numbers, as hermitage session list shows them
        #[arg(value_name = "NUMBER", required_unless_present = "account")]
        numbers: Vec<u64>,
        /// All sessions of this account
        #[arg(long, value_name = "NAME")]
        account: Option<String>,
    },
    /// Show a text on the terminals of sessions
    #[command(after_help = "\
Examples:
  hermitage session message --all 'This host restarts at 18:00; your machine will be saved.'
  hermitage session message --account alice < notice.txt")]
    Message {
        /// What to show [default: standard input]
        text: Option<String>,
        /// On the terminals of this session; can be given again
        #[arg(long, value_name = "NUMBER", required_unless_present_any = ["account", "all"])]
        session: Vec<u64>,
        /// On those of this account
        #[arg(long, value_name = "NAME")]
        account: Option<String>,
        /// On all there are
        #[arg(long, conflicts_with_all = ["account", "session"])]
        all: bool,
    },
}

pub fn run(context: &Context, command: Command) -> anyhow::Result<()> {
    match command {
        Command::List { account } => list(context, account),
        Command::Kill { numbers, account } => {
            let ended = ask(context, &Request::EndSessions { numbers, account })?;
            context.out.show(&json!({ "ended": ended }), || match ended {
                0 => "there was no session".into(),
                n => format!("{} told to end", count(n as usize, "session")),
            })
        }
        Command::Message { text, session, account, all: _ } => {
            let text = text.map_or_else(read_text, Ok)?;
            let told = ask(context, &Request::Message { numbers: session, account, text })?;
            context.out.show(&json!({ "told": told }), || match told {
                0 => "nobody of them is on a terminal; nothing was shown".into(),
                n => format!("shown on {}", count(n as usize, "terminal")),
            })
        }
    }
}

/// At most what a message may have and a byte, so that more is refused and not cut.
fn read_text() -> anyhow::Result<String> {
    let most = hermitage::admin::protocol::MAX_MESSAGE as u64;
    let mut text = String::new();
    std::io::stdin().take(most + 1).read_to_string(&mut text)?;
    Ok(text)
}

fn list(context: &Context, account: Option<String>) -> anyhow::Result<()> {
    let Some(sessions) = query(context, account)? else {
        bail!("the service is not running, so nobody is here (hermitage serve starts it)");
    };
    let object = json!({ "sessions": sessions.iter().map(object).collect::<Vec<_>>() });
    context.out.show(&object, || text(&sessions))
}

/// `None`: no service is running.
pub fn query(
    context: &Context,
    account: Option<String>,
) -> anyhow::Result<Option<Vec<SessionStatus>>> {
    match admin::ask(context, &Request::Sessions { account })?.map(|answer| answer.reply) {
        None => Ok(None),
        Some(Reply::Sessions { sessions }) => Ok(Some(sessions)),
        Some(other) => Err(unexpected(other)),
    }
}

fn ask(context: &Context, request: &Request) -> anyhow::Result<u32> {
    match admin::ask(context, request)?.map(|answer| answer.reply) {
        None => bail!("the service is not running, so nobody is here"),
        Some(Reply::Counted { count }) => Ok(count),
        Some(other) => Err(unexpected(other)),
    }
}

fn unexpected(reply: Reply) -> anyhow::Error {
    match reply {
        Reply::Error { message } if message.starts_with("there is no ") => NotFound(message).into(),
        Reply::Error { message } => anyhow::anyhow!("the service answered: {message}"),
        _ => anyhow::anyhow!("the service answered something else; is it another version?"),
    }
}

fn object(session: &SessionStatus) -> Value {
    json!({
        "number": session.number,
        "account": session.account,
        "source": session.source,
        "kind": session.kind,
        "terminal": session.terminal,
        "login": session.login,
        "since": time::rfc3339(session.since),
        "idle_seconds": session.idle,
        "machine": session.machine,
        "received_bytes": session.received,
        "sent_bytes": session.sent,
    })
}

fn text(sessions: &[SessionStatus]) -> String {
    if sessions.is_empty() {
        return "nobody is here".into();
    }
    let columns =
        ["SESSION", "ACCOUNT", "KIND", "FROM", "SINCE", "IDLE", "IN", "OUT", "MACHINE", "BY"];
    let mut table = table(columns);
    for session in sessions {
        let kind = match (session.kind.as_str(), session.terminal) {
            ("exec", true) => "exec, terminal".to_owned(),
            ("shell", false) => "shell, no terminal".to_owned(),
            (kind, _) => kind.to_owned(),
        };
        table.add_row([
            session.number.to_string(),
            session.account.clone(),
            kind,
            session.source.clone(),
            time::short(session.since),
            span::show(session.idle.try_into().unwrap_or(u32::MAX)),
            size::show(session.received),
            size::show(session.sent),
            session.machine.clone().unwrap_or_else(|| "waits for it".into()),
            session.login.clone(),
        ]);
    }
    table.trim_fmt()
}
