//! All connections: how many there may be, and how each can be ended.

use std::{
    collections::HashMap,
    net::{IpAddr, SocketAddr},
    sync::{
        Arc, Mutex, MutexGuard, OnceLock, PoisonError, Weak,
        atomic::{AtomicU64, Ordering},
    },
};

use tokio::sync::Notify;
use tokio_util::sync::CancellationToken;
use uuid::Uuid;

use super::{ended::Ended, penalties::Penalty};
use crate::{config::Ssh, link::Link};

#[derive(Default)]
pub struct Connections {
    next: AtomicU64,
    table: Mutex<Table>,
    /// Notified when a connection has gone.
    changed: Notify,
}

#[derive(Default)]
struct Table {
    entries: HashMap<u64, Arc<Entry>>,
    unauthenticated: HashMap<IpAddr, usize>,
}

/// One connection.
#[derive(Default)]
pub struct Entry {
    link: OnceLock<Arc<Link>>,
    account: OnceLock<Uuid>,
    reason: OnceLock<String>,
    disconnect: Notify,
    /// Its goodbye is on its way.
    said: CancellationToken,
    authenticated: Notify,
    pub ended: Ended,
}

impl Entry {
    pub fn set_link(&self, link: Link) {
        let _ = self.link.set(Arc::new(link));
    }

    /// Its connection, which nobody keeps open for longer than it is.
    pub fn link(&self) -> Weak<Link> {
        self.link.get().map(Arc::downgrade).unwrap_or_default()
    }

    /// Ends the connection, with a reason for the client; the first one counts.
    pub fn disconnect(&self, reason: &str) {
        let _ = self.reason.set(reason.to_owned());
        self.disconnect.notify_one();
    }

    /// Waits until the connection is to be ended.
    pub async fn disconnected(&self) -> String {
        loop {
            if let Some(reason) = self.reason.get() {
                return reason.clone();
            }
            self.disconnect.notified().await;
        }
    }

    /// Nothing that the client is told from now on comes before the reason.
    pub fn said_goodbye(&self) {
        self.said.cancel();
    }

    pub async fn goodbye(&self) {
        self.said.cancelled().await;
    }

    pub fn authenticated(&self, account: Uuid) {
        let _ = self.account.set(account);
        self.authenticated.notify_one();
    }

    pub fn is_authenticated(&self) -> bool {
        self.account.get().is_some()
    }

    pub async fn wait_authenticated(&self) {
        while self.account.get().is_none() {
            self.authenticated.notified().await;
        }
    }
}

/// Why a connection is not taken.
#[derive(Debug, thiserror::Error)]
pub enum Refusal {
    #[error("there are {0} connections, which is ssh.max_connections")]
    Full(usize),
    #[error("{0} connections have not authenticated, which is ssh.max_unauthenticated")]
    Unauthenticated(usize),
    #[error("{0} connections have not authenticated: by chance, from ssh.early_drop on")]
    Chance(usize),
    #[error(transparent)]
    Penalty(#[from] Penalty),
    #[error(
        "{0} of its connections have not authenticated, which is ssh.max_unauthenticated_per_source"
    )]
    Source(usize),
}

impl Refusal {
    /// Their names among the metrics.
    pub const NAMES: [&str; 5] = [
        "max_connections",
        "max_unauthenticated",
        "early_drop",
        "penalty",
        "max_unauthenticated_per_source",
    ];

    pub fn name(&self) -> &'static str {
        let [full, unauthenticated, chance, penalty, source] = Self::NAMES;
        match self {
            Refusal::Full(_) => full,
            Refusal::Unauthenticated(_) => unauthenticated,
            Refusal::Chance(_) => chance,
            Refusal::Penalty(_) => penalty,
            Refusal::Source(_) => source,
        }
    }
}

/// A place for a connection; given back when dropped.
pub struct Place {
    connections: Arc<Connections>,
    number: u64,
    source: Option<IpAddr>,
    pub entry: Arc<Entry>,
}

impl Connections {
    pub fn enter(self: &Arc<Self>, peer: SocketAddr, limits: &Ssh) -> Result<Place, Refusal> {
        let source = source(peer);
        let mut table = self.table();
        if table.entries.len() >= limits.max_connections {
            return Err(Refusal::Full(table.entries.len()));
        }
        let all: usize = table.unauthenticated.values().sum();
        if all >= limits.max_unauthenticated {
            return Err(Refusal::Unauthenticated(all));
        }
        if draw(all, limits) {
            return Err(Refusal::Chance(all));
        }
        let count = table.unauthenticated.entry(source).or_default();
        if *count >= limits.max_unauthenticated_per_source {
            return Err(Refusal::Source(*count));
        }
        *count += 1;
        let number = self.next.fetch_add(1, Ordering::Relaxed);
        let entry = Arc::new(Entry::default());
        table.entries.insert(number, entry.clone());
        Ok(Place { connections: self.clone(), number, source: Some(source), entry })
    }

    pub fn count(&self) -> usize {
        self.table().entries.len()
    }

    /// The accounts that are connected; one that is connected twice, twice.
    pub fn accounts(&self) -> Vec<Uuid> {
        self.table().entries.values().filter_map(|entry| entry.account.get().copied()).collect()
    }

