//! How often an account may ask.

use std::{
    collections::HashMap,
    sync::{Mutex, PoisonError},
    time::{Duration, Instant},
};

use uuid::Uuid;

/// Questions at once; one comes back every [`EVERY`].
pub const BURST: u32 = 10;
const EVERY: Duration = Duration::from_secs(3);

/// Accounts that are remembered before those are forgotten that may ask as they like.
const MOST: usize = 1024;

/// When each account will have all of its questions back.
#[derive(Default)]
pub struct Rate(Mutex<HashMap<Uuid, Instant>>);

impl Rate {
    /// Takes a question; or says for how long there is none.
    pub fn take(&self, account: Uuid, now: Instant) -> Result<(), String> {
        let mut accounts = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        if accounts.len() >= MOST {
            accounts.retain(|_, full| *full > now);
        }
        let full = accounts.entry(account).or_insert(now);
        let owed = full.saturating_duration_since(now);
        if owed > EVERY * (BURST - 1) {
            let wait = (owed - EVERY * (BURST - 1)).as_secs() + 1;
            return Err(format!("too many questions at once; ask again in {wait} s"));
        }
        *full = now + owed + EVERY;
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_burst_is_answered_and_then_one_at_a_time() {
        let (rate, now) = (Rate::default(), Instant::now());
        let alice = Uuid::from_u128(1);
        for _ in 0..BURST {
            rate.take(alice, now).unwrap();
        }
        let words = rate.take(alice, now).unwrap_err();
        assert_eq!(words, "too many questions at once; ask again in 4 s");
        rate.take(Uuid::from_u128(2), now).unwrap();
        let later = now + EVERY;
        rate.take(alice, later).unwrap();
        rate.take(alice, later).unwrap_err();
        let much_later = later + EVERY * 100;
        assert_eq!((0..100).filter(|_| rate.take(alice, much_later).is_ok()).count(), 10);
    }

    #[test]
    fn who_asked_long_ago_is_forgotten() {
        let (rate, now) = (Rate::default(), Instant::now());
        for id in 0..20_000 {
            let then = now + EVERY * id;
            rate.take(Uuid::from_u128(id.into()), then).unwrap();
            assert!(rate.0.lock().unwrap().len() <= MOST);
        }
    }
}
