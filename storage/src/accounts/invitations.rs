//! Invitations: a code that an operator hands to somebody, who gives the account her key or her password by it,
//! once. So the operator never knows a password, and needs no key to begin with.
//!
//! A code has 128 random bits: no guessing, and nothing to stretch, so a plain SHA-256 of it is kept.

use super::PublicKey;
use super::account::Change;
use super::database::{Accounts, AccountsError};
use super::stored_keys::insert_key;
use rusqlite::{OptionalExtension, TransactionBehavior, params};
use sha2::{Digest, Sha256};
use uuid::Uuid;

/// Crockford's base 32: without I, L, O and U, which are misread.
const DIGITS: &[u8; 32] = b"0123456789ABCDEFGHJKMNPQRSTVWXYZ";
/// 128 bits in digits of five, and how many of those are written together.
const LENGTH: usize = 26;
const GROUP: usize = 5;

/// What a code is redeemed for.
#[derive(Clone, Debug)]
pub enum Redeemed {
    /// argon2id, PHC string.
    Password(String),
    Key(PublicKey),
}

impl Accounts {
    /// A new code for the account, good until then; one that was given before is worth nothing from now
    /// on.
    pub fn invite(&self, id: Uuid, expires: i64) -> Result<String, AccountsError> {
        let (code, digits) = new_code();
        self.db.execute(
            "INSERT INTO invitations (account, hash, expires) VALUES (?1, ?2, ?3) \
             ON CONFLICT (account) DO UPDATE SET hash = ?2, expires = ?3",
            params![id.to_string(), hash(&digits), expires],
        )?;
        Ok(code)
    }

    /// Takes the account's code back.
    pub fn uninvite(&self, id: Uuid) -> Result<Change, AccountsError> {
        let sql = "DELETE FROM invitations WHERE account = ?1";
        let changed = self.db.execute(sql, [id.to_string()])?;
        Ok(if changed == 0 { Change::AlreadySo } else { Change::Done })
    }

    /// Until when there is a code for the account that nobody has redeemed.
    pub fn invited_until(&self, id: Uuid) -> Result<Option<i64>, AccountsError> {
        let sql = "SELECT expires FROM invitations WHERE account = ?1";
        let mut statement = self.db.prepare_cached(sql)?;
        Ok(statement.query_row([id.to_string()], |row| row.get(0)).optional()?)
    }

    /// Whether that is the account's code, at that time. Nothing is redeemed yet.
    pub fn is_invitation(&self, id: Uuid, code: &str, now: i64) -> Result<bool, AccountsError> {
        let digits = digits_of(code).unwrap_or_default();
        let sql = "SELECT 1 FROM invitations WHERE account = ?1 AND hash = ?2 AND expires > ?3";
        let mut statement = self.db.prepare_cached(sql)?;
        let found = statement.query_row(params![id.to_string(), hash(&digits), now], |_| Ok(()));
        Ok(!digits.is_empty() && found.optional()?.is_some())
    }

    /// Redeems the account's code, all of it or nothing. False: there is none any more.
    pub fn redeem(&mut self, id: Uuid, what: &Redeemed, now: i64) -> Result<bool, AccountsError> {
        let tx = self.db.transaction_with_behavior(TransactionBehavior::Immediate)?;
        let used = tx.execute(
            "DELETE FROM invitations WHERE account = ?1 AND expires > ?2",
            params![id.to_string(), now],
        )?;
        if used == 0 {
            return Ok(false);
        }
        match what {
            Redeemed::Password(hash) => {
                let sql = "UPDATE accounts SET password = ?2 WHERE id = ?1";
                tx.execute(sql, params![id.to_string(), hash])?;
            }
            Redeemed::Key(key) => drop(insert_key(&tx, id, key)?),
        }
        tx.commit()?;
        Ok(true)
    }
}

/// As it is shown, and its digits alone.
fn new_code() -> (String, Vec<u8>) {
    // 244 random bits of the system's generator, of which 128 are kept.
    let mut drawn = Sha256::new();
    drawn.update(Uuid::new_v4().as_bytes());
    drawn.update(Uuid::new_v4().as_bytes());
    let drawn = drawn.finalize();
    let mut bits = drawn.iter().take(16).fold(0u128, |bits, byte| bits << 8 | u128::from(*byte));
    let mut digits = vec![0; LENGTH];
    for digit in digits.iter_mut().rev() {
        *digit = DIGITS[(bits & 31) as usize];
        bits >>= 5;
    }
    let groups: Vec<_> = digits.chunks(GROUP).map(String::from_utf8_lossy).collect();
    (groups.join("-"), digits)
}

