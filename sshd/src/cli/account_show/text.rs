//! An account, for people.

use super::View;
use crate::cli::output::table;
use crate::cli::{account_size, account_usage, size, span, time};
use hermitage::cgroup::Usage;
use hermitage::limits::Resources;
use hermitage_storage::accounts::StoredKey;
use std::time::Duration;

impl View {
    pub(super) fn disk(&self) -> String {
        let limit = size::show(self.account.disk_bytes);
        match self.disk_allocated {
            Some(written) => format!("{} of {limit}", size::show(written)),
            None => format!("none yet, {limit}"),
        }
    }

    fn quota_words(&self) -> String {
        let takes = format!("takes {} ({})", self.quota.shown(), self.quota.parts());
        match self.quota.percent() {
            Some(percent) => {
                let own = self.account.quota_bytes.is_some();
                format!("{takes}, {percent} %{}", self.by(own))
            }
            None => format!("none; {takes}"),
        }
    }

    /// Memory and CPUs: of the next machine, and of this one if that is something else.
    fn size_words(&self) -> String {
        let own = self.account.memory_bytes.is_some() || self.account.vcpus.is_some();
        let said = own || self.limits.resources != Resources::default();
        let by = if said { self.by(own) } else { " (the base's)".into() };
        let mut text = match self.size {
            Some(size) => format!("{}{by}", account_size::words(size)),
            None => "what a base has, once there is one".into(),
        };
        let Some(machine) = &self.machine else { return text };
        if let Some(has) = machine.size.filter(|has| Some(*has) != self.size) {
            text.push_str(&format!("; this one has {}", account_size::words(has)));
        }
        if let Some(fault) = &machine.unused {
            text.push_str(&format!("; not all of it is in use: {fault}"));
        }
        text
    }

    /// The share of processors, and what was used.
    fn cpu(&self) -> String {
        let (share, account) = (&self.limits.share, &self.account);
        let cap = share.cpu_percent.map_or("no cap".into(), |cap| format!("at most {cap} %"));
        let own = account.cpu_percent.is_some() || account.cpu_weight.is_some();
        let mut text = format!("{cap}, weight {}{}", share.cpu_weight, self.by(own));
        let usage = self.counted.as_ref();
        if let Some(used) = usage.and_then(|usage| usage.cpu_microseconds) {
            text.push_str(&format!("; {} s used", seconds(used)));
        }
        let throttled = usage.and_then(|usage| usage.throttled_microseconds);
        if let Some(throttled) = throttled.filter(|throttled| *throttled > 0) {
            text.push_str(&format!(", held back for {} s", seconds(throttled)));
        }
        text
    }

    /// The same of the disk.
    fn io(&self) -> String {
        let (share, account) = (&self.limits.share, &self.account);
        let rate = share.io_rate.map(|rate| format!("at most {}/s each way", size::show(rate)));
        let operations = share.io_operations.map(|n| format!("at most {n} operations/s each way"));
        let caps: Vec<_> = rate.into_iter().chain(operations).collect();
        let caps = if caps.is_empty() { "no cap".into() } else { caps.join(", ") };
        let own = account.io_rate.is_some() || account.io_operations.is_some();
        let mut text = format!("{caps}{}", self.by(own));
        if let Some(usage) = &self.counted
            && let (Some(read), Some(written)) = (usage.io_read_bytes, usage.io_written_bytes)
        {
            let (read, written) = (size::show(read), size::show(written));
            text.push_str(&format!("; {read} read, {written} written"));
        }
        text
    }

    /// `37 of 500 (its own)`
    fn processes(&self) -> String {
        let by = self.by(self.account.processes.is_some());
        let mut text = match (self.processes.count, self.limits.processes) {
            (Some(count), Some(most)) => format!("{count} of {most}{by}"),
            (Some(count), None) => format!("{count}, no limit{by}"),
            (None, Some(most)) => format!("at most {most}{by}"),
            (None, None) => format!("no limit{by}"),
        };
        if let Some(fault) = &self.processes.fault {
            text.push_str(&format!("; not enforced: {fault}"));
        }
        text
    }

    /// Where a limit comes from.
    fn by(&self, own: bool) -> String {
        match (&self.account.class, own) {
            (_, true) => " (its own)".into(),
            (Some(class), false) => format!(" (class {class} or the configuration)"),
            (None, false) => String::new(),
        }
    }

