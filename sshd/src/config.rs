//! The service's configuration: one TOML file, every field optional. `config/hermitage.toml` is the
//! commented default.

mod sections;

use std::{
    net::SocketAddr,
    path::{Path, PathBuf},
};

use serde::{Deserialize, Serialize};

use crate::limits::{self, Classes};
pub use sections::{Audit, History, MACHINE_USER, Machines, Metrics, Ssh};

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

#[derive(Debug, thiserror::Error)]
pub enum ConfigError {
    #[error("can't read the configuration {path}: {error}")]
    Read { path: PathBuf, error: std::io::Error },
    #[error("the configuration {path} is not right: {error}")]
    Parse { path: PathBuf, error: Box<toml::de::Error> },
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
            Err(error) => return Err(ConfigError::Read { path: path.into(), error }),
        };
        let config: Self = toml::from_str(&text)
            .map_err(|error| ConfigError::Parse { path: path.into(), error: Box::new(error) })?;
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
            ("ssh.max_ended_channels", self.ssh.max_ended_channels as u64),
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
            (
                "machines.processes",
                machines.processes.into(),
                limits::processes_fault(machines.processes),
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
