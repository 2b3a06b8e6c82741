//! Sources that keep failing wait, longer each time.
//!
//! As OpenSSH's PerSourcePenalties (sshd_config(5)), with one difference: each offence adds to the time for which
//! its source owes good behaviour, and when that comes to [`ENFORCED_FROM`] connections are refused until it
//! has passed. Who is refused again and again is so for twice as long each time, up to the limit.

use std::{
    collections::HashMap,
    net::IpAddr,
    sync::{Mutex, MutexGuard, PoisonError, RwLock},
    time::{Duration, Instant},
};

use ipnet::IpNet;

/// Less than this is owed by everybody who mistypes.
const ENFORCED_FROM: Duration = Duration::from_secs(15);

/// Most sources that are remembered; those that owe least are forgotten first.
const MOST_SOURCES: usize = 16 * 1024;

/// Doublings that count; more would be over any limit.
const MOST_DOUBLINGS: u32 = 16;

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Offence {
    /// A wrong password, or a signature by a key that may not log in.
    Failure,
    /// Gone without having tried to authenticate, or never spoke SSH.
    NoAttempt,
    /// Took all the time there is for authenticating.
    Grace,
}

impl Offence {
    fn owes(self) -> Duration {
        Duration::from_secs(match self {
            Offence::Failure => 5,
            Offence::NoAttempt => 1,
            Offence::Grace => 10,
        })
    }

    pub fn words(self) -> &'static str {
        match self {
            Offence::Failure => "failed logins",
            Offence::NoAttempt => "connections without a login",
            Offence::Grace => "logins that were never finished",
        }
    }
}

/// A source that is refused for now.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("it is refused for {} s after {}", left.as_secs() + 1, offence.words())]
pub struct Penalty {
    pub left: Duration,
    pub offence: Offence,
}

pub struct Penalties {
    rules: RwLock<Rules>,
    sources: Mutex<HashMap<IpAddr, Debt>>,
}

struct Rules {
    limit: Duration,
    exempt: Vec<IpNet>,
}

struct Debt {
    until: Instant,
    /// How often it has come to be refused.
    refusals: u32,
    refused: bool,
    last: Offence,
}

impl Penalties {
    /// Nobody is refused for longer than `limit`; zero: nobody is refused at all.
    pub fn new(limit: Duration, exempt: Vec<IpNet>) -> Self {
        Self { rules: RwLock::new(Rules { limit, exempt }), sources: Mutex::default() }
    }

    /// From now on. What sources owe already stays.
    pub fn set(&self, limit: Duration, exempt: Vec<IpNet>) {
        *self.rules.write().unwrap_or_else(PoisonError::into_inner) = Rules { limit, exempt };
    }

    /// Whether connections of this source are refused now.
    pub fn check(&self, source: IpAddr, now: Instant) -> Option<Penalty> {
        let mut sources = self.sources();
        let debt = sources.get_mut(&source)?;
        let left = debt.until.saturating_duration_since(now);
        debt.refused &= !left.is_zero();
        debt.refused.then_some(Penalty { left, offence: debt.last })
    }

    /// Notes an offence. Returns the penalty if it begins with this one.
    pub fn note(&self, source: IpAddr, offence: Offence, now: Instant) -> Option<Penalty> {
        let rules = self.rules.read().unwrap_or_else(PoisonError::into_inner);
        let limit = rules.limit;
        if limit.is_zero() || rules.exempt.iter().any(|net| net.contains(&source)) {
            return None;
        }
        drop(rules);
        let mut sources = self.sources();
        if sources.len() >= MOST_SOURCES && !sources.contains_key(&source) {
            make_room(&mut sources, limit, now);
        }
        let fresh = Debt { until: now, refusals: 0, refused: false, last: offence };
        let debt = sources.entry(source).or_insert(fresh);
        // Forgiven after as long a time of good behaviour as the longest penalty.
        if now.saturating_duration_since(debt.until) >= limit {
            debt.refusals = 0;
        }
        let was_refused = debt.refused && debt.until > now;
        let factor = 1 << debt.refusals.min(MOST_DOUBLINGS);
        let owed = debt.until.saturating_duration_since(now) + offence.owes() * factor;
        debt.until = now + owed.min(limit);
        debt.last = offence;
        debt.refused = was_refused || owed >= ENFORCED_FROM.min(limit);
        if was_refused || !debt.refused {
            return None;
        }
        debt.refusals += 1;
        Some(Penalty { left: owed.min(limit), offence })
    }

