//! `base.json`: what a base is, what it can be restored on, and the seal of each of its files.

use crate::sparse::Digest;
use serde::{Deserialize, Serialize};
use std::fmt;
use std::fs;
use std::io;

/// Version of this format, not of the vmm's state inside it (that is [`HostKind::snapshot_version`]).
pub const FORMAT_VERSION: u32 = 1;

pub const MANIFEST: &str = "base.json";
pub const MEMORY: &str = "memory.img";
pub const STATE: &str = "state.bin";
pub const ROOT: &str = "root.erofs";

const FORMAT_NAME: &str = "hermitage-base";

/// A base's id: the first 128 bits of its content's hash, as 32 hexadecimal digits. Safe as a name.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct BaseId(String);

impl BaseId {
    pub fn parse(text: &str) -> Option<Self> {
        let digit = |b: u8| matches!(b, b'0'..=b'9' | b'a'..=b'f');
        (text.len() == 32 && text.bytes().all(digit)).then(|| Self(text.to_owned()))
    }

    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl fmt::Display for BaseId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl TryFrom<String> for BaseId {
    type Error = String;
    fn try_from(text: String) -> Result<Self, String> {
        Self::parse(&text).ok_or_else(|| format!("\"{}\" is not a base id", text.escape_debug()))
    }
}

impl From<BaseId> for String {
    fn from(id: BaseId) -> String {
        id.0
    }
}

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Manifest {
    format: String,
    version: u32,
    pub id: BaseId,
    pub content: Content,
}

/// All that the id stands for.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Content {
    /// Id of the guest image it was booted from.
    pub image: String,
    /// `hermitage_guest_proto::VERSION` that its agent speaks.
    pub agent_protocol: u16,
    /// Release of the guest's kernel.
    pub guest_kernel: String,
    pub machine: Machine,
    pub restorable_on: HostKind,
    pub files: Files,
}

/// What machines of the base have.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Machine {
    /// At least.
    pub memory_bytes: u64,
    pub vcpus: u8,
    /// At most; `None`: no more than that.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub most: Option<Size>,
}

/// What one machine has, or can have.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Size {
    pub memory_bytes: u64,
    pub vcpus: u8,
}

/// Machines have their base's memory, or so many bytes more, or twice so many, …: what a guest's kernel takes into
/// use and out of it at once (a memory block of Linux on x86-64 with less than 64 GiB).
pub const MEMORY_BLOCK: u64 = 128 << 20;

/// Most that a machine whose memory can grow has; with more, Linux's blocks may be larger.
pub const MAX_MEMORY: u64 = 62 << 30;

/// Most virtual processors of a machine.
pub const MAX_VCPUS: u8 = 32;

impl Machine {
    pub fn new(least: Size, most: Size) -> Self {
        let most = (most != least).then_some(most);
        Self { memory_bytes: least.memory_bytes, vcpus: least.vcpus, most }
    }

    pub fn least(&self) -> Size {
        Size { memory_bytes: self.memory_bytes, vcpus: self.vcpus }
    }

    pub fn most(&self) -> Size {
        self.most.unwrap_or_else(|| self.least())
    }

    /// What a machine of this base has where `memory` and `vcpus` are wanted: no less than the base's least, no
    /// more than its most, memory in whole blocks. `None`: the least.
    pub fn fit(&self, memory: Option<u64>, vcpus: Option<u8>) -> Size {
        let (least, most) = (self.least(), self.most());
        let more = memory.unwrap_or(0).saturating_sub(least.memory_bytes);
        let blocks = more.div_ceil(MEMORY_BLOCK).saturating_mul(MEMORY_BLOCK);
        let memory = least.memory_bytes.saturating_add(blocks).min(most.memory_bytes);
        Size {
            memory_bytes: memory,
            vcpus: vcpus.unwrap_or(0).clamp(least.vcpus, most.vcpus.max(least.vcpus)),
        }
    }

    /// Whether a machine of this base can have exactly that.
    pub fn allows(&self, size: Size) -> bool {
        self.fit(Some(size.memory_bytes), Some(size.vcpus)) == size
    }
}

/// What the machine's state was taken on, and so can be put back on.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct HostKind {
    /// Version of the vmm's state format (the content of `state.bin`).
    pub snapshot_version: u32,
    /// CPUID leaf 0: `AuthenticAMD`, `GenuineIntel`.
    pub cpu_vendor: String,
    pub cpu_family: u32,
    pub cpu_model: u32,
    /// Digest of what KVM offers guests here (KVM_GET_SUPPORTED_CPUID), made by the vmm.
    pub cpuid_digest: String,
    /// `uname -r` of the host.
    pub kernel_release: String,
}

