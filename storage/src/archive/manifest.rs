//! What an archive says of its account: written from the database, read as anything a stranger says.

use base64ct::{Base64, Encoding as _};
use serde::{Deserialize, Serialize};

use super::{ArchiveError, failed};
use crate::accounts::{
    Account, AccountName, Accounts, Identity, MAX_KEYS, NewAccount, Policy, PublicKey, StoredKey,
    check_hash,
};
use crate::base::BaseId;
use crate::rest::Kept;
use crate::sparse;

/// Largest disk.
pub const FORMAT_DISK_MAX: u64 = 64 << 40;
/// Largest memory: more RAM than a machine can have, and then some.
const MEMORY_MAX: u64 = 1 << 40;
const BLOCK: u64 = 4096;

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Manifest {
    /// Seconds since 1970-01-01 UTC.
    pub created: i64,
    /// Version of the program that wrote it.
    pub hermitage: String,
    pub account: Settings,
    /// Lines as of an `authorized_keys` file.
    pub keys: Vec<String>,
    pub disk: Disk,
    pub memory: Option<Memory>,
}

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Settings {
    pub id: uuid::Uuid,
    pub name: String,
    /// 32 digits.
    pub machine_id: String,
    pub password: Option<String>,
    /// Its user in the guest.
    pub guest_name: String,
    pub disabled: bool,
    pub disabled_until: Option<i64>,
    pub expires: Option<i64>,
    pub created: i64,
    pub class: Option<String>,
    // Its own, each; null: as its class or the configuration says.
    pub policy: Option<String>,
    pub max_sessions: Option<u32>,
    pub max_streams: Option<u32>,
    pub linger_s: Option<u32>,
    pub max_linger_s: Option<u32>,
    /// Left out where there is none: programs from before there were quotas refuse only what they would drop.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub quota_bytes: Option<u64>,
    // Since there are such limits; archives of before, and of accounts without, have no word of them.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub memory_bytes: Option<u64>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub vcpus: Option<u8>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub cpu_weight: Option<u32>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub cpu_percent: Option<u32>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub io_rate: Option<u64>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub io_operations: Option<u32>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub processes: Option<u32>,
    pub disk_bytes: u64,
}

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Disk {
    /// Its size.
    pub bytes: u64,
    /// At most so many of them follow; the others are zero.
    pub data_bytes: u64,
}

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Memory {
    pub bytes: u64,
    pub base: String,
    /// As in the database: the terminals that wait for their user, and what was at work.
    pub terminals: Option<String>,
    pub paused: Option<String>,
}

impl Settings {
    pub fn of(account: &Account) -> Self {
        Self {
            id: account.id,
            name: account.name.clone(),
            machine_id: format!("{:032x}", u128::from_be_bytes(account.machine_id)),
            password: account.password.clone(),
            guest_name: account.guest_name().to_owned(),
            disabled: account.disabled,
            disabled_until: account.disabled_until,
            expires: account.expires,
            created: account.created,
            class: account.class.clone(),
            policy: account.policy.map(|policy| policy.as_str().to_owned()),
            max_sessions: account.max_sessions,
            max_streams: account.max_streams,
            linger_s: account.linger_s,
            max_linger_s: account.max_linger_s,
            quota_bytes: account.quota_bytes,
            memory_bytes: account.memory_bytes,
            vcpus: account.vcpus,
            cpu_weight: account.cpu_weight,
            cpu_percent: account.cpu_percent,
            io_rate: account.io_rate,
            io_operations: account.io_operations,
            processes: account.processes,
            disk_bytes: account.disk_bytes,
        }
    }
}

/// Of an account, with its memory if that is wanted and there is some that can be resumed.
pub fn describe(
    accounts: &Accounts,
    account: &Account,
    kept: Kept<'_>,
    memory: bool,
    version: &str,
    now: i64,
) -> Result<Manifest, ArchiveError> {
    let look = |doing| failed(doing);
    let intent = accounts.intent(account.id)?;
    let memory = kept.memory.filter(|_| memory).map(|(_, header)| Memory {
        bytes: header.file_bytes(),
        base: header.description.base.as_str().to_owned(),
        terminals: intent.as_ref().and_then(|intent| intent.terminals.clone()),
        paused: intent.as_ref().and_then(|intent| intent.paused.clone()),
    });
    let bytes = kept.disk.metadata().map_err(look("look at the disk"))?.len();
    let data_bytes = sparse::data_bytes(kept.disk).map_err(look("look at the disk"))?;
    let manifest = Manifest {
        created: now,
        hermitage: version.to_owned(),
        account: Settings::of(account),
        keys: accounts.keys(account.id)?.iter().map(key_line).collect(),
        disk: Disk { bytes, data_bytes },
        memory,
    };
    // What a reader would refuse is not written.
    manifest.check()?;
    Ok(manifest)
}