    /// Ends every connection of an account.
    pub fn disconnect_account(&self, account: Uuid, reason: &str) {
        for entry in self.table().entries.values() {
            if entry.account.get() == Some(&account) {
                entry.disconnect(reason);
            }
        }
    }

    pub fn disconnect_all(&self, reason: &str) {
        self.table().entries.values().for_each(|entry| entry.disconnect(reason));
    }

    /// Waits until no connection is left.
    pub async fn all_gone(&self) {
        loop {
            let changed = self.changed.notified();
            if self.count() == 0 {
                return;
            }
            changed.await;
        }
    }

    fn table(&self) -> MutexGuard<'_, Table> {
        self.table.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Place {
    /// Has authenticated: no longer counts against the limits of those that have not.
    pub fn authenticated(&mut self) {
        let Some(source) = self.source.take() else { return };
        let mut table = self.connections.table();
        if let Some(count) = table.unauthenticated.get_mut(&source) {
            *count = count.saturating_sub(1);
            if *count == 0 {
                table.unauthenticated.remove(&source);
            }
        }
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        self.authenticated();
        self.connections.table().entries.remove(&self.number);
        self.connections.changed.notify_waiters();
    }
}

/// Whether a connection is refused by chance: some of the real clients get in while somebody fills up the
/// places, and try again if they did not (sshd_config(5), MaxStartups).
fn draw(unauthenticated: usize, limits: &Ssh) -> bool {
    let percent = refused_percent(unauthenticated, limits.early_drop, limits.max_unauthenticated);
    // Without random numbers there is no service at all.
    percent > 0 && getrandom::u32().unwrap_or(0) % 100 < percent
}

/// From `start` on 30 of 100, growing evenly to all of them at `full`.
fn refused_percent(unauthenticated: usize, start: usize, full: usize) -> u32 {
    if unauthenticated < start {
        return 0;
    }
    let (over, room) = ((unauthenticated - start) as u64, full.saturating_sub(start) as u64);
    match room {
        0 => 100,
        room => 30 + (70 * over.min(room) / room) as u32,
    }
}

/// Who counts as one source: an IPv4 address, or an IPv6 network of a site (/64), which is what one
/// subscriber has.
pub fn source(peer: SocketAddr) -> IpAddr {
    match peer.ip().to_canonical() {
        IpAddr::V6(address) => {
            let network = u128::from(address) & (u128::MAX << 64);
            IpAddr::V6(network.into())
        }
        address => address,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn peer(text: &str) -> SocketAddr {
        SocketAddr::new(text.parse().unwrap(), 1)
    }

    #[test]
    fn one_source_does_not_take_all_places() {
        let connections = Arc::new(Connections::default());
        let limits =
            Ssh { max_unauthenticated_per_source: 2, max_unauthenticated: 3, ..Ssh::default() };
        let mut first = connections.enter(peer("10.0.0.1"), &limits).unwrap();
        let _second = connections.enter(peer("10.0.0.1"), &limits).unwrap();
        let third = connections.enter(peer("10.0.0.1"), &limits);
        assert!(matches!(third, Err(Refusal::Source(2))));
        let _other = connections.enter(peer("10.0.0.2"), &limits).unwrap();
        let fourth = connections.enter(peer("10.0.0.3"), &limits);
        assert!(matches!(fourth, Err(Refusal::Unauthenticated(3))));
        first.authenticated();
        connections.enter(peer("10.0.0.1"), &limits).unwrap();
    }

    #[test]
    fn the_fuller_it_is_the_more_are_refused() {
        let percents: Vec<_> =
            [0, 29, 30, 65, 99, 100].map(|count| refused_percent(count, 30, 100)).into();
        assert_eq!(percents, [0, 0, 30, 65, 99, 100]);
        assert_eq!(refused_percent(5, 100, 100), 0);
        assert_eq!(refused_percent(100, 100, 100), 100);
        let limits = Ssh { early_drop: 10, max_unauthenticated: 1000, ..Ssh::default() };
        let refused = (0..10_000).filter(|_| draw(10, &limits)).count();
        assert!((2_500..3_500).contains(&refused), "{refused} of 10,000 instead of 30 %");
    }

    #[test]
    fn an_ipv6_site_is_one_source() {
        assert_eq!(source(peer("2001:db8::1")), source(peer("2001:db8::ffff:2")));
        assert_ne!(source(peer("2001:db8:0:1::1")), source(peer("2001:db8::1")));
        assert_eq!(source(peer("::ffff:10.0.0.1")), source(peer("10.0.0.1")));
    }

    #[test]
    fn places_are_given_back() {
        let connections = Arc::new(Connections::default());
        let limits = Ssh { max_connections: 1, ..Ssh::default() };
        let place = connections.enter(peer("10.0.0.1"), &limits).unwrap();
        assert!(matches!(connections.enter(peer("10.0.0.2"), &limits), Err(Refusal::Full(1))));
        drop(place);
        assert_eq!(connections.count(), 0);
        assert!(connections.table().unauthenticated.is_empty());
        connections.enter(peer("10.0.0.2"), &limits).unwrap();
    }
}
