//! What the service tells those who run it: each [`Event`] once, at one place, for two readers. The audit
//! log keeps it ([`audit`]), the metrics count it ([`metrics`]). Who is here now is in [`live`].
//!
//! Nobody waits for any of it: an event is handed over or, when the log does not keep up, counted as lost.

pub mod audit;
mod copying;
pub(crate) mod errors;
mod event;
pub mod exporter;
mod gather;
mod ledger;
mod live;
mod metrics;
mod scales;
mod writer;

use std::sync::Arc;

pub use copying::CopyNote;
pub use event::{Copied, Event, Method, Who};
pub use ledger::{Ledger, Meter, Traffic};
pub use live::{Live, LiveSessions, NewSession, Presence};
pub use metrics::Metrics;

use crate::config::Audit;
use audit::AuditLog;
use writer::Writer;

#[derive(Clone)]
pub struct Watch {
    inner: Arc<Inner>,
}

struct Inner {
    metrics: Metrics,
    sessions: LiveSessions,
    ledger: Ledger,
    writer: Option<Writer>,
}

impl Watch {
    /// `None`: no audit log is kept.
    pub fn new(log: Option<AuditLog>) -> Self {
        let writer = log.map(Writer::start);
        let inner = Inner {
            metrics: Metrics::default(),
            sessions: LiveSessions::default(),
            ledger: Ledger::default(),
            writer,
        };
        Self { inner: Arc::new(inner) }
    }

    pub fn tell(&self, event: Event) {
        self.inner.metrics.count(&event);
        if let Some(writer) = &self.inner.writer {
            writer.write(&event);
        }
    }

    pub fn metrics(&self) -> &Metrics {
        &self.inner.metrics
    }

    pub fn sessions(&self) -> &LiveSessions {
        &self.inner.sessions
    }

    /// What accounts have used and nobody has written down.
    pub fn ledger(&self) -> &Ledger {
        &self.inner.ledger
    }

    /// Events that the audit log did not get.
    pub fn lost(&self) -> u64 {
        self.inner.writer.as_ref().map_or(0, Writer::lost)
    }

    /// Waits until everything told so far is in the log, some seconds at most.
    pub async fn flush(&self) {
        if let Some(writer) = &self.inner.writer {
            writer.flush().await;
        }
    }
}

/// The audit log that the configuration asks for, in this state directory.
pub fn audit_log(settings: &Audit, state_dir: &std::path::Path) -> Option<AuditLog> {
    let size = settings.max_file_mib.saturating_mul(1 << 20);
    (settings.files > 0).then(|| AuditLog::new(state_dir.join(audit::FILE), size, settings.files))
}
