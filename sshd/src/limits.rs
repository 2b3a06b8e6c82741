//! What an account may have: its own word, else its class', else what the configuration says for all.
//!
//! A class is a table of the configuration, `[class.student]`. Accounts name theirs, so that a change of
//! the class counts for all of them, and that what one of them has of its own stays.

use std::{collections::BTreeMap, time::Duration};

use hermitage_storage::{
    accounts::{Account, DEFAULT_DISK_BYTES, DEFAULT_MAX_SESSIONS, MAX_CPU_WEIGHT, Policy},
    base::{MAX_MEMORY, MAX_VCPUS, MEMORY_BLOCK},
};
use serde::{Deserialize, Deserializer, Serialize, Serializer, de::Error as _};

use crate::{config::Config, size};

/// Longest name of a class.
const MAX_NAME: usize = 32;

pub type Classes = BTreeMap<String, Class>;

#[derive(Clone, Debug, Default, PartialEq, Eq, Deserialize, Serialize)]
#[serde(default, deny_unknown_fields)]
pub struct Class {
    /// Size of the disks of accounts that are made in it.
    #[serde(deserialize_with = "bytes", serialize_with = "as_bytes")]
    pub disk: Option<u64>,
    /// What its disk, saved memory and checkpoints may take together; 0: without end.
    #[serde(deserialize_with = "bytes", serialize_with = "as_bytes")]
    pub quota: Option<u64>,
    pub sessions: Option<u32>,
    /// Streams that one connection forwards at a time.
    pub streams: Option<u32>,
    /// Seconds.
    pub linger: Option<u32>,
    /// Seconds.
    pub max_linger: Option<u32>,
    #[serde(deserialize_with = "policy", serialize_with = "as_policy")]
    pub policy: Option<Policy>,
    /// Of its machines, where the base can give it.
    #[serde(deserialize_with = "bytes", serialize_with = "as_bytes")]
    pub memory: Option<u64>,
    pub vcpus: Option<u8>,
    pub cpu_weight: Option<u32>,
    pub cpu_percent: Option<u32>,
    #[serde(deserialize_with = "bytes", serialize_with = "as_bytes")]
    pub io_rate: Option<u64>,
    pub io_operations: Option<u32>,
    /// Of the user's in her machine.
    pub processes: Option<u32>,
}

/// What counts for an account.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Limits {
    pub max_sessions: u32,
    pub max_streams: usize,
    pub policy: Policy,
    pub linger: Duration,
    pub max_linger: Duration,
    /// Bytes that it may take on the host; `None`: as many as its disk, memory and checkpoints can have.
    pub quota: Option<u64>,
    pub resources: Resources,
    pub share: Share,
    /// Processes and threads in its machine; `None`: as many as its kernel has.
    pub processes: Option<u32>,
}

/// What a machine is to have of its own. `None`: the least that machines of its base have. The base has the last
/// word ([`hermitage_storage::base::Machine::fit`]).
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Resources {
    pub memory: Option<u64>,
    pub vcpus: Option<u8>,
}

/// What the host lets a machine take of its processors and its disk. `None`: as much as there is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Share {
    /// Against other machines', where all want more than there is.
    pub cpu_weight: u32,
    /// Hundredths of one processor.
    pub cpu_percent: Option<u32>,
    /// Bytes a second that are read, and as many that are written.
    pub io_rate: Option<u64>,
    /// The same of operations.
    pub io_operations: Option<u32>,
}

impl Share {
    /// What the kernel gives a group of which nothing is said.
    pub const WEIGHT: u32 = 100;
}

impl Default for Share {
    fn default() -> Self {
        Self { cpu_weight: Self::WEIGHT, cpu_percent: None, io_rate: None, io_operations: None }
    }
}

impl Limits {
    pub fn of(config: &Config, account: &Account) -> Self {
        let nothing = Class::default();
        // One that is not configured any more says nothing: doctor and `account show` tell.
        let class = account.class.as_ref().and_then(|name| config.classes.get(name));
        let class = class.unwrap_or(&nothing);
        let seconds = |own: Option<u32>, of_class: Option<u32>, configured| {
            own.or(of_class).map_or(configured, |seconds| Duration::from_secs(seconds.into()))
        };
        let machines = &config.machines;
        Self {
            max_sessions: account.max_sessions.or(class.sessions).unwrap_or(DEFAULT_MAX_SESSIONS),
            max_streams: account
                .max_streams
                .or(class.streams)
                .and_then(|streams| streams.try_into().ok())
                .unwrap_or(config.ssh.max_streams),
            policy: account.policy.or(class.policy).unwrap_or_default(),
            linger: seconds(account.linger_s, class.linger, machines.linger()),
            max_linger: seconds(account.max_linger_s, class.max_linger, machines.max_linger()),
            quota: Some(account.quota_bytes.or(class.quota).unwrap_or_else(|| machines.quota()))
                .filter(|bytes| *bytes > 0),
            resources: Resources {
                memory: account.memory_bytes.or(class.memory),
                vcpus: account.vcpus.or(class.vcpus),
            },
            share: Share {
                cpu_weight: account.cpu_weight.or(class.cpu_weight).unwrap_or(machines.cpu_weight),
                cpu_percent: cap(account.cpu_percent, class.cpu_percent, machines.cpu_percent),
                io_rate: cap(account.io_rate, class.io_rate, machines.io_rate),
                io_operations: cap(
                    account.io_operations,
                    class.io_operations,
                    machines.io_operations,
                ),
            },
            processes: cap(account.processes, class.processes, machines.processes),
        }
    }
}

