//! What the service answers itself: `ssh alice+status@host`, `+keys`, `+hold`, …
//!
//! For what a user would otherwise have to write to an operator for, and for when a machine is in no state to be
//! logged in to. No machine is started for any of it. Answers are short and readable; everything that is
//! asked is in the service's log and the sessions log.
//!
//! An account may ask [`rate::BURST`] things at once: each costs the database a few reads, some a write.
//! Whether a login may ask at all was decided when it was let in (`server/admission.rs`): a key that runs one
//! command may not, and one that may less than the account can't set its password.

mod inside;
mod keep;
mod line;
mod rate;
mod redeem;
mod report;

use std::{sync::Arc, time::Instant};

use hermitage_storage::{
    StateDir,
    accounts::{Account, Closed, MIN_PASSWORD},
};
use uuid::Uuid;

use crate::{
    auth::Authenticator,
    closing,
    lifecycle::Registry,
    quota::Quota,
    server::Settings,
    session::{InputQueue, Kind, Output},
    span,
    store::Store,
    time,
    watch::Watch,
};
pub use inside::answer_all;
use keep::Wish;
use line::Lines;
use rate::Rate;

/// Longest argument in bytes.
const MAX_ARGUMENT: usize = 64;

/// What may stand after an account's name.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Word {
    Help,
    Status,
    Keys,
    Passwd,
    Hold,
    Reset,
    /// Nobody's to type: what a login with the code of an invitation gets.
    Invitation,
    Checkpoint,
}

impl Word {
    pub const ALL: &[Word] = &[
        Word::Help,
        Word::Status,
        Word::Keys,
        Word::Passwd,
        Word::Hold,
        Word::Reset,
        Word::Checkpoint,
    ];

    pub fn parse(name: &str) -> Option<Self> {
        Self::ALL.iter().copied().find(|word| word.name() == name)
    }

    pub fn name(self) -> &'static str {
        &self.with_plus()[1..]
    }

    /// Its name in the sessions log.
    pub fn with_plus(self) -> &'static str {
        match self {
            Word::Help => "+help",
            Word::Status => "+status",
            Word::Keys => "+keys",
            Word::Passwd => "+passwd",
            Word::Hold => "+hold",
            Word::Reset => "+reset",
            Word::Invitation => "+invitation",
            Word::Checkpoint => "+checkpoint",
        }
    }
}

/// What answers stand on.
#[derive(Clone)]
pub struct Desk {
    pub registry: Registry,
    pub store: Store,
    authenticator: Authenticator,
    config: Settings,
    state_dir: StateDir,
    watch: Watch,
    rate: Arc<Rate>,
    /// Of questions from inside: a machine that asks without end keeps nobody from `+reset`.
    inside: Arc<Rate>,
}

impl Desk {
    pub fn new(
        registry: Registry,
        store: Store,
        authenticator: Authenticator,
        config: Settings,
        state_dir: StateDir,
        watch: Watch,
    ) -> Self {
        let (rate, inside) = Default::default();
        Self { registry, store, authenticator, config, state_dir, watch, rate, inside }
    }

    /// What the account takes on the host, and may take.
    pub async fn quota(&self, account: &Account) -> Result<Quota, String> {
        let (config, state, account) =
            (self.config.clone(), self.state_dir.clone(), account.clone());
        let looked = tokio::task::spawn_blocking(move || Quota::of(&config, &state, &account));
        looked.await.map_err(|error| error.to_string())
    }

    /// For a user whose room gets tight.
    pub async fn tight(&self, account: &Account) -> Option<String> {
        self.quota(account).await.ok()?.warning()
    }
}

/// Somebody who asks.
pub struct Visit<'a> {
    pub account: Uuid,
    /// Address and port of the client.
    pub source: &'a str,
    pub kind: &'a Kind,
    pub input: &'a InputQueue,
    pub output: &'a Output,
    /// Whether the client shows what it is sent on a terminal, and sends keys as they are pressed.
    pub terminal: bool,
}

/// The way that a question came.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Way {
    Ssh,
    Inside,
}

impl Way {
    /// What is typed for a word.
    fn shown(self, word: Word) -> String {
        match self {
            Way::Ssh => word.with_plus().into(),
            Way::Inside => format!("hermitage {}", word.name()),
        }
    }
}

