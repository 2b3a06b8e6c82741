//! Commands write to the audit log themselves: they change the database whether the service runs or not.
//!
//! What is noted are the command's own words: no option takes a secret. Each command says of itself whether it is
//! noted (`changes`), in a match that a new one does not compile without: what changes something is, and what takes
//! an account's files out; what only looks, checks or says what it would do is not.

use super::context::Context;
use hermitage::time;
use hermitage::watch::{self, Copied, Event, Who, audit, audit_log};
use hermitage_storage::accounts::Account;
use std::fmt::Display;
use std::time::Instant;
use uuid::Uuid;

/// Words of a command line that are noted, and bytes of each.
const MOST_WORDS: usize = 64;
const LONGEST_WORD: usize = 512;

/// What a command is noted as, if it changes something.
pub struct Note {
    words: Vec<String>,
    begun: Instant,
}

impl Note {
    /// `words`: the command line without the program.
    pub fn new(words: impl Iterator<Item = String>) -> Self {
        Self { words: words.take(MOST_WORDS).map(shortened).collect(), begun: Instant::now() }
    }

    /// After the command.
    pub fn write(self, context: &Context, outcome: &anyhow::Result<()>) {
        let event = Event::Command {
            who: who(),
            command: self.words,
            details: context.details(),
            milliseconds: time::ms(self.begun.elapsed()),
            error: outcome.as_ref().err().map(|error| format!("{error:#}")),
        };
        append(context, &event, outcome.is_ok());
    }
}

/// What becomes of an account's files: the command's line says neither whose they were, where it was about many, nor
/// how much it was.
pub struct CopyNote<'a> {
    context: &'a Context,
    note: watch::CopyNote,
}

impl<'a> CopyNote<'a> {
    pub fn of(
        context: &'a Context,
        what: Copied,
        account: &Account,
        place: impl Display,
    ) -> CopyNote<'a> {
        Self::new(context, what, &account.name, Some(account.id), place)
    }

    /// Of an account that is not there yet. Its name may be an archive's word.
    pub fn named(
        context: &'a Context,
        what: Copied,
        account: &str,
        place: impl Display,
    ) -> CopyNote<'a> {
        Self::new(context, what, account, None, place)
    }

    fn new(
        context: &'a Context,
        what: Copied,
        account: &str,
        id: Option<Uuid>,
        place: impl Display,
    ) -> CopyNote<'a> {
        let account = shortened(account.to_owned());
        let note = watch::CopyNote::new(what, &account, id);
        CopyNote { context, note: note.by(who()).at(shortened(place.to_string())) }
    }

    /// Now it is there.
    pub fn is(&mut self, id: Uuid) {
        self.note.is(id);
    }

    /// `outcome`: bytes, or why there are none.
    pub fn over(self, outcome: Result<u64, &anyhow::Error>) {
        let done = outcome.is_ok();
        let event = self.note.over(outcome.map_err(|error| format!("{error:#}")));
        append(self.context, &event, done);
    }
}

fn who() -> Who {
    Who::of(nix::unistd::getuid().as_raw(), std::process::id() as i32)
}

/// `done`: it came to something. Whoever may not do anything here may not note it either.
fn append(context: &Context, event: &Event, done: bool) {
    let log = audit_log(&context.config.audit, &context.config.state_dir);
    let Some(mut log) = log else { return };
    if let Err(error) = log.append(&audit::line(event))
        && done
    {
        eprintln!("hermitage: warning: {error}");
    }
}

fn shortened(mut word: String) -> String {
    if word.len() > LONGEST_WORD {
        let end = (0..=LONGEST_WORD).rev().find(|end| word.is_char_boundary(*end)).unwrap_or(0);
        word.truncate(end);
        word.push('…');
    }
    word
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cli::Cli;
    use clap::Parser;

    fn noted(line: &str) -> bool {
        let words = std::iter::once("hermitage").chain(line.split(' '));
        Cli::try_parse_from(words).unwrap().command.changes()
    }

    #[test]
    fn changes_are_noted_and_looks_are_not() {
        for change in [
            "account add list",
            "account remove show --purge",
            "--json account key remove alice list",
            "account disable log",
            "account import list.csv",
            "account export alice -o -",
            "account invite alice",
            "base gc",
            "database backup check",
            "backup create verify",
            "snapshot drop list",
            "checkpoint create alice list",
            "doctor --fix",
        ] {
            assert!(noted(change), "{change}");
        }
        for look in [
            "account list",
            "account show x",
            "account usage x",
            "account key list x",
            "account import list.csv --dry-run",
            "base gc --dry-run",
            "database check",
            "database list",
            "backup verify dir",
            "backup list dir",
            "snapshot verify",
            "checkpoint list x",
            "image list",
            "doctor",
            "session kill 7",
            "status",
            "log x",
            "serve",
        ] {
            assert!(!noted(look), "{look}");
        }
    }

    #[test]
    fn so_many_words_are_noted() {
        let note = Note::new((0..100).map(|n| n.to_string()));
        assert_eq!((note.words.len(), note.words[63].as_str()), (MOST_WORDS, "63"));
    }

    #[test]
    fn a_long_word_is_cut_between_characters() {
        let word = shortened("é".repeat(1000));
        assert!(word.len() <= LONGEST_WORD + 3 && word.ends_with('…'), "{word}");
    }
}
