//! Memory and CPUs of accounts' machines, where commands meet them: docs/limits.md.

use std::fs::File;
use std::path::Path;

use super::account_limits::{Own, Wanted};
use super::context::Context;
use super::output::count;
use super::{size, status};
use anyhow::bail;
use hermitage::cgroup;
use hermitage::limits::{Limits, Resources};
use hermitage_storage::accounts::{Account, Changes};
use hermitage_storage::base::{Base, BaseId, Machine, Size};
use hermitage_storage::snapshot;

/// What machines of the current base can have. `None`: there is none that could be read; `doctor` says why.
pub fn of_base(context: &Context) -> Option<Machine> {
    sizes_of(context, &context.state.current_base().ok()??)
}

fn sizes_of(context: &Context, base: &BaseId) -> Option<Machine> {
    Some(Base::manifest(&context.state.base(base)).ok()?.content.machine)
}

/// `1 GiB of memory, 2 CPUs`
pub fn words(of: Size) -> String {
    format!("{} of memory, {}", size::show(of.memory_bytes), count(of.vcpus.into(), "CPU"))
}

/// Refuses what the current base can't give, which would else count for nothing.
pub fn check_base(context: &Context, wanted: &Wanted) -> anyhow::Result<()> {
    // Lists are checked line by line.
    if wanted.memory.is_none() && wanted.vcpus.is_none() {
        return Ok(());
    }
    let Some(sizes) = of_base(context) else { return Ok(()) };
    let (least, most) = (sizes.least(), sizes.most());
    // All of the line: what is left out would be as a base has it of which nothing is said.
    let build = |least: Size, most: Size| {
        format!(
            "hermitage base build --memory-mib {} --vcpus {} --max-memory-mib {} --max-vcpus {}",
            least.memory_bytes >> 20,
            least.vcpus,
            most.memory_bytes >> 20,
            most.vcpus,
        )
    };
    if let Some(Own::Value(bytes)) = wanted.memory {
        if bytes > most.memory_bytes {
            bail!(
                "machines of the current base have at most {}, not {}; for a base that has more: {}",
                size::show(most.memory_bytes),
                size::show(bytes),
                build(least, Size { memory_bytes: bytes, ..most }),
            );
        }
        if bytes < least.memory_bytes {
            bail!(
                "machines of the current base have at least {}, not {}; for a base that has less: {}",
                size::show(least.memory_bytes),
                size::show(bytes),
                build(Size { memory_bytes: bytes, ..least }, most),
            );
        }
    }
    if let Some(Own::Value(vcpus)) = wanted.vcpus
        && !(least.vcpus..=most.vcpus).contains(&vcpus)
    {
        let fewer = Size { vcpus: least.vcpus.min(vcpus), ..least };
        bail!(
            "machines of the current base have {} to {}, not {vcpus}; for a base that has so many: {}",
            least.vcpus,
            count(most.vcpus.into(), "CPU"),
            build(fewer, Size { vcpus: most.vcpus.max(vcpus), ..most }),
        );
    }
    Ok(())
}

/// A machine that is there, running or saved.
struct There {
    size: Size,
    /// Bytes of its memory that it uses; `None`: nobody counts.
    used: Option<u64>,
    runs: bool,
    /// What machines of its base can have, which is its own for as long as it keeps its memory.
    sizes: Option<Machine>,
}

fn there(context: &Context, account: &Account) -> Option<There> {
    let status = status::query(context).ok().flatten();
    let running = status.into_iter().flat_map(|status| status.accounts);
    let running = running.filter(|status| status.account == account.name);
    if let Some((size, now)) = running.filter_map(|now| Some((now.size?, now))).next() {
        let used = now.cgroup.and_then(|group| cgroup::kept_by(Path::new(&group)));
        let base = now.base.as_deref().and_then(BaseId::parse);
        let sizes = base.and_then(|base| sizes_of(context, &base));
        return Some(There { size, used, runs: true, sizes });
    }
    let saved = File::open(context.state.snapshot(account.id)).ok()?;
    let header = snapshot::read_header(&saved).ok()?;
    Some(There {
        size: header.description.size(),
        used: Some(header.data_pages.saturating_mul(snapshot::PAGE as u64)),
        runs: false,
        sizes: sizes_of(context, &header.description.base),
    })
}

/// Refuses changes that leave the account's machine less memory than it uses. Else says, if there is something to say,
/// from when on they count.
pub fn check(
    context: &Context,
    account: &Account,
    changes: &Changes,
) -> anyhow::Result<Option<String>> {
    let mut wished = account.clone();
    if let Some(class) = &changes.class {
        wished.class = class.clone();
    }
    wished.memory_bytes = changes.memory_bytes.unwrap_or(wished.memory_bytes);
    wished.vcpus = changes.vcpus.unwrap_or(wished.vcpus);
    let resources = |account: &Account| Limits::of(&context.config, account).resources;
    let (before, after) = (resources(account), resources(&wished));
    if before == after {
        return Ok(None);
    }
    let (Some(sizes), Some(there)) = (of_base(context), there(context, account)) else {
        return Ok(None);
    };
    let fit = |of: Resources| sizes.fit(of.memory, of.vcpus);
    let (name, wanted, has) = (&account.name, fit(after), there.size);
    let is_less = wanted.memory_bytes < fit(before).memory_bytes;
    if let Some(used) = there.used.filter(|used| is_less && *used > wanted.memory_bytes) {
        let what = if there.runs { "uses" } else { "is saved with" };
        bail!(
            "{name}'s machine {what} {} of memory, more than {}; nothing was changed. End programs in it, or drop \
             its memory: hermitage account reset {name}",
            size::show(used),
            size::show(wanted.memory_bytes),
        );
    }
    if wanted.memory_bytes < has.memory_bytes || wanted.vcpus < has.vcpus {
        return Ok(Some(format!(
            "{name}'s machine has {} and keeps it until it next starts from its disk: ssh {name}+fresh@…, or \
             hermitage account reset {name}",
            words(has),
        )));
    }
    let can = there.sizes.map_or(wanted, |sizes| sizes.fit(after.memory, after.vcpus));
    if can != wanted {
        return Ok(Some(format!(
            "{name}'s machine is of a former base, which has at most {}; it has more when it next starts from its \
             disk: ssh {name}+fresh@…, or hermitage account reset {name}",
            words(can),
        )));
    }
    if wanted == has || !there.runs {
        return Ok(None);
    }
    Ok(Some(format!(
        "{name}'s machine runs with {} and has more when it is started or resumed the next time: hermitage account stop \
         {name} saves it",
        words(has),
    )))
}
