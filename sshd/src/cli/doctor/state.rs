//! The state directory: room, database, image, base, disks; and the service.

use super::{Finding, MAKE_BASE, repairs};
use crate::cli::base::{memory_range, vcpu_range};
use crate::cli::context::Context;
use crate::cli::output::count;
use crate::cli::{account_quota, size, status};
use hermitage::admin::protocol::{Enforcement, Status};
use hermitage_storage::accounts::{Account, Accounts, AccountsError};
use hermitage_storage::base::{Base, BaseId, HostKind};
use hermitage_storage::image::{self, Image, ImageId};
use nix::sys::statvfs::statvfs;
use nix::unistd::{AccessFlags, access};
use std::time::Instant;

/// A thousand accounts' with their checkpoints.
const FEW_INODES: u64 = 20_000;

pub fn check(context: &Context) -> Vec<Finding> {
    let root = context.state.root();
    if !root.is_dir() {
        return vec![Finding::warning(
            "state directory",
            format!("there is no {} yet", root.display()),
            "the first command makes it; start with: hermitage image build",
        )];
    }
    if let Err(errno) = access(root, AccessFlags::R_OK | AccessFlags::W_OK | AccessFlags::X_OK) {
        return vec![Finding::failure(
            "state directory",
            format!("{}: {}", root.display(), errno.desc()),
            "run this as the service's user (root), or name another with --state-dir",
        )];
    }
    let mut findings = vec![Finding::ok("state directory", root.display().to_string())];
    findings.extend(repairs::folders(context));
    findings.push(space(context));
    findings.extend(inodes(context));
    findings.extend(base(context));
    findings.extend(database(context));
    findings.extend(repairs::leftovers(context));
    findings.extend(repairs::copies(context));
    let running = status::query(context);
    findings.extend(repairs::lock(context, &running));
    findings.extend(service(running));
    findings
}

fn space(context: &Context) -> Finding {
    const CHECK: &str = "space";
    let root = context.state.root();
    let stat = match statvfs(root) {
        Ok(stat) => stat,
        Err(errno) => {
            let found = format!("{}: {}", root.display(), errno.desc());
            return Finding::failure(CHECK, found, "is the file system mounted?");
        }
    };
    let free = stat.blocks_available().saturating_mul(stat.fragment_size());
    let floor = context.config.machines.min_free_mib << 20;
    let found = format!("{} free", size::show(free));
    let limit = size::show(floor);
    let guest_floor = context.config.machines.guest_floor();
    if free < guest_floor {
        let advice = format!(
            "below {} (machines.guest_floor_mib) guests get no new space on their disks, and no machine \
             starts: free some at once, or enlarge the file system",
            size::show(guest_floor)
        );
        Finding::failure(CHECK, found, advice)
    } else if free < floor {
        let advice = format!(
            "below {limit} (machines.min_free_mib) logins are refused: free some (hermitage account \
             remove NAME --purge, hermitage base remove ID, image remove ID) or enlarge the file system"
        );
        Finding::failure(CHECK, found, advice)
    } else if free < floor.saturating_mul(4) {
        Finding::warning(CHECK, found, format!("logins are refused below {limit}; make room soon"))
    } else {
        Finding::ok(CHECK, found)
    }
}

/// Each account has a few files; a file system that was made with few inodes runs out of them before its space.
fn inodes(context: &Context) -> Option<Finding> {
    const CHECK: &str = "inodes";
    let stat = statvfs(context.state.root()).ok()?;
    let (all, free) = (stat.files(), stat.files_available());
    // Btrfs makes them as they are needed, and says 0.
    let found = (all > 0).then(|| format!("{free} of {all} free"))?;
    Some(if free < FEW_INODES {
        let advice =
            "soon no file can be made there: find what has many (du --inodes), or move state_dir";
        Finding::warning(CHECK, found, advice)
    } else {
        Finding::ok(CHECK, found)
    })
}

fn base(context: &Context) -> Vec<Finding> {
    const CHECK: &str = "base";
    let id = match context.state.current_base() {
        Ok(Some(id)) => id,
        Ok(None) => {
            let advice = match image::list(&context.state) {
                Ok(images) if images.iter().any(Result::is_ok) => "hermitage base build makes one",
                _ => "hermitage image build makes an image, then hermitage base build a base of it",
            };
            return vec![Finding::failure(CHECK, "there is none, so no machine can start", advice)];
        }
        Err(error) => {
            let advice = "choose one again: hermitage base list, hermitage base use ID";
            return vec![Finding::failure(CHECK, error.to_string(), advice)];
        }
    };
    let start = Instant::now();
    let base = match Base::open(&context.state.base(&id)) {
        Ok(base) => base,
        Err(error) => {
            return vec![unusable(CHECK, error.to_string())];
        }
    };
    let content = &base.manifest.content;
    let machine = &content.machine;
    let found = format!(
        "{id}: whole (checked in {} ms), {} of memory, {}, guest kernel {}",
        start.elapsed().as_millis(),
        memory_range(machine),
        if machine.most().vcpus == 1 {
            "1 CPU".into()
        } else {
            format!("{} CPUs", vcpu_range(machine))
        },
        content.guest_kernel,
    );
    let mut findings = vec![Finding::ok(CHECK, found)];
    findings.push(fit(&id, &content.restorable_on));
    findings.push(image(context, &content.image));
    findings
}

/// Some of the words have the command in them already.
fn unusable(check: &'static str, reason: String) -> Finding {
    let another = "choose another: hermitage base list, hermitage base use ID";
    let advice = match reason.contains(MAKE_BASE) {
        true => format!("or {another}"),
        false => format!("make one again: {MAKE_BASE}; or {another}"),
    };
    Finding::failure(check, reason, advice)
}

