//! What `hermitage account` prints of accounts, for people and for programs.

mod text;

use super::admin::{self, Answer};
use super::context::Context;
use super::output::{count, table};
use super::{account_quota, account_size, account_usage};
use super::{size, status, time};
use anyhow::Context as _;
use hermitage::admin::protocol::{AccountStatus, Reply, Request, Status};
use hermitage::cgroup::Usage;
use hermitage::limits::{Limits, Resources};
use hermitage::quota::Quota;
use hermitage_storage::accounts::{
    Account, Accounts, Closed, Intent, Policy, SessionRecord, StoredKey, UsedDay,
};
use hermitage_storage::base::{self, Size};
use hermitage_storage::footprint::Footprint;
use hermitage_storage::{checkpoint, disk};
use serde_json::{Value, json};
use std::path::Path;
use uuid::Uuid;

pub use text::key_table;

/// Sessions that `account show` tells of.
const SESSIONS_SHOWN: u32 = 10;

/// An account and what belongs to it, collected.
struct View {
    account: Account,
    keys: Vec<StoredKey>,
    sessions: Vec<SessionRecord>,
    /// What its disk takes on the host. `None`: there is no disk yet.
    disk_allocated: Option<u64>,
    /// `None`: stopped, or the service is.
    machine: Option<AccountStatus>,
    /// What its machine has used, where the host counts it.
    counted: Option<Usage>,
    /// What was recorded of its machine.
    recorded: Option<Intent>,
    /// Bytes that are saved of its memory.
    saved_bytes: Option<u64>,
    limits: Limits,
    /// Until when a code of an invitation is good.
    invited: Option<i64>,
    /// Its class as it is shown.
    class: String,
    /// Bytes that its checkpoints take.
    checkpoint_bytes: u64,
    quota: Quota,
    /// Of the last days.
    usage: Vec<UsedDay>,
    /// What its next machine has; `None`: there is no base to tell.
    size: Option<Size>,
    /// Its running machine's, where the machine was asked.
    processes: Processes,
}

/// What a running machine's guest has.
#[derive(Default)]
struct Processes {
    count: Option<u32>,
    /// Why the limit does not count in it.
    fault: Option<String>,
}

impl View {
    fn of(
        context: &Context,
        accounts: &Accounts,
        account: Account,
        service: Option<&Status>,
        sizes: Option<base::Machine>,
    ) -> anyhow::Result<Self> {
        let place = match account.removed {
            None => context.state.disk(account.id),
            Some(_) => context.state.removed_dir(account.id).join("disk.img"),
        };
        let quota = Quota {
            used: Footprint::in_dir(place.parent().unwrap_or(&place)),
            ..account_quota::of(context, &account)
        };
        let running = service.into_iter().flat_map(|service| &service.accounts);
        let machine = running
            .filter(|_| account.removed.is_none())
            .find(|status| status.account == account.name)
            .cloned();
        let limits = Limits::of(&context.config, &account);
        let Resources { memory, vcpus } = limits.resources;
        Ok(Self {
            size: sizes.map(|sizes| sizes.fit(memory, vcpus)),
            processes: Processes::default(),
            keys: accounts.keys(account.id)?,
            sessions: accounts.sessions(account.id, SESSIONS_SHOWN)?,
            disk_allocated: disk::allocated(&place).ok(),
            recorded: accounts.intent(account.id)?,
            saved_bytes: std::fs::metadata(context.state.snapshot(account.id))
                .ok()
                .map(|metadata| metadata.len()),
            checkpoint_bytes: checkpoint::usage(&context.state, account.id),
            quota,
            usage: account_usage::of(accounts, account.id, account_usage::SHOWN)?,
            counted: machine
                .as_ref()
                .and_then(|machine| Usage::of(Path::new(machine.cgroup.as_ref()?))),
            machine,
            limits,
            invited: accounts.invited_until(account.id)?.filter(|until| *until > time::now()),
            class: match &account.class {
                None => "none".into(),
                Some(class) if context.config.classes.contains_key(class) => class.clone(),
                Some(class) => {
                    format!("{class}, which the configuration does not have: it says nothing")
                }
            },
            account,
        })
    }

