//! What a person sees on a terminal, by the library that the machines keep their screens with.

use std::num::NonZeroU16;

use vt100::Parser;

/// The window's title.
#[derive(Default)]
struct Title(String);

impl vt100::Callbacks for Title {
    fn set_window_title(&mut self, _: &mut vt100::Screen, title: &[u8]) {
        self.0 = String::from_utf8_lossy(title).into_owned();
    }
}

pub struct Watched(Parser<Title>);

/// A screen at one moment.
#[derive(Clone)]
pub struct Seen {
    pub screen: vt100::Screen,
    pub title: String,
}

impl Watched {
    pub fn new(columns: u16, rows: u16) -> Self {
        let [columns, rows] =
            [columns, rows].map(|size| NonZeroU16::new(size).unwrap_or(NonZeroU16::MIN));
        Self(Parser::new_with_callbacks(rows, columns, 0, Title::default()))
    }

    pub fn feed(&mut self, bytes: &[u8]) {
        self.0.process(bytes);
    }

    pub fn seen(&self) -> Seen {
        Seen { screen: self.0.screen().clone(), title: self.0.callbacks().0.clone() }
    }
}

impl Seen {
    /// Cells with their colours, cursor, modes and title: all that makes it what it is.
    pub fn all(&self) -> String {
        let state = self.screen.state_formatted();
        let alternate = self.screen.alternate_screen();
        format!("{} alternate {alternate} title {}", state.escape_debug(), self.title)
    }

    /// The colour of the first cell of a word.
    pub fn colour_of(&self, word: &str) -> Option<vt100::Color> {
        let (rows, columns) = self.screen.size();
        let rows = 0..rows.get();
        let (row, column) =
            rows.zip(self.screen.rows(0, columns.get())).find_map(|(row, text)| {
                let at = text.find(word)?;
                Some((row, text[..at].chars().count() as u16))
            })?;
        Some(self.screen.cell(row, column)?.fgcolor())
    }
}