/// The first that has something to say; 0 is no cap, also against what the others say.
fn cap<T: Default + PartialEq>(own: Option<T>, of_class: Option<T>, configured: T) -> Option<T> {
    Some(own.or(of_class).unwrap_or(configured)).filter(|cap| *cap != T::default())
}

/// The size of a new disk in that class.
pub fn new_disk(config: &Config, class: Option<&str>) -> u64 {
    let class = class.and_then(|name| config.classes.get(name));
    class.and_then(|class| class.disk).unwrap_or(DEFAULT_DISK_BYTES)
}

/// What is wrong with the classes, if anything: the field's name, and what it should be.
pub fn fault(classes: &Classes) -> Option<(String, &'static str)> {
    classes.iter().find_map(|(name, class)| {
        let fault = |field: &str, expected| Some((format!("class.{name}{field}"), expected));
        if !is_name(name) {
            let expected = "a class' name has 1 to 32 lowercase letters, digits, '-' and '_'";
            return fault("", expected);
        }
        if class.sessions == Some(0) {
            return fault(".sessions", "it has to be 1 or more");
        }
        if class.disk.is_some_and(|bytes| bytes == 0 || bytes % 4096 != 0) {
            return fault(".disk", "it has to be a multiple of 4 KiB");
        }
        let share = [
            (".memory", class.memory.and_then(memory_fault)),
            (".vcpus", class.vcpus.and_then(vcpus_fault)),
            (".cpu_weight", class.cpu_weight.and_then(weight_fault)),
            (".cpu_percent", class.cpu_percent.and_then(percent_fault)),
            (".io_rate", class.io_rate.and_then(rate_fault)),
            (".io_operations", class.io_operations.and_then(operations_fault)),
            (".processes", class.processes.and_then(processes_fault)),
        ];
        if let Some((field, expected)) = share.into_iter().find_map(|(f, e)| Some((f, e?))) {
            return fault(field, expected);
        }
        None
    })
}

// Below these a machine stands still rather than being slow. What is wrong with a value, if anything.

pub fn memory_fault(bytes: u64) -> Option<&'static str> {
    let fine = (MEMORY_BLOCK..=MAX_MEMORY).contains(&bytes) && bytes.is_multiple_of(MEMORY_BLOCK);
    (!fine).then_some("it has to be a multiple of 128 MiB, up to 62 GiB")
}

pub fn vcpus_fault(vcpus: u8) -> Option<&'static str> {
    (!(1..=MAX_VCPUS).contains(&vcpus)).then_some("it has to be 1 to 32")
}

pub fn weight_fault(weight: u32) -> Option<&'static str> {
    let fine = (1..=MAX_CPU_WEIGHT).contains(&weight);
    (!fine).then_some("it has to be 1 to 10000; 100 is what everybody has")
}

pub fn percent_fault(percent: u32) -> Option<&'static str> {
    let fine = percent == 0 || (5..=51_200).contains(&percent);
    (!fine).then_some("it has to be 5 to 51200 (100 is one processor), or 0 for no cap")
}

pub fn rate_fault(bytes: u64) -> Option<&'static str> {
    let fine = bytes == 0 || (1 << 16..=1 << 50).contains(&bytes);
    (!fine).then_some("it has to be 64 KiB or more (a second), or 0 for no cap")
}

pub fn operations_fault(operations: u32) -> Option<&'static str> {
    let fine = operations == 0 || operations >= 10;
    (!fine).then_some("it has to be 10 or more (a second), or 0 for no cap")
}

pub fn processes_fault(processes: u32) -> Option<&'static str> {
    // With fewer a shell and what it starts by itself may not do; there are no more process ids.
    let fine = processes == 0 || (20..=1 << 22).contains(&processes);
    (!fine).then_some("it has to be 20 to 4194304, or 0 for no limit")
}