    fn state(&self) -> &'static str {
        match self.account.closed_at(time::now()) {
            Some(Closed::Removed) => "removed",
            Some(Closed::Disabled { .. }) => "disabled",
            Some(Closed::Expired { .. }) => "expired",
            None => "enabled",
        }
    }

    fn state_with_times(&self) -> String {
        let utc = |seconds| format!("{} UTC", time::short(seconds));
        let state = self.state();
        match (self.disabled_until(), self.account.expires) {
            (Some(until), _) => format!("{state} until {}", utc(until)),
            (None, Some(at)) if state == "enabled" => format!("{state}, expires {}", utc(at)),
            (None, Some(at)) if state == "expired" => format!("{state} since {}", utc(at)),
            _ => state.to_owned(),
        }
    }

    fn machine_state(&self) -> &str {
        match (&self.machine, self.saved_bytes) {
            (Some(machine), _) => &machine.state,
            (None, Some(_)) => "saved",
            (None, None) => "stopped",
        }
    }

    /// Why the machine is in that state.
    fn because(&self) -> Option<&str> {
        let why = match (&self.machine, &self.recorded) {
            (Some(machine), _) => Some(machine.why.as_str()),
            (None, Some(record)) => record.detail.as_deref(),
            (None, None) => None,
        };
        why.filter(|why| !why.is_empty())
    }

    /// When its hold ends, if it has one.
    fn hold(&self) -> Option<i64> {
        self.account.hold_at(time::now())
    }

    fn disabled_until(&self) -> Option<i64> {
        self.account.disabled_until.filter(|_| self.account.is_disabled_at(time::now()))
    }

    /// What its disk and its saved memory take on the host.
    fn used(&self) -> u64 {
        self.disk_allocated.unwrap_or(0).saturating_add(self.saved_bytes.unwrap_or(0))
    }

    fn json(&self) -> Value {
        let account = &self.account;
        json!({
            "id": account.id,
            "name": account.name,
            "state": self.state(),
            "disabled": account.is_disabled_at(time::now()),
            "disabled_until": self.disabled_until().map(time::rfc3339),
            "expires": account.expires.map(time::rfc3339),
            "class": account.class,
            "created": time::rfc3339(account.created),
            "removed": account.removed.map(time::rfc3339),
            "hostname": account.hostname,
            "guest_name": account.guest_name(),
            "has_password": account.password.is_some(),
            "invited_until": self.invited.map(time::rfc3339),
            "keys": self.keys.iter().map(key_json).collect::<Vec<_>>(),
            "limits": {
                "disk_bytes": account.disk_bytes,
                "quota_bytes": self.quota.limit,
                "max_sessions": self.limits.max_sessions,
                "max_streams": self.limits.max_streams,
                "linger_seconds": account.linger_s,
                "max_linger_seconds": account.max_linger_s,
                "memory_bytes": self.size.map(|size| size.memory_bytes),
                "vcpus": self.size.map(|size| size.vcpus),
                "cpu_weight": self.limits.share.cpu_weight,
                "cpu_percent": self.limits.share.cpu_percent,
                "io_bytes_per_second": self.limits.share.io_rate,
                "io_operations_per_second": self.limits.share.io_operations,
                "processes": self.limits.processes,
            },
            // What it has of its own, where neither its class nor the configuration counts.
            "own": {
                "quota_bytes": account.quota_bytes,
                "max_sessions": account.max_sessions,
                "max_streams": account.max_streams,
                "linger_seconds": account.linger_s,
                "max_linger_seconds": account.max_linger_s,
                "policy": account.policy.map(Policy::as_str),
                "memory_bytes": account.memory_bytes,
                "vcpus": account.vcpus,
                // 0: none, whatever its class says.
                "cpu_weight": account.cpu_weight,
                "cpu_percent": account.cpu_percent,
                "io_bytes_per_second": account.io_rate,
                "io_operations_per_second": account.io_operations,
                "processes": account.processes,
            },
            "policy": self.limits.policy.as_str(),
            "held_until": self.hold().map(time::rfc3339),
            "saved_bytes": self.saved_bytes,
            "checkpoint_bytes": self.checkpoint_bytes,
            "machine_state": self.machine_state(),
            "because": self.because(),
            "disk_allocated_bytes": self.disk_allocated,
            "used_bytes": self.used(),
            // Against limits.quota_bytes: checkpoints too, each file once.
            "quota_used_bytes": self.quota.used.total(),
            "usage": self.usage.iter().map(account_usage::day_json).collect::<Vec<_>>(),
            "machine": self.machine.as_ref().map(|machine| json!({
                "state": machine.state,
                "since": time::rfc3339(machine.since),
                "why": machine.why,
                "pid": machine.machine_pid,
                "base": machine.base,
                "sessions": machine.sessions,
                "awake": machine.awake,
                "memory_bytes": machine.size.map(|size| size.memory_bytes),
                "vcpus": machine.size.map(|size| size.vcpus),
                "unused": machine.unused,
                // What its guest says, which only "account show" asks; and why the limit does not count.
                "processes": self.processes.count,
                "processes_fault": self.processes.fault,
                // What the host counts of it and limits; null where it does neither.
                "use": self.counted,
            })),
            "sessions": self.sessions.iter().map(session_json).collect::<Vec<_>>(),
        })
    }
}

