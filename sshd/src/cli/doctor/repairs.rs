//! What is not as it should be in the state and run directories, and can be put right without harm.
//!
//! Each of these is a thing that some command or the service does by itself sooner or later; here it is seen, said and
//! done now. Disks that are missing are none of it: an empty one would hide that files were lost.

use super::Finding;
use crate::cli::context::Context;
use crate::cli::output::count;
use anyhow::Context as _;
use hermitage::admin::protocol::{SOCKET_NAME, Status};
use hermitage::{span, time};
use hermitage_storage::accounts::{Accounts, Copies};
use hermitage_storage::{incoming, leftovers, publish};
use std::fs::{self, Permissions};
use std::io::ErrorKind;
use std::os::unix::fs::PermissionsExt;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::time::{Duration, SystemTime};

/// A daily copy is late from then on; the service looks every hour.
const LATE: Duration = Duration::from_secs(26 * 3600);

/// Folders that are missing, and modes that let others see what is not theirs, or the service not.
pub fn folders(context: &Context) -> Vec<Finding> {
    const CHECK: &str = "folders";
    let mut findings = Vec::new();
    for (path, mode) in context.state.folders() {
        let shown = path.display().to_string();
        match mode_of(&path) {
            None => {
                let words = format!("make the folder {shown}");
                let found = format!("there is no {shown}");
                let make = |context: &Context| Ok(context.state.create()?);
                findings.push(Finding::fixable(CHECK, found, words, make));
            }
            Some(is) if is != mode => findings.push(mode_differs(CHECK, path, is, mode)),
            Some(_) => {}
        }
    }
    let state = &context.state;
    let secret = [
        state.database(),
        state.database().with_extension("db-wal"),
        state.database().with_extension("db-shm"),
        state.host_key(),
        state.root().join(hermitage::watch::audit::FILE),
    ];
    for path in secret {
        if let Some(is) = mode_of(&path).filter(|is| is & 0o077 != 0) {
            findings.push(mode_differs(CHECK, path, is, 0o600));
        }
    }
    if findings.is_empty() {
        findings.push(Finding::ok(CHECK, "all there, for nobody else to read"));
    }
    findings
}

fn mode_of(path: &Path) -> Option<u32> {
    fs::symlink_metadata(path).ok().map(|metadata| metadata.permissions().mode() & 0o7777)
}

fn mode_differs(check: &'static str, path: PathBuf, is: u32, wanted: u32) -> Finding {
    let shown = path.display().to_string();
    let words = format!("set the mode of {shown} to {wanted:04o}");
    Finding::fixable(check, format!("{shown} has the mode {is:04o}"), words, move |_| {
        // Not of what a link names: nobody's but the service's is changed.
        anyhow::ensure!(!fs::symlink_metadata(&path)?.is_symlink(), "it is a link");
        Ok(fs::set_permissions(&path, Permissions::from_mode(wanted))?)
    })
}

/// What killed commands left half-made. What somebody still writes is locked, and not counted.
pub fn leftovers(context: &Context) -> Vec<Finding> {
    const CHECK: &str = "leftovers";
    let state = &context.state;
    let mut found = Vec::new();
    let mut sweep = Vec::new();
    for folder in leftovers::folders(state) {
        let left = publish::leftovers(&folder).unwrap_or_default();
        if !left.is_empty() {
            found.extend(left);
            sweep.push(folder);
        }
    }
    // A database that can't be opened is told of elsewhere.
    let database = state.database();
    let accounts = database.exists().then(|| Accounts::open(&database).ok()).flatten();
    let restores = accounts
        .and_then(|accounts| incoming::leftovers(state, &accounts).ok())
        .unwrap_or_default();
    let restored = !restores.is_empty();
    found.extend(restores);
    let Some(first) = found.first() else {
        return vec![Finding::ok(CHECK, "nothing half-made is left of killed commands")];
    };
    let count = count(found.len(), "thing");
    let words =
        format!("delete {count} that killed commands left half-made, {} first", first.display());
    let found = format!("{count} half-made, as {}", first.display());
    vec![Finding::fixable(CHECK, found, words, move |context| {
        leftovers::sweep(sweep.iter().cloned()).1?;
        if restored {
            incoming::sweep(&context.state, &context.accounts()?)?;
        }
        Ok(())
    })]
}

