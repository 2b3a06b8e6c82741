//! What the account's user asks the host from inside of her machine: `hermitage status`, say.
//!
//! [`program`] is what she runs: this program once more, by another name. It sends its question to PID 1 over
//! a local socket, which passes it on ([`Questions`]) and brings the answer back. A question and an answer
//! are one packet each (SOCK_SEQPACKET, unix(7)): nothing comes in pieces, and an answer lies in the asker's
//! socket at once, whether she reads it or not.

pub mod program;
mod waiting;

pub use waiting::Questions;

use hermitage_guest_proto::{AnswerStatus, MAX_ARGUMENT, MAX_WORD};

/// Where PID 1 listens. Of the account's user, as no other asks for her.
pub const SOCKET: &str = "/run/hermitage.socket";

/// Largest packet of a question, in bytes.
const QUESTION_MAX: usize = MAX_WORD + 1 + MAX_ARGUMENT;

/// A word and what comes with it: as a packet, in UTF-8 with a NUL between the two.
#[derive(Debug, PartialEq, Eq)]
struct Question {
    word: String,
    argument: String,
}

impl Question {
    /// None: it is too long, or has a NUL in it.
    fn packet(&self) -> Option<Vec<u8>> {
        let fits = self.word.len() <= MAX_WORD && self.argument.len() <= MAX_ARGUMENT;
        let packet = [self.word.as_bytes(), self.argument.as_bytes()].join(&0);
        let nuls = packet.iter().filter(|byte| **byte == 0).count();
        (fits && nuls == 1).then_some(packet)
    }

    fn parse(packet: &[u8]) -> Option<Self> {
        let (word, argument) = std::str::from_utf8(packet).ok()?.split_once('\0')?;
        let question = Self { word: word.into(), argument: argument.into() };
        question.packet().is_some().then_some(question)
    }
}

/// The first byte of an answer's packet, and what the program ends with.
fn exit_status(status: AnswerStatus) -> u8 {
    match status {
        AnswerStatus::Done => 0,
        AnswerStatus::Refused => 1,
        AnswerStatus::Unasked => UNASKED,
    }
}

const UNASKED: u8 = 255;

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_question_is_bounded_and_two_words() {
        let question =
            |word: &str, argument: &str| Question { word: word.into(), argument: argument.into() };
        let hold = question("hold", "2h");
        assert_eq!(hold.packet().unwrap(), b"hold\x002h");
        assert_eq!(Question::parse(b"hold\x002h"), Some(hold));
        assert_eq!(Question::parse(b"status\0"), Some(question("status", "")));
        let longest = question(&"w".repeat(MAX_WORD), &"a".repeat(MAX_ARGUMENT));
        assert_eq!(longest.packet().unwrap().len(), QUESTION_MAX);
        for bad in [question(&"w".repeat(MAX_WORD + 1), ""), question("a", &"a".repeat(257))] {
            assert_eq!(bad.packet(), None);
        }
        let one_too_long = [&b"w\0"[..], &[b'a'; MAX_ARGUMENT + 1]].concat();
        for bad in [&b""[..], b"status", b"a\0b\0c", b"hold\0\xff", &one_too_long] {
            assert_eq!(Question::parse(bad), None, "{bad:?}");
        }
    }
}