    fn sources(&self) -> MutexGuard<'_, HashMap<IpAddr, Debt>> {
        self.sources.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Forgets who has been good for long enough, or else the half that owes least.
fn make_room(sources: &mut HashMap<IpAddr, Debt>, limit: Duration, now: Instant) {
    sources.retain(|_, debt| now.saturating_duration_since(debt.until) < limit);
    if sources.len() < MOST_SOURCES {
        return;
    }
    let mut times: Vec<Instant> = sources.values().map(|debt| debt.until).collect();
    let middle = times.len() / 2;
    let (_, &mut median, _) = times.select_nth_unstable(middle);
    sources.retain(|_, debt| debt.until > median);
}

#[cfg(test)]
mod tests {
    use super::*;

    const LIMIT: Duration = Duration::from_secs(600);

    fn source(last: u8) -> IpAddr {
        IpAddr::from([192, 0, 2, last])
    }

    fn seconds(count: u64) -> Duration {
        Duration::from_secs(count)
    }

    #[test]
    fn who_mistypes_twice_is_let_in_and_who_goes_on_waits() {
        let penalties = Penalties::new(LIMIT, vec![]);
        let now = Instant::now();
        for _ in 0..2 {
            assert_eq!(penalties.note(source(1), Offence::Failure, now), None);
            assert_eq!(penalties.check(source(1), now), None);
        }
        let penalty = penalties.note(source(1), Offence::Failure, now).unwrap();
        assert_eq!(penalty, Penalty { left: seconds(15), offence: Offence::Failure });
        assert_eq!(penalty.to_string(), "it is refused for 16 s after failed logins");
        let later = now + seconds(10);
        assert_eq!(penalties.check(source(1), later).unwrap().left, seconds(5));
        assert_eq!(penalties.check(source(2), later), None);
        assert_eq!(penalties.check(source(1), now + seconds(15)), None);
    }

    #[test]
    fn failures_far_apart_cost_nothing() {
        let penalties = Penalties::new(LIMIT, vec![]);
        let now = Instant::now();
        for n in 0..1000 {
            let then = now + seconds(6 * n);
            assert_eq!(penalties.note(source(1), Offence::Failure, then), None);
        }
    }

    #[test]
    fn each_penalty_is_longer_up_to_the_limit_and_good_behaviour_is_remembered() {
        let penalties = Penalties::new(LIMIT, vec![]);
        let mut now = Instant::now();
        let mut lengths = vec![];
        for _ in 0..9 {
            let penalty = loop {
                if let Some(penalty) = penalties.note(source(1), Offence::Failure, now) {
                    break penalty;
                }
            };
            lengths.push(penalty.left.as_secs());
            now += penalty.left;
            assert_eq!(penalties.check(source(1), now), None);
        }
        assert_eq!(lengths, [15, 20, 20, 40, 80, 160, 320, 600, 600]);
        now += LIMIT;
        assert_eq!(penalties.note(source(1), Offence::Failure, now), None);
    }

    #[test]
    fn exempt_sources_and_a_limit_of_zero_are_never_refused() {
        let nets = vec!["192.0.2.0/28".parse().unwrap()];
        let (some, none) = (Penalties::new(LIMIT, nets), Penalties::new(Duration::ZERO, vec![]));
        let now = Instant::now();
        for _ in 0..100 {
            assert_eq!(some.note(source(7), Offence::Grace, now), None);
            assert_eq!(none.note(source(7), Offence::Grace, now), None);
        }
        assert!(some.note(source(77), Offence::Grace, now).is_none());
        assert!(some.note(source(77), Offence::Grace, now).is_some());
    }

    #[test]
    fn a_million_sources_take_no_more_room_and_the_worst_are_remembered() {
        let penalties = Penalties::new(LIMIT, vec![]);
        let now = Instant::now();
        for _ in 0..20 {
            penalties.note(source(1), Offence::Grace, now);
        }
        for n in 0..200_000u32 {
            let source = IpAddr::from(n.to_be_bytes());
            penalties.note(source, Offence::NoAttempt, now);
            assert!(penalties.sources().len() <= MOST_SOURCES);
        }
        assert!(penalties.check(source(1), now).is_some());
    }
}