    pub(super) fn text(&self) -> String {
        let account = &self.account;
        let span = |span: Duration| span::show(span.as_secs().try_into().unwrap_or(u32::MAX));
        let limits = &self.limits;
        let linger =
            format!("{}, with work at most {}", span(limits.linger), span(limits.max_linger));
        let mut facts = vec![
            ("name", account.name.clone()),
            ("id", account.id.to_string()),
            ("state", self.state_with_times()),
            ("class", self.class.clone()),
            ("created", time::short(account.created)),
            ("password", if account.password.is_some() { "set" } else { "none" }.to_owned()),
            ("disk", self.disk()),
            ("quota", self.quota_words()),
            (
                "sessions",
                format!(
                    "at most {}{}",
                    limits.max_sessions,
                    self.by(account.max_sessions.is_some())
                ),
            ),
            (
                "streams",
                format!("at most {}{}", limits.max_streams, self.by(account.max_streams.is_some())),
            ),
            ("linger", linger),
            ("policy", format!("{}{}", limits.policy.as_str(), self.by(account.policy.is_some()))),
            ("size", self.size_words()),
            ("cpu", self.cpu()),
            ("i/o", self.io()),
            ("processes", self.processes()),
        ];
        if let Some(until) = self.invited {
            facts.push((
                "invited",
                format!("by a code that is good until {} UTC", time::short(until)),
            ));
        }
        if let Some(until) = self.hold() {
            facts.push(("hold", format!("until {} UTC", time::short(until))));
        }
        if let Some(bytes) = self.saved_bytes {
            facts.push(("saved", format!("{}, which counts for the quota", size::show(bytes))));
        }
        if account.guest_name() != account.name {
            facts.push(("inside", format!("the user is {}", account.guest_name())));
        }
        if self.checkpoint_bytes > 0 {
            facts.push(("kept", format!("{} in checkpoints", size::show(self.checkpoint_bytes))));
        }
        if !self.usage.is_empty() {
            facts.push(("used", account_usage::summary(&self.usage)));
        }
        if let Some(memory) = self.counted.as_ref().and_then(memory) {
            facts.push(("memory", memory));
        }
        let since = match (&self.machine, &self.recorded) {
            (Some(machine), _) => Some(machine.since),
            (None, Some(record)) => Some(record.since),
            (None, None) => None,
        };
        let since = since.map_or(String::new(), |since| format!(" since {}", time::short(since)));
        facts.push(("machine", format!("{}{since}", self.machine_state())));
        facts.extend(self.because().map(|why| ("because", why.to_owned())));
        let mut text = String::new();
        for (name, value) in facts {
            text.push_str(&format!("{name:<10}{value}\n"));
        }
        text.push_str(&format!("\n{}\n", key_table(&self.keys)));
        if !self.sessions.is_empty() {
            let mut table = table(["SESSION", "FROM", "STARTED", "ENDED", "HOW"]);
            for session in &self.sessions {
                table.add_row([
                    session.kind.clone(),
                    session.source.clone(),
                    time::short(session.started),
                    session.ended.map_or("-".into(), time::short),
                    session.outcome.clone().unwrap_or_default(),
                ]);
            }
            text.push_str(&format!("\n{}\n", table.trim_fmt()));
        }
        text
    }
}

fn memory(usage: &Usage) -> Option<String> {
    let used = size::show(usage.memory_bytes?);
    let threads = usage.threads.map_or(String::new(), |n| format!(", {n} threads"));
    Some(match usage.memory_max_bytes {
        Some(max) => format!("{used} of {} on the host{threads}", size::show(max)),
        None => format!("{used} on the host{threads}"),
    })
}

fn seconds(microseconds: u64) -> String {
    format!("{:.1}", microseconds as f64 / 1e6)
}

pub fn key_table(keys: &[StoredKey]) -> String {
    if keys.is_empty() {
        return "no keys".to_owned();
    }
    let mut table = table(["KEY", "FINGERPRINT", "COMMENT", "ADDED", "OPTIONS"]);
    for key in keys {
        let (comment, added) = (key.comment.clone(), time::short(key.added));
        let (fingerprint, options) = (key.fingerprint.clone(), key.options.clone());
        table.add_row([key.key_type.clone(), fingerprint, comment, added, options]);
    }
    table.trim_fmt()
}
