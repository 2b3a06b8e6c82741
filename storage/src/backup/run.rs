//! Runs: what was there at one time.

use std::fs::File;
use std::io::Read as _;
use std::path::Path;

use serde::{Deserialize, Serialize};

use super::chunks::Hash;
use super::{BackupError, VERSION, failed};

/// Longest run, in bytes.
const MOST: u64 = 64 << 20;

#[derive(Clone, Debug)]
pub struct Run {
    pub id: String,
    pub content: Content,
}

#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Content {
    pub(super) version: u32,
    /// Seconds since 1970-01-01 UTC.
    pub created: i64,
    /// Version of the program that wrote it.
    pub hermitage: String,
    pub accounts: Vec<Listed>,
    pub left_out: Vec<LeftOut>,
    pub database: Database,
}

#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Listed {
    pub name: String,
    pub(super) object: Hash,
}

/// An account that the run does not have.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct LeftOut {
    pub name: String,
    pub reason: String,
}

#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Database {
    pub bytes: u64,
    pub(super) chunks: Vec<Hash>,
}

/// `20261121-101530`, perhaps with `-2` behind it.
pub fn is_id(name: &str) -> bool {
    (15..=24).contains(&name.len())
        && name.bytes().all(|byte| byte.is_ascii_digit() || byte == b'-')
        && name.as_bytes()[8] == b'-'
}

pub fn encode(content: &Content) -> Result<Vec<u8>, serde_json::Error> {
    let json = serde_json::to_vec(content)?;
    let mut bytes = format!("{}\n", Hash::of(&json)).into_bytes();
    bytes.extend_from_slice(&json);
    Ok(bytes)
}

pub fn read(path: &Path, id: &str) -> Result<Run, BackupError> {
    let damaged =
        |reason: String| BackupError::Damaged { what: "run", name: id.to_owned(), reason };
    let file = File::open(path).map_err(failed(path, "opening"))?;
    let mut bytes = vec![];
    file.take(MOST + 1).read_to_end(&mut bytes).map_err(failed(path, "reading"))?;
    if bytes.len() as u64 > MOST {
        return Err(damaged(format!("it is longer than {MOST} bytes")));
    }
    let altered = || damaged("it was altered: its checksum does not fit".into());
    let (sum, json) = bytes.split_at_checked(65).ok_or_else(altered)?;
    let sum = sum.strip_suffix(b"\n").and_then(|sum| Hash::parse(std::str::from_utf8(sum).ok()?));
    if sum != Some(Hash::of(json)) {
        return Err(altered());
    }
    let content: Content =
        serde_json::from_slice(json).map_err(|error| damaged(error.to_string()))?;
    match content.version {
        VERSION => Ok(Run { id: id.to_owned(), content }),
        other => Err(damaged(format!("its version is {other}, this program knows {VERSION}"))),
    }
}
