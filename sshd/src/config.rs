//! The service's configuration: one TOML file, every field optional. `config/hermitage.toml` is the
//! commented default.

use std::{
    net::{IpAddr, SocketAddr},
    path::{Path, PathBuf},
    time::Duration,
};

use ipnet::IpNet;
use serde::{Deserialize, Deserializer, Serialize, de::Error as _};

use crate::limits::{self, Classes};

#[derive(Clone, Debug, Deserialize, Serialize)]
#[serde(default, deny_unknown_fields)]
pub struct Config {
    pub state_dir: PathBuf,
    pub run_dir: PathBuf,
    /// Where `hermitage-vmm` is. Default: `HERMITAGE_LIBEXEC`, or beside this program, or `/usr/libexec/hermitage`.
    pub libexec_dir: Option<PathBuf>,
    pub ssh: Ssh,
    pub machines: Machines,
    /// What accounts of a class may have where they have nothing of their own.
    #[serde(rename = "class")]
    pub classes: Classes,
    pub audit: Audit,
    pub history: History,
    pub metrics: Metrics,
}

impl Default for Config {
    fn default() -> Self {
        Self {
            state_dir: "/var/lib/hermitage".into(),
            run_dir: "/run/hermitage".into(),
            libexec_dir: None,
            ssh: Ssh::default(),
            machines: Machines::default(),
            classes: Classes::default(),
            audit: Audit::default(),
            history: History::default(),
            metrics: Metrics::default(),
        }
    }
}

#[derive(Clone, Debug, Deserialize, Serialize)]
#[serde(default, deny_unknown_fields)]
pub struct Ssh {
    pub listen: Vec<SocketAddr>,
    /// Seconds a client has to authenticate.
    pub login_grace: u64,
    /// Failed attempts (a wrong password, a bad signature) after which a connection is closed.
    pub max_failures: u32,
    /// Connections that have not authenticated yet, all together and per source address.
    pub max_unauthenticated: usize,
    pub max_unauthenticated_per_source: usize,
    /// From so many unauthenticated connections on some new ones are refused by chance: 30 of 100, and
    /// evenly more up to `max_unauthenticated`.
    pub early_drop: usize,
    /// Seconds for which a source that keeps failing is refused at most. 0: never.
    pub max_penalty: u64,
    /// Sources that are never refused for that: addresses and networks.
    #[serde(deserialize_with = "networks")]
    pub penalty_exempt: Vec<IpNet>,
    /// Connections, authenticated or not.
    pub max_connections: usize,
    /// Sessions of one connection.
    pub max_channels: usize,
    /// Streams that one connection forwards at a time, in either direction.
    pub max_streams: usize,
    /// Sockets that one connection has listened on in its machine.
    pub max_listeners: usize,
    /// Seconds between keepalives on an otherwise silent connection.
    pub keepalive: u64,
    /// Environment variables that clients may set, beside LANG, LC_*, TERM and COLORTERM. A trailing
    /// `*` stands for anything.
    pub accept_env: Vec<String>,
    /// Passwords verified at the same time (each takes 19 MiB and a core for some 20 ms).
    pub password_checks: usize,
    /// Milliseconds a failed attempt takes at least.
    pub failure_delay_ms: u64,
    /// File with what clients are shown before they log in.
    pub banner: Option<PathBuf>,
    /// File with the public keys of the authorities whose certificates log in. None: no certificate does.
    pub user_ca_keys: Option<PathBuf>,
    /// File with keys, fingerprints, and certificates' serials and ids, that open nothing.
    pub revoked_keys: Option<PathBuf>,
}

impl Default for Ssh {
    fn default() -> Self {
        Self {
            listen: vec![
                SocketAddr::from(([0, 0, 0, 0], 2222)),
                SocketAddr::from(([0u16; 8], 2222)),
            ],
            login_grace: 30,
            max_failures: 6,
            max_unauthenticated: 500,
            max_unauthenticated_per_source: 20,
            early_drop: 300,
            max_penalty: 600,
            penalty_exempt: vec![],
            max_connections: 4000,
            max_channels: 64,
            max_streams: 128,
            max_listeners: 32,
            keepalive: 30,
            accept_env: vec![],
            password_checks: 4,
            failure_delay_ms: 400,
            banner: None,
            user_ca_keys: None,
            revoked_keys: None,
        }
    }
}

