//! What is asked for of an account, by options or by a line of a list: its class, disk, limits and end.

use super::context::Context;
use super::{NotFound, account_idle, account_size, date, size, span, time};
use hermitage::limits;
use hermitage_storage::accounts::{Account, Changes, NewAccount, Policy};

/// Of an account's own, or as its class and the configuration say.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Own<T> {
    Value(T),
    Default,
}

impl<T: Clone> Own<T> {
    pub fn value(&self) -> Option<T> {
        match self {
            Own::Value(value) => Some(value.clone()),
            Own::Default => None,
        }
    }
}

#[derive(Clone, Debug, Default, PartialEq, Eq, clap::Args)]
pub struct Wanted {
    /// A class of the configuration, [class.NAME], or "none"
    #[arg(long, value_name = "CLASS", value_parser = class)]
    pub class: Option<Own<String>>,
    /// Size of the disk, which takes only what is written to it [default: as the class says, or 10G]
    #[arg(long, value_name = "SIZE", value_parser = size::parse)]
    pub disk: Option<u64>,
    /// What its disk, saved memory and checkpoints may take on the host together: 20G, "none", or "default": as
    /// the class or the configuration says
    #[arg(long, value_name = "SIZE", value_parser = quota)]
    pub quota: Option<Own<u64>>,
    /// Most sessions at once, or "default": as the class says, or 32
    #[arg(long, visible_alias = "max-sessions", value_name = "N", value_parser = sessions)]
    pub sessions: Option<Own<u32>>,
    /// Most streams that one connection forwards, or "default": as the class or the configuration says
    #[arg(long, visible_alias = "max-streams", value_name = "N", value_parser = streams)]
    pub streams: Option<Own<u32>>,
    /// How long its machine stays after the last session, or "default"
    #[arg(long, value_name = "TIME", value_parser = time_span)]
    pub linger: Option<Own<u32>>,
    /// How long work may keep its machine awake after the last session, or "default"
    #[arg(long, value_name = "TIME", value_parser = time_span)]
    pub max_linger: Option<Own<u32>>,
    /// What happens to its machine when nobody is logged in: save, keep, discard or "default"
    #[arg(long, value_name = "POLICY", value_parser = policy)]
    pub policy: Option<Own<Policy>>,
    /// Memory of its machine, in multiples of 128M, as far as the base has it, or "default": as the class or the base
    /// says
    #[arg(long, value_name = "SIZE", value_parser = memory)]
    pub memory: Option<Own<u64>>,
    /// Virtual CPUs of its machine, as far as the base has them, or "default"
    #[arg(long, value_name = "N", value_parser = vcpus)]
    pub vcpus: Option<Own<u8>>,
    /// Its machine's weight against others' where processors are scarce, 1 to 10000 (100 is usual), or "default"
    #[arg(long, value_name = "N", value_parser = cpu_weight)]
    pub cpu_weight: Option<Own<u32>>,
    /// Most processor time of its machine, in hundredths of one processor, "none" or "default"
    #[arg(long, value_name = "N", value_parser = cpu_percent)]
    pub cpu_percent: Option<Own<u32>>,
    /// Bytes that its machine reads from the host's disk a second, and as many that it writes, "none" or "default"
    #[arg(long, value_name = "SIZE", value_parser = io_rate)]
    pub io_rate: Option<Own<u64>>,
    /// The same of operations a second
    #[arg(long, value_name = "N", value_parser = io_operations)]
    pub io_operations: Option<Own<u32>>,
    /// Most processes and threads in its machine, "none" or "default"
    #[arg(long, value_name = "N", value_parser = processes)]
    pub processes: Option<Own<u32>>,
    /// From when on nobody logs in: 2027-06-30, 2027-06-30T18:00 (UTC), 90d or "never"
    #[arg(long, value_name = "TIME", value_parser = expiry)]
    pub expires: Option<Own<i64>>,
}

