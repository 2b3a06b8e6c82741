//! Two forms of every answer: a few words or a table for people, one JSON object for programs.

use comfy_table::{ContentArrangement, Table, presets};
use serde_json::Value;
use std::io::{self, IsTerminal, Write};

pub struct Output {
    json: bool,
}

impl Output {
    pub fn new(json: bool) -> Self {
        Self { json }
    }

    pub fn is_json(&self) -> bool {
        self.json
    }

    /// Prints the object or the text, as was asked for. A reader that went away (`| head`) is no error.
    pub fn show(&self, object: &Value, text: impl FnOnce() -> String) -> anyhow::Result<()> {
        let printed = match self.json {
            false => text(),
            // On a line of its own, for programs that look at lines.
            true if !io::stdout().is_terminal() => serde_json::to_string(object)?,
            true => serde_json::to_string_pretty(object)?,
        };
        let mut out = io::stdout().lock();
        match writeln!(out, "{}", printed.trim_end()).and_then(|()| out.flush()) {
            Err(error) if error.kind() != io::ErrorKind::BrokenPipe => Err(error.into()),
            _ => Ok(()),
        }
    }

    /// Something to know besides the answer; for people only.
    pub fn note(&self, text: impl AsRef<str>) {
        if !self.json {
            eprintln!("{}", text.as_ref());
        }
    }
}

pub fn table<const N: usize>(header: [&str; N]) -> Table {
    let mut table = Table::new();
    table.load_preset(presets::NOTHING);
    table.set_content_arrangement(ContentArrangement::Disabled);
    table.set_header(header);
    for column in table.column_iter_mut() {
        column.set_padding((0, 2));
    }
    table
}

/// `1 key`, `2 keys`.
pub fn count(n: usize, what: &str) -> String {
    if n == 1 { format!("1 {what}") } else { format!("{n} {what}s") }
}
