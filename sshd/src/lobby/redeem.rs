//! Redeeming an invitation: its code was the password of this login, which may do nothing else.

use hermitage_storage::accounts::{Account, MIN_PASSWORD, PublicKey, Redeemed};

use super::{Desk, Visit, line::Lines};
use crate::store::StoreError;

const QUESTION: &str = "Give this account your public SSH key (paste its line), or a new password.\n\
                        Key or password: ";

pub(super) async fn redeem(
    desk: &Desk,
    account: &Account,
    visit: &Visit<'_>,
) -> Result<String, String> {
    let mut lines = Lines::new(visit.input, visit.output, visit.terminal);
    let given = lines.secret(QUESTION).await?;
    let (what, done) = match key(&given)? {
        Some(key) => {
            let fingerprint = key.fingerprint();
            (Redeemed::Key(key), format!("Your key {fingerprint} logs in from now on.\n"))
        }
        None => {
            let length = given.chars().count();
            if length < MIN_PASSWORD {
                return Err(format!(
                    "the password has {length} characters, and needs {MIN_PASSWORD}; nothing was changed, \
                     and the invitation is still good"
                ));
            }
            if visit.terminal && lines.secret("Again: ").await? != given {
                return Err(
                    "the two are not the same; nothing was changed, and the invitation is still \
                            good"
                        .into(),
                );
            }
            let hash = desk.authenticator.hash(given).await?;
            (Redeemed::Password(hash), "Your password is set: log in with it from now on.\n".into())
        }
    };
    let redeemed = desk.store.redeem(account.id, what).await.map_err(|error: StoreError| {
        tracing::error!(%error, account = account.name, "can't redeem an invitation");
        "it could not be written, and the invitation is still good; try again later".to_owned()
    })?;
    if !redeemed {
        return Err("the invitation was used or taken back meanwhile; nothing was changed".into());
    }
    tracing::info!(account = account.name, source = visit.source, "has redeemed an invitation");
    Ok(done)
}

/// A line that begins like a key is meant as one, and no password.
fn key(line: &str) -> Result<Option<PublicKey>, String> {
    let begins = ["ssh-", "ecdsa-sha2-", "sk-ssh-", "sk-ecdsa-", "-----BEGIN"];
    if !begins.iter().any(|begin| line.starts_with(begin)) {
        return Ok(None);
    }
    PublicKey::parse_line(line)
        .map_err(|error| format!("{error}; nothing was changed, and the invitation is still good"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_key_is_told_from_a_password() {
        let keys = include_str!("../../../storage/testdata/authorized_keys");
        let line = keys.lines().find(|line| line.starts_with("ssh-ed25519")).unwrap();
        assert!(key(line).unwrap().is_some());
        assert!(key("correct horse").unwrap().is_none());
        for bad in ["ssh-ed25519 AAAA", "-----BEGIN OPENSSH PRIVATE KEY-----", "ssh-dss AAAA"] {
            assert!(key(bad).unwrap_err().contains("still good"), "{bad}");
        }
    }
}
