//! Recognising a shell's prompt.

/// Output of a terminal up to the shell's first prompt.
#[derive(Debug, Default)]
pub struct Prompt {
    seen: Vec<u8>,
}

/// More than any message of the day; a prompt is looked for in the last line only.
const LIMIT: usize = 256 * 1024;

impl Prompt {
    /// Takes in what was read. True: the output ends with a prompt, `$ ` or `# `, and the shell waits.
    pub fn feed(&mut self, bytes: &[u8]) -> bool {
        if self.seen.len() + bytes.len() > LIMIT {
            self.seen.clear();
        }
        self.seen.extend_from_slice(bytes);
        let line = self.seen.rsplit(|&b| b == b'\n').next().unwrap_or_default();
        let text = without_escapes(line);
        text.ends_with(b"$ ") || text.ends_with(b"# ")
    }

    /// What came so far, for an error.
    pub fn seen(&self) -> String {
        let tail = &self.seen[self.seen.len().saturating_sub(2000)..];
        String::from_utf8_lossy(tail).into_owned()
    }
}

/// Leaves out control sequences and control strings (ECMA-48 §5.4, §5.6): shells put some around the
/// prompt, for the title, colours and bracketed paste. One that is not complete ends the text.
fn without_escapes(line: &[u8]) -> Vec<u8> {
    const ESC: u8 = 0x1b;
    const BEL: u8 = 0x07;
    let mut text = Vec::with_capacity(line.len());
    let mut rest = line;
    while let Some((&byte, tail)) = rest.split_first() {
        rest = tail;
        if byte != ESC {
            text.push(byte);
            continue;
        }
        let end = match rest.first() {
            // CSI: up to its final byte.
            Some(b'[') => {
                rest.iter().skip(1).position(|b| (0x40..=0x7e).contains(b)).map(|at| at + 2)
            }
            // OSC: up to BEL or ST.
            Some(b']') => rest
                .iter()
                .position(|&b| b == BEL || b == ESC)
                .map(|at| if rest[at] == ESC { (at + 2).min(rest.len()) } else { at + 1 }),
            Some(_) => Some(1),
            None => None,
        };
        let Some(end) = end else { break };
        rest = &rest[end..];
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_prompt_is_seen_through_title_colours_and_bracketed_paste() {
        let mut prompt = Prompt::default();
        assert!(!prompt.feed(b"Linux 6.12\r\ncosts 5$ a day\r\n"));
        assert!(!prompt.feed(b"\x1b[?2004h\x1b]0;demo@demo: ~\x07"));
        assert!(!prompt.feed(b"\x1b[01;32mdemo@demo\x1b[00m:~$"));
        assert!(prompt.feed(b" "));
        assert!(Prompt::default().feed(b"root@lab:~# \x1b[0m"));
    }

    #[test]
    fn an_open_sequence_is_no_prompt() {
        assert!(!Prompt::default().feed(b"\x1b]0;root# "));
    }

    #[test]
    fn a_flood_is_bounded() {
        let mut prompt = Prompt::default();
        for _ in 0..100 {
            prompt.feed(&[b'x'; 8192]);
        }
        assert!(prompt.seen.len() <= LIMIT);
        assert!(prompt.seen().len() <= 2000);
    }
}
