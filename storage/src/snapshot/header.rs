//! The first page: what the snapshot is of, and the length and checksum of everything else.

use super::{MAX_RUNS, PAGE, SnapshotError, index};
use crate::base::{BaseId, Size};
use crate::disk::Tag;
use twox_hash::XxHash3_128;
use uuid::Uuid;

/// Version of this format, not of the machine's state inside it ([`Description::state_version`]).
pub const VERSION: u32 = 1;

/// The header has a page of its own, so that the data after it is aligned.
pub const HEADER_BYTES: usize = PAGE;

/// Most bytes of machine state: a vCPU's is some 10 KiB.
pub const MAX_STATE: u64 = 16 << 20;

const MAGIC: &[u8; 8] = b"hrmtdiff";
/// The header's own checksum is its last field.
const SUM_AT: usize = HEADER_BYTES - 16;
/// RAM is at most 512 GiB (the vmm's layout).
const MAX_RAM: u64 = 512 << 30;
const MAX_VCPUS: u32 = 1024;

/// What a snapshot is of. The writer's caller knows it; the header repeats it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Description {
    /// What it is the difference to.
    pub base: BaseId,
    pub account: Uuid,
    /// The disk must have the same (`disk::tag`).
    pub disk_tag: Tag,
    /// Seconds since 1970-01-01 UTC.
    pub created: i64,
    /// Bytes of the machine's RAM.
    pub ram: u64,
    pub vcpus: u32,
    /// Version of the state's encoding: the vmm's, opaque here.
    pub state_version: u32,
}

impl Description {
    /// What the machine had.
    pub fn size(&self) -> Size {
        // No base has more CPUs than fit.
        Size { memory_bytes: self.ram, vcpus: self.vcpus.try_into().unwrap_or(u8::MAX) }
    }
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Header {
    pub description: Description,
    /// Pages with data in the file.
    pub data_pages: u64,
    /// Pages that are zero, and are not in the base.
    pub zero_pages: u64,
    pub runs: u64,
    /// Bytes.
    pub state: u64,
    /// XXH3-128 of each part.
    pub(super) data_sum: u128,
    pub(super) index_sum: u128,
    pub(super) state_sum: u128,
}

impl Header {
    pub(super) fn index_at(&self) -> u64 {
        HEADER_BYTES as u64 + self.data_pages * PAGE as u64
    }

    pub(super) fn state_at(&self) -> u64 {
        self.index_at() + self.runs * index::RECORD as u64
    }

    /// Length of the file.
    pub fn file_bytes(&self) -> u64 {
        self.state_at() + self.state
    }

    pub(super) fn encode(&self) -> [u8; HEADER_BYTES] {
        let mut raw = [0; HEADER_BYTES];
        let mut at = 0;
        let mut put = |bytes: &[u8]| {
            raw[at..at + bytes.len()].copy_from_slice(bytes);
            at += bytes.len();
        };
        let about = &self.description;
        put(MAGIC);
        put(&VERSION.to_le_bytes());
        put(&about.state_version.to_le_bytes());
        put(&base_bytes(&about.base));
        put(about.account.as_bytes());
        put(&about.disk_tag);
        put(&about.created.to_le_bytes());
        put(&about.ram.to_le_bytes());
        put(&u64::from(about.vcpus).to_le_bytes());
        for count in [self.data_pages, self.zero_pages, self.runs, self.state] {
            put(&count.to_le_bytes());
        }
        for sum in [self.data_sum, self.index_sum, self.state_sum] {
            put(&sum.to_le_bytes());
        }
        let sum = XxHash3_128::oneshot(&raw[..SUM_AT]);
        raw[SUM_AT..].copy_from_slice(&sum.to_le_bytes());
        raw
    }

