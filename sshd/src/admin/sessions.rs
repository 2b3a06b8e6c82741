//! Looking at sessions, ending them, and speaking to them.

use std::{sync::Arc, time::SystemTime};

use uuid::Uuid;

use super::{
    protocol::{MAX_MESSAGE, Reply, SessionStatus},
    refused,
};
use crate::{lifecycle::How, server::Server, watch::Live};

/// What the user of an ended session is told.
const ENDED: &str = "an operator has ended this session";

pub(super) async fn list(server: &Server, account: Option<String>) -> Reply {
    match chosen(server, &[], account, true).await {
        Ok(sessions) => {
            Reply::Sessions { sessions: sessions.iter().map(|live| status(live)).collect() }
        }
        Err(message) => refused(message),
    }
}

pub(super) async fn end(server: &Server, numbers: &[u64], account: Option<String>) -> Reply {
    let id = match account_id(server, account.as_deref()).await {
        Ok(id) => id,
        Err(message) => return refused(message),
    };
    let sessions = match chosen(server, numbers, account, false).await {
        Ok(sessions) => sessions,
        Err(message) => return refused(message),
    };
    sessions.iter().for_each(|live| live.end(ENDED));
    if let Some(id) = id {
        // Also those that have no session, or begin one in this moment.
        let server = server.connections.clone();
        tokio::spawn(async move {
            tokio::time::sleep(GOODBYE).await;
            server.disconnect_account(id, ENDED);
        });
    }
    Reply::Counted { count: count(sessions.len()) }
}

/// What ended sessions have to say to their clients goes first.
const GOODBYE: std::time::Duration = std::time::Duration::from_millis(500);

pub(super) async fn message(
    server: &Server,
    numbers: &[u64],
    account: Option<String>,
    text: &str,
) -> Reply {
    if text.trim().is_empty() || text.len() > MAX_MESSAGE {
        return refused(format!("a message has 1 to {MAX_MESSAGE} bytes, this one {}", text.len()));
    }
    // A terminal obeys what it is sent: only words go there.
    let text: String = text
        .trim_end()
        .chars()
        .map(|c| if c.is_control() && !matches!(c, '\n' | '\t') { ' ' } else { c })
        .collect();
    match chosen(server, numbers, account, true).await {
        Ok(sessions) => {
            let told = sessions.iter().filter(|live| live.say(&text)).count();
            Reply::Counted { count: count(told) }
        }
        Err(message) => refused(message),
    }
}

/// The sessions of these numbers, each of which there has to be, and all of the account; with neither, all
/// there are if `all`.
async fn chosen(
    server: &Server,
    numbers: &[u64],
    account: Option<String>,
    all: bool,
) -> Result<Vec<Arc<Live>>, String> {
    let sessions = server.watch.sessions();
    let mut chosen = Vec::new();
    for number in numbers {
        let live = sessions.get(*number).ok_or_else(|| {
            format!("there is no session {number}; hermitage session list shows which there are")
        })?;
        chosen.push(live);
    }
    match account_id(server, account.as_deref()).await? {
        Some(id) => chosen.extend(sessions.list(Some(id))),
        None if numbers.is_empty() && all => chosen.extend(sessions.list(None)),
        None if numbers.is_empty() => return Err("say which sessions, or whose".into()),
        None => {}
    }
    chosen.sort_by_key(|live| live.number);
    chosen.dedup_by_key(|live| live.number);
    Ok(chosen)
}

async fn account_id(server: &Server, name: Option<&str>) -> Result<Option<Uuid>, String> {
    let Some(name) = name else { return Ok(None) };
    match server.store.by_name(name).await {
        Ok(Some(account)) => Ok(Some(account.id)),
        Ok(None) => Err(format!("there is no account \"{name}\"")),
        Err(error) => Err(error.to_string()),
    }
}

fn status(live: &Live) -> SessionStatus {
    let since = live.since.duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default();
    let (received, sent) = live.traffic.totals();
    SessionStatus {
        number: live.number,
        account: live.who.account.clone(),
        source: live.who.source.clone(),
        kind: live.who.kind.into(),
        terminal: live.who.terminal,
        login: live.who.login.clone(),
        since: since.as_secs().try_into().unwrap_or(i64::MAX),
        idle: live.idle().as_secs(),
        machine: live.machine().map(|how| How::as_str(how).into()),
        received,
        sent,
    }
}

fn count(n: usize) -> u32 {
    n.try_into().unwrap_or(u32::MAX)
}