/// Less is a slip of the pen: an empty disk takes more.
const SMALLEST_QUOTA: u64 = 1 << 20;

/// Something that is not as it is asked for.
pub struct Difference {
    /// `its disk is 10 GiB, not 20 GiB`
    pub words: String,
    /// The option of `account set` that would change it: `--disk 20GiB`.
    pub option: String,
}

impl Wanted {
    pub fn is_empty(&self) -> bool {
        *self == Self::default()
    }

    /// A class that nobody knows is a slip of the pen.
    pub fn check(&self, context: &Context) -> anyhow::Result<()> {
        account_size::check_base(context, self)?;
        let Some(Own::Value(class)) = &self.class else { return Ok(()) };
        let classes = &context.config.classes;
        if classes.contains_key(class) {
            return Ok(());
        }
        let known: Vec<_> = classes.keys().map(String::as_str).collect();
        let known = match known.as_slice() {
            [] => format!("it has none; [class.{class}] makes one"),
            known => format!("it has {}", known.join(", ")),
        };
        Err(NotFound(format!("there is no class \"{class}\" in the configuration: {known}")).into())
    }

    pub fn fill(&self, context: &Context, new: &mut NewAccount) {
        new.class = self.class.as_ref().and_then(Own::value);
        let of_class = || limits::new_disk(&context.config, new.class.as_deref());
        new.disk_bytes = self.disk.unwrap_or_else(of_class);
        new.quota_bytes = self.quota.as_ref().and_then(Own::value);
        new.max_sessions = self.sessions.as_ref().and_then(Own::value);
        new.max_streams = self.streams.as_ref().and_then(Own::value);
        new.linger_s = self.linger.as_ref().and_then(Own::value);
        new.max_linger_s = self.max_linger.as_ref().and_then(Own::value);
        new.policy = self.policy.as_ref().and_then(Own::value);
        new.memory_bytes = self.memory.as_ref().and_then(Own::value);
        new.vcpus = self.vcpus.as_ref().and_then(Own::value);
        new.cpu_weight = self.cpu_weight.as_ref().and_then(Own::value);
        new.cpu_percent = self.cpu_percent.as_ref().and_then(Own::value);
        new.io_rate = self.io_rate.as_ref().and_then(Own::value);
        new.io_operations = self.io_operations.as_ref().and_then(Own::value);
        new.processes = self.processes.as_ref().and_then(Own::value);
        new.expires = self.expires.as_ref().and_then(Own::value);
    }

    /// All but the disk, which is more than its number.
    pub fn changes(&self) -> Changes {
        Changes {
            class: self.class.as_ref().map(Own::value),
            quota_bytes: self.quota.as_ref().map(Own::value),
            max_sessions: self.sessions.as_ref().map(Own::value),
            max_streams: self.streams.as_ref().map(Own::value),
            linger_s: self.linger.as_ref().map(Own::value),
            max_linger_s: self.max_linger.as_ref().map(Own::value),
            policy: self.policy.as_ref().map(Own::value),
            memory_bytes: self.memory.as_ref().map(Own::value),
            vcpus: self.vcpus.as_ref().map(Own::value),
            cpu_weight: self.cpu_weight.as_ref().map(Own::value),
            cpu_percent: self.cpu_percent.as_ref().map(Own::value),
            io_rate: self.io_rate.as_ref().map(Own::value),
            io_operations: self.io_operations.as_ref().map(Own::value),
            processes: self.processes.as_ref().map(Own::value),
            expires: self.expires.as_ref().map(Own::value),
            ..Changes::default()
        }
    }

