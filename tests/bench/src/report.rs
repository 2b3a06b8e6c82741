//! What a run found, as a table and as JSON.
//!
//! A figure alone says little on an emulated CPU, so a row carries its ratio to a peer measured in the
//! same run wherever there is one.

use comfy_table::{Attribute, Cell, CellAlignment, Table, presets};
use serde::Serialize;

use crate::{host::Host, stats::Samples};

/// Version of the JSON's shape; fields are only added within one.
const FORMAT: u32 = 1;

#[derive(Debug, Serialize)]
pub struct Report {
    pub format: u32,
    pub host: Host,
    /// Id of the base that was measured.
    pub base: Option<String>,
    pub sections: Vec<Section>,
}

#[derive(Debug, Serialize)]
pub struct Section {
    pub name: &'static str,
    pub title: String,
    pub rows: Vec<Row>,
    /// What a reader has to know: what was left out and why.
    pub notes: Vec<String>,
}

#[derive(Debug, Serialize)]
pub struct Row {
    pub name: String,
    pub unit: Unit,
    pub n: usize,
    pub min: u64,
    pub p50: u64,
    pub p99: u64,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub ratio: Option<Ratio>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub goal: Option<Goal>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum Unit {
    Nanoseconds,
    Bytes,
    Count,
}

/// This row's median over that of another row of the same run.
#[derive(Debug, Serialize)]
pub struct Ratio {
    pub value: f64,
    pub of: &'static str,
}

/// What the design asks for: at most this ratio where there is one, else this p50.
#[derive(Debug, Serialize)]
pub struct Goal {
    pub at_most: f64,
    pub met: bool,
}

impl Report {
    pub fn new(host: Host) -> Self {
        Self { format: FORMAT, host, base: None, sections: Vec::new() }
    }

    pub fn table(&self) -> String {
        let mut text = format!("{}\n", self.host);
        if let Some(base) = &self.base {
            text += &format!("base {base}\n");
        }
        for section in &self.sections {
            text += &format!("\n{}\n", section.title);
            if !section.rows.is_empty() {
                text += &format!("{}\n", section.table());
            }
            for note in &section.notes {
                text += &format!("  {note}\n");
            }
        }
        text
    }
}

impl Section {
    pub fn new(name: &'static str, title: impl Into<String>) -> Self {
        Self { name, title: title.into(), rows: Vec::new(), notes: Vec::new() }
    }

    pub fn time(&mut self, name: impl Into<String>, samples: &Samples) -> &mut Row {
        self.row(name, Unit::Nanoseconds, samples)
    }

    pub fn size(&mut self, name: impl Into<String>, samples: &Samples) -> &mut Row {
        self.row(name, Unit::Bytes, samples)
    }

    pub fn count(&mut self, name: impl Into<String>, samples: &Samples) -> &mut Row {
        self.row(name, Unit::Count, samples)
    }

    pub fn note(&mut self, note: impl Into<String>) {
        self.notes.push(note.into());
    }

    fn row(&mut self, name: impl Into<String>, unit: Unit, samples: &Samples) -> &mut Row {
        self.rows.push(Row {
            name: name.into(),
            unit,
            n: samples.count(),
            min: samples.min(),
            p50: samples.p50(),
            p99: samples.p99(),
            ratio: None,
            goal: None,
        });
        let last = self.rows.len() - 1;
        &mut self.rows[last]
    }