/// The answer, or why there is none.
pub async fn answer(desk: &Desk, word: Word, visit: Visit<'_>) -> Result<String, String> {
    desk.rate.take(visit.account, Instant::now())?;
    let argument = argument(visit.kind)?;
    let account = enter(desk, visit.account).await?;
    note(&account, visit.source, word.name(), argument);
    fits(word, argument, Way::Ssh)?;
    match word {
        Word::Passwd => passwd(desk, &account, &visit).await,
        Word::Invitation => redeem::redeem(desk, &account, &visit).await,
        Word::Reset => reset(desk, &account, &visit, argument).await,
        Word::Checkpoint => match Wish::parse(argument)? {
            Wish::Restore { name, sure } => {
                let question = format!(
                    "This ends everything that runs in your machine, other sessions too, and makes it and your \
                     files what they were in {name}. What they are now is kept. Type yes to go on: "
                );
                if !sure {
                    confirmed(&visit, None, &question).await?;
                }
                keep::restore(desk, &account, name).await
            }
            Wish::Drop(name) => keep::drop(desk, &account, name).await,
            Wish::List | Wish::Take(_) => at_once(desk, word, argument, &account, Way::Ssh).await,
        },
        _ => at_once(desk, word, argument, &account, Way::Ssh).await,
    }
}

/// The account that asks, if it may.
async fn enter(desk: &Desk, id: Uuid) -> Result<Account, String> {
    let account = desk.store.by_id(id).await.map_err(|error| {
        tracing::error!(%error, "can't look up an account");
        "the accounts can't be read at the moment; try again later".to_owned()
    })?;
    if let Some(closed) = closing::closed(account.as_ref()) {
        return Err(closing::words(closed));
    }
    account.ok_or_else(|| closing::words(Closed::Removed))
}

fn note(account: &Account, source: &str, word: &str, argument: Option<&str>) {
    tracing::info!(account = account.name, source, word, argument, "asked of the service");
}

/// What needs no more said than the question, which fits the word.
async fn at_once(
    desk: &Desk,
    word: Word,
    argument: Option<&str>,
    account: &Account,
    way: Way,
) -> Result<String, String> {
    let over_ssh = || format!("that is asked over ssh: ssh {}{}@…", account.name, word.with_plus());
    match (word, argument) {
        (Word::Help, _) => Ok(match way {
            Way::Ssh => report::help(&account.name),
            Way::Inside => report::help_inside(&account.name),
        }),
        (Word::Status, _) => report::status(desk, account).await,
        (Word::Keys, _) => report::keys(desk, account).await,
        (Word::Hold, argument) => hold(desk, account, argument).await,
        (Word::Checkpoint, argument) => match Wish::parse(argument)? {
            Wish::List => keep::list(desk, account).await,
            Wish::Take(name) => keep::create(desk, account, name).await,
            // What keeps her from a program that runs amok is not for any program to take away.
            Wish::Restore { .. } | Wish::Drop(_) => Err(over_ssh()),
        },
        (Word::Passwd | Word::Reset | Word::Invitation, _) => Err(over_ssh()),
    }
}

/// Whether the word takes such an argument.
fn fits(word: Word, argument: Option<&str>, way: Way) -> Result<(), String> {
    match (word, argument) {
        (_, None) | (Word::Hold | Word::Reset | Word::Checkpoint, _) => Ok(()),
        (_, Some(given)) => {
            Err(format!("{} takes no argument, and was given \"{given}\"", way.shown(word)))
        }
    }
}

/// What stands in the place of a command. None of what words take has a character that is not printed.
fn argument(kind: &Kind) -> Result<Option<&str>, String> {
    let bytes = match kind {
        Kind::Shell => return Ok(None),
        Kind::Exec(bytes) => bytes.as_slice(),
        Kind::Sftp => {
            return Err("files are taken and brought without a word after the name".into());
        }
    };
    std::str::from_utf8(bytes).map_err(|_| unprintable()).and_then(checked)
}

fn checked(text: &str) -> Result<Option<&str>, String> {
    match text.trim() {
        "" => Ok(None),
        text if text.len() <= MAX_ARGUMENT && !text.contains(char::is_control) => Ok(Some(text)),
        _ => Err(unprintable()),
    }
}

fn unprintable() -> String {
    format!("the argument is at most {MAX_ARGUMENT} printable characters")
}