impl HostKind {
    /// Why a base taken on `self` can't be restored on `here`. Empty: it can.
    ///
    /// The host's kernel release is on record, not compared: KVM's ioctls are stable, and what may
    /// change with the kernel is in the CPUID digest. That is not compared here either: where it differs the
    /// vmm looks whether all that the guest uses is there.
    pub fn mismatches(&self, here: &Self) -> Vec<String> {
        let mut found = Vec::new();
        let mut compare = |what: &str, base: String, here: String| {
            if base != here {
                found.push(format!("it was taken with {what} {base}, here it is {here}"));
            }
        };
        let cpu =
            |h: &Self| format!("{} family {} model {}", h.cpu_vendor, h.cpu_family, h.cpu_model);
        compare(
            "snapshot version",
            self.snapshot_version.to_string(),
            here.snapshot_version.to_string(),
        );
        compare("the CPU", cpu(self), cpu(here));
        found
    }

    /// This host, as far as it can be told without KVM. The vmm knows the other two.
    pub fn here(snapshot_version: u32, cpuid_digest: String) -> io::Result<Self> {
        let cpuinfo = fs::read_to_string("/proc/cpuinfo")?;
        let field = |name: &str| {
            let line = cpuinfo
                .lines()
                .find(|line| line.split_once(':').is_some_and(|(key, _)| key.trim_end() == name));
            line.and_then(|line| line.split_once(':')).map_or("", |(_, value)| value.trim())
        };
        let kernel_release = fs::read_to_string("/proc/sys/kernel/osrelease")?;
        Ok(Self {
            snapshot_version,
            cpu_vendor: field("vendor_id").to_owned(),
            cpu_family: field("cpu family").parse().unwrap_or(0),
            cpu_model: field("model").parse().unwrap_or(0),
            cpuid_digest,
            kernel_release: kernel_release.trim_end().to_owned(),
        })
    }
}

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Files {
    #[serde(rename = "memory.img")]
    pub memory: FileSeal,
    #[serde(rename = "state.bin")]
    pub state: FileSeal,
    #[serde(rename = "root.erofs")]
    pub root: FileSeal,
}

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct FileSeal {
    pub length: u64,
    /// [`crate::sparse::digest`], 64 hexadecimal digits.
    pub digest: String,
}

impl FileSeal {
    pub fn new(length: u64, digest: Digest) -> Self {
        Self { length, digest: digest.to_string() }
    }
}

#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub(super) enum ManifestError {
    #[error("it is not the JSON of a base: {0}")]
    Json(String),
    #[error("it is not of a base but of \"{0}\"")]
    Format(String),
    #[error(
        "its format version is {0}, this program knows {FORMAT_VERSION}; make the base again with: \
         hermitage base build"
    )]
    Version(u32),
    #[error("it was altered: its content's id is {found}, not {named}")]
    Id { named: BaseId, found: BaseId },
    #[error("it was altered: it is not written as a base's manifest is")]
    NotCanonical,
    #[error("memory.img should have {memory} bytes but has {file}")]
    Memory { memory: u64, file: u64 },
}

impl Manifest {
    pub(super) fn of(content: Content) -> Result<Self, ManifestError> {
        let id = content_id(&content)?;
        Ok(Self { format: FORMAT_NAME.into(), version: FORMAT_VERSION, id, content })
    }

    pub(super) fn to_bytes(&self) -> Result<Vec<u8>, ManifestError> {
        let mut bytes =
            serde_json::to_vec_pretty(self).map_err(|e| ManifestError::Json(e.to_string()))?;
        bytes.push(b'\n');
        Ok(bytes)
    }

    pub(super) fn from_bytes(bytes: &[u8]) -> Result<Self, ManifestError> {
        /// What every version has, so that another version is named and not just "not JSON".
        #[derive(Deserialize)]
        struct Head {
            format: String,
            version: u32,
        }
        let json = |error: serde_json::Error| ManifestError::Json(error.to_string());
        let head: Head = serde_json::from_slice(bytes).map_err(json)?;
        if head.format != FORMAT_NAME {
            return Err(ManifestError::Format(head.format.escape_debug().to_string()));
        }
        if head.version != FORMAT_VERSION {
            return Err(ManifestError::Version(head.version));
        }
        let manifest: Self = serde_json::from_slice(bytes).map_err(json)?;
        let found = content_id(&manifest.content)?;
        if found != manifest.id {
            return Err(ManifestError::Id { named: manifest.id, found });
        }
        // Every byte counts, also those JSON doesn't care about: one way to write it, no other.
        if manifest.to_bytes()? != bytes {
            return Err(ManifestError::NotCanonical);
        }
        let (memory, file) =
            (manifest.content.machine.most().memory_bytes, manifest.content.files.memory.length);
        if memory != file {
            return Err(ManifestError::Memory { memory, file });
        }
        Ok(manifest)
    }
}

fn content_id(content: &Content) -> Result<BaseId, ManifestError> {
    let bytes = serde_json::to_vec(content).map_err(|e| ManifestError::Json(e.to_string()))?;
    let hash = blake3::derive_key("hermitage base 1", &bytes);
    let hex = hash[..16].iter().map(|byte| format!("{byte:02x}")).collect();
    Ok(BaseId(hex))
}
