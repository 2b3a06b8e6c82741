//! Records: what both ends agree on.

use twox_hash::XxHash3_128;

use super::ArchiveError;

/// Most bytes of a record's payload, decoded or not.
pub const MAX_RAW: usize = 1 << 20;

pub const HEADER: usize = 48;
const SUMMED: usize = 32;

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    Manifest,
    Disk,
    Memory,
    End,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Coding {
    Plain,
    Zstd,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Header {
    pub kind: Kind,
    pub coding: Coding,
    pub stored: u32,
    pub raw: u32,
    pub offset: u64,
    pub number: u64,
}

impl Header {
    /// With the sum of it and the payload as it is stored.
    pub fn encode(&self, payload: &[u8]) -> [u8; HEADER] {
        let mut bytes = [0; HEADER];
        let kind: u32 = match self.kind {
            Kind::Manifest => 1,
            Kind::Disk => 2,
            Kind::Memory => 3,
            Kind::End => 4,
        };
        let coding: u32 = match self.coding {
            Coding::Plain => 0,
            Coding::Zstd => 1,
        };
        bytes[..4].copy_from_slice(&kind.to_le_bytes());
        bytes[4..8].copy_from_slice(&coding.to_le_bytes());
        bytes[8..12].copy_from_slice(&self.stored.to_le_bytes());
        bytes[12..16].copy_from_slice(&self.raw.to_le_bytes());
        bytes[16..24].copy_from_slice(&self.offset.to_le_bytes());
        bytes[24..32].copy_from_slice(&self.number.to_le_bytes());
        let sum = sum(&bytes[..SUMMED], payload);
        bytes[SUMMED..].copy_from_slice(&sum.to_le_bytes());
        bytes
    }

    /// What has to be known before the payload is read: that there is room for it. The sum comes after.
    pub fn decode(bytes: &[u8; HEADER], expected: u64) -> Result<Self, ArchiveError> {
        let wrong = |reason| ArchiveError::Record { number: expected, reason };
        let kind = match number(&bytes[..4]) {
            1 => Kind::Manifest,
            2 => Kind::Disk,
            3 => Kind::Memory,
            4 => Kind::End,
            _ => return Err(wrong("is of no kind that is known")),
        };
        let coding = match number(&bytes[4..8]) {
            0 => Coding::Plain,
            1 => Coding::Zstd,
            _ => return Err(wrong("is coded in a way that is not known")),
        };
        let (stored, raw) = (number(&bytes[8..12]), number(&bytes[12..16]));
        let bounds = 1..=MAX_RAW as u64;
        if !bounds.contains(&stored) || !bounds.contains(&raw) {
            return Err(wrong("has a length that can't be"));
        }
        let header = Self {
            kind,
            coding,
            stored: stored as u32,
            raw: raw as u32,
            offset: number(&bytes[16..24]),
            number: number(&bytes[24..32]),
        };
        if header.number != expected {
            return Err(wrong("is not the one that belongs here"));
        }
        if coding == Coding::Plain && stored != raw {
            return Err(wrong("has two lengths"));
        }
        if !matches!(kind, Kind::Disk | Kind::Memory) && header.offset != 0 {
            return Err(wrong("has a place where it has none"));
        }
        Ok(header)
    }

    pub fn check(bytes: &[u8; HEADER], payload: &[u8], number: u64) -> Result<(), ArchiveError> {
        let found = sum(&bytes[..SUMMED], payload).to_le_bytes();
        if found == bytes[SUMMED..] { Ok(()) } else { Err(ArchiveError::Altered { number }) }
    }
}

fn sum(header: &[u8], payload: &[u8]) -> u128 {
    let mut sum = XxHash3_128::new();
    sum.write(header);
    sum.write(payload);
    sum.finish_128()
}

/// Up to eight bytes, little endian.
fn number(bytes: &[u8]) -> u64 {
    bytes.iter().rev().fold(0, |number, byte| (number << 8) | u64::from(*byte))
}
