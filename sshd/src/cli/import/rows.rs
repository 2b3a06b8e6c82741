//! A list of accounts as CSV (RFC 4180): its columns, and each field in our words.

use crate::cli::account_limits::{self, Wanted};
use crate::cli::password;
use hermitage_storage::accounts::{AccountName, PublicKey, parse_keys};
use std::collections::HashMap;

/// Most lines with accounts.
const MAX_ROWS: usize = 10_000;

/// One account as its line asks for it.
#[derive(Debug)]
pub struct Row {
    pub line: u64,
    pub name: AccountName,
    pub keys: Vec<PublicKey>,
    pub password: Option<String>,
    pub disabled: Option<bool>,
    pub wanted: Wanted,
}

/// What is wrong with a line.
#[derive(Debug)]
pub struct Problem {
    pub line: u64,
    pub words: String,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Column {
    Name,
    Key,
    Password,
    Class,
    Disk,
    Quota,
    Sessions,
    Streams,
    Linger,
    MaxLinger,
    Policy,
    Memory,
    Vcpus,
    CpuWeight,
    CpuPercent,
    IoRate,
    IoOperations,
    Processes,
    Expires,
    Disabled,
}

const COLUMNS: &[(&str, Column)] = &[
    ("name", Column::Name),
    ("key", Column::Key),
    ("password", Column::Password),
    ("class", Column::Class),
    ("disk", Column::Disk),
    ("quota", Column::Quota),
    ("sessions", Column::Sessions),
    ("streams", Column::Streams),
    ("linger", Column::Linger),
    ("max_linger", Column::MaxLinger),
    ("policy", Column::Policy),
    ("memory", Column::Memory),
    ("vcpus", Column::Vcpus),
    ("cpu_weight", Column::CpuWeight),
    ("cpu_percent", Column::CpuPercent),
    ("io_rate", Column::IoRate),
    ("io_operations", Column::IoOperations),
    ("processes", Column::Processes),
    ("expires", Column::Expires),
    ("disabled", Column::Disabled),
];

impl Column {
    fn name(self) -> &'static str {
        COLUMNS.iter().find(|(_, column)| *column == self).map_or("", |(name, _)| name)
    }
}

/// The lines that are right, and what is wrong with the others.
pub fn parse(text: &[u8]) -> (Vec<Row>, Vec<Problem>) {
    // Spreadsheets put one before UTF-8.
    let text = text.strip_prefix("\u{feff}".as_bytes()).unwrap_or(text);
    let mut reader = csv::ReaderBuilder::new()
        .has_headers(false)
        .flexible(true)
        .comment(Some(b'#'))
        .from_reader(text);
    let (mut rows, mut problems) = (Vec::new(), Vec::new());
    let mut records = reader.byte_records();
    let columns = match records.next() {
        None => Err("the list is empty; its first line names the columns".to_owned()),
        Some(Err(error)) => Err(error.to_string()),
        Some(Ok(record)) => columns(&record),
    };
    let columns = match columns {
        Ok(columns) => columns,
        Err(words) => return (rows, vec![Problem { line: 1, words }]),
    };
    let mut lines_of: HashMap<AccountName, u64> = HashMap::new();
    let mut lines = Lines { text, at: 0, line: 1 };
    for (number, record) in records.enumerate() {
        let record = match record {
            Ok(record) => record,
            Err(error) => {
                let line = lines.line_of(error.position());
                problems.push(Problem { line, words: error.to_string() });
                break;
            }
        };
        let line = lines.line_of(record.position());
        let mut wrong = |words: String| problems.push(Problem { line, words });
        if number == MAX_ROWS {
            wrong(format!("more than {MAX_ROWS} accounts in one list; give it in parts"));
            break;
        }
        match row(line, &columns, &record) {
            Ok(row) => match lines_of.get(&row.name) {
                Some(before) => wrong(format!("{} is on line {before} already", row.name)),
                None => {
                    lines_of.insert(row.name.clone(), line);
                    rows.push(row);
                }
            },
            Err(faults) => faults.into_iter().for_each(wrong),
        }
    }
    (rows, problems)
}

/// Which line a record begins on. Where the reader says that it does, the end of the line before may still
/// be to come (CR LF), and empty lines and comments.
struct Lines<'a> {
    text: &'a [u8],
    at: usize,
    line: u64,
}

