//! What is looked up when somebody asks for the metrics: counts of what is there now, and what machines'
//! processes take.

use std::{collections::HashMap, path::Path, sync::atomic::Ordering, time::SystemTime};

use super::{
    Watch, errors,
    metrics::{KINDS, kind_label},
};
use crate::{cgroup::charged_to, room, server::Server};

/// States in which there is nothing to count are 0, not absent.
const STATES: [&str; 8] =
    ["starting", "running", "lingering", "saving", "saved", "resuming", "stopping", "failed"];

/// Bytes.
#[derive(Default)]
struct Memory {
    private: u64,
    page_tables: u64,
}

/// All metrics, as text. Blocks: it reads files of `/proc` and of control groups.
pub(super) fn text(server: &Server, watch: &Watch) -> String {
    // For what their caps kept from machines up to now.
    server.registry.settle();
    let now = &watch.metrics().now;
    let since = server.since.duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default();
    now.start_time.set(since.as_secs().try_into().unwrap_or(i64::MAX));
    now.connections.set(gauge(server.connections.count() as u64));

    let mut kinds: HashMap<&str, i64> = HashMap::new();
    for live in watch.sessions().list(None) {
        *kinds.entry(kind_label(live.who.kind)).or_default() += 1;
    }
    for kind in KINDS {
        let count = kinds.get(kind).copied().unwrap_or_default();
        now.sessions.get_or_create(&vec![("kind", kind)]).set(count);
    }

    let mut states: HashMap<String, i64> = HashMap::new();
    let (mut sum, mut largest, mut charged) = (Memory::default(), 0, 0);
    for (_, status) in server.registry.status() {
        *states.entry(status.state).or_default() += 1;
        charged += status.cgroup.and_then(|group| charged_to(Path::new(&group))).unwrap_or(0);
        // One that has just ended is no error.
        if let Some(memory) = status.machine_pid.and_then(memory) {
            sum.private += memory.private;
            sum.page_tables += memory.page_tables;
            largest = largest.max(memory.private);
        }
    }
    for state in STATES {
        let count = states.get(state).copied().unwrap_or_default();
        now.machines.get_or_create(&vec![("state", state)]).set(count);
    }
    now.memory.get_or_create(&vec![("kind", "private")]).set(gauge(sum.private));
    now.memory.get_or_create(&vec![("kind", "page_tables")]).set(gauge(sum.page_tables));
    now.memory.get_or_create(&vec![("kind", "charged")]).set(gauge(charged));
    now.largest_memory.set(gauge(largest));
    if let Ok(free) = room::free(&server.config.state_dir) {
        now.free_bytes.set(gauge(free));
    }

    // Counted elsewhere; it only grows.
    let (errors, warnings) = errors::counted();
    for (level, count) in [("error", errors), ("warning", warnings)] {
        now.log_messages
            .get_or_create(&vec![("level", level)])
            .inner()
            .store(count, Ordering::Relaxed);
    }
    now.audit_lost.inner().store(watch.lost(), Ordering::Relaxed);
    watch.metrics().text()
}

fn gauge(value: u64) -> i64 {
    value.try_into().unwrap_or(i64::MAX)
}

/// Of a process: proc_pid_status(5). Cheap, unlike `smaps_rollup`, which walks all its pages.
fn memory(pid: i32) -> Option<Memory> {
    let status = std::fs::read_to_string(format!("/proc/{pid}/status")).ok()?;
    let kib = |name: &str| -> Option<u64> {
        let line = status.lines().find_map(|line| line.strip_prefix(name))?;
        line.split_ascii_whitespace().next()?.parse().ok()
    };
    Some(Memory { private: kib("RssAnon:")? << 10, page_tables: kib("VmPTE:")? << 10 })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_process_has_memory_and_one_that_is_gone_has_none() {
        let block = std::hint::black_box(vec![1u8; 8 << 20]);
        let mine = memory(std::process::id() as i32).unwrap();
        assert!(mine.private >= 8 << 20 && mine.page_tables > 0, "{}", mine.private);
        drop(block);
        assert!(memory(i32::MAX).is_none());
    }
}