/// The rest of the fit, what KVM offers guests and the state's version, the vmm knows
/// ([`super::host::base`]).
fn fit(id: &BaseId, base: &HostKind) -> Finding {
    const CHECK: &str = "base fits host";
    let here = match HostKind::here(base.snapshot_version, base.cpuid_digest.clone()) {
        Ok(here) => here,
        Err(error) => {
            let found = format!("/proc can't be read: {error}");
            return Finding::failure(CHECK, found, "is /proc mounted?");
        }
    };
    let mismatches = base.mismatches(&here);
    if mismatches.is_empty() {
        let (family, model) = (here.cpu_family, here.cpu_model);
        let found = format!("{} family {family} model {model}", here.cpu_vendor);
        return Finding::ok(CHECK, found);
    }
    let advice = format!("make a base on this host: hermitage base build (then: base remove {id})");
    Finding::failure(CHECK, mismatches.join("; "), advice)
}

fn image(context: &Context, id: &str) -> Finding {
    const CHECK: &str = "image";
    let image = match ImageId::parse(id) {
        Some(id) => Image::open(&context.state.image(&id)),
        None => {
            let found = format!("the base names the image \"{id}\"");
            return Finding::failure(CHECK, found, "make the base again: hermitage base build");
        }
    };
    match image {
        Ok(image) => Finding::ok(CHECK, image.id.to_string()),
        Err(error) => Finding::failure(
            CHECK,
            error.to_string(),
            "disks of new accounts are made from it: hermitage image build, then hermitage base build",
        ),
    }
}

const RESTORE: &str = "stop the service, then: hermitage database restore (hermitage database list shows what \
                       copies there are)";

fn database(context: &Context) -> Vec<Finding> {
    const CHECK: &str = "accounts";
    let path = context.state.database();
    if !path.exists() {
        return vec![Finding::warning(
            CHECK,
            "there are none yet",
            "hermitage account add NAME --key FILE makes one",
        )];
    }
    let looked = Accounts::open(&path).and_then(|accounts| {
        let damage = accounts.damage()?;
        let accounts = if damage.is_empty() { accounts.list(false)? } else { Vec::new() };
        Ok((damage, accounts))
    });
    let (damage, accounts) = match looked {
        Ok(found) => found,
        Err(error) => {
            let advice = match &error {
                AccountsError::Newer { .. } => {
                    "use the program that wrote it, or: hermitage database restore"
                }
                _ => RESTORE,
            };
            return vec![Finding::failure(CHECK, error.to_string(), advice)];
        }
    };
    if !damage.is_empty() {
        let found = format!("{} is damaged: {}", path.display(), damage.join("; "));
        return vec![Finding::failure(CHECK, found, RESTORE)];
    }
    let mut findings = vec![Finding::ok(
        CHECK,
        format!("{}, the database is sound", count(accounts.len(), "account")),
    )];
    let without: Vec<_> = accounts
        .iter()
        .filter(|account| !context.state.disk(account.id).exists())
        .map(|account| account.name.as_str())
        .collect();
    if !without.is_empty() {
        let shown = without[..without.len().min(10)].join(", ");
        findings.push(Finding::warning(
            "disks",
            format!("{} without a disk, so they can't log in: {shown}", count(without.len(), "account")),
            "hermitage base build (or: base use ID) makes disks that were never made; one that was lost \
             has to come from a backup",
        ));
    }
    findings.extend(quotas(context, &accounts));
    findings
}

/// A class or the configuration may have been made less than accounts take.
fn quotas(context: &Context, accounts: &[Account]) -> Option<Finding> {
    let quotas = accounts.iter().map(|account| (account, account_quota::of(context, account)));
    let with = || quotas.clone().filter(|(_, quota)| quota.limit.is_some());
    let count_with = with().count();
    if count_with == 0 {
        return None;
    }
    let over: Vec<_> = with().filter(|(_, quota)| quota.is_over()).collect();
    if over.is_empty() {
        let found = format!("{} with one, none is over it", count(count_with, "account"));
        return Some(Finding::ok("quotas", found));
    }
    let shown =
        over.iter().take(10).map(|(account, quota)| format!("{} {}", account.name, quota.shown()));
    let shown: Vec<_> = shown.collect();
    Some(Finding::warning(
        "quotas",
        format!("{} over it: {}", count(over.len(), "account"), shown.join(", ")),
        "programs in their machines get no new space: hermitage account show NAME says what takes it, account set \
         NAME --quota SIZE gives more",
    ))
}

fn service(running: anyhow::Result<Option<Status>>) -> Vec<Finding> {
    const CHECK: &str = "service";
    match running {
        Ok(Some(status)) => {
            let listens = status.listen.join(" ");
            let found = format!("runs as process {}, listens on {listens}", status.pid);
            vec![Finding::ok(CHECK, found), limits(&status.limits)]
        }
        Ok(None) => vec![Finding::warning(CHECK, "is not running", "hermitage serve starts it")],
        Err(error) => vec![Finding::failure(
            CHECK,
            format!("{error:#}"),
            "run this as the service's user; if it hangs, restart it (machines are stopped in order)",
        )],
    }
}

/// Whether the service found a place for machines' control groups when it started.
fn limits(enforcement: &Enforcement) -> Finding {
    const CHECK: &str = "limits of machines";
    match (&enforcement.path, &enforcement.reason) {
        (Some(path), _) => Finding::ok(CHECK, format!("are enforced, in {path}")),
        (None, reason) => {
            let reason = reason.as_deref().unwrap_or("the service does not say why");
            let advice = "guests are bounded by their own memory and processors alone; docs/limits.md says \
                          where limits can be enforced";
            Finding::warning(CHECK, format!("are not enforced: {reason}"), advice)
        }
    }
}
