//! Commands write to the audit log themselves: they change the database whether the service runs or not.
//!
//! What is noted are the command's own words: no option takes a secret. A command that only shows something
//! is not noted; one that is not known to only show something is.

use super::context::Context;
use clap::ArgMatches;
use hermitage::watch::{Event, Who, audit, audit_log};

/// Words of a command line that are noted, and bytes of each.
const MOST_WORDS: usize = 64;
const LONGEST_WORD: usize = 512;

/// Commands that change nothing, or that the service notes.
const LOOKS: [&str; 11] = [
    "serve",
    "doctor",
    "status",
    "hostkey",
    "log",
    "console",
    "session",
    "config",
    "completions",
    "man",
    "top",
];

/// Subcommands of any command that change nothing.
const LOOKING: [&str; 2] = ["list", "show"];

/// What a command is noted as, if it changes something.
pub struct Note {
    words: Vec<String>,
}

impl Note {
    /// `words`: the command line without the program.
    pub fn of(matches: &ArgMatches, words: impl Iterator<Item = String>) -> Option<Self> {
        let mut path = Vec::new();
        let mut here = matches;
        while let Some((name, below)) = here.subcommand() {
            path.push(name);
            here = below;
        }
        let looks = path.first().is_none_or(|name| LOOKS.contains(name))
            || path.last().is_some_and(|name| LOOKING.contains(name));
        let words = words.take(MOST_WORDS).map(shortened).collect();
        (!looks).then_some(Self { words })
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
    use clap::CommandFactory;

    fn noted(line: &str) -> Option<Vec<String>> {
        let words: Vec<String> = line.split(' ').map(str::to_owned).collect();
        let program = std::iter::once("hermitage".to_owned());
        let matches = Cli::command().try_get_matches_from(program.chain(words.clone())).unwrap();
        Note::of(&matches, words.into_iter()).map(|note| note.words)
    }

    #[test]
    fn changes_are_noted_and_looks_are_not() {
        for change in [
            "account add list",
            "account remove show --purge",
            "--json account key remove alice list",
            "account disable log",
            "base gc",
        ] {
            let words: Vec<_> = change.split(' ').collect();
            assert_eq!(noted(change).unwrap(), words);
        }
        for look in
            ["account list", "account show x", "account key list x", "status", "log x", "serve"]
        {
            assert_eq!(noted(look), None, "{look}");
        }
    }

    #[test]
    fn a_long_word_is_cut_between_characters() {
        let word = shortened("é".repeat(1000));
        assert!(word.len() <= LONGEST_WORD + 3 && word.ends_with('…'), "{word}");
    }
}
