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
use hermitage_storage::base::{Base, Machine, Size};
use hermitage_storage::snapshot;

/// What machines of the current base can have. `None`: there is none that could be read; `doctor` says why.
pub fn of_base(context: &Context) -> Option<Machine> {
    let id = context.state.current_base().ok()??;
    Some(Base::manifest(&context.state.base(&id)).ok()?.content.machine)
}

/// `1 GiB of memory, 2 CPUs`
pub fn words(of: Size) -> String {
    format!("{} of memory, {}", size::show(of.memory_bytes), count(of.vcpus.into(), "CPU"))
}

/// Refuses what the current base can't give, which would else count for nothing.
pub fn check_base(context: &Context, wanted: &Wanted) -> anyhow::Result<()> {
    let Some(sizes) = of_base(context) else { return Ok(()) };
    let (least, most) = (sizes.least(), sizes.most());
    if let Some(Own::Value(bytes)) = wanted.memory {
        if bytes > most.memory_bytes {
            bail!(
                "machines of the current base have at most {}, not {}: hermitage base build --max-memory-mib {} makes \
                 a base that has more",
                size::show(most.memory_bytes),
                size::show(bytes),
                bytes >> 20,
            );
        }
        if bytes < least.memory_bytes {
            bail!(
                "machines of the current base have at least {}, not {}: hermitage base build --memory-mib {} makes a \
                 base that has less",
                size::show(least.memory_bytes),
                size::show(bytes),
                bytes >> 20,
            );
        }
    }
    if let Some(Own::Value(vcpus)) = wanted.vcpus {
        let (least, most) = (least.vcpus, most.vcpus);
        if !(least..=most).contains(&vcpus) {
            let option = if vcpus > most { "max-vcpus" } else { "vcpus" };
            bail!(
                "machines of the current base have {least} to {}, not {vcpus}: hermitage base build --{option} \
                 {vcpus} makes a base that has so many",
                count(most.into(), "CPU"),
            );
        }
    }
    Ok(())
}

/// A machine that is there, running or saved.
struct There {
    size: Size,
    /// Bytes of its memory that it uses; `None`: nobody counts.
    used: Option<u64>,
    runs: bool,
}

fn there(context: &Context, account: &Account) -> Option<There> {
    let status = status::query(context).ok().flatten();
    let running = status.into_iter().flat_map(|status| status.accounts);
    let running = running.filter(|status| status.account == account.name);
    if let Some((size, group)) = running.filter_map(|now| Some((now.size?, now.cgroup))).next() {
        let used = group.and_then(|group| cgroup::charged_to(Path::new(&group)));
        return Some(There { size, used, runs: true });
    }
    let saved = File::open(context.state.snapshot(account.id)).ok()?;
    let header = snapshot::read_header(&saved).ok()?;
    let vcpus = header.description.vcpus.try_into().unwrap_or(u8::MAX);
    Some(There {
        size: Size { memory_bytes: header.description.ram, vcpus },
        used: Some(header.data_pages.saturating_mul(snapshot::PAGE as u64)),
        runs: false,
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
    if wanted == has || !there.runs {
        return Ok(None);
    }
    Ok(Some(format!(
        "{name}'s machine runs with {} and has more when it is started or resumed the next time: hermitage account stop \
         {name} saves it",
        words(has),
    )))
}