impl Lines<'_> {
    /// Records come in order, so that the text is gone through once.
    fn line_of(&mut self, position: Option<&csv::Position>) -> u64 {
        let byte = position.and_then(|position| usize::try_from(position.byte()).ok()).unwrap_or(0);
        while let Some(next) = self.text.get(self.at) {
            let comment = *next == b'#'
                && matches!(self.at.checked_sub(1).map(|at| self.text[at]), None | Some(b'\n'));
            match next {
                _ if self.at < byte => self.pass(),
                b'\r' | b'\n' => self.pass(),
                _ if comment => {
                    while self.text.get(self.at).is_some_and(|byte| *byte != b'\n') {
                        self.at += 1;
                    }
                }
                _ => break,
            }
        }
        self.line
    }

    fn pass(&mut self) {
        self.line += u64::from(self.text.get(self.at) == Some(&b'\n'));
        self.at += 1;
    }
}

fn columns(record: &csv::ByteRecord) -> Result<Vec<Column>, String> {
    let mut columns = Vec::new();
    for field in record {
        let field = String::from_utf8_lossy(field).trim().to_ascii_lowercase().replace('-', "_");
        let found = COLUMNS.iter().find(|(name, _)| *name == field).map(|(_, column)| *column);
        let Some(column) = found else {
            let known: Vec<_> = COLUMNS.iter().map(|(name, _)| *name).collect();
            return Err(format!(
                "\"{}\" is no column; the first line names them, of: {}",
                field.chars().take(48).flat_map(char::escape_default).collect::<String>(),
                known.join(", ")
            ));
        };
        if column != Column::Key && columns.contains(&column) {
            return Err(format!("the column {} is there twice", column.name()));
        }
        columns.push(column);
    }
    if columns.contains(&Column::Name) {
        Ok(columns)
    } else {
        Err("there is no column name".into())
    }
}

/// All that is wrong with it, not only the first.
fn row(line: u64, columns: &[Column], record: &csv::ByteRecord) -> Result<Row, Vec<String>> {
    if record.len() != columns.len() {
        return Err(vec![format!(
            "it has {} fields, the first line has {}; is a quote missing?",
            record.len(),
            columns.len()
        )]);
    }
    let mut faults = Vec::new();
    let (mut name, mut password, mut disabled) = (None, None, None);
    let (mut keys, mut wanted) = (Vec::new(), Wanted::default());
    for (column, field) in columns.iter().zip(record) {
        let Ok(whole) = std::str::from_utf8(field) else {
            faults.push(format!("{} is not UTF-8", column.name()));
            continue;
        };
        let text = whole.trim();
        if text.is_empty() && *column != Column::Name {
            continue;
        }
        let told = |words: String| format!("{}: {words}", column.name());
        let taken = match column {
            // It says itself whose name it is.
            Column::Name => take(&mut name, AccountName::parse(text).map_err(|e| e.to_string())),
            Column::Key => parse_keys(text)
                .map(|more: Vec<PublicKey>| keys.extend(more))
                .map_err(|error| told(error.to_string())),
            // Spaces may belong to it.
            Column::Password => {
                let checked = password::check(whole).map(|()| whole.to_owned());
                take(&mut password, checked.map_err(|error| told(format!("{error:#}"))))
            }
            Column::Class => take(&mut wanted.class, account_limits::class(text).map_err(told)),
            Column::Disk => take(&mut wanted.disk, crate::cli::size::parse(text).map_err(told)),
            Column::Quota => take(&mut wanted.quota, account_limits::quota(text).map_err(told)),
            Column::Sessions => {
                take(&mut wanted.sessions, account_limits::sessions(text).map_err(told))
            }
            Column::Streams => {
                take(&mut wanted.streams, account_limits::streams(text).map_err(told))
            }
            Column::Linger => {
                take(&mut wanted.linger, account_limits::time_span(text).map_err(told))
            }
            Column::MaxLinger => {
                take(&mut wanted.max_linger, account_limits::time_span(text).map_err(told))
            }
            Column::Policy => take(&mut wanted.policy, account_limits::policy(text).map_err(told)),
            Column::Memory => take(&mut wanted.memory, account_limits::memory(text).map_err(told)),
            Column::Vcpus => take(&mut wanted.vcpus, account_limits::vcpus(text).map_err(told)),
            Column::CpuWeight => {
                take(&mut wanted.cpu_weight, account_limits::cpu_weight(text).map_err(told))
            }
            Column::CpuPercent => {
                take(&mut wanted.cpu_percent, account_limits::cpu_percent(text).map_err(told))
            }
            Column::IoRate => {
                take(&mut wanted.io_rate, account_limits::io_rate(text).map_err(told))
            }
            Column::IoOperations => {
                take(&mut wanted.io_operations, account_limits::io_operations(text).map_err(told))
            }
            Column::Processes => {
                take(&mut wanted.processes, account_limits::processes(text).map_err(told))
            }
            Column::Expires => {
                take(&mut wanted.expires, account_limits::expiry(text).map_err(told))
            }
            Column::Disabled => take(&mut disabled, yes_or_no(text).map_err(told)),
        };
        faults.extend(taken.err());
    }
    match name {
        Some(name) if faults.is_empty() => Ok(Row { line, name, keys, password, disabled, wanted }),
        _ => Err(faults),
    }
}

