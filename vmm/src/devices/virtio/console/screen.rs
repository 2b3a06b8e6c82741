//! What a terminal shows, kept where its bytes pass by, so that somebody who comes back finds the same
//! screen: cells, colours, cursor, alternate screen, title, bracketed paste and mouse modes.
//!
//! The bytes are a guest's. The parser keeps no scrollback, its window is clamped, and without its `std`
//! feature its longest string has 1 KiB, so what a guest writes can't make it grow. It is not free of
//! panics (a scroll region can outlive the rows it names): they are caught here, the screen starts anew,
//! and a terminal that does it often is not followed any more. Nor is it free of amplification (seven
//! bytes repeat a character 65,535 times): what costs too much time is not drawn.

use std::{
    num::NonZeroU16,
    panic::{AssertUnwindSafe, catch_unwind},
    time::Duration,
};

use rustix::time::{ClockId, clock_gettime};
use serde::{Deserialize, Serialize};
use vt100::Parser;

use super::{Console, VirtioDevice as _};
use crate::devices::virtio::StateError;

/// Largest screen that is kept; what a client claims beyond that is clamped. Two grids of 32 bytes a
/// cell: at most 6.4 MB a terminal.
const MOST_COLUMNS: u16 = 500;
const MOST_ROWS: u16 = 200;

/// Longest title that is kept, in bytes.
const MOST_TITLE: usize = 256;

/// Most panics of the parser that a terminal gets away with.
const MOST_PANICS: u8 = 3;

/// Processor time that following one buffer of output may take. A buffer has at most 32 KiB; drawing
/// plain text takes a few milliseconds even under emulation.
const DRAW_LIMIT: Duration = Duration::from_secs(1);

/// Bytes drawn between two looks at the clock: at most 73 repetitions of 65,535 characters.
const SLICE: usize = 512;

/// Most bytes of a saved screen. One of 250 columns and 80 rows with a colour of its own for each
/// character has about that; what has more is saved blank.
const MOST_SAVED: usize = 1 << 20;

pub struct Screen {
    /// None once the parser has panicked too often.
    parser: Option<Parser<Title>>,
    panics: u8,
}

/// A screen in a snapshot: what has to be written to a terminal of that size to make it so.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ScreenState {
    columns: u16,
    rows: u16,
    /// The primary screen and, while it is in use, the alternate one. Empty if the screen was too large
    /// or not followed any more.
    primary: Vec<u8>,
    alternate: Option<Vec<u8>>,
    title: Vec<u8>,
}

/// The window's title (OSC 0 and 2).
#[derive(Default)]
struct Title(Vec<u8>);

impl vt100::Callbacks for Title {
    fn set_window_title(&mut self, _: &mut vt100::Screen, title: &[u8]) {
        // It goes out to another terminal later: text, and nothing that could end the sequence early.
        let text: String =
            String::from_utf8_lossy(title).chars().filter(|c| !c.is_control()).collect();
        let mut end = text.len().min(MOST_TITLE);
        while !text.is_char_boundary(end) {
            end -= 1;
        }
        self.0 = text[..end].into();
    }
}

impl Screen {
    pub fn new(columns: u16, rows: u16) -> Self {
        Self { parser: Some(parser(columns, rows)), panics: 0 }
    }

    /// Follows what the terminal has written. Returns false when drawing took too long and the rest was
    /// left out.
    pub fn write(&mut self, bytes: &[u8]) -> bool {
        let begun = thread_time();
        for slice in bytes.chunks(SLICE) {
            if thread_time().saturating_sub(begun) > DRAW_LIMIT {
                return false;
            }
            self.guarded(|parser| parser.process(slice));
        }
        true
    }

    pub fn resize(&mut self, columns: u16, rows: u16) {
        let (columns, rows) = clamp(columns, rows);
        self.guarded(|parser| {
            if parser.screen().size() != (rows, columns) {
                parser.set_size(rows, columns);
            }
        });
    }

    /// What to write to a terminal of the screen's size to make it look and behave like this one.
    pub fn redraw(&self) -> Vec<u8> {
        let rows = self.parser.as_ref().map_or(1, |parser| parser.screen().size().0.get());
        // What the client's terminal shows goes to its scrollback rather than being overwritten.
        let mut out = b"\x1b[r\x1b[m\x1b[999;1H".to_vec();
        out.extend(std::iter::repeat_n(b'\n', rows.into()));
        match self.pictures() {
            Some((primary, alternate, title)) => {
                out.extend(primary);
                if let Some(alternate) = alternate {
                    out.extend(b"\x1b[?1049h");
                    out.extend(alternate);
                }
                if !title.is_empty() {
                    out.extend(b"\x1b]2;");
                    out.extend(title);
                    out.push(0x07);
                }
            }
            None => out.extend(b"\x1b[H\x1b[J"),
        }
        out
    }

