//! The configuration as it counts now, and reading it again while the service runs (SIGHUP).
//!
//! What is read at the moment it is needed changes with the file; what was made of it when the service
//! started (listeners, directories, threads) does not, and is named in the log as needing a restart. No
//! session notices: limits count for what begins after.

use std::{
    collections::BTreeSet,
    ops::Deref,
    sync::{Arc, PoisonError, RwLock},
};

use serde_json::Value;
use tokio::signal::unix::Signal;

use super::Server;
use crate::{config::Config, watch::Event};

/// Settings of which something was made when the service started.
const FIXED: [&str; 15] = [
    "state_dir",
    "run_dir",
    "libexec_dir",
    "ssh.listen",
    "ssh.keepalive",
    "ssh.password_checks",
    "ssh.failure_delay_ms",
    "ssh.user_ca_keys",
    "ssh.revoked_keys",
    "machines.guest_floor_mib",
    "machines.cgroup",
    "machines.user",
    "audit.files",
    "audit.max_file_mib",
    "metrics.address",
];

/// The configuration: a reference to its fields is to those of now.
///
/// A former one is never freed, because somebody may still be reading it: some KiB each time that an
/// operator changes the file and says so.
#[derive(Clone)]
pub struct Settings {
    current: Arc<RwLock<&'static Config>>,
}

impl Settings {
    pub fn new(config: Config) -> Self {
        Self { current: Arc::new(RwLock::new(Box::leak(Box::new(config)))) }
    }

    fn now(&self) -> &'static Config {
        *self.current.read().unwrap_or_else(PoisonError::into_inner)
    }

    fn replace(&self, config: Config) {
        let config = Box::leak(Box::new(config));
        *self.current.write().unwrap_or_else(PoisonError::into_inner) = config;
    }
}

impl Deref for Settings {
    type Target = Config;

    fn deref(&self) -> &Config {
        self.now()
    }
}

/// How the file is read again.
pub type Reader = Box<dyn Fn() -> anyhow::Result<Config> + Send + Sync>;

/// Reads the configuration at every SIGHUP.
pub(super) async fn reload_on(mut hangup: Signal, server: Arc<Server>, reader: Reader) {
    let reader = Arc::new(reader);
    while hangup.recv().await.is_some() {
        let (reader, shared) = (reader.clone(), server.clone());
        // It reads files.
        let read = tokio::task::spawn_blocking(move || reload(&shared, &reader));
        match read.await {
            Ok(Ok(change)) => told(&server, change),
            Ok(Err(error)) => refused(&server, format!("{error:#}")),
            Err(error) => refused(&server, error.to_string()),
        }
    }
}

fn reload(server: &Server, reader: &Reader) -> anyhow::Result<Change> {
    let wanted = reader()?;
    super::check_files(&wanted)?;
    let (config, change) = merge(server.config.now(), &wanted)?;
    if !change.changed.is_empty() {
        server.penalties.set(config.ssh.max_penalty(), config.ssh.penalty_exempt.clone());
        server.config.replace(config);
    }
    Ok(change)
}

fn told(server: &Server, change: Change) {
    let Change { changed, needs_restart } = change;
    if changed.is_empty() {
        tracing::info!("the configuration was read again; nothing has changed that can change now");
    } else {
        tracing::info!(changed = changed.join(", "), "the configuration was read again");
        // What it says of idle machines counts at once.
        server.registry.known().into_iter().for_each(|account| server.registry.reconsider(account));
    }
    if !needs_restart.is_empty() {
        tracing::warn!(settings = needs_restart.join(", "), "these count after a restart only");
    }
    server.watch.tell(Event::ConfigReloaded { changed, needs_restart });
}

fn refused(server: &Server, reason: String) {
    tracing::error!(reason, "the configuration stays as it was");
    server.watch.tell(Event::ConfigRefused { reason });
}

/// Names of settings.
#[derive(Debug, Default, PartialEq)]
struct Change {
    changed: Vec<String>,
    needs_restart: Vec<String>,
}

/// `wanted`, but for what can't change now.
fn merge(current: &Config, wanted: &Config) -> anyhow::Result<(Config, Change)> {
    let (current, mut wanted) = (serde_json::to_value(current)?, serde_json::to_value(wanted)?);
    let mut names = BTreeSet::new();
    differences("", &current, &wanted, &mut names);
    let (needs_restart, changed): (Vec<_>, Vec<_>) =
        names.into_iter().partition(|name| FIXED.contains(&name.as_str()));
    for name in &needs_restart {
        let pointer = format!("/{}", name.replace('.', "/"));
        let before = current.pointer(&pointer).cloned().unwrap_or(Value::Null);
        if let Some(place) = wanted.pointer_mut(&pointer) {
            *place = before;
        }
    }
    Ok((serde_json::from_value(wanted)?, Change { changed, needs_restart }))
}

/// The dotted names of what is not the same in both.
fn differences(path: &str, one: &Value, other: &Value, names: &mut BTreeSet<String>) {
    match (one, other) {
        (Value::Object(one), Value::Object(other)) => {
            for key in one.keys().chain(other.keys()).collect::<BTreeSet<_>>() {
                let path = if path.is_empty() { key.clone() } else { format!("{path}.{key}") };
                let null = &Value::Null;
                let (one, other) = (one.get(key).unwrap_or(null), other.get(key).unwrap_or(null));
                differences(&path, one, other, names);
            }
        }
        _ if one != other => drop(names.insert(path.to_owned())),
        _ => {}
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_can_change_changes_and_the_rest_is_named() {
        let current = Config::default();
        let mut wanted = Config::default();
        wanted.ssh.max_channels = 7;
        wanted.ssh.penalty_exempt = vec!["192.0.2.0/24".parse().unwrap()];
        wanted.machines.linger = 5;
        wanted.ssh.listen = vec!["127.0.0.1:22".parse().unwrap()];
        wanted.metrics.address = Some("127.0.0.1:1".parse().unwrap());
        let (merged, change) = merge(&current, &wanted).unwrap();
        assert_eq!(change.changed, ["machines.linger", "ssh.max_channels", "ssh.penalty_exempt"]);
        assert_eq!(change.needs_restart, ["metrics.address", "ssh.listen"]);
        assert_eq!((merged.ssh.max_channels, merged.machines.linger), (7, 5));
        assert_eq!(merged.ssh.penalty_exempt, wanted.ssh.penalty_exempt);
        assert_eq!((&merged.ssh.listen, merged.metrics.address), (&current.ssh.listen, None));
        // And the next time what still differs is named again, and only that.
        let (_, change) = merge(&merged, &wanted).unwrap();
        assert_eq!(change.changed, [] as [&str; 0]);
        assert_eq!(change.needs_restart, ["metrics.address", "ssh.listen"]);
    }

    #[test]
    fn every_name_of_the_list_is_a_setting() {
        let config = serde_json::to_value(Config::default()).unwrap();
        for name in FIXED {
            let pointer = format!("/{}", name.replace('.', "/"));
            assert!(config.pointer(&pointer).is_some(), "{name}");
        }
    }

    #[test]
    fn whoever_holds_the_settings_sees_the_new_ones() {
        let settings = Settings::new(Config::default());
        let (held, before) = (settings.clone(), &settings.machines);
        let mut config = Config::default();
        config.machines.linger = 7;
        let old = before.linger;
        settings.replace(config);
        assert_eq!((old, before.linger, held.machines.linger), (60, 60, 7));
    }
}