/// A new password in place of the one there is. Whether an account has one at all is its operator's to say.
async fn passwd(desk: &Desk, account: &Account, visit: &Visit<'_>) -> Result<String, String> {
    if account.password.is_none() {
        return Err(
            "this account has no password, only keys; the first one is its operator's to set \
                    (hermitage account passwd)"
                .into(),
        );
    }
    let mut lines = Lines::new(visit.input, visit.output, visit.terminal);
    let password = lines.secret("New password: ").await?;
    let length = password.chars().count();
    if length < MIN_PASSWORD {
        return Err(format!(
            "the password has {length} characters, and needs {MIN_PASSWORD}; nothing was changed"
        ));
    }
    if visit.terminal && lines.secret("Again: ").await? != password {
        return Err("the two are not the same; nothing was changed".into());
    }
    let hash = desk.authenticator.hash(password).await?;
    let unwritten = |error: crate::store::StoreError| {
        tracing::error!(%error, account = account.name, "can't set a password");
        "the password could not be written; the old one stays".to_owned()
    };
    // It may have been closed, or its password taken away, while somebody typed.
    let now = desk.store.by_id(account.id).await.map_err(unwritten)?;
    if !now.is_some_and(|now| now.is_open() && now.password == account.password) {
        return Err("the account was changed meanwhile; nothing was done".into());
    }
    desk.store.set_password(account.id, hash).await.map_err(unwritten)?;
    tracing::info!(account = account.name, source = visit.source, "has set a new password");
    Ok("Your password is changed. Keys log in as before.\n".into())
}

async fn hold(desk: &Desk, account: &Account, argument: Option<&str>) -> Result<String, String> {
    let now = time::now();
    let held = account.hold_at(now);
    let longest = desk.config.machines.max_hold;
    let until = match argument {
        None => return Ok(report::held(held)),
        Some("off") => None,
        Some(text) => match span::parse_with_units(text)? {
            0 => return Err("a hold of no time is none; \"off\" takes one back".into()),
            seconds if u64::from(seconds) > longest => {
                let longest = span::show(u32::try_from(longest).unwrap_or(u32::MAX));
                return Err(format!("{text} is longer than a hold may be here: {longest}"));
            }
            seconds => Some(now + i64::from(seconds)),
        },
    };
    if until.is_some() || held.is_some() {
        desk.store.set_hold(account.id, until).await.map_err(|error| {
            tracing::error!(%error, account = account.name, "can't set a hold");
            "the hold could not be written; try again later".to_owned()
        })?;
        desk.registry.reconsider(account.id);
    }
    Ok(match until {
        None if held.is_some() => "The hold is taken back.\n".into(),
        until => report::held(until),
    })
}

async fn reset(
    desk: &Desk,
    account: &Account,
    visit: &Visit<'_>,
    argument: Option<&str>,
) -> Result<String, String> {
    let question = "This ends everything that runs in your machine, other sessions too, and drops \
                    what was saved of it. Your files stay. Type yes to go on: ";
    confirmed(visit, argument, question).await?;
    desk.registry.reset(account).await;
    Ok("The memory of your machine is dropped. The next login starts it from your files.\n".into())
}

/// What can't be undone needs a "yes", said with the word or when it is asked for.
async fn confirmed(visit: &Visit<'_>, said: Option<&str>, question: &str) -> Result<(), String> {
    let sure = match said {
        Some(word) => word.to_owned(),
        None => Lines::new(visit.input, visit.output, visit.terminal).line(question).await?,
    };
    match sure.trim() {
        "yes" => Ok(()),
        _ => Err("nothing was done; the word was not \"yes\"".into()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn words_have_the_names_they_are_parsed_by() {
        for word in Word::ALL {
            assert_eq!(Word::parse(word.name()), Some(*word));
            assert!(
                report::help("alice").contains(word.with_plus()),
                "{word:?} is not in the help"
            );
        }
        assert_eq!(Word::parse("HELP"), None);
    }

    #[test]
    fn an_argument_is_short_and_printable() {
        let exec = |bytes: &[u8]| Kind::Exec(bytes.to_vec());
        assert_eq!(argument(&exec(b" 2h\n")), Ok(Some("2h")));
        assert_eq!(argument(&exec(b"")), Ok(None));
        assert_eq!(argument(&Kind::Shell), Ok(None));
        let long = [b'x'; MAX_ARGUMENT + 1];
        for bad in [&b"\xff"[..], b"a\x1b[2J", &long] {
            assert!(argument(&exec(bad)).is_err());
        }
        assert!(argument(&Kind::Sftp).is_err());
    }
}