    fn table(&self) -> Table {
        let mut table = Table::new();
        table.load_preset(presets::NOTHING);
        table.set_header(["", "N", "min", "p50", "p99", "ratio", "goal"]);
        for row in &self.rows {
            let ratio = row.ratio.as_ref().map(|r| format!("{:.2} × {}", r.value, r.of));
            let goal = row.goal.as_ref().map(|goal| {
                let limit = match (&row.ratio, row.unit) {
                    (Some(_), _) => format!("{:.2} ×", goal.at_most),
                    (None, unit) => unit.show(goal.at_most as u64),
                };
                format!("≤ {limit} {}", if goal.met { "met" } else { "MISSED" })
            });
            let goal = Cell::new(goal.unwrap_or_default());
            let missed = row.goal.as_ref().is_some_and(|goal| !goal.met);
            table.add_row([
                Cell::new(&row.name),
                Cell::new(row.n),
                Cell::new(row.unit.show(row.min)),
                Cell::new(row.unit.show(row.p50)),
                Cell::new(row.unit.show(row.p99)),
                Cell::new(ratio.unwrap_or_default()),
                if missed { goal.add_attribute(Attribute::Bold) } else { goal },
            ]);
        }
        for column in table.column_iter_mut().skip(1).take(5) {
            column.set_cell_alignment(CellAlignment::Right);
        }
        table
    }
}

impl Row {
    /// Compares with the median `peer` of what is called `of`. No ratio where that was not measured.
    pub fn over(&mut self, peer: Option<u64>, of: &'static str) -> &mut Self {
        if let Some(peer) = peer.filter(|&peer| peer > 0) {
            self.ratio = Some(Ratio { value: self.p50 as f64 / peer as f64, of });
        }
        self
    }

    /// The ratio's limit. No goal where there is no ratio.
    pub fn ratio_goal(&mut self, at_most: f64) -> &mut Self {
        if let Some(ratio) = &self.ratio {
            self.goal = Some(Goal { at_most, met: ratio.value <= at_most });
        }
        self
    }

    /// The limit of p50 itself.
    pub fn goal(&mut self, at_most: u64) -> &mut Self {
        self.goal = Some(Goal { at_most: at_most as f64, met: self.p50 <= at_most });
        self
    }
}

impl Unit {
    pub fn show(self, value: u64) -> String {
        let scaled = |steps: &[(f64, &str)]| {
            let value = value as f64;
            let (size, name) =
                steps.iter().find(|(size, _)| value >= *size).unwrap_or(&steps[steps.len() - 1]);
            format!("{:.2} {name}", value / size)
        };
        match self {
            Self::Nanoseconds => scaled(&[(1e9, "s"), (1e6, "ms"), (1e3, "µs")]),
            Self::Count => value.to_string(),
            Self::Bytes => scaled(&[(1024.0 * 1024.0, "MiB"), (1024.0, "KiB")]),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_missed_goal_is_told_in_table_and_json() {
        let mut section = Section::new("fork", "fork");
        let samples: Samples = [4_000_000, 5_000_000, 6_000_000].into_iter().collect();
        section.time("total", &samples).over(Some(2_500_000), "floor").ratio_goal(1.5);
        let text = section.table().to_string();
        assert!(text.contains("5.00 ms") && text.contains("6.00 ms"), "{text}");
        assert!(text.contains("2.00 × floor") && text.contains("≤ 1.50 × MISSED"), "{text}");
        let json = serde_json::to_value(&section).unwrap();
        assert_eq!(json["rows"][0]["goal"]["met"], false);
        assert_eq!(json["rows"][0]["unit"], "nanoseconds");
    }

    #[test]
    fn without_the_peer_there_is_neither_ratio_nor_goal() {
        let mut section = Section::new("fork", "fork");
        section.time("total", &Samples::from_iter([1])).over(None, "floor").ratio_goal(1.5);
        assert!(section.rows[0].ratio.is_none() && section.rows[0].goal.is_none());
    }

    #[test]
    fn units_scale() {
        assert_eq!(Unit::Nanoseconds.show(1_500), "1.50 µs");
        assert_eq!(Unit::Nanoseconds.show(2_500_000_000), "2.50 s");
        assert_eq!(Unit::Bytes.show(3 << 20), "3.00 MiB");
        assert_eq!(Unit::Bytes.show(0), "0.00 KiB");
        assert_eq!(Unit::Count.show(4250), "4250");
    }
}