fn is_name(name: &str) -> bool {
    let allowed = |c: char| c.is_ascii_lowercase() || c.is_ascii_digit() || "-_".contains(c);
    (1..=MAX_NAME).contains(&name.len()) && name.chars().all(allowed)
}

/// A number alone is bytes.
fn as_bytes<S: Serializer>(disk: &Option<u64>, serializer: S) -> Result<S::Ok, S::Error> {
    disk.map(|bytes| bytes.to_string()).serialize(serializer)
}

/// A size that is always said.
pub mod sized {
    use super::*;

    pub fn serialize<S: Serializer>(bytes: &u64, serializer: S) -> Result<S::Ok, S::Error> {
        bytes.to_string().serialize(serializer)
    }

    pub fn deserialize<'de, D: Deserializer<'de>>(deserializer: D) -> Result<u64, D::Error> {
        size::parse(&String::deserialize(deserializer)?).map_err(D::Error::custom)
    }
}

fn as_policy<S: Serializer>(policy: &Option<Policy>, serializer: S) -> Result<S::Ok, S::Error> {
    policy.map(Policy::as_str).serialize(serializer)
}

fn bytes<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Option<u64>, D::Error> {
    let text = Option::<String>::deserialize(deserializer)?;
    text.map(|text| size::parse(&text).map_err(D::Error::custom)).transpose()
}

fn policy<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Option<Policy>, D::Error> {
    let Some(name) = Option::<String>::deserialize(deserializer)? else { return Ok(None) };
    let policy = Policy::parse(&name);
    policy.map(Some).ok_or_else(|| D::Error::custom(format!("\"{name}\": save, keep or discard")))
}

#[cfg(test)]
mod tests {
    use hermitage_storage::accounts::{AccountName, Accounts, NewAccount};

    use super::*;

    fn load(text: &str) -> Result<Config, String> {
        let file = tempfile::NamedTempFile::new().unwrap();
        std::fs::write(file.path(), text).unwrap();
        Config::load(Some(file.path())).map_err(|error| error.to_string())
    }

    #[test]
    fn an_accounts_own_word_counts_before_its_class_and_that_before_the_rest() {
        let text = "[machines]\nlinger = 7\nquota_mib = 8192\n[ssh]\nmax_streams = 5\n[class.student]\ndisk = \"2GiB\"\n\
                    quota = \"3GiB\"\nsessions = 3\nmax_linger = 0\npolicy = \"discard\"\n[class.staff]\nstreams = 0\n";
        let config = load(text).unwrap();
        let dir = tempfile::tempdir().unwrap();
        let mut accounts = Accounts::open(&dir.path().join("accounts.db")).unwrap();
        let new = NewAccount::new(AccountName::parse("alice").unwrap());
        let plain = accounts.create(&new).unwrap();
        let seconds = Duration::from_secs;
        let everybodys = Limits {
            max_sessions: DEFAULT_MAX_SESSIONS,
            max_streams: 5,
            policy: Policy::Save,
            linger: seconds(7),
            max_linger: seconds(4 * 3600),
            quota: Some(8 << 30),
            resources: Resources::default(),
            share: Share::default(),
            processes: None,
        };
        assert_eq!(Limits::of(&config, &plain), everybodys);
        let student = Account { class: Some("student".into()), ..plain.clone() };
        let students = Limits {
            max_sessions: 3,
            policy: Policy::Discard,
            max_linger: seconds(0),
            quota: Some(3 << 30),
            ..everybodys.clone()
        };
        assert_eq!(Limits::of(&config, &student), students);
        let own = Account { max_sessions: Some(9), policy: Some(Policy::Keep), ..student };
        let own = Account { quota_bytes: Some(0), ..own };
        let wanted = Limits { max_sessions: 9, policy: Policy::Keep, quota: None, ..students };
        assert_eq!(Limits::of(&config, &own), wanted);
        let staff = Account { class: Some("staff".into()), ..plain.clone() };
        assert_eq!(Limits::of(&config, &staff).max_streams, 0);
        let gone = Account { class: Some("gone".into()), ..plain };
        assert_eq!(Limits::of(&config, &gone), everybodys);
        assert_eq!(new_disk(&config, Some("student")), 2 << 30);
        assert_eq!(new_disk(&config, Some("staff")), DEFAULT_DISK_BYTES);
    }

