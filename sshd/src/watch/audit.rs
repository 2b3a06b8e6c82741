//! The audit log: `STATE_DIR/audit.jsonl`, a JSON object a line, and its former files `audit.jsonl.1` (the
//! latest) and so on. docs/watching.md has the fields.
//!
//! The service and commands write to it at the same time. Each takes the file's lock for what it has to
//! write, and whoever finds it full puts it aside under the same lock; who waited for a file that was put
//! aside meanwhile opens the new one. What is written is whole lines, at the end.

use std::{
    fs::{File, OpenOptions},
    io::{self, Write},
    os::unix::fs::{MetadataExt, OpenOptionsExt},
    path::{Path, PathBuf},
    time::SystemTime,
};

use nix::fcntl::{Flock, FlockArg};
use serde::Serialize;

use super::Event;
use crate::time;

pub const FILE: &str = "audit.jsonl";

/// How often a file that was put aside meanwhile is opened anew.
const TRIES: u32 = 100;

#[derive(Debug)]
pub struct AuditLog {
    path: PathBuf,
    /// Bytes at which a file is put aside.
    size: u64,
    /// Files in all, the one written to among them; at least one.
    files: u32,
    /// As it was opened last.
    open: Option<File>,
}

#[derive(Debug, thiserror::Error)]
#[error("can't write to the audit log {path}: {source}", path = path.display())]
pub struct AuditError {
    path: PathBuf,
    source: io::Error,
}

/// A line of the log.
#[derive(Serialize)]
struct Line<'a> {
    time: String,
    #[serde(flatten)]
    event: &'a Event,
}

/// The event as a line, with the time of now. Empty for one that is not kept.
pub fn line(event: &Event) -> Vec<u8> {
    if matches!(event, Event::ConnectionRefused { .. }) {
        return vec![];
    }
    let line = Line { time: time::rfc3339_ms(SystemTime::now()), event };
    // Strings, numbers and maps with string keys: nothing of it can fail.
    let mut line = serde_json::to_vec(&line).unwrap_or_default();
    line.push(b'\n');
    line
}

impl AuditLog {
    pub fn new(path: PathBuf, size: u64, files: u32) -> Self {
        Self { path, size, files, open: None }
    }

    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Puts whole lines at the end.
    pub fn append(&mut self, lines: &[u8]) -> Result<(), AuditError> {
        self.try_append(lines).map_err(|source| AuditError { path: self.path.clone(), source })
    }

    fn try_append(&mut self, lines: &[u8]) -> io::Result<()> {
        for _ in 0..TRIES {
            let file = match self.open.take() {
                Some(file) => file,
                None => {
                    OpenOptions::new().create(true).append(true).mode(0o600).open(&self.path)?
                }
            };
            let mut file =
                Flock::lock(file, FlockArg::LockExclusive).map_err(|(_, errno)| errno)?;
            let length = match self.is_current(&file)? {
                Some(length) => length,
                None => continue,
            };
            if length > 0 && length.saturating_add(lines.len() as u64) > self.size {
                self.put_aside()?;
                continue;
            }
            file.write_all(lines)?;
            self.open = Some(file.unlock().map_err(|(_, errno)| errno)?);
            return Ok(());
        }
        Err(io::Error::other("it is put aside again and again"))
    }

    /// Its length, if it is still the one that is written to.
    fn is_current(&self, file: &File) -> io::Result<Option<u64>> {
        let open = file.metadata()?;
        match std::fs::metadata(&self.path) {
            Ok(there) if (there.dev(), there.ino()) == (open.dev(), open.ino()) => {
                Ok(Some(open.len()))
            }
            Ok(_) => Ok(None),
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
            Err(error) => Err(error),
        }
    }

    /// The oldest file goes, the others move on by one.
    fn put_aside(&self) -> io::Result<()> {
        let former = |n: u32| match n {
            0 => self.path.clone(),
            n => PathBuf::from(format!("{}.{n}", self.path.display())),
        };
        let last = self.files.saturating_sub(1);
        if last == 0 {
            return std::fs::remove_file(&self.path);
        }
        for n in (0..last).rev() {
            match std::fs::rename(former(n), former(n + 1)) {
                Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
                _ => {}
            }
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn it_is_bounded_and_the_latest_lines_are_kept() {
        let dir = tempfile::tempdir().unwrap();
        let mut log = AuditLog::new(dir.path().join(FILE), 1000, 3);
        for n in 0..100 {
            log.append(format!("{{\"n\":{n},\"fill\":\"{}\"}}\n", "x".repeat(80)).as_bytes())
                .unwrap();
        }
        let mut names: Vec<_> =
            std::fs::read_dir(dir.path()).unwrap().map(|e| e.unwrap().file_name()).collect();
        names.sort();
        assert_eq!(names, ["audit.jsonl", "audit.jsonl.1", "audit.jsonl.2"]);
        let mut all = String::new();
        for name in ["audit.jsonl.2", "audit.jsonl.1", "audit.jsonl"] {
            let path = dir.path().join(name);
            let metadata = std::fs::metadata(&path).unwrap();
            assert!(metadata.len() <= 1000, "{name}: {}", metadata.len());
            assert_eq!(metadata.mode() & 0o777, 0o600);
            all += &std::fs::read_to_string(path).unwrap();
        }
        let numbers: Vec<u64> = all
            .lines()
            .map(|line| serde_json::from_str::<serde_json::Value>(line).unwrap()["n"].as_u64())
            .map(Option::unwrap)
            .collect();
        assert_eq!(numbers, (100 - numbers.len() as u64..100).collect::<Vec<_>>());
        assert!(numbers.len() >= 20);
    }

    #[test]
    fn many_writers_lose_no_line() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join(FILE);
        std::thread::scope(|scope| {
            for writer in 0..4 {
                let mut log = AuditLog::new(path.clone(), 4000, 50);
                scope.spawn(move || {
                    for n in 0..100 {
                        log.append(format!("{writer} {n} {}\n", "y".repeat(60)).as_bytes())
                            .unwrap();
                    }
                });
            }
        });
        let mut lines = vec![];
        for entry in std::fs::read_dir(dir.path()).unwrap() {
            let text = std::fs::read_to_string(entry.unwrap().path()).unwrap();
            lines.extend(text.lines().map(str::to_owned));
        }
        lines.sort();
        lines.dedup();
        assert_eq!(lines.len(), 400);
        assert!(lines.iter().all(|line| line.len() > 60), "a torn line");
    }

    #[test]
    fn a_line_is_an_object_with_a_time_and_its_fields() {
        let event = Event::LoginRefused {
            user: "x\\ny".into(),
            source: "192.0.2.1:4".into(),
            method: super::super::Method::Password,
            by: None,
            reason: "wrong\npassword".into(),
        };
        let line = line(&event);
        assert_eq!(line.iter().filter(|byte| **byte == b'\n').count(), 1, "in one line");
        let value: serde_json::Value = serde_json::from_slice(&line).unwrap();
        assert_eq!(value["event"], "login-refused");
        assert_eq!(value["method"], "password");
        assert!(value["time"].as_str().unwrap().ends_with('Z'), "{value}");
        assert!(super::line(&Event::ConnectionRefused { reason: "full" }).is_empty());
    }
}
