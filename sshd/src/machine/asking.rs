//! What a machine's user asks the service from inside of it (`docs/agent-protocol.md`, **Ask**).
//!
//! Whose machine it is the service knows: the guest does not say, and would not be believed. What it says is
//! bounded here and judged in the lobby. One that asks without end gets a few questions looked at at a time;
//! the others cost it a refusal each, which is not waited for.

use std::sync::Arc;

use hermitage_guest_proto::{
    ALL_QUESTIONS, Answer, AnswerStatus, Ask, HostMessage, MAX_ANSWER, MAX_ARGUMENT, MAX_ASKED,
    MAX_WORD,
};
use tokio::{
    sync::{OwnedSemaphorePermit, Semaphore, mpsc},
    time::timeout,
};
use uuid::Uuid;

use super::{Machine, REQUEST_TIMEOUT};

/// Questions of all machines that nobody has looked at yet.
pub const DESK_QUEUE: usize = 256;

/// Where an account's machine has its questions answered.
#[derive(Clone)]
pub struct Line {
    account: Uuid,
    desk: mpsc::Sender<Asked>,
    room: Arc<Semaphore>,
}

impl Line {
    pub fn new(account: Uuid, desk: mpsc::Sender<Asked>) -> Self {
        Self { account, desk, room: Arc::new(Semaphore::new(MAX_ASKED)) }
    }
}

/// A question as it came from a guest: any text, of bounded length.
pub struct Asked {
    pub account: Uuid,
    pub word: String,
    pub argument: String,
    number: u64,
    agent: mpsc::Sender<HostMessage>,
    _room: OwnedSemaphorePermit,
}

impl Asked {
    /// Passes the answer on, or why there is none. A guest that does not take it goes without.
    pub async fn answer(self, outcome: Result<String, String>) {
        let (status, text) = match outcome {
            Ok(text) => (AnswerStatus::Done, text),
            Err(reason) => (AnswerStatus::Refused, reason),
        };
        let answer = Answer { number: self.number, status, text: bounded(text) };
        let _ = timeout(REQUEST_TIMEOUT, self.agent.send(HostMessage::Answer(answer))).await;
    }
}

impl Machine {
    pub(super) fn asked(&self, ask: Ask) {
        let Ask { number, word, argument } = ask;
        let refuse = |words: &str| {
            let (status, text) = (AnswerStatus::Refused, words.into());
            self.tell_if_listening(HostMessage::Answer(Answer { number, status, text }));
        };
        if word.len() > MAX_WORD || argument.len() > MAX_ARGUMENT {
            return refuse("that is too long for a question");
        }
        let Ok(room) = self.line.room.clone().try_acquire_owned() else {
            return refuse("too many questions wait for their answers already");
        };
        let (account, agent) = (self.line.account, self.agent.clone());
        let asked = Asked { account, word, argument, number, agent, _room: room };
        if self.line.desk.try_send(asked).is_err() {
            refuse("the host answers no questions at the moment; ask again later");
        }
    }

    /// Ends the waiting for what was asked before the machine was saved, of which nobody here knows.
    pub(super) async fn disown_questions(&self) {
        let text = "that was asked before the machine slept; ask again".into();
        let status = AnswerStatus::Unasked;
        self.tell(HostMessage::Answer(Answer { number: ALL_QUESTIONS, status, text })).await;
    }
}

fn bounded(mut text: String) -> String {
    const CUT: &str = "\n(cut off)\n";
    if text.len() > MAX_ANSWER {
        let mut end = MAX_ANSWER - CUT.len();
        while !text.is_char_boundary(end) {
            end -= 1;
        }
        text.truncate(end);
        text.push_str(CUT);
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_answer_is_bounded() {
        assert_eq!(bounded("x".repeat(MAX_ANSWER)).len(), MAX_ANSWER);
        let cut = bounded("\u{e9}".repeat(MAX_ANSWER));
        assert!(cut.len() <= MAX_ANSWER && cut.ends_with("\u{e9}\n(cut off)\n"));
    }
}
