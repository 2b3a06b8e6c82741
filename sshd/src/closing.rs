//! Accounts that may no longer be here: what they are told, and how their sessions and machines end.
//!
//! A command that closes an account tells the service. That an account's time is over nobody tells: it
//! is looked for.

use std::{sync::Arc, time::Duration};

use hermitage_storage::accounts::{Account, Closed};
use uuid::Uuid;

use crate::{lifecycle::StopCause, server::Server, time};

/// How often accounts are looked for whose time is over.
const LOOK: Duration = Duration::from_secs(1);

/// For whoever has shown that the account is hers, or is logged in to it.
pub fn words(closed: Closed) -> String {
    let utc = |seconds| format!("{} UTC", time::short(seconds));
    match closed {
        Closed::Removed => "this account was removed".into(),
        Closed::Disabled { until: None } => "this account is disabled".into(),
        Closed::Disabled { until: Some(until) } => {
            format!("this account is disabled until {}", utc(until))
        }
        Closed::Expired { since } => {
            format!("this account expired on {}; its operator can extend it", utc(since))
        }
    }
}

/// Why this account is closed now; `None` stands for one that is not there any more.
pub fn closed(account: Option<&Account>) -> Option<Closed> {
    account.map_or(Some(Closed::Removed), |account| account.closed_at(time::now()))
}

/// Ends its connections, and its machine as its policy says.
pub fn end(server: &Server, account: Uuid, closed: Closed) {
    let words = words(closed);
    server.connections.disconnect_account(account, &words);
    let registry = server.registry.clone();
    let removed = matches!(closed, Closed::Removed);
    tokio::spawn(async move {
        registry.stop(account, StopCause::Closed(words)).await;
        if removed {
            registry.forget(account);
        }
    });
}

/// Ends, for ever, what accounts have whose time is over. What was over before has nobody here: its logins
/// are refused.
pub async fn keep_hours(server: Arc<Server>) {
    let mut looked = time::now();
    let mut failing = false;
    loop {
        tokio::time::sleep(LOOK).await;
        let now = time::now();
        match server.store.expired_between(looked, now).await {
            Ok(expired) => {
                (looked, failing) = (now, false);
                for account in expired {
                    close(&server, account).await;
                }
            }
            Err(error) => {
                if !std::mem::replace(&mut failing, true) {
                    tracing::error!(%error, "can't look for accounts whose time is over");
                }
            }
        }
    }
}

/// Looked at again: it may have been extended meanwhile.
async fn close(server: &Server, account: Uuid) {
    match server.store.by_id(account).await {
        Ok(found) => {
            if let Some(closed) = closed(found.as_ref()) {
                let name = found.map(|account| account.name);
                tracing::info!(%account, name, "closed: {}", words(closed));
                end(server, account, closed);
            }
        }
        Err(error) => tracing::error!(%account, %error, "can't look up an account that expired"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn whoever_is_let_in_no_more_is_told_since_or_until_when() {
        let at = 1_798_761_600;
        for (closed, wanted) in [
            (Closed::Removed, "removed"),
            (Closed::Disabled { until: None }, "is disabled"),
            (Closed::Disabled { until: Some(at) }, "disabled until 2027-01-01 00:00 UTC"),
            (Closed::Expired { since: at }, "expired on 2027-01-01 00:00 UTC"),
        ] {
            assert!(words(closed).contains(wanted), "{}", words(closed));
        }
        assert_eq!(super::closed(None), Some(Closed::Removed));
    }
}