#[derive(Clone, Debug, Deserialize, Serialize)]
#[serde(default, deny_unknown_fields)]
pub struct Machines {
    /// Seconds a machine stays after its last session left.
    pub linger: u64,
    /// Seconds from the fork until the account has its machine.
    pub start_timeout: u64,
    /// Seconds a guest has to power off in order; then it is killed.
    pub stop_timeout: u64,
    /// Seconds that saving all machines may take when the service stops.
    pub save_timeout: u64,
    /// Seconds to wait for the disk of a machine that a killed service left behind.
    pub stale_timeout: u64,
    /// No machine is started with less than this free where the state directory is.
    pub min_free_mib: u64,
    /// No machine is started with less memory than this available on the host. 0: whatever there is.
    pub min_available_mib: u64,
    /// Memory that running machines are promised together, in multiples of the host's. 0: without end.
    pub memory_overcommit: u64,
    /// What saving all running machines may take, in multiples of the room that is free. 0: without end.
    pub save_overcommit: u64,
    /// With less than this free there, guests get no new space on their disks. 0: never.
    pub guest_floor_mib: u64,
    /// What an account may take on the host: its disk, saved memory and checkpoints together. 0: as much as they
    /// can have.
    pub quota_mib: u64,
    /// Seconds that work may keep a machine awake after its last session left. 0: not at all.
    pub max_linger: u64,
    /// What work is, in hundredths of one processor.
    pub busy_cpu_percent: u64,
    /// Longest hold an operator may ask for, in seconds.
    pub max_hold: u64,
    /// What the host lets each machine take, where its account and class say nothing: its weight against
    /// other machines', hundredths of one processor, bytes and operations a second of the disk in each
    /// direction. 0: without end.
    pub cpu_weight: u32,
    pub cpu_percent: u32,
    #[serde(with = "limits::sized")]
    pub io_rate: u64,
    pub io_operations: u32,
    /// The control group below which machines' are. None: the one that the service is started in.
    pub cgroup: Option<PathBuf>,
    /// No machine is started whose limits can't be enforced.
    pub require_limits: bool,
    /// The host's user that machines run as. The default need not exist: then they run as nobody.
    pub user: String,
}

/// Whom the package makes for it.
pub const MACHINE_USER: &str = "hermitage-machine";

impl Default for Machines {
    fn default() -> Self {
        Self {
            linger: 60,
            start_timeout: 30,
            stop_timeout: 20,
            save_timeout: 80,
            stale_timeout: 30,
            min_free_mib: 512,
            min_available_mib: 128,
            memory_overcommit: 64,
            save_overcommit: 64,
            guest_floor_mib: 256,
            quota_mib: 0,
            max_linger: 4 * 3600,
            busy_cpu_percent: 10,
            max_hold: 7 * 86_400,
            cpu_weight: limits::Share::WEIGHT,
            cpu_percent: 0,
            io_rate: 0,
            io_operations: 0,
            cgroup: None,
            require_limits: false,
            user: MACHINE_USER.into(),
        }
    }
}

/// The audit log (docs/watching.md).
#[derive(Clone, Debug, Deserialize, Serialize)]
#[serde(default, deny_unknown_fields)]
pub struct Audit {
    /// Files of it that are kept, the one written to among them. 0: there is no audit log.
    pub files: u32,
    /// Size at which a file is put aside.
    pub max_file_mib: u64,
}

impl Default for Audit {
    fn default() -> Self {
        Self { files: 8, max_file_mib: 16 }
    }
}

/// What the database keeps of the past (docs/accounts.md, "History"); 0: all of it.
#[derive(Clone, Debug, Deserialize, Serialize)]
#[serde(default, deny_unknown_fields)]
pub struct History {
    /// Days that a session is remembered after its end.
    pub sessions_days: u32,
    /// Sessions that are remembered, the latest.
    pub most_sessions: u64,
    /// Days of which it is known what each account used.
    pub usage_days: u32,
}

impl Default for History {
    fn default() -> Self {
        Self { sessions_days: 400, most_sessions: 1_000_000, usage_days: 400 }
    }
}

/// Where metrics are asked for besides the socket in the run directory.
#[derive(Clone, Debug, Default, Deserialize, Serialize)]
#[serde(default, deny_unknown_fields)]
pub struct Metrics {
    /// Address and port, of loopback only.
    pub address: Option<SocketAddr>,
}

/// Networks, and addresses as networks of one.
fn networks<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Vec<IpNet>, D::Error> {
    let network = |text: String| {
        let address = text.parse::<IpAddr>().map(|address| address.to_canonical().into());
        address.or_else(|_| text.parse()).map_err(|_| {
            let example = "one that is: \"192.0.2.7\" or \"192.0.2.0/24\"";
            D::Error::custom(format!("\"{text}\" is no address and no network ({example})"))
        })
    };
    Vec::<String>::deserialize(deserializer)?.into_iter().map(network).collect()
}

