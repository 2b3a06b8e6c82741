//! What is counted and measured, under the names that dashboards and alarms use: docs/watching.md has the
//! table. Text format: OpenMetrics 1.0, by `prometheus-client`.
//!
//! No label's value comes from a user, a guest or a client: the number of series is fixed.

use std::{sync::atomic::AtomicU64, time::Duration};

use prometheus_client::{
    encoding::text::encode,
    metrics::{counter::Counter, family::Family, gauge::Gauge, histogram::Histogram},
    registry::Registry,
};

use super::{
    Event, Method,
    scales::{BYTES, SECONDS, SESSION_SECONDS, STAGE_SECONDS, STAGES},
};
use crate::server::Refusal;

type Labels = Vec<(&'static str, &'static str)>;
type Histograms = Family<Labels, Histogram, fn() -> Histogram>;

/// Kinds of sessions; `lobby`: the service answered itself.
pub(super) const KINDS: [&str; 5] = ["shell", "exec", "sftp", "forward", "lobby"];

pub(super) fn kind_label(kind: &'static str) -> &'static str {
    if kind.starts_with('+') { "lobby" } else { kind }
}

const OTHER_STAGE: &str = "other";

pub struct Metrics {
    registry: Registry,
    logins: Family<Labels, Counter>,
    refused_connections: Family<Labels, Counter>,
    penalties: Counter,
    sessions: Family<Labels, Counter>,
    session_seconds: Histograms,
    session_bytes: Family<Labels, Counter>,
    quotas_reached: Counter,
    start_seconds: Histograms,
    start_retries: Counter,
    start_failures: Counter,
    stage_seconds: Histograms,
    saves: Family<Labels, Counter>,
    save_seconds: Histogram,
    saved_bytes: Histogram,
    ends: Counter,
    held_back: Counter<f64, AtomicU64>,
    admin_requests: Counter,
    reloads: Family<Labels, Counter>,
    pub(super) now: Gauges,
}

/// What is looked up when somebody asks.
#[derive(Default)]
pub(super) struct Gauges {
    pub start_time: Gauge,
    pub connections: Gauge,
    pub sessions: Family<Labels, Gauge>,
    pub machines: Family<Labels, Gauge>,
    pub memory: Family<Labels, Gauge>,
    pub largest_memory: Gauge,
    pub free_bytes: Gauge,
    pub log_messages: Family<Labels, Counter>,
    pub audit_lost: Counter<u64, AtomicU64>,
}

impl Default for Metrics {
    fn default() -> Self {
        let seconds: fn() -> Histogram = || Histogram::new(SECONDS);
        let stage_seconds: fn() -> Histogram = || Histogram::new(STAGE_SECONDS);
        let session_seconds: fn() -> Histogram = || Histogram::new(SESSION_SECONDS);
        let mut metrics = Self {
            registry: Registry::with_prefix("hermitage"),
            logins: Family::default(),
            refused_connections: Family::default(),
            penalties: Counter::default(),
            sessions: Family::default(),
            session_seconds: Family::new_with_constructor(session_seconds),
            session_bytes: Family::default(),
            quotas_reached: Counter::default(),
            start_seconds: Family::new_with_constructor(seconds),
            start_retries: Counter::default(),
            start_failures: Counter::default(),
            stage_seconds: Family::new_with_constructor(stage_seconds),
            saves: Family::default(),
            save_seconds: Histogram::new(SECONDS),
            saved_bytes: Histogram::new(BYTES),
            ends: Counter::default(),
            held_back: Counter::default(),
            admin_requests: Counter::default(),
            reloads: Family::default(),
            now: Gauges::default(),
        };
        metrics.register();
        metrics.begin_at_zero();
        metrics
    }
}

impl Metrics {
    fn register(&mut self) {
        let all = &mut self.registry;
        let build = prometheus_client::metrics::info::Info::new(vec![(
            "version",
            env!("CARGO_PKG_VERSION"),
        )]);
        all.register("build", "Which program this is", build);
        all.register("logins", "Authentications, by method and outcome", self.logins.clone());
        all.register(
            "connections_refused",
            "Connections that were not taken, by reason",
            self.refused_connections.clone(),
        );
        all.register(
            "penalties",
            "Times that a source began to be refused for a while",
            self.penalties.clone(),
        );
        all.register(
            "session_bytes",
            "Bytes of sessions that have ended, from clients and to them",
            self.session_bytes.clone(),
        );
        all.register(
            "quotas_reached",
            "Times that a machine got no more space because its account was at its quota",
            self.quotas_reached.clone(),
        );
        all.register("sessions", "Sessions that were begun, by kind", self.sessions.clone());
        all.register(
            "session_seconds",
            "How long ended sessions went on, by kind",
            self.session_seconds.clone(),
        );
        all.register(
            "machine_start_seconds",
            "From the word to start until the account has its machine, by how it came to be",
            self.start_seconds.clone(),
        );
        all.register(
            "machine_start_retries",
            "Forks that were lost before the account had them, and were made once more",
            self.start_retries.clone(),
        );
        all.register(
            "machine_start_failures",
            "Machines that could not be started",
            self.start_failures.clone(),
        );
        all.register(
            "machine_stage_seconds",
            "The stages of forks, resumes and saves",
            self.stage_seconds.clone(),
        );
        all.register("machine_saves", "Attempts to save a machine, by outcome", self.saves.clone());
        all.register(
            "machine_save_seconds",
            "How long saving a machine took",
            self.save_seconds.clone(),
        );
        all.register("machine_saved_bytes", "What was saved of machines", self.saved_bytes.clone());
        all.register("machine_ends", "Machines whose process has ended", self.ends.clone());
        all.register(
            "machine_held_back_seconds",
            "Time that machines stood still because of their caps of processor time",
            self.held_back.clone(),
        );
        all.register(
            "admin_requests",
            "Requests over the admin socket that are in the audit log",
            self.admin_requests.clone(),
        );
        all.register(
            "config_reloads",
            "Times that the configuration was read again, by outcome",
            self.reloads.clone(),
        );
        let now = &self.now;
        all.register(
            "start_time_seconds",
            "When the service started, in seconds since 1970",
            now.start_time.clone(),
        );
        all.register("connections_open", "Connections now", now.connections.clone());
        all.register("sessions_open", "Sessions now, by kind", now.sessions.clone());
        all.register("machines", "Accounts by their machine's state", now.machines.clone());
        all.register(
            "machine_memory_bytes",
            "Memory of all machines' processes: private pages, and page tables",
            now.memory.clone(),
        );
        all.register(
            "machine_memory_largest_bytes",
            "Private pages of the machine that has most",
            now.largest_memory.clone(),
        );
        all.register(
            "state_free_bytes",
            "Bytes free on the file system of the state directory",
            now.free_bytes.clone(),
        );
        all.register(
            "log_messages",
            "Warnings and errors in the service's log",
            now.log_messages.clone(),
        );
        all.register(
            "audit_lost",
            "Events that are missing from the audit log",
            now.audit_lost.clone(),
        );
    }

    /// What never happened is 0 and not absent: a rate needs a beginning.
    fn begin_at_zero(&self) {
        for method in [Method::Password, Method::Publickey, Method::Certificate] {
            for outcome in ["accepted", "refused"] {
                let labels = vec![("method", method.as_str()), ("outcome", outcome)];
                drop(self.logins.get_or_create(&labels));
            }
        }
        for outcome in ["saved", "failed", "called_off"] {
            drop(self.saves.get_or_create(&vec![("outcome", outcome)]));
        }
        for reason in Refusal::NAMES {
            drop(self.refused_connections.get_or_create(&vec![("reason", reason)]));
        }
        for direction in ["received", "sent"] {
            drop(self.session_bytes.get_or_create(&vec![("direction", direction)]));
        }
        for kind in KINDS {
            drop(self.sessions.get_or_create(&vec![("kind", kind)]));
        }
        for how in ["forked", "resumed", "cold"] {
            drop(self.start_seconds.get_or_create(&vec![("how", how)]));
        }
        for outcome in ["done", "refused"] {
            drop(self.reloads.get_or_create(&vec![("outcome", outcome)]));
        }
    }

    pub fn count(&self, event: &Event) {
        let login = |method: Method, outcome| {
            let labels = vec![("method", method.as_str()), ("outcome", outcome)];
            self.logins.get_or_create(&labels).inc();
        };
        let save = |outcome| {
            self.saves.get_or_create(&vec![("outcome", outcome)]).inc();
        };
        match event {
            Event::Login { method, .. } => login(*method, "accepted"),
            Event::LoginRefused { method, .. } => login(*method, "refused"),
            Event::ConnectionRefused { reason } => {
                self.refused_connections.get_or_create(&vec![("reason", *reason)]).inc();
            }
            Event::Penalty { .. } => {
                self.penalties.inc();
            }
            Event::SessionStarted { kind, .. } => {
                self.sessions.get_or_create(&vec![("kind", kind_label(kind))]).inc();
            }
            Event::SessionEnded { kind, seconds, received, sent, .. } => {
                for (direction, bytes) in [("received", received), ("sent", sent)] {
                    let labels = vec![("direction", direction)];
                    self.session_bytes.get_or_create(&labels).inc_by(*bytes);
                }
                let labels = vec![("kind", kind_label(kind))];
                self.session_seconds.get_or_create(&labels).observe(*seconds as f64);
            }
            Event::MachineStarted { how, milliseconds, stages, .. } => {
                let took = Duration::from_millis(*milliseconds).as_secs_f64();
                self.start_seconds.get_or_create(&vec![("how", *how)]).observe(took);
                self.count_stages(if *how == "resumed" { "resume" } else { "fork" }, stages);
            }
            Event::MachineRetried { .. } => {
                self.start_retries.inc();
            }
            Event::MachineFailed { .. } => {
                self.start_failures.inc();
            }
            Event::MachineSaved { bytes, milliseconds, stages, .. } => {
                save("saved");
                self.save_seconds.observe(Duration::from_millis(*milliseconds).as_secs_f64());
                self.saved_bytes.observe(*bytes as f64);
                self.count_stages("save", stages);
            }
            Event::SaveFailed { .. } => save("failed"),
            Event::SaveCalledOff { .. } => save("called_off"),
            Event::MachineEnded { .. } => {
                self.ends.inc();
            }
            Event::QuotaReached { .. } => {
                self.quotas_reached.inc();
            }
            Event::AdminRequest { .. } => {
                self.admin_requests.inc();
            }
            Event::ConfigReloaded { .. } => {
                self.reloads.get_or_create(&vec![("outcome", "done")]).inc();
            }
            Event::ConfigRefused { .. } => {
                self.reloads.get_or_create(&vec![("outcome", "refused")]).inc();
            }
            Event::ServiceStarted { .. }
            | Event::ServiceStopping
            | Event::ServiceStopped { .. }
            | Event::QuotaFree { .. }
            | Event::Copy { .. }
            | Event::Command { .. } => {}
        }
    }

    fn count_stages(&self, of: &'static str, stages: &[(String, u64)]) {
        for (name, nanoseconds) in stages {
            let stage = STAGES.iter().find(|known| *known == name).unwrap_or(&OTHER_STAGE);
            let labels = vec![("of", of), ("stage", stage)];
            let took = Duration::from_nanos(*nanoseconds).as_secs_f64();
            self.stage_seconds.get_or_create(&labels).observe(took);
        }
    }

    pub fn held_back(&self, time: Duration) {
        self.held_back.inc_by(time.as_secs_f64());
    }

    /// All of it, as text.
    pub fn text(&self) -> String {
        let mut text = String::new();
        if let Err(error) = encode(&mut text, &self.registry) {
            // Writing to a string does not fail.
            tracing::error!(%error, "metrics can't be put into words");
        }
        text
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use uuid::Uuid;

    #[test]
    fn a_machine_gives_no_names_to_series() {
        let metrics = Metrics::default();
        let stages = (0..1000).map(|n| (format!("evil{n}\"\n"), 5_000)).collect::<Vec<_>>();
        let started = Event::MachineStarted {
            account: "a".into(),
            id: Uuid::nil(),
            pid: 1,
            base: "b".into(),
            how: "forked",
            milliseconds: 40,
            detail: None,
            stages: [stages, vec![("create VM".into(), 20_000)]].concat(),
        };
        metrics.count(&started);
        let text = metrics.text();
        assert!(!text.contains("evil"), "{text}");
        let count = |stage: &str| {
            let line =
                format!("hermitage_machine_stage_seconds_count{{of=\"fork\",stage=\"{stage}\"}} ");
            text.lines().find_map(|found| found.strip_prefix(&line)?.parse::<u64>().ok())
        };
        assert_eq!((count("other"), count("create VM")), (Some(1000), Some(1)));
        assert!(
            text.contains("hermitage_machine_start_seconds_bucket{le=\"0.05\",how=\"forked\"} 1")
        );
    }

    #[test]
    fn what_never_happened_is_zero() {
        let text = Metrics::default().text();
        for line in [
            "hermitage_logins_total{method=\"password\",outcome=\"refused\"} 0",
            "hermitage_penalties_total 0",
            "hermitage_machine_saves_total{outcome=\"failed\"} 0",
            "hermitage_machine_start_seconds_count{how=\"resumed\"} 0",
        ] {
            assert!(text.lines().any(|found| found == line), "{line} is not in\n{text}");
        }
        assert!(text.ends_with("# EOF\n"));
    }
}