/// The newest daily copy of the database.
pub fn copies(context: &Context) -> Option<Finding> {
    const CHECK: &str = "database copies";
    let database = context.state.database();
    if !database.exists() {
        return None;
    }
    let last = match Copies::of(&database).last_daily() {
        Ok(last) => last,
        Err(error) => return Some(Finding::warning(CHECK, error.to_string(), "can it be read?")),
    };
    let age =
        last.as_ref().map(|copy| SystemTime::now().duration_since(copy.taken).unwrap_or_default());
    let found = match age {
        Some(age) if age < LATE => {
            return Some(Finding::ok(CHECK, format!("the last is of {} ago", shown(age))));
        }
        Some(age) => format!("the last daily copy is of {} ago", shown(age)),
        None => "there is no daily copy of the accounts database".into(),
    };
    Some(Finding::fixable(CHECK, found, "take today's copy of the accounts database", |context| {
        let stamp = time::rfc3339(time::now()).replace(['-', ':'], "");
        Copies::of(&context.state.database()).take_daily(&context.accounts()?, &stamp)?;
        Ok(())
    }))
}

fn shown(age: Duration) -> String {
    // Whole minutes.
    span::show((age.as_secs() / 60 * 60).try_into().unwrap_or(u32::MAX))
}

/// The service's lock, which ends with its process, against what answers; and sockets that it left behind.
pub fn lock(context: &Context, running: &anyhow::Result<Option<Status>>) -> Vec<Finding> {
    const CHECK: &str = "service lock";
    let path = context.state.service_lock();
    let held = context.state.service_is_locked().unwrap_or(false);
    match (held, running) {
        (true, Ok(Some(_))) => vec![Finding::ok(CHECK, "held by the service")],
        (false, Ok(None)) => {
            let mut findings = vec![Finding::ok(CHECK, "free: no service runs here")];
            findings.extend(sockets(context));
            findings
        }
        (true, _) => vec![Finding::failure(
            CHECK,
            format!(
                "a process holds {}, and none answers at {}",
                path.display(),
                context.config.run_dir.display()
            ),
            "is its run_dir another (--run-dir)? fuser -v serve.lock says which process it is; the lock ends with it",
        )],
        (false, _) => vec![Finding::warning(
            CHECK,
            format!("a service answers, and does not hold {}", path.display()),
            "it serves another state directory: give --state-dir or --run-dir that belong together",
        )],
    }
}

/// Of a service that was killed: nobody answers there.
fn sockets(context: &Context) -> Vec<Finding> {
    const CHECK: &str = "sockets";
    let names = [SOCKET_NAME, "admin.sock.new", "metrics.sock", "metrics.sock.new"];
    let stale: Vec<PathBuf> = names
        .iter()
        .map(|name| context.config.run_dir.join(name))
        .filter(|path| is_stale(path))
        .collect();
    let [first, ..] = &stale[..] else { return Vec::new() };
    let words = format!("delete {} of a service that is gone", count(stale.len(), "socket"));
    vec![Finding::fixable(
        CHECK,
        format!("nobody answers at {}", first.display()),
        words,
        move |_| {
            // Not if somebody has come meanwhile.
            for path in stale.iter().filter(|path| is_stale(path)) {
                fs::remove_file(path).with_context(|| path.display().to_string())?;
            }
            Ok(())
        },
    )]
}

fn is_stale(path: &Path) -> bool {
    UnixStream::connect(path).is_err_and(|error| error.kind() == ErrorKind::ConnectionRefused)
}