    /// In what the account is not as it is asked for here.
    pub fn differences(&self, account: &Account) -> Vec<Difference> {
        let mut found = Vec::new();
        let number = |n: u32| n.to_string();
        let named = |policy: Policy| policy.as_str().to_owned();
        let own = "default";
        let a = account;
        found.extend(differs(("class", "class"), &a.class, &self.class, |class| class, "none"));
        found.extend(differs(("quota", "quota"), &a.quota_bytes, &self.quota, bytes_or_none, own));
        let sessions = ("number of sessions", "sessions");
        found.extend(differs(sessions, &a.max_sessions, &self.sessions, number, own));
        let streams = ("number of streams", "streams");
        found.extend(differs(streams, &a.max_streams, &self.streams, number, own));
        found.extend(differs(("linger", "linger"), &a.linger_s, &self.linger, span::show, own));
        let longest = ("max-linger", "max-linger");
        found.extend(differs(longest, &a.max_linger_s, &self.max_linger, span::show, own));
        found.extend(differs(("policy", "policy"), &a.policy, &self.policy, named, own));
        found.extend(differs(("memory", "memory"), &a.memory_bytes, &self.memory, exact_size, own));
        let vcpus = ("number of CPUs", "vcpus");
        found.extend(differs(vcpus, &a.vcpus, &self.vcpus, |n| n.to_string(), own));
        let weight = ("CPU weight", "cpu-weight");
        found.extend(differs(weight, &a.cpu_weight, &self.cpu_weight, number, own));
        let cap = ("CPU cap", "cpu-percent");
        found.extend(differs(cap, &a.cpu_percent, &self.cpu_percent, number_or_none, own));
        let rate = ("i/o rate", "io-rate");
        found.extend(differs(rate, &a.io_rate, &self.io_rate, bytes_or_none, own));
        let operations = ("number of i/o operations", "io-operations");
        found.extend(differs(
            operations,
            &a.io_operations,
            &self.io_operations,
            number_or_none,
            own,
        ));
        let processes = ("number of processes", "processes");
        found.extend(differs(processes, &a.processes, &self.processes, number_or_none, own));
        let end = |seconds: i64| time::rfc3339(seconds);
        found.extend(differs(("end", "expires"), &a.expires, &self.expires, end, "never"));
        if let Some(bytes) = self.disk.filter(|bytes| *bytes != account.disk_bytes) {
            let wanted = exact_size(bytes);
            found.push(Difference {
                words: format!("its disk has {}, not {wanted}", exact_size(account.disk_bytes)),
                option: format!("--disk {wanted}"),
            });
        }
        found
    }
}

/// What of one setting, by its name and its option, is not as it is asked for. `none`: the word for an account that has
/// none of its own.
fn differs<T: Clone>(
    (what, option): (&str, &str),
    is: &Option<T>,
    wanted: &Option<Own<T>>,
    show: impl Fn(T) -> String,
    none: &str,
) -> Option<Difference> {
    let is = is.clone().map(&show);
    let wanted = wanted.as_ref()?.value().map(&show);
    if is == wanted {
        return None;
    }
    let say = |value: Option<String>| value.unwrap_or_else(|| none.to_owned());
    let value = say(wanted);
    let quoted = if value.contains(' ') { format!("\"{value}\"") } else { value.clone() };
    Some(Difference {
        words: format!("its {what} is {}, not {value}", say(is)),
        option: format!("--{option} {quoted}"),
    })
}

fn bytes_or_none(bytes: u64) -> String {
    if bytes == 0 { "none".into() } else { exact_size(bytes) }
}

/// A size in the largest unit that says it exactly: what can be typed again.
fn exact_size(bytes: u64) -> String {
    for (unit, bits) in [("GiB", 30), ("MiB", 20), ("KiB", 10)] {
        if bytes > 0 && bytes.is_multiple_of(1 << bits) {
            return format!("{}{unit}", bytes >> bits);
        }
    }
    bytes.to_string()
}

fn own<T>(
    text: &str,
    default: &str,
    parse: impl Fn(&str) -> Result<T, String>,
) -> Result<Own<T>, String> {
    if text == default { Ok(Own::Default) } else { parse(text).map(Own::Value) }
}

