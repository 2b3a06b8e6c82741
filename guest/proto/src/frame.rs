//! Length-prefixed frames over a byte stream.

use serde::{Serialize, de::DeserializeOwned};

use crate::MAX_FRAME;

#[derive(Debug, thiserror::Error)]
pub enum FrameError {
    #[error("a frame of {0} bytes is over the limit of {MAX_FRAME}")]
    TooLong(usize),
    #[error("a frame does not decode: {0}")]
    Malformed(#[from] postcard::Error),
}

/// Encodes `message` as one frame.
pub fn encode<M: Serialize>(message: &M) -> Result<Vec<u8>, FrameError> {
    let body = postcard::to_stdvec(message)?;
    if body.len() > MAX_FRAME {
        return Err(FrameError::TooLong(body.len()));
    }
    let mut frame = Vec::with_capacity(4 + body.len());
    frame.extend_from_slice(&(body.len() as u32).to_le_bytes());
    frame.extend_from_slice(&body);
    Ok(frame)
}

/// Turns bytes as they arrive into messages. Holds at most one frame plus what one
/// [`feed`](Self::feed) brought.
#[derive(Debug, Default)]
pub struct Decoder {
    buffer: Vec<u8>,
}

impl Decoder {
    pub fn feed(&mut self, bytes: &[u8]) {
        self.buffer.extend_from_slice(bytes);
    }

    /// The next message, or None until more bytes come. After an error the stream is of no use.
    pub fn message<M: DeserializeOwned>(&mut self) -> Result<Option<M>, FrameError> {
        let Some((head, rest)) = self.buffer.split_first_chunk::<4>() else {
            return Ok(None);
        };
        let length = u32::from_le_bytes(*head) as usize;
        if length > MAX_FRAME {
            return Err(FrameError::TooLong(length));
        }
        let Some(body) = rest.get(..length) else {
            return Ok(None);
        };
        let message = postcard::from_bytes(body)?;
        self.buffer.drain(..4 + length);
        Ok(Some(message))
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::{AgentMessage, Answer, AnswerStatus, Ask, ExitStatus, HostMessage};

    #[test]
    fn a_message_arrives_byte_by_byte() {
        let sent = AgentMessage::Exited { session: 7, status: ExitStatus::Code(3) };
        let mut decoder = Decoder::default();
        let frame = encode(&sent).unwrap();
        for byte in &frame[..frame.len() - 1] {
            decoder.feed(&[*byte]);
            assert!(decoder.message::<AgentMessage>().unwrap().is_none());
        }
        decoder.feed(&frame[frame.len() - 1..]);
        assert_eq!(decoder.message().unwrap(), Some(sent));
    }

    #[test]
    fn a_giant_length_is_refused_before_anything_is_kept() {
        let mut decoder = Decoder::default();
        decoder.feed(&u32::MAX.to_le_bytes());
        assert!(matches!(decoder.message::<AgentMessage>(), Err(FrameError::TooLong(_))));
    }

    fn status() -> impl Strategy<Value = AnswerStatus> {
        prop_oneof![
            Just(AnswerStatus::Done),
            Just(AnswerStatus::Refused),
            Just(AnswerStatus::Unasked)
        ]
    }

    /// Feeds it in two pieces.
    fn pass<M: DeserializeOwned + Serialize>(message: &M, cut: usize) -> Option<M> {
        let frame = encode(message).unwrap();
        let (first, second) = frame.split_at(cut % frame.len());
        let mut decoder = Decoder::default();
        decoder.feed(first);
        assert!(decoder.message::<M>().unwrap().is_none());
        decoder.feed(second);
        decoder.message().unwrap()
    }

    proptest! {
        #[test]
        fn questions_and_answers_pass_whole(
            number: u64, word: String, argument: String, status in status(), cut: usize,
        ) {
            let ask = AgentMessage::Ask(Ask { number, word, argument: argument.clone() });
            prop_assert_eq!(pass(&ask, cut), Some(ask));
            let answer = HostMessage::Answer(Answer { number, status, text: argument });
            prop_assert_eq!(pass(&answer, cut), Some(answer));
        }

        /// A question that is damaged on its way is one, is none, or ends the conversation; lengths that it
        /// claims are not believed.
        #[test]
        fn damaged_questions_never_panic(word: String, at: usize, with: u8) {
            let mut frame = encode(&AgentMessage::Ask(Ask {
                number: 7, word, argument: "2h".into(),
            })).unwrap();
            let at = at % frame.len();
            frame[at] = with;
            let mut decoder = Decoder::default();
            decoder.feed(&frame);
            while let Ok(Some(_)) = decoder.message::<AgentMessage>() {}
        }

        #[test]
        fn garbage_never_panics(bytes in proptest::collection::vec(any::<u8>(), 0..512)) {
            let mut decoder = Decoder::default();
            decoder.feed(&bytes);
            while let Ok(Some(_)) = decoder.message::<AgentMessage>() {}
            let mut decoder = Decoder::default();
            decoder.feed(&bytes);
            while let Ok(Some(_)) = decoder.message::<HostMessage>() {}
        }
    }
}