#[derive(Debug, thiserror::Error)]
pub enum ConfigError {
    #[error("can't read the configuration {path}: {source}")]
    Read { path: PathBuf, source: std::io::Error },
    #[error("the configuration {path} is not right: {source}")]
    Parse { path: PathBuf, source: Box<toml::de::Error> },
    #[error("the configuration: {field} = {value} is out of range; {expected}")]
    Range { field: &'static str, value: u64, expected: &'static str },
    #[error("the configuration: {field} is not right; {expected}")]
    Class { field: String, expected: &'static str },
    #[error(
        "the configuration: metrics.address = \"{0}\" is not of this host alone; use 127.0.0.1 or [::1], \
         and a proxy for others"
    )]
    Public(SocketAddr),
}

/// Where the other programs are if they are not beside this one, and the one that is looked for.
const LIBEXEC_DIR: &str = "/usr/libexec/hermitage";
const LIBEXEC_PROGRAM: &str = "hermitage-vmm";

/// Where the configuration is looked for unless told.
pub const DEFAULT_PATH: &str = "/etc/hermitage/hermitage.toml";

/// Each is renamed when one is full.
const MOST_AUDIT_FILES: u32 = 1000;

impl Config {
    /// Reads `path`; without one, the default path if there is such a file, else the defaults.
    pub fn load(path: Option<&Path>) -> Result<Self, ConfigError> {
        let (path, required) = match path {
            Some(path) => (path, true),
            None => (Path::new(DEFAULT_PATH), false),
        };
        let text = match std::fs::read_to_string(path) {
            Ok(text) => text,
            Err(error) if error.kind() == std::io::ErrorKind::NotFound && !required => {
                return Ok(Self::default());
            }
            Err(source) => return Err(ConfigError::Read { path: path.into(), source }),
        };
        let config: Self = toml::from_str(&text)
            .map_err(|source| ConfigError::Parse { path: path.into(), source: Box::new(source) })?;
        config.check()?;
        Ok(config)
    }

    /// Refuses values that would make the service useless rather than strict.
    fn check(&self) -> Result<(), ConfigError> {
        let positive = [
            ("ssh.login_grace", self.ssh.login_grace),
            ("ssh.max_failures", self.ssh.max_failures.into()),
            ("ssh.max_unauthenticated", self.ssh.max_unauthenticated as u64),
            ("ssh.max_unauthenticated_per_source", self.ssh.max_unauthenticated_per_source as u64),
            ("ssh.max_connections", self.ssh.max_connections as u64),
            ("ssh.max_channels", self.ssh.max_channels as u64),
            ("ssh.keepalive", self.ssh.keepalive),
            ("ssh.password_checks", self.ssh.password_checks as u64),
            ("machines.start_timeout", self.machines.start_timeout),
            ("machines.stop_timeout", self.machines.stop_timeout),
            ("machines.save_timeout", self.machines.save_timeout),
            ("machines.busy_cpu_percent", self.machines.busy_cpu_percent),
            ("audit.max_file_mib", self.audit.max_file_mib),
        ];
        for (field, value) in positive {
            if value == 0 {
                return Err(ConfigError::Range {
                    field,
                    value,
                    expected: "it has to be 1 or more",
                });
            }
        }
        let machines = &self.machines;
        let shares = [
            (
                "machines.cpu_weight",
                u64::from(machines.cpu_weight),
                limits::weight_fault(machines.cpu_weight),
            ),
            (
                "machines.cpu_percent",
                machines.cpu_percent.into(),
                limits::percent_fault(machines.cpu_percent),
            ),
            ("machines.io_rate", machines.io_rate, limits::rate_fault(machines.io_rate)),
            (
                "machines.io_operations",
                machines.io_operations.into(),
                limits::operations_fault(machines.io_operations),
            ),
        ];
        for (field, value, fault) in shares {
            if let Some(expected) = fault {
                return Err(ConfigError::Range { field, value, expected });
            }
        }
        if let Some((field, expected)) = limits::fault(&self.classes) {
            return Err(ConfigError::Class { field, expected });
        }
        if self.audit.files > MOST_AUDIT_FILES {
            return Err(ConfigError::Range {
                field: "audit.files",
                value: self.audit.files.into(),
                expected: "it has to be 1000 or less",
            });
        }
        match self.metrics.address {
            Some(address) if !address.ip().to_canonical().is_loopback() => {
                Err(ConfigError::Public(address))
            }
            _ => Ok(()),
        }
    }