/// As classes are named in the configuration.
fn is_word(text: &str) -> bool {
    (1..=32).contains(&text.len())
        && text.bytes().all(|b| b.is_ascii_lowercase() || b.is_ascii_digit() || b"-_".contains(&b))
}

/// A key as a line.
fn key_line(key: &StoredKey) -> String {
    let blob = Base64::encode_string(&key.blob);
    let words = [&key.options, &key.key_type, &blob, &key.comment];
    let words: Vec<&str> =
        words.iter().map(|word| word.as_str()).filter(|w| !w.is_empty()).collect();
    words.join(" ")
}

impl Manifest {
    pub(super) fn decode(bytes: &[u8]) -> Result<Self, ArchiveError> {
        let manifest: Self = serde_json::from_slice(bytes).map_err(ArchiveError::Manifest)?;
        manifest.check()?;
        Ok(manifest)
    }

    /// Everything but the account's own settings, which [`Self::account`] takes apart.
    pub(crate) fn check(&self) -> Result<(), ArchiveError> {
        let field = |what, value: &dyn ToString| {
            Err(ArchiveError::Field { what, value: value.to_string().chars().take(64).collect() })
        };
        let disk = &self.disk;
        if !disk.bytes.is_multiple_of(BLOCK) || !(BLOCK..=FORMAT_DISK_MAX).contains(&disk.bytes) {
            return field("a disk of so many bytes:", &disk.bytes);
        }
        if disk.data_bytes > disk.bytes {
            return field("so many bytes of data on a smaller disk:", &disk.data_bytes);
        }
        if let Some(memory) = &self.memory {
            if !(1..=MEMORY_MAX).contains(&memory.bytes) {
                return field("a memory of so many bytes:", &memory.bytes);
            }
            if BaseId::parse(&memory.base).is_none() {
                return field("a base named", &memory.base.escape_default());
            }
            let terminals = memory.terminals.as_deref().unwrap_or_default();
            if terminals.len() > 64 || !terminals.bytes().all(|b| b == b' ' || b.is_ascii_digit()) {
                return field("terminals", &terminals.escape_default());
            }
            let paused = memory.paused.as_deref().unwrap_or_default();
            if paused.len() > 256 || paused.contains(char::is_control) {
                return field("that there was at work", &paused.escape_default());
            }
        }
        Ok(())
    }

    /// The account to be made, under this name, and what it was told apart by.
    pub fn account(&self, name: &str) -> Result<(NewAccount, Identity), ArchiveError> {
        let settings = &self.account;
        let mut new = NewAccount::new(AccountName::parse(name)?);
        if let Some(hash) = &settings.password {
            check_hash(hash)?;
        }
        if self.keys.len() > MAX_KEYS {
            let value = self.keys.len().to_string();
            return Err(ArchiveError::Field { what: "so many keys:", value });
        }
        for line in &self.keys {
            new.keys.extend(PublicKey::parse_line(line)?);
        }
        let field = |what, value: &str| ArchiveError::Field {
            what,
            value: value.chars().take(64).flat_map(char::escape_default).collect(),
        };
        new.password_hash = settings.password.clone();
        let policy = |name: &String| Policy::parse(name).ok_or_else(|| field("the policy", name));
        new.policy = settings.policy.as_ref().map(policy).transpose()?;
        new.disk_bytes = settings.disk_bytes;
        if settings.disk_bytes > FORMAT_DISK_MAX || settings.disk_bytes < BLOCK {
            return Err(field("a disk of so many bytes:", &settings.disk_bytes.to_string()));
        }
        new.max_sessions = settings.max_sessions;
        new.linger_s = settings.linger_s;
        new.max_linger_s = settings.max_linger_s;
        new.quota_bytes = settings.quota_bytes;
        (new.memory_bytes, new.vcpus) = (settings.memory_bytes, settings.vcpus);
        new.cpu_weight = settings.cpu_weight;
        new.cpu_percent = settings.cpu_percent;
        new.io_rate = settings.io_rate;
        new.io_operations = settings.io_operations;
        new.processes = settings.processes;
        let digits = &settings.machine_id;
        let machine_id = u128::from_str_radix(digits, 16)
            .ok()
            .filter(|_| digits.len() == 32 && digits.bytes().all(|b| b.is_ascii_hexdigit()))
            .ok_or_else(|| field("the machine id", digits))?
            .to_be_bytes();
        (new.disabled, new.disabled_until) = (settings.disabled, settings.disabled_until);
        new.expires = settings.expires;
        new.max_streams = settings.max_streams;
        if let Some(class) = settings.class.as_deref().filter(|class| !is_word(class)) {
            return Err(field("the class", class));
        }
        new.class = settings.class.clone();
        // Under another name its user gets that one in the guest.
        let inside = AccountName::parse(&settings.guest_name)?.to_string();
        let guest_name = Some(inside).filter(|inside| name == settings.name && *inside != name);
        Ok((new, Identity { machine_id, guest_name, ..Identity::draw() }))
    }
}