    /// Checks everything that can be checked without the rest of the file.
    pub(super) fn decode(raw: &[u8; HEADER_BYTES]) -> Result<Self, SnapshotError> {
        let mut fields = Fields(raw);
        if fields.take() != *MAGIC {
            return Err(SnapshotError::NotASnapshot);
        }
        // Before the checksum: another version's header may be summed otherwise.
        let version = u32::from_le_bytes(fields.take());
        if version != VERSION {
            return Err(SnapshotError::Version(version));
        }
        let (found, expected) = (XxHash3_128::oneshot(&raw[..SUM_AT]), sum_of(&raw[SUM_AT..]));
        if found != expected {
            return Err(SnapshotError::Altered { part: "header", found, expected });
        }
        let header = fields.header()?;
        header.check()?;
        if header.encode() != *raw {
            // Bytes that mean nothing are zero.
            return Err(SnapshotError::Field { what: "reserved bytes", value: 1 });
        }
        Ok(header)
    }

    /// With these bounds no sum or product of the fields overflows.
    pub(super) fn check(&self) -> Result<(), SnapshotError> {
        let ram = self.description.ram;
        let pages = ram / PAGE as u64;
        let vcpus = self.description.vcpus;
        let bounds = [
            ("a RAM size of", ram, ram.is_multiple_of(PAGE as u64) && (1..=MAX_RAM).contains(&ram)),
            ("a number of vCPUs of", vcpus.into(), (1..=MAX_VCPUS).contains(&vcpus)),
            ("a number of data pages of", self.data_pages, self.data_pages <= pages),
            ("a number of zero pages of", self.zero_pages, self.zero_pages <= pages),
            ("a number of runs of", self.runs, self.runs <= MAX_RUNS.min(pages)),
            ("a state length of", self.state, self.state <= MAX_STATE),
        ];
        match bounds.iter().find(|(_, _, good)| !good) {
            Some(&(what, value, _)) => Err(SnapshotError::Field { what, value }),
            None => Ok(()),
        }
    }
}

/// Takes fields off the front. Those of a header add up to less than its length.
struct Fields<'a>(&'a [u8]);

impl Fields<'_> {
    fn take<const N: usize>(&mut self) -> [u8; N] {
        let mut field = [0; N];
        let (now, rest) = self.0.split_at(N.min(self.0.len()));
        field[..now.len()].copy_from_slice(now);
        self.0 = rest;
        field
    }

    fn number(&mut self) -> u64 {
        u64::from_le_bytes(self.take())
    }

    fn sum(&mut self) -> u128 {
        u128::from_le_bytes(self.take())
    }

    /// What follows magic and version.
    fn header(&mut self) -> Result<Header, SnapshotError> {
        let state_version = u32::from_le_bytes(self.take());
        let base = base_id(&self.take())?;
        let account = Uuid::from_bytes(self.take());
        let disk_tag = self.take();
        let created = i64::from_le_bytes(self.take());
        let ram = self.number();
        let vcpus = self.number();
        let vcpus = u32::try_from(vcpus)
            .map_err(|_| SnapshotError::Field { what: "a number of vCPUs of", value: vcpus })?;
        Ok(Header {
            description: Description {
                base,
                account,
                disk_tag,
                created,
                ram,
                vcpus,
                state_version,
            },
            data_pages: self.number(),
            zero_pages: self.number(),
            runs: self.number(),
            state: self.number(),
            data_sum: self.sum(),
            index_sum: self.sum(),
            state_sum: self.sum(),
        })
    }
}

fn sum_of(raw: &[u8]) -> u128 {
    Fields(raw).sum()
}

/// A base's id as the 16 bytes that its 32 digits stand for.
fn base_bytes(base: &BaseId) -> [u8; 16] {
    // A BaseId is 32 hexadecimal digits by its type.
    u128::from_str_radix(base.as_str(), 16).unwrap_or(0).to_be_bytes()
}

fn base_id(raw: &[u8; 16]) -> Result<BaseId, SnapshotError> {
    let text = format!("{:032x}", u128::from_be_bytes(*raw));
    BaseId::parse(&text).ok_or(SnapshotError::NotASnapshot)
}
