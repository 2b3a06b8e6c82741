//! The sessions that are going on: for operators who look, speak to them, or end them.

use std::{
    collections::BTreeMap,
    sync::{
        Arc, Mutex, MutexGuard, OnceLock, PoisonError,
        atomic::{AtomicU64, Ordering},
    },
    time::{Duration, Instant, SystemTime},
};

use tokio::sync::{mpsc, watch};
use uuid::Uuid;

use super::{Event, Traffic, Watch};
use crate::{lifecycle::How, time};

/// Messages that a terminal which takes no bytes keeps waiting.
const MESSAGES: usize = 4;

#[derive(Default)]
pub struct LiveSessions {
    last: AtomicU64,
    table: Mutex<BTreeMap<u64, Arc<Live>>>,
}

/// Who begins a session, and what for.
#[derive(Clone, Debug)]
pub struct NewSession {
    pub account: String,
    pub id: Uuid,
    /// Address and port of the client.
    pub source: String,
    pub kind: &'static str,
    /// It is on a terminal.
    pub terminal: bool,
    /// What the login was by.
    pub login: String,
}

pub struct Live {
    pub number: u64,
    pub who: NewSession,
    pub since: SystemTime,
    begun: Instant,
    /// When its client last said something, in milliseconds since it began.
    heard: AtomicU64,
    machine: OnceLock<How>,
    /// Bytes from its client and to it.
    pub traffic: Traffic,
    end: watch::Sender<Option<String>>,
    words: mpsc::Sender<String>,
}

/// A session's place among the live ones, for as long as it goes on.
pub struct Presence {
    watch: Watch,
    live: Arc<Live>,
    words: mpsc::Receiver<String>,
    told: bool,
}

impl LiveSessions {
    /// All of them, or an account's, by their numbers.
    pub fn list(&self, account: Option<Uuid>) -> Vec<Arc<Live>> {
        let table = self.table();
        let wanted = |live: &&Arc<Live>| account.is_none_or(|account| live.who.id == account);
        table.values().filter(wanted).cloned().collect()
    }

    pub fn get(&self, number: u64) -> Option<Arc<Live>> {
        self.table().get(&number).cloned()
    }

    fn table(&self) -> MutexGuard<'_, BTreeMap<u64, Arc<Live>>> {
        self.table.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Live {
    /// Its client has said something.
    pub fn heard(&self) {
        self.heard.store(time::ms(self.begun.elapsed()), Ordering::Relaxed);
    }

    pub fn idle(&self) -> Duration {
        let heard = Duration::from_millis(self.heard.load(Ordering::Relaxed));
        self.begun.elapsed().saturating_sub(heard)
    }

    /// How it found its machine, once it has.
    pub fn machine(&self) -> Option<How> {
        self.machine.get().copied()
    }

    /// Ends the session, with a reason for its user.
    pub fn end(&self, reason: &str) {
        self.end.send_if_modified(|end| end.is_none() && end.replace(reason.into()).is_none());
    }

    /// Shows words on its terminal. False if it has none, or takes no more.
    pub fn say(&self, words: &str) -> bool {
        self.who.terminal && self.words.try_send(words.to_owned()).is_ok()
    }
}

impl Presence {
    pub fn new(watch: &Watch, who: NewSession) -> Self {
        let sessions = watch.sessions();
        let number = sessions.last.fetch_add(1, Ordering::Relaxed) + 1;
        let (sender, words) = mpsc::channel(MESSAGES);
        watch.tell(Event::SessionStarted {
            session: number,
            account: who.account.clone(),
            id: who.id,
            source: who.source.clone(),
            kind: who.kind,
            terminal: who.terminal,
            login: who.login.clone(),
        });
        let live = Arc::new(Live {
            number,
            who,
            since: SystemTime::now(),
            begun: Instant::now(),
            heard: AtomicU64::new(0),
            machine: OnceLock::new(),
            traffic: Traffic::default(),
            end: watch::channel(None).0,
            words: sender,
        });
        sessions.table().insert(number, live.clone());
        Self { watch: watch.clone(), live, words, told: false }
    }

    pub fn live(&self) -> Arc<Live> {
        self.live.clone()
    }

    /// The next words for the terminal. Never comes where there is none. Cancellation-safe.
    pub async fn words(&mut self) -> String {
        match self.words.recv().await {
            Some(words) => words,
            None => std::future::pending().await,
        }
    }

    /// How it found its machine.
    pub fn machine(&self) -> Option<&'static str> {
        self.live.machine().map(How::as_str)
    }

    /// The session is over.
    pub fn ended(mut self, outcome: &str) {
        self.tell(outcome);
    }

    fn tell(&mut self, outcome: &str) {
        if std::mem::replace(&mut self.told, true) {
            return;
        }
        self.watch.sessions().table().remove(&self.live.number);
        let who = &self.live.who;
        self.live.traffic.settle(who.id, self.watch.ledger());
        let (received, sent) = self.live.traffic.totals();
        self.watch.tell(Event::SessionEnded {
            session: self.live.number,
            account: who.account.clone(),
            id: who.id,
            source: who.source.clone(),
            kind: who.kind,
            login: who.login.clone(),
            machine: self.machine(),
            seconds: self.live.begun.elapsed().as_secs(),
            received,
            sent,
            outcome: outcome.to_owned(),
        });
    }
}

impl Drop for Presence {
    fn drop(&mut self) {
        self.tell("cut off");
    }
}

impl Live {
    /// The first answer counts.
    pub fn found_machine(&self, how: How) {
        let _ = self.machine.set(how);
    }

    /// Waits until an operator ends the session, and says with which words.
    pub async fn must_end(&self) -> String {
        let mut end = self.end.subscribe();
        let reason = end.wait_for(Option::is_some).await.ok().and_then(|reason| reason.clone());
        match reason {
            Some(reason) => reason,
            // The sender is this session's own.
            None => std::future::pending().await,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn who(account: u128, terminal: bool) -> NewSession {
        NewSession {
            account: "alice".into(),
            id: Uuid::from_u128(account),
            source: "192.0.2.1:7".into(),
            kind: "shell",
            terminal,
            login: "password".into(),
        }
    }

    #[tokio::test]
    async fn who_is_here_is_listed_and_gone_when_dropped() {
        let watch = Watch::new(None);
        let (alice, bob) =
            (Presence::new(&watch, who(1, true)), Presence::new(&watch, who(2, false)));
        let numbers = |account| -> Vec<u64> {
            watch.sessions().list(account).iter().map(|live| live.number).collect()
        };
        assert_eq!(numbers(None), [1, 2]);
        assert_eq!(numbers(Some(Uuid::from_u128(2))), [2]);
        alice.live().end("first");
        alice.live().end("second");
        assert_eq!(alice.live().must_end().await, "first");
        drop(alice);
        bob.ended("exit status 0");
        assert_eq!(numbers(None), [] as [u64; 0]);
        assert!(watch.sessions().get(1).is_none());
    }

    #[tokio::test]
    async fn a_terminal_that_takes_nothing_keeps_few_words() {
        let watch = Watch::new(None);
        let mut shell = Presence::new(&watch, who(1, true));
        let live = shell.live();
        let taken = (0..100).filter(|n| live.say(&n.to_string())).count();
        assert_eq!(taken, MESSAGES);
        assert_eq!(shell.words().await, "0");
        assert!(!Presence::new(&watch, who(1, false)).live().say("no terminal"));
    }
}