pub fn list(context: &Context, removed: bool) -> anyhow::Result<()> {
    let accounts = context.accounts()?;
    let service = service(context);
    let sizes = account_size::of_base(context);
    let views = accounts
        .list(removed)?
        .into_iter()
        .map(|account| View::of(context, &accounts, account, service.as_ref(), sizes))
        .collect::<anyhow::Result<Vec<_>>>()?;
    let object = json!({ "accounts": views.iter().map(View::json).collect::<Vec<_>>() });
    context.out.show(&object, || {
        if views.is_empty() {
            return "no accounts (hermitage account add NAME --key FILE makes one)".to_owned();
        }
        let columns = [
            "NAME",
            "STATE",
            "CLASS",
            "MACHINE",
            "LOGS IN WITH",
            "DISK",
            "QUOTA",
            "LAST SESSION",
            "BECAUSE",
        ];
        let mut table = table(columns);
        for view in &views {
            table.add_row([
                view.account.name.clone(),
                view.state().to_owned(),
                view.account.class.clone().unwrap_or_else(|| "-".into()),
                view.machine_state().to_owned(),
                means(view),
                view.disk(),
                view.quota.percent().map_or("-".into(), |percent| format!("{percent} %")),
                view.sessions.first().map_or("never".into(), |last| time::short(last.started)),
                view.because().unwrap_or_default().to_owned(),
            ]);
        }
        table.trim_fmt()
    })
}

pub fn show(context: &Context, name: &str) -> anyhow::Result<()> {
    let accounts = context.accounts()?;
    let account = accounts.named(name)?;
    let sizes = account_size::of_base(context);
    let mut view = View::of(context, &accounts, account, service(context).as_ref(), sizes)?;
    if view.machine.is_some() {
        view.processes = processes(context, name);
    }
    context.out.show(&view.json(), || view.text())
}

/// The answer of `account add`; not `new`: it was there, and is what was asked for.
pub fn added(
    context: &Context,
    accounts: &Accounts,
    account: &Account,
    new: bool,
) -> anyhow::Result<()> {
    let view = View::of(context, accounts, account.clone(), None, account_size::of_base(context))?;
    let mut object = view.json();
    object["changed"] = json!(new);
    let is = if new { "is added" } else { "is there already" };
    context
        .out
        .show(&object, || format!("{} {is}: {}, disk {}", account.name, means(&view), view.disk()))
}

/// The answer of `account set`.
pub fn changed(
    context: &Context,
    accounts: &Accounts,
    account: Uuid,
    changed: &[&str],
) -> anyhow::Result<()> {
    let account = accounts.by_id(account)?.context("the account was purged meanwhile")?;
    let view = View::of(context, accounts, account, None, account_size::of_base(context))?;
    let mut object = view.json();
    object["changed"] = json!(!changed.is_empty());
    let name = &view.account.name;
    let is = if changed.is_empty() { "was so already" } else { "is changed" };
    let limits = &view.limits;
    context.out.show(&object, || {
        format!(
            "{name} {is}: class {}, disk {}, {}, {}, policy {}, {}",
            view.class,
            size::show(view.account.disk_bytes),
            count(limits.max_sessions as usize, "session"),
            count(limits.max_streams, "stream"),
            limits.policy.as_str(),
            view.state_with_times(),
        )
    })
}

pub fn key_json(key: &StoredKey) -> Value {
    json!({
        "type": key.key_type,
        "fingerprint": key.fingerprint,
        "comment": key.comment,
        "options": key.options,
        "expires": key.expires().map(time::rfc3339),
        "added": time::rfc3339(key.added),
    })
}

fn session_json(session: &SessionRecord) -> Value {
    json!({
        "kind": session.kind,
        "source": session.source,
        "started": time::rfc3339(session.started),
        "ended": session.ended.map(time::rfc3339),
        "outcome": session.outcome,
    })
}

fn means(view: &View) -> String {
    match (view.keys.len(), view.account.password.is_some()) {
        (0, false) => "nothing".to_owned(),
        (0, true) => "password".to_owned(),
        (n, false) => count(n, "key"),
        (n, true) => format!("{}, password", count(n, "key")),
    }
}

/// Its user's processes, for showing only: a service or a guest that doesn't say must not hide the account.
fn processes(context: &Context, name: &str) -> Processes {
    match admin::ask(context, &Request::CountProcesses { account: name.to_owned() }) {
        Ok(Some(Answer { reply: Reply::Processes { count, fault }, .. })) => {
            Processes { count, fault }
        }
        _ => Processes::default(),
    }
}

/// What runs, for showing only: a service that doesn't answer must not hide the accounts.
fn service(context: &Context) -> Option<Status> {
    match status::query(context) {
        Ok(status) => status,
        Err(error) => {
            eprintln!("hermitage: warning: what runs is not known: {error:#}");
            None
        }
    }
}
