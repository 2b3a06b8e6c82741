//! The thread that writes the service's events to the audit log: a slow disk must hold up nobody, and a
//! full one neither.

use std::{
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
        mpsc::{Receiver, SyncSender, TrySendError, sync_channel},
    },
    time::Duration,
};

use tokio::{sync::oneshot, time::timeout};

use super::{
    Event,
    audit::{self, AuditLog},
};

/// Events on their way. A burst of logins fits; more is lost, and counted.
const QUEUE: usize = 4096;

/// Bytes that are put together for one write.
const BATCH: usize = 256 * 1024;

const FLUSH_TIMEOUT: Duration = Duration::from_secs(5);

enum Order {
    Line(Vec<u8>),
    Flush(oneshot::Sender<()>),
}

pub struct Writer {
    orders: SyncSender<Order>,
    lost: Arc<AtomicU64>,
}

impl Writer {
    pub fn start(log: AuditLog) -> Self {
        let (orders, taken) = sync_channel(QUEUE);
        let lost = Arc::new(AtomicU64::new(0));
        let counted = lost.clone();
        let started = std::thread::Builder::new()
            .name("audit".into())
            .spawn(move || write_all(log, &taken, &counted));
        if let Err(error) = started {
            tracing::error!(%error, "no thread for the audit log; nothing is written to it");
        }
        Self { orders, lost }
    }

    pub fn write(&self, event: &Event) {
        let line = audit::line(event);
        if line.is_empty() {
            return;
        }
        match self.orders.try_send(Order::Line(line)) {
            Ok(()) => {}
            Err(TrySendError::Full(_) | TrySendError::Disconnected(_)) => {
                self.lost.fetch_add(1, Ordering::Relaxed);
            }
        }
    }

    pub fn lost(&self) -> u64 {
        self.lost.load(Ordering::Relaxed)
    }

    pub async fn flush(&self) {
        let (done, flushed) = oneshot::channel();
        let orders = self.orders.clone();
        // The queue may be full: waiting for it is for another thread.
        let sent = tokio::task::spawn_blocking(move || orders.send(Order::Flush(done)).is_ok());
        let waited = timeout(FLUSH_TIMEOUT, async { (sent.await, flushed.await) }).await;
        if !matches!(waited, Ok((Ok(true), Ok(())))) {
            tracing::warn!("the audit log may lack its last lines");
        }
    }
}

fn write_all(mut log: AuditLog, orders: &Receiver<Order>, lost: &AtomicU64) {
    let mut failing = false;
    while let Ok(first) = orders.recv() {
        let (mut lines, mut count, mut flushes) = (vec![], 0, vec![]);
        let mut next = Some(first);
        while let Some(order) = next {
            match order {
                Order::Line(line) => {
                    lines.extend(line);
                    count += 1;
                }
                Order::Flush(done) => flushes.push(done),
            }
            next = if lines.len() < BATCH { orders.try_recv().ok() } else { None };
        }
        if !lines.is_empty() {
            match log.append(&lines) {
                Ok(()) if failing => {
                    failing = false;
                    tracing::info!(lost = lost.load(Ordering::Relaxed), "the audit log goes on");
                }
                Ok(()) => {}
                Err(error) => {
                    lost.fetch_add(count, Ordering::Relaxed);
                    // Once, not for every event of a full disk.
                    if !std::mem::replace(&mut failing, true) {
                        tracing::error!(%error, "events are lost");
                    }
                }
            }
        }
        for done in flushes {
            let _ = done.send(());
        }
    }
}