fn take<T>(slot: &mut Option<T>, parsed: Result<T, String>) -> Result<(), String> {
    *slot = Some(parsed?);
    Ok(())
}

fn yes_or_no(text: &str) -> Result<bool, String> {
    match text.to_ascii_lowercase().as_str() {
        "yes" | "true" | "1" => Ok(true),
        "no" | "false" | "0" => Ok(false),
        _ => Err("it is yes or no".into()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cli::account_limits::Own;
    use proptest::prelude::*;

    const KEYS: &str = include_str!("../../../../storage/testdata/authorized_keys");

    #[test]
    fn columns_come_in_any_order_and_fields_as_people_write_them() {
        let mut keys = KEYS.lines().filter(|line| !line.starts_with('#'));
        let (first, second) = (keys.next().unwrap(), keys.next().unwrap());
        let text = format!(
            "\u{feff}Class, KEY,name,Max-Linger,disabled,expires,key,password\r\n\
             student,\"{first}\n{second}\",alice,8h,no,never,,\" a b c d \"\r\n\
             # somebody who left\r\n\
             \r\n\
             ,,bob,,,2027-06-30,,\r\n"
        );
        let (rows, problems) = parse(text.as_bytes());
        assert!(problems.is_empty(), "{problems:?}");
        let [alice, bob] = &rows[..] else { panic!("{rows:?}") };
        assert_eq!((alice.line, alice.name.as_str(), alice.keys.len()), (2, "alice", 2));
        assert_eq!(alice.wanted.class, Some(Own::Value("student".into())));
        assert_eq!(alice.wanted.max_linger, Some(Own::Value(28_800)));
        assert_eq!((&alice.wanted.expires, alice.disabled), (&Some(Own::Default), Some(false)));
        assert_eq!(alice.password.as_deref(), Some(" a b c d "));
        assert_eq!((bob.line, bob.wanted.expires.clone()), (6, Some(Own::Value(1_814_313_600))));
        assert_eq!((&bob.password, bob.wanted.class.clone()), (&None, None));
    }

    #[test]
    fn every_fault_of_every_line_is_told() {
        let text = b"name,key,sessions,expires,policy,disabled\nAlice,x,0,soon,nap,perhaps\nbob\n\
                     carol,,1,,,\ncarol,,2,,,\n,,,,,\nd\xff,,,,,\n";
        let (rows, problems) = parse(text);
        assert_eq!(rows.len(), 1);
        let of = |line: u64| -> Vec<&str> {
            problems.iter().filter(|p| p.line == line).map(|p| p.words.as_str()).collect()
        };
        assert_eq!(of(2).len(), 6, "{problems:?}");
        assert!(of(3)[0].contains("1 fields"), "{problems:?}");
        assert!(of(5)[0].contains("on line 4 already"), "{problems:?}");
        assert!(of(6)[0].contains("empty") && of(7)[0].contains("UTF-8"), "{problems:?}");
    }

    #[test]
    fn a_first_line_that_names_no_columns_is_refused() {
        for (text, words) in [
            ("", "empty"),
            ("alice,bob\n", "\"alice\" is no column"),
            ("class\n", "no column name"),
            ("name,class,class\n", "class is there twice"),
        ] {
            let (_, problems) = parse(text.as_bytes());
            assert!(problems[0].words.contains(words), "{problems:?}");
        }
    }

    #[test]
    fn a_list_without_end_is_refused() {
        let names: Vec<_> = (0..=MAX_ROWS).map(|n| format!("a{n}\n")).collect();
        let (rows, problems) = parse(format!("name\n{}", names.concat()).as_bytes());
        assert_eq!(rows.len(), MAX_ROWS);
        assert!(problems[0].words.contains("give it in parts"), "{problems:?}");
    }

    proptest! {
        #[test]
        fn nothing_in_a_file_makes_it_panic(text in proptest::collection::vec(any::<u8>(), 0..400)) {
            parse(&text);
            parse(&[b"name,key,password,disk\n".as_slice(), &text].concat());
        }
    }
}