pub fn class(text: &str) -> Result<Own<String>, String> {
    own(text, "none", |name| match name {
        "" => Err("a class has a name".into()),
        name => Ok(name.to_owned()),
    })
}

/// "none" is 0.
pub fn quota(text: &str) -> Result<Own<u64>, String> {
    own(text, "default", |text| match text {
        "none" => Ok(0),
        text => match size::parse(text)? {
            bytes if bytes < SMALLEST_QUOTA => {
                Err(format!("{text} is no quota: 1M or more, \"none\" or \"default\""))
            }
            bytes => Ok(bytes),
        },
    })
}

pub fn sessions(text: &str) -> Result<Own<u32>, String> {
    own(text, "default", |text| match text.parse() {
        Ok(0) | Err(_) => {
            Err(format!("\"{text}\" is no number of sessions: 1 or more, or \"default\""))
        }
        Ok(n) => Ok(n),
    })
}

pub fn streams(text: &str) -> Result<Own<u32>, String> {
    own(text, "default", |text| {
        text.parse()
            .map_err(|_| format!("\"{text}\" is no number of streams: 0 or more, or \"default\""))
    })
}

pub fn time_span(text: &str) -> Result<Own<u32>, String> {
    own(text, "default", span::parse)
}

pub fn memory(text: &str) -> Result<Own<u64>, String> {
    let bytes = |text: &str| size::parse(text).map_err(drop);
    own(text, "default", |text| fitting(text, bytes(text), limits::memory_fault, "or \"default\""))
}

pub fn vcpus(text: &str) -> Result<Own<u8>, String> {
    own(text, "default", |text| {
        fitting(text, text.parse().map_err(drop), limits::vcpus_fault, "or \"default\"")
    })
}

pub fn cpu_weight(text: &str) -> Result<Own<u32>, String> {
    own(text, "default", |text| {
        fitting(text, text.parse().map_err(drop), limits::weight_fault, "or \"default\"")
    })
}

pub fn cpu_percent(text: &str) -> Result<Own<u32>, String> {
    capping(text, |text| text.parse().map_err(drop), limits::percent_fault)
}

pub fn io_rate(text: &str) -> Result<Own<u64>, String> {
    // The word "second" is in the option's meaning.
    let bytes = |text: &str| size::parse(text.strip_suffix("/s").unwrap_or(text)).map_err(drop);
    capping(text, bytes, limits::rate_fault)
}

pub fn io_operations(text: &str) -> Result<Own<u32>, String> {
    capping(text, |text| text.parse().map_err(drop), limits::operations_fault)
}

pub fn processes(text: &str) -> Result<Own<u32>, String> {
    capping(text, |text| text.parse().map_err(drop), limits::processes_fault)
}

/// A cap, "none", which is 0, or "default".
fn capping<T: Copy + Default>(
    text: &str,
    parse: impl Fn(&str) -> Result<T, ()>,
    fault: impl Fn(T) -> Option<&'static str>,
) -> Result<Own<T>, String> {
    own(text, "default", |text| match text {
        "none" => Ok(T::default()),
        text => fitting(text, parse(text), &fault, "\"none\" or \"default\""),
    })
}

fn fitting<T: Copy>(
    text: &str,
    parsed: Result<T, ()>,
    fault: impl Fn(T) -> Option<&'static str>,
    words: &str,
) -> Result<T, String> {
    match parsed.map(|value| (value, fault(value))) {
        Ok((value, None)) => Ok(value),
        Ok((_, Some(expected))) => Err(format!("\"{text}\": {expected}, {words}")),
        Err(()) => Err(format!("\"{text}\" is none: a number, {words}")),
    }
}

fn number_or_none(cap: u32) -> String {
    if cap == 0 { "none".into() } else { cap.to_string() }
}

pub fn policy(text: &str) -> Result<Own<Policy>, String> {
    own(text, "default", account_idle::parse_policy)
}

pub fn expiry(text: &str) -> Result<Own<i64>, String> {
    own(text, "never", date::parse)
}
