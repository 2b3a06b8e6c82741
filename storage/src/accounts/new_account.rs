//! An account that is to be made.

use super::account::DEFAULT_DISK_BYTES;
use super::{AccountName, Policy, PublicKey};
use uuid::Uuid;

#[derive(Clone, Debug)]
pub struct NewAccount {
    pub name: AccountName,
    pub password_hash: Option<String>,
    pub keys: Vec<PublicKey>,
    pub disk_bytes: u64,
    pub class: Option<String>,
    pub max_sessions: Option<u32>,
    pub max_streams: Option<u32>,
    pub linger_s: Option<u32>,
    pub policy: Option<Policy>,
    pub max_linger_s: Option<u32>,
    /// 0: without end.
    pub quota_bytes: Option<u64>,
    pub memory_bytes: Option<u64>,
    pub vcpus: Option<u8>,
    pub cpu_weight: Option<u32>,
    pub cpu_percent: Option<u32>,
    pub io_rate: Option<u64>,
    pub io_operations: Option<u32>,
    pub processes: Option<u32>,
    pub expires: Option<i64>,
    /// Made closed: nobody logs in until it is opened.
    pub disabled: bool,
    /// Or until then.
    pub disabled_until: Option<i64>,
}

impl NewAccount {
    /// With default limits, no password, no key.
    pub fn new(name: AccountName) -> Self {
        Self {
            name,
            password_hash: None,
            keys: Vec::new(),
            disk_bytes: DEFAULT_DISK_BYTES,
            class: None,
            max_sessions: None,
            max_streams: None,
            linger_s: None,
            policy: None,
            max_linger_s: None,
            quota_bytes: None,
            memory_bytes: None,
            vcpus: None,
            cpu_weight: None,
            cpu_percent: None,
            io_rate: None,
            io_operations: None,
            processes: None,
            expires: None,
            disabled: false,
            disabled_until: None,
        }
    }
}

/// What an account is told apart by.
#[derive(Clone, Debug)]
pub struct Identity {
    pub id: Uuid,
    /// machine-id(5): 128 random bits, formatted as a version 4 UUID by convention.
    pub machine_id: [u8; 16],
    /// Its user in the guest, where that is not the account's name.
    pub guest_name: Option<String>,
}

impl Identity {
    pub fn draw() -> Self {
        let (id, machine_id) = (Uuid::new_v4(), *Uuid::new_v4().as_bytes());
        Self { id, machine_id, guest_name: None }
    }
}