/// What somebody typed or pasted, as digits; `None`: it is no code.
fn digits_of(text: &str) -> Option<Vec<u8>> {
    let mut digits = Vec::with_capacity(LENGTH);
    for c in text.chars().filter(|c| !matches!(c, '-' | ' ')) {
        let digit = match c.to_ascii_uppercase() {
            'O' => '0',
            'I' | 'L' => '1',
            c => c,
        };
        let digit = u8::try_from(digit).ok().filter(|digit| DIGITS.contains(digit))?;
        digits.push(digit);
        if digits.len() > LENGTH {
            return None;
        }
    }
    (digits.len() == LENGTH).then_some(digits)
}

fn hash(digits: &[u8]) -> Vec<u8> {
    Sha256::digest(digits).to_vec()
}

#[cfg(test)]
mod tests {
    use super::super::fixtures::{database, keys, new};
    use super::*;

    #[test]
    fn a_code_opens_its_account_once_and_until_its_time() {
        let (_dir, mut accounts) = database();
        let (alice, bob) =
            (accounts.create(&new("alice")).unwrap(), accounts.create(&new("bob")).unwrap());
        let code = accounts.invite(alice.id, 100).unwrap();
        assert_eq!(code.len(), LENGTH + 5, "{code}");
        let fits = |accounts: &Accounts, id, code: &str, now| {
            accounts.is_invitation(id, code, now).unwrap()
        };
        assert!(fits(&accounts, alice.id, &code, 99));
        assert!(fits(&accounts, alice.id, &code.to_lowercase().replace('-', " "), 99));
        assert!(!fits(&accounts, alice.id, &code, 100), "its time is over");
        assert!(!fits(&accounts, bob.id, &code, 99), "another's");
        assert!(!fits(&accounts, alice.id, &code[1..], 99));
        assert!(!fits(&accounts, alice.id, "", 99));
        assert_eq!(accounts.invited_until(alice.id).unwrap(), Some(100));

        let second = accounts.invite(alice.id, 200).unwrap();
        assert!(!fits(&accounts, alice.id, &code, 99), "a new one in its place");
        let key = Redeemed::Key(keys()[3].clone());
        assert!(!accounts.redeem(bob.id, &key, 99).unwrap());
        assert!(!accounts.redeem(alice.id, &key, 200).unwrap());
        assert!(accounts.redeem(alice.id, &key, 199).unwrap());
        assert_eq!(accounts.keys(alice.id).unwrap().len(), 3);
        assert!(!fits(&accounts, alice.id, &second, 99), "once");
        assert!(!accounts.redeem(alice.id, &Redeemed::Password("x".into()), 99).unwrap());
        assert_eq!(accounts.named("alice").unwrap().password, None);
        accounts.invite(alice.id, 200).unwrap();
        assert!(accounts.redeem(alice.id, &Redeemed::Password("x".into()), 99).unwrap());
        assert_eq!(accounts.named("alice").unwrap().password.as_deref(), Some("x"));

        accounts.invite(bob.id, 200).unwrap();
        assert_eq!(accounts.uninvite(bob.id).unwrap(), Change::Done);
        assert_eq!(accounts.uninvite(bob.id).unwrap(), Change::AlreadySo);
    }

    /// What cannot be redeemed leaves the code good.
    #[test]
    fn a_key_that_is_not_taken_does_not_use_the_code_up() {
        let (_dir, mut accounts) = database();
        let alice = accounts.create(&new("alice")).unwrap();
        let code = accounts.invite(alice.id, 100).unwrap();
        let other = super::super::KeyOptions::parse("no-pty").unwrap();
        let key = Redeemed::Key(keys()[0].clone().with_options(other));
        assert!(accounts.redeem(alice.id, &key, 1).is_err());
        assert!(accounts.is_invitation(alice.id, &code, 1).unwrap());
    }

    #[test]
    fn misread_digits_are_understood_and_what_is_no_code_is_none() {
        let digits = digits_of("oOiIlL-0000000000-0000000000").unwrap();
        assert_eq!(&digits[..6], b"001111");
        for bad in ["", "correct horse battery staple", &"0".repeat(25), &"0".repeat(27), "é"] {
            assert_eq!(digits_of(bad), None, "{bad}");
        }
        let (one, two) = (new_code(), new_code());
        assert_ne!(one, two);
        assert_eq!(digits_of(&one.0).unwrap(), one.1);
    }
}