    #[test]
    fn a_share_is_the_accounts_its_class_or_everybodys_and_none_takes_a_cap_away() {
        let text = "[machines]\ncpu_percent = 200\nio_rate = \"20MiB\"\n\
                    [class.small]\ncpu_percent = 25\ncpu_weight = 50\nio_operations = 300\n";
        let config = load(text).unwrap();
        let dir = tempfile::tempdir().unwrap();
        let mut accounts = Accounts::open(&dir.path().join("accounts.db")).unwrap();
        let plain =
            accounts.create(&NewAccount::new(AccountName::parse("alice").unwrap())).unwrap();
        let share = |account: &Account| Limits::of(&config, account).share;
        let everybodys =
            Share { cpu_percent: Some(200), io_rate: Some(20 << 20), ..Share::default() };
        assert_eq!(share(&plain), everybodys);
        let small = Account { class: Some("small".into()), ..plain };
        let of_class =
            Share { cpu_weight: 50, cpu_percent: Some(25), io_operations: Some(300), ..everybodys };
        assert_eq!(share(&small), of_class);
        let own = Account { cpu_percent: Some(0), io_rate: Some(0), cpu_weight: Some(7), ..small };
        let wanted =
            Share { cpu_weight: 7, cpu_percent: None, io_rate: None, io_operations: Some(300) };
        assert_eq!(share(&own), wanted);
    }

    #[test]
    fn memory_and_processors_are_the_accounts_or_its_class_or_the_bases() {
        let config = load("[class.big]\nmemory = \"2GiB\"\nvcpus = 4\n").unwrap();
        let dir = tempfile::tempdir().unwrap();
        let mut accounts = Accounts::open(&dir.path().join("accounts.db")).unwrap();
        let plain =
            accounts.create(&NewAccount::new(AccountName::parse("alice").unwrap())).unwrap();
        let resources = |account: &Account| Limits::of(&config, account).resources;
        assert_eq!(resources(&plain), Resources::default());
        let big = Account { class: Some("big".into()), ..plain };
        assert_eq!(resources(&big), Resources { memory: Some(2 << 30), vcpus: Some(4) });
        let own = Account { memory_bytes: Some(1 << 30), ..big };
        assert_eq!(resources(&own), Resources { memory: Some(1 << 30), vcpus: Some(4) });
    }

    #[test]
    fn processes_are_limited_by_the_account_its_class_or_for_everybody() {
        let config = load("[machines]\nprocesses = 900\n[class.small]\nprocesses = 100\n").unwrap();
        let dir = tempfile::tempdir().unwrap();
        let mut accounts = Accounts::open(&dir.path().join("accounts.db")).unwrap();
        let plain =
            accounts.create(&NewAccount::new(AccountName::parse("alice").unwrap())).unwrap();
        let processes = |account: &Account| Limits::of(&config, account).processes;
        assert_eq!(processes(&plain), Some(900));
        let small = Account { class: Some("small".into()), ..plain };
        assert_eq!(processes(&small), Some(100));
        let own = Account { processes: Some(60), ..small };
        assert_eq!(processes(&own), Some(60));
        let none = Account { processes: Some(0), ..own };
        assert_eq!(processes(&none), None);
    }

    /// Reading the configuration again compares and merges it as JSON, where what is not said is null.
    #[test]
    fn a_class_of_few_words_survives_being_read_again() {
        let config =
            load("[class.a]\nsessions = 3\n[class.b]\ndisk = \"5GiB\"\npolicy = \"keep\"\n");
        let config = config.unwrap();
        let json = serde_json::to_value(&config).unwrap();
        let again: Config = serde_json::from_value(json).unwrap();
        assert_eq!(again.classes, config.classes);
    }

    #[test]
    fn classes_that_can_not_be_meant_are_refused_by_name() {
        for (text, words) in [
            ("[class.Student]\n", "class.Student"),
            ("[class.a]\nsessions = 0\n", "class.a.sessions"),
            ("[class.a]\ndisk = \"5000\"\n", "class.a.disk"),
            ("[class.a]\ndisk = \"much\"\n", "much"),
            ("[class.a]\ncpu_weight = 0\n", "class.a.cpu_weight"),
            ("[class.a]\ncpu_percent = 2\n", "class.a.cpu_percent"),
            ("[class.a]\nio_rate = \"1KiB\"\n", "class.a.io_rate"),
            ("[class.a]\nio_operations = 1\n", "class.a.io_operations"),
            ("[machines]\ncpu_percent = 1\n", "machines.cpu_percent = 1"),
            ("[class.a]\npolicy = \"sleep\"\n", "save, keep or discard"),
            ("[class.a]\nmemory = \"100MiB\"\n", "class.a.memory"),
            ("[class.a]\nvcpus = 0\n", "class.a.vcpus"),
            ("[class.a]\nprocesses = 19\n", "class.a.processes"),
            ("[machines]\nprocesses = 4194305\n", "machines.processes = 4194305"),
            ("[class.a]\nram = 5\n", "ram"),
        ] {
            let error = load(text).unwrap_err();
            assert!(error.contains(words), "{text}: {error}");
        }
    }
}
