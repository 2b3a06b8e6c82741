//! The file's tables, each with its defaults.

use std::{
    net::{IpAddr, SocketAddr},
    path::PathBuf,
    time::Duration,
};

use ipnet::IpNet;
use serde::{Deserialize, Deserializer, Serialize, de::Error as _};

use crate::limits;

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
    /// Sessions and streams of one connection that have ended, and whose client has not closed them before: some
    /// 4 KiB of memory each for as long as it lives.
    pub max_ended_channels: usize,
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
            max_ended_channels: 4096,
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
    /// Processes and threads of the user's in each machine, where account and class say nothing. 0: as many as its
    /// kernel has.
    pub processes: u32,
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
            processes: 0,
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