    pub fn save(&self) -> ScreenState {
        let (rows, columns) = match &self.parser {
            Some(parser) => parser.screen().size(),
            None => (NonZeroU16::MIN, NonZeroU16::MIN),
        };
        let (mut primary, mut alternate, title) = self.pictures().unwrap_or_default();
        if primary.len() + alternate.as_ref().map_or(0, Vec::len) > MOST_SAVED {
            (primary, alternate) = Default::default();
        }
        ScreenState { columns: columns.get(), rows: rows.get(), primary, alternate, title }
    }

    /// The screen that was saved. What a snapshot says is checked like what a guest says.
    pub fn load(state: &ScreenState) -> Result<Self, StateError> {
        let ScreenState { columns, rows, primary, alternate, title } = state;
        if !(1..=MOST_COLUMNS).contains(columns) || !(1..=MOST_ROWS).contains(rows) {
            let words = format!("a screen of {columns} columns and {rows} rows");
            return Err(StateError::invalid(Console::NAME, words));
        }
        let bytes = primary.len() + alternate.as_ref().map_or(0, Vec::len);
        if bytes > MOST_SAVED || title.len() > MOST_TITLE {
            let words = format!("a screen of {bytes} bytes, its title of {}", title.len());
            return Err(StateError::invalid(Console::NAME, words));
        }
        let mut screen = Self::new(*columns, *rows);
        screen.guarded(|parser| {
            parser.process(primary);
            if let Some(alternate) = alternate {
                parser.process(b"\x1b[?1049h");
                parser.process(alternate);
            }
            parser.callbacks_mut().0.clone_from(title);
        });
        Ok(screen)
    }

    fn pictures(&self) -> Option<Pictures> {
        let parser = self.parser.as_ref()?;
        catch_unwind(AssertUnwindSafe(|| pictures_of(parser))).ok()
    }

    /// Runs `call` on the parser. One that panics is replaced, or given up.
    fn guarded<T>(&mut self, call: impl FnOnce(&mut Parser<Title>) -> T) -> Option<T> {
        let parser = self.parser.as_mut()?;
        let (rows, columns) = parser.screen().size();
        // A parser that has panicked is not looked at again: it is replaced as a whole.
        match catch_unwind(AssertUnwindSafe(|| call(parser))) {
            Ok(result) => Some(result),
            Err(_) => {
                self.panics += 1;
                let again = self.panics < MOST_PANICS;
                self.parser =
                    again.then(|| Parser::new_with_callbacks(rows, columns, 0, Title::default()));
                None
            }
        }
    }
}

fn parser(columns: u16, rows: u16) -> Parser<Title> {
    let (columns, rows) = clamp(columns, rows);
    Parser::new_with_callbacks(rows, columns, 0, Title::default())
}

/// A client that does not know its window says 0.
fn clamp(columns: u16, rows: u16) -> (NonZeroU16, NonZeroU16) {
    let size = |value: u16, default: u16, most: u16| {
        NonZeroU16::new(if value == 0 { default } else { value.min(most) })
            .unwrap_or(NonZeroU16::MIN)
    };
    (size(columns, 80, MOST_COLUMNS), size(rows, 24, MOST_ROWS))
}

type Pictures = (Vec<u8>, Option<Vec<u8>>, Vec<u8>);

/// The primary screen, the alternate one if it is in use, the title.
fn pictures_of(parser: &Parser<Title>) -> Pictures {
    let screen = parser.screen();
    let shown = screen.state_formatted().into_bytes();
    let title = parser.callbacks().0.clone();
    if !screen.alternate_screen() {
        return (shown, None, title);
    }
    // The parser itself may be in the middle of a sequence; another one looks behind the alternate screen.
    let (rows, columns) = screen.size();
    let mut behind = Parser::new(rows, columns, 0);
    *behind.screen_mut() = screen.clone();
    behind.process(b"\x1b[?47l");
    (behind.screen().contents_formatted().into_bytes(), Some(shown), title)
}

/// Processor time of this thread: a thread that has to wait is not a screen that costs much.
fn thread_time() -> Duration {
    let time = clock_gettime(ClockId::ThreadCPUTime);
    let seconds = u64::try_from(time.tv_sec).unwrap_or(0);
    Duration::new(seconds, u32::try_from(time.tv_nsec).unwrap_or(0))
}

#[cfg(test)]
mod tests;