    /// Where `hermitage-vmm` and `hermitage-image` are.
    pub fn libexec_dir(&self) -> PathBuf {
        if let Some(dir) = &self.libexec_dir {
            return dir.clone();
        }
        if let Some(dir) = std::env::var_os("HERMITAGE_LIBEXEC") {
            return dir.into();
        }
        let beside =
            std::env::current_exe().ok().and_then(|program| Some(program.parent()?.to_owned()));
        match beside {
            Some(dir) if dir.join(LIBEXEC_PROGRAM).exists() => dir,
            // As the package installs them.
            _ => LIBEXEC_DIR.into(),
        }
    }
}

impl Ssh {
    pub fn max_penalty(&self) -> Duration {
        Duration::from_secs(self.max_penalty)
    }
}

impl Machines {
    pub fn linger(&self) -> Duration {
        Duration::from_secs(self.linger)
    }
    pub fn start_timeout(&self) -> Duration {
        Duration::from_secs(self.start_timeout)
    }
    pub fn stop_timeout(&self) -> Duration {
        Duration::from_secs(self.stop_timeout)
    }
    pub fn save_timeout(&self) -> Duration {
        Duration::from_secs(self.save_timeout)
    }
    pub fn stale_timeout(&self) -> Duration {
        Duration::from_secs(self.stale_timeout)
    }
    pub fn max_linger(&self) -> Duration {
        Duration::from_secs(self.max_linger)
    }
    pub fn max_hold(&self) -> Duration {
        Duration::from_secs(self.max_hold)
    }
    /// In bytes; 0: no end.
    pub fn quota(&self) -> u64 {
        self.quota_mib.saturating_mul(1 << 20)
    }
    /// In bytes.
    pub fn guest_floor(&self) -> u64 {
        self.guest_floor_mib.saturating_mul(1 << 20)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_unknown_field_is_refused_by_name() {
        let file = tempfile::NamedTempFile::new().unwrap();
        std::fs::write(file.path(), "[ssh]\nlogin_grase = 5\n").unwrap();
        let error = Config::load(Some(file.path())).unwrap_err().to_string();
        assert!(error.contains("login_grase"), "{error}");
    }

    #[test]
    fn a_grace_of_nothing_is_refused() {
        let file = tempfile::NamedTempFile::new().unwrap();
        std::fs::write(file.path(), "[ssh]\nlogin_grace = 0\n").unwrap();
        let error = Config::load(Some(file.path())).unwrap_err().to_string();
        assert!(error.contains("ssh.login_grace = 0"), "{error}");
    }

    #[test]
    fn metrics_are_for_this_host_alone() {
        let file = tempfile::NamedTempFile::new().unwrap();
        let load = |address: &str| {
            std::fs::write(file.path(), format!("[metrics]\naddress = \"{address}\"\n")).unwrap();
            Config::load(Some(file.path())).map(|config| config.metrics.address)
        };
        for fine in ["127.0.0.1:9222", "[::1]:9222", "[::ffff:127.0.0.9]:9222"] {
            assert_eq!(load(fine).unwrap(), Some(fine.parse().unwrap()));
        }
        for public in ["0.0.0.0:9222", "192.0.2.1:1", "[::]:9222"] {
            let error = load(public).unwrap_err().to_string();
            assert!(error.contains(public) && error.contains("127.0.0.1"), "{error}");
        }
    }

    #[test]
    fn networks_and_addresses_are_read_and_others_named() {
        let file = tempfile::NamedTempFile::new().unwrap();
        let write = |list: &str| {
            std::fs::write(file.path(), format!("[ssh]\npenalty_exempt = {list}\n")).unwrap();
            Config::load(Some(file.path()))
        };
        let read = write(r#"["192.0.2.7", "2001:db8::/32", "::ffff:10.0.0.1"]"#).unwrap();
        let shown: Vec<_> = read.ssh.penalty_exempt.iter().map(ToString::to_string).collect();
        assert_eq!(shown, ["192.0.2.7/32", "2001:db8::/32", "10.0.0.1/32"]);
        let error = write(r#"["192.0.2.300"]"#).unwrap_err().to_string();
        assert!(error.contains("192.0.2.300") && error.contains("192.0.2.0/24"), "{error}");
    }

    #[test]
    fn what_is_not_said_keeps_its_default() {
        let file = tempfile::NamedTempFile::new().unwrap();
        std::fs::write(file.path(), "[machines]\nlinger = 5\n").unwrap();
        let config = Config::load(Some(file.path())).unwrap();
        assert_eq!(config.machines.linger, 5);
        assert_eq!(config.ssh.login_grace, 30);
    }

    #[test]
    fn a_named_file_that_is_missing_is_an_error() {
        let error = Config::load(Some(Path::new("/nowhere/h.toml"))).unwrap_err().to_string();
        assert!(error.contains("/nowhere/h.toml"), "{error}");
    }
}
