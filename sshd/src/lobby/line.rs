//! Lines from a client, as a terminal's line discipline would give them (termios(3), "Canonical mode").
//!
//! The terminal on the client's side is raw: keys come as they are pressed, and what should be seen of
//! them has to be sent back. Without a terminal a line is a line.

use std::{collections::VecDeque, time::Duration};

use tokio::time::timeout;

use crate::session::{InputQueue, Output};

/// How long somebody may think.
const PATIENCE: Duration = Duration::from_secs(120);

/// Longest line in bytes; as passwords.
const MAX: usize = hermitage_storage::accounts::MAX_PASSWORD;

pub struct Lines<'a> {
    input: &'a InputQueue,
    output: &'a Output,
    terminal: bool,
    /// Came, and belongs to lines that nobody has asked for yet.
    ahead: VecDeque<u8>,
    /// The last line ended with a carriage return; a newline right after it is the same key.
    returned: bool,
}

impl<'a> Lines<'a> {
    pub fn new(input: &'a InputQueue, output: &'a Output, terminal: bool) -> Self {
        Self { input, output, terminal, ahead: VecDeque::new(), returned: false }
    }

    pub async fn line(&mut self, question: &str) -> Result<String, String> {
        self.ask(question, true).await
    }

    /// One that is not shown.
    pub async fn secret(&mut self, question: &str) -> Result<String, String> {
        self.ask(question, false).await
    }

    async fn ask(&mut self, question: &str, shown: bool) -> Result<String, String> {
        if self.terminal {
            self.output.print(question, true).await;
        }
        let asked = timeout(PATIENCE, self.read(shown)).await;
        let line = match asked {
            Ok(line) => line,
            Err(_) => Err("no answer; nothing was changed".into()),
        };
        if self.terminal {
            self.output.print("\n", true).await;
        }
        line
    }

    async fn read(&mut self, shown: bool) -> Result<String, String> {
        let mut line = Line { terminal: self.terminal, ..Line::default() };
        loop {
            let Some(byte) = self.next().await else { return line.end() };
            if std::mem::replace(&mut self.returned, self.terminal && byte == b'\r')
                && byte == b'\n'
            {
                continue;
            }
            let step = line.key(byte);
            if shown && self.terminal && !step.echo.is_empty() {
                self.output.print(step.echo, true).await;
            }
            if let Some(done) = step.done {
                return done;
            }
        }
    }

    async fn next(&mut self) -> Option<u8> {
        while self.ahead.is_empty() {
            let chunk = self.input.next().await?;
            self.ahead.extend(&chunk.bytes);
        }
        self.ahead.pop_front()
    }
}

/// A line as far as it has come.
#[derive(Default)]
struct Line {
    bytes: Vec<u8>,
    terminal: bool,
}

/// What a key does.
struct Step {
    /// To be shown.
    echo: &'static str,
    done: Option<Result<String, String>>,
}

impl Line {
    fn key(&mut self, byte: u8) -> Step {
        let go_on = |echo| Step { echo, done: None };
        match byte {
            b'\n' => Step { echo: "", done: Some(self.end()) },
            b'\r' if self.terminal => Step { echo: "", done: Some(self.end()) },
            // ^C, and ^D of an empty line.
            0x03 if self.terminal => Step { echo: "", done: Some(Err(CANCELLED.into())) },
            0x04 if self.terminal => {
                let done = self.bytes.is_empty().then(|| Err(CANCELLED.into()));
                Step { echo: "", done }
            }
            0x08 | 0x7f if self.terminal => go_on(if self.rub_out() { "\x08 \x08" } else { "" }),
            // ^U
            0x15 if self.terminal => {
                self.bytes.clear();
                go_on("")
            }
            _ if self.bytes.len() >= MAX => Step { echo: "", done: Some(Err(TOO_LONG.into())) },
            byte => {
                self.bytes.push(byte);
                // Shown are answers like "yes": what is not ASCII is not worth drawing right.
                go_on(printable(byte))
            }
        }
    }

    /// Takes a character off, however many bytes it has.
    fn rub_out(&mut self) -> bool {
        let before = self.bytes.len();
        while self.bytes.pop().is_some_and(|byte| byte & 0xc0 == 0x80) {}
        before > 0
    }

    fn end(&mut self) -> Result<String, String> {
        let mut bytes = std::mem::take(&mut self.bytes);
        if !self.terminal && bytes.last() == Some(&b'\r') {
            bytes.pop();
        }
        String::from_utf8(bytes).map_err(|_| "that is not UTF-8; nothing was changed".into())
    }
}

const CANCELLED: &str = "cancelled; nothing was changed";
const TOO_LONG: &str = "that is too long; nothing was changed";

fn printable(byte: u8) -> &'static str {
    const ASCII: &str = " !\"#$%&'()*+,-./0123456789:;<=>?@ABCDEFGHIJKLMNOPQRSTUVWXYZ[\\]^_`\
                         abcdefghijklmnopqrstuvwxyz{|}~";
    let at = usize::from(byte.wrapping_sub(b' '));
    ASCII.get(at..at + 1).unwrap_or("")
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The line that these keys make, and what was shown of them.
    fn typed(terminal: bool, keys: &str) -> (Result<String, String>, String) {
        let mut line = Line { terminal, ..Line::default() };
        let mut shown = String::new();
        for byte in keys.bytes() {
            let step = line.key(byte);
            shown.push_str(step.echo);
            if let Some(done) = step.done {
                return (done, shown);
            }
        }
        (line.end(), shown)
    }

    #[test]
    fn keys_of_a_terminal_edit_the_line() {
        assert_eq!(typed(true, "yes\rmore"), (Ok("yes".into()), "yes".into()));
        assert_eq!(typed(true, "yez\x7fs\n"), (Ok("yes".into()), "yez\x08 \x08s".into()));
        assert_eq!(typed(true, "\x7f\x08né\x7f\x7fyes\r").0, Ok("yes".into()));
        assert_eq!(typed(true, "wrong\x15right\r").0, Ok("right".into()));
        assert!(typed(true, "ab\x04c\x03").0.unwrap_err().contains("cancelled"));
        assert!(typed(true, "\x04").0.is_err());
        assert_eq!(typed(true, "a\x1bb~\r").1, "ab~");
    }

    #[test]
    fn without_a_terminal_a_line_is_a_line() {
        assert_eq!(typed(false, "a\x7f\x03b \r\nnext").0, Ok("a\x7f\x03b ".into()));
        assert_eq!(typed(false, "no end").0, Ok("no end".into()));
        assert!(typed(false, &"x".repeat(MAX + 1)).0.unwrap_err().contains("too long"));
        assert_eq!(typed(false, &format!("{}\n", "x".repeat(MAX))).0.unwrap().len(), MAX);
    }
}
