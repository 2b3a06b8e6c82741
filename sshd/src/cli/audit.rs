//! Commands write to the audit log themselves: they change the database whether the service runs or not.
//!
//! What is noted are the command's own words: no option takes a secret. Each command says of itself whether it is
//! noted (`changes`), in a match that a new one does not compile without: what changes something is, and what takes
//! an account's files out; what only looks, checks or says what it would do is not.

use super::context::Context;
use hermitage::watch::{Event, Who, audit, audit_log};

/// Words of a command line that are noted, and bytes of each.
const MOST_WORDS: usize = 64;
const LONGEST_WORD: usize = 512;

/// What a command is noted as, if it changes something.
pub struct Note {
    words: Vec<String>,
}

impl Note {
    /// `words`: the command line without the program.
    pub fn new(words: impl Iterator<Item = String>) -> Self {
        Self { words: words.take(MOST_WORDS).map(shortened).collect() }
    }

    /// After the command.
    pub fn write(self, context: &Context, outcome: &anyhow::Result<()>) {
        let log = audit_log(&context.config.audit, &context.config.state_dir);
        let Some(mut log) = log else { return };
        let event = Event::Command {
            who: Who::of(nix::unistd::getuid().as_raw(), std::process::id() as i32),
            command: self.words,
            details: context.details(),
            error: outcome.as_ref().err().map(|error| format!("{error:#}")),
        };
        // Whoever may not do anything here may not note it either.
        if let Err(error) = log.append(&audit::line(&event))
            && outcome.is_ok()
        {
            eprintln!("hermitage: warning: {error}");
        }
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
