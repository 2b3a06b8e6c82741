//! Login names: `account`, or `account+word` for a login that wants something of its own. An account's
//! name has no `+`, so the two can't be mixed up.

use crate::lobby::Word;

/// What a login asks for beside its account.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Wishes {
    /// `+new`: a terminal beside those that wait, rather than the one left last.
    pub new_terminal: bool,
    /// `+take`: the terminal that was attached last, whoever has it.
    pub take_over: bool,
    /// `+fresh`: a machine that starts from the disk; what was saved of its memory is dropped.
    pub fresh_machine: bool,
    /// Something that the service itself answers; no machine is started for it.
    pub lobby: Option<Word>,
}

impl Wishes {
    /// Whether the account's machine will be needed, as it is.
    pub fn want_the_machine(&self) -> bool {
        !self.fresh_machine && self.lobby.is_none()
    }
}

/// The account's name, and what else is wanted: or, in words for the user once she has authenticated,
/// why that can't be.
pub fn parse(user: &str) -> (&str, Result<Wishes, String>) {
    let mut words = user.split('+');
    let account = words.next().unwrap_or(user);
    let mut wishes = Wishes::default();
    let mut count = 0;
    for word in words {
        count += 1;
        match word {
            "new" => wishes.new_terminal = true,
            "take" => wishes.take_over = true,
            "fresh" => wishes.fresh_machine = true,
            _ => match Word::parse(word) {
                Some(word) => wishes.lobby = Some(word),
                None => {
                    let word: String =
                        word.chars().take(20).flat_map(char::escape_default).collect();
                    return (
                        account,
                        Err(format!(
                            "\"+{word}\" is nothing this service knows after an account's name: \
                             +new opens another terminal, +take takes over the one in use elsewhere, \
                             +fresh starts the machine anew from its disk, +help tells of the others"
                        )),
                    );
                }
            },
        }
    }
    if let Some(word) = wishes.lobby
        && count > 1
    {
        return (account, Err(format!("+{} goes with no other word", word.name())));
    }
    if wishes.take_over && (wishes.new_terminal || wishes.fresh_machine) {
        let words = "+take goes with neither +new nor +fresh: those leave nothing to take over";
        return (account, Err(words.into()));
    }
    (account, Ok(wishes))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn words_after_the_account_are_wishes() {
        assert_eq!(parse("alice"), ("alice", Ok(Wishes::default())));
        let new = Wishes { new_terminal: true, ..Wishes::default() };
        assert_eq!(parse("alice+new"), ("alice", Ok(new)));
        let take = Wishes { take_over: true, ..Wishes::default() };
        assert_eq!(parse("alice+take"), ("alice", Ok(take)));
        assert!(parse("alice+take+new").1.is_err() && parse("alice+fresh+take").1.is_err());
        let both = Wishes { new_terminal: true, fresh_machine: true, ..Wishes::default() };
        assert_eq!(parse("alice+fresh+new"), ("alice", Ok(both)));
        assert_eq!(parse("").0, "");
    }

    #[test]
    fn a_word_for_the_service_itself_stands_alone() {
        for word in Word::ALL {
            let lobby = Wishes { lobby: Some(*word), ..Wishes::default() };
            assert!(!lobby.want_the_machine());
            let name = word.name();
            assert_eq!(parse(&format!("alice+{name}")), ("alice", Ok(lobby)));
            for both in
                [format!("a+{name}+new"), format!("a+fresh+{name}"), format!("a+{name}+{name}")]
            {
                assert!(parse(&both).1.unwrap_err().contains("no other word"), "{both}");
            }
        }
    }

    #[test]
    fn an_unknown_word_is_refused_in_clean_words() {
        for user in ["alice+", "alice+nwe", "alice+new+\x1b]0;x", "alice+NEW"] {
            let (account, wishes) = parse(user);
            assert_eq!(account, "alice");
            let words = wishes.unwrap_err();
            assert!(words.contains("+new") && !words.contains('\x1b'), "{words}");
        }
    }
}
