//! `hermitage database …`: whether accounts.db is sound, copies of it, and going back to one.

use super::context::Context;
use super::output::{count, table};
use super::{NotFound, Said, admin, date, size, time};
use anyhow::{Context as _, bail};
use clap::Subcommand;
use hermitage_storage::accounts::{Accounts, AccountsError, Copies, DatabaseCopy, examine};
use serde_json::{Value, json};
use std::fs;
use std::path::{Path, PathBuf};
use std::time::SystemTime;
use uuid::Uuid;

const HELP: &str = "\
The service takes a copy a day and keeps 14; one is taken before a new version changes the schema. Copies are in
STATE_DIR/database-copies, complete and as secret as the database. They are on the same disk: take backups of the
host as well.";

const RESTORE_HELP: &str = "\
Stop the service first. Without COPY the newest sound one is taken. What it replaces is kept among the copies, so
that a restore can be taken back. Disks are not touched: those of accounts that the copy does not know are listed.

Examples:
  hermitage database restore
  hermitage database restore daily-20261121T030000Z.db
  hermitage database restore /backup/accounts.db";

#[derive(Debug, Subcommand)]
#[command(after_help = HELP)]
pub enum Command {
    /// Look whether the database, or a copy, is sound
    Check {
        /// A copy's name, or a file [default: the database]
        copy: Option<PathBuf>,
    },
    /// Copy the database as it is at this moment, whatever runs
    Backup {
        /// Where to [default: among the copies]
        file: Option<PathBuf>,
    },
    /// List the copies
    List,
    /// Put a copy in the database's place
    #[command(after_help = RESTORE_HELP)]
    Restore {
        /// A copy's name, or a file [default: the newest sound copy]
        copy: Option<PathBuf>,
    },
}

impl Command {
    /// Whether it is noted in the audit log ([`super::audit`]).
    pub fn changes(&self) -> bool {
        match self {
            Self::Check { .. } | Self::List => false,
            Self::Backup { .. } | Self::Restore { .. } => true,
        }
    }
}

pub fn run(context: &Context, command: Command) -> anyhow::Result<()> {
    match command {
        Command::Check { copy } => check(context, copy.as_deref()),
        Command::Backup { file } => backup(context, file.as_deref()),
        Command::List => list(context),
        Command::Restore { copy } => restore(context, copy.as_deref()),
    }
}

fn copies(context: &Context) -> Copies {
    Copies::of(&context.state.database())
}

fn check(context: &Context, copy: Option<&Path>) -> anyhow::Result<()> {
    let path = match copy {
        Some(copy) => find(context, copy)?,
        None => context.state.database(),
    };
    if !path.exists() {
        return Err(NotFound(format!("there is no {}", path.display())).into());
    }
    // The database itself may be in use: it is opened as every command does.
    let damage = match copy {
        Some(_) => examine(&path).map(|examined| examined.damage),
        None => Accounts::open(&path).and_then(|accounts| accounts.damage()),
    };
    let damage = match damage {
        Ok(damage) => damage,
        Err(error @ AccountsError::Newer { .. }) => return Err(error.into()),
        Err(error) => vec![error.to_string()],
    };
    let object = json!({ "path": path, "sound": damage.is_empty(), "damage": damage });
    context.out.show(&object, || match damage.is_empty() {
        true => format!("{} is sound", path.display()),
        false => format!(
            "{} is damaged:\n  {}\nhermitage database restore puts the newest sound copy in its place",
            path.display(),
            damage.join("\n  ")
        ),
    })?;
    if damage.is_empty() { Ok(()) } else { Err(Said.into()) }
}

fn backup(context: &Context, file: Option<&Path>) -> anyhow::Result<()> {
    let accounts = context.accounts()?;
    let damage = accounts.damage()?;
    if !damage.is_empty() {
        bail!(
            "the database is damaged, so it is not copied: {}; hermitage database restore",
            damage.join("; ")
        );
    }
    let path = match file {
        Some(file) => {
            accounts.copy_to(file)?;
            file.to_owned()
        }
        None => {
            let stamp = stamp();
            let taken = copies(context).take(&accounts, &format!("manual-{stamp}"))?;
            taken.with_context(|| format!("there is a copy manual-{stamp} already; try again"))?
        }
    };
    let bytes = fs::metadata(&path)?.len();
    let object = json!({ "path": path, "bytes": bytes });
    context.out.show(&object, || format!("copied to {} ({})", path.display(), size::show(bytes)))
}

fn list(context: &Context) -> anyhow::Result<()> {
    let copies = copies(context).list()?;
    let rows: Vec<(&DatabaseCopy, Result<u32, String>)> =
        copies.iter().map(|copy| (copy, sound(&copy.path))).collect();
    let json = |(copy, sound): &(&DatabaseCopy, Result<u32, String>)| -> Value {
        json!({
            "name": copy.name,
            "taken": time::rfc3339(seconds(copy.taken)),
            "bytes": copy.bytes,
            "sound": sound.is_ok(),
            "accounts": sound.as_ref().ok(),
        })
    };
    let object = json!({ "copies": rows.iter().map(json).collect::<Vec<_>>() });
    context.out.show(&object, || {
        if rows.is_empty() {
            return "there are no copies (hermitage database backup takes one)".to_owned();
        }
        let mut table = table(["COPY", "TAKEN", "SIZE", "ACCOUNTS"]);
        for (copy, sound) in &rows {
            table.add_row([
                copy.name.clone(),
                time::short(seconds(copy.taken)),
                size::show(copy.bytes),
                sound.as_ref().map_or_else(|damage| format!("unusable: {damage}"), u32::to_string),
            ]);
        }
        table.trim_fmt()
    })
}

fn restore(context: &Context, copy: Option<&Path>) -> anyhow::Result<()> {
    context.state.create().with_context(|| context.not_ours())?;
    // Held until the end: a service must not start on what is being replaced.
    let Some(_lock) = context.state.lock_service().with_context(|| context.not_ours())? else {
        bail!("the service runs and has the database open; stop it first. Nothing was changed");
    };
    let from = match copy {
        Some(copy) => find(context, copy)?,
        None => newest_sound(context)?,
    };
    let database = context.state.database();
    if same_file(&from, &database) {
        bail!("{} is the database itself", from.display());
    }
    let aside = format!("replaced-{}", stamp());
    let examined = copies(context).restore(&database, &from, &aside)?;
    let accounts = Accounts::open(&database)?;
    let unknown = unknown_disks(context, &accounts)?;
    let kept = copies(context).dir().join(format!("{aside}.db"));
    let kept = kept.exists().then_some(kept);
    let object = json!({
        "restored": from,
        "accounts": examined.accounts,
        "replaced": kept,
        "unknown_disks": unknown,
    });
    admin::base_changed(context);
    context.out.show(&object, || {
        let accounts = count(examined.accounts as usize, "account");
        let mut text = format!("{} is in place: {accounts}", from.display());
        if let Some(kept) = &kept {
            text.push_str(&format!("\nwhat it replaced is kept as {}", kept.display()));
        }
        if !unknown.is_empty() {
            text.push_str(&format!(
                "\nin {} are disks of accounts that it does not know, made or renamed since: {}",
                context.state.accounts_dir().display(),
                unknown.join(", ")
            ));
        }
        text
    })
}

/// Names mean copies; whatever has a slash is a file.
fn find(context: &Context, copy: &Path) -> anyhow::Result<PathBuf> {
    let named = copies(context).dir().join(copy);
    let bare = copy.components().count() == 1 && !copy.is_absolute();
    let path = if bare && named.exists() { named } else { copy.to_owned() };
    if path.exists() {
        return Ok(path);
    }
    let words = format!(
        "there is no copy and no file \"{}\" (hermitage database list shows the copies)",
        copy.display()
    );
    Err(NotFound(words).into())
}

fn newest_sound(context: &Context) -> anyhow::Result<PathBuf> {
    let copies = copies(context).list()?;
    // What a restore replaced is what somebody wanted to leave.
    let candidates = copies.iter().filter(|copy| !copy.name.starts_with("replaced-"));
    let found = candidates.map(|copy| &copy.path).find(|path| sound(path).is_ok());
    found.cloned().ok_or_else(|| {
        NotFound("there is no sound copy; name a file from a backup of this host".into()).into()
    })
}

/// How many accounts are in it, or what is wrong.
fn sound(path: &Path) -> Result<u32, String> {
    match examine(path) {
        Ok(examined) if examined.damage.is_empty() => Ok(examined.accounts),
        Ok(examined) => Err(examined.damage.join("; ")),
        Err(error) => Err(error.to_string()),
    }
}

fn unknown_disks(context: &Context, accounts: &Accounts) -> anyhow::Result<Vec<String>> {
    let mut unknown = Vec::new();
    for entry in fs::read_dir(context.state.accounts_dir())? {
        let Ok(name) = entry?.file_name().into_string() else { continue };
        if let Ok(id) = Uuid::try_parse(&name)
            && accounts.by_id(id)?.is_none()
        {
            unknown.push(name);
        }
    }
    unknown.sort();
    Ok(unknown)
}

fn same_file(a: &Path, b: &Path) -> bool {
    matches!((a.canonicalize(), b.canonicalize()), (Ok(a), Ok(b)) if a == b)
}

/// `20261121T194219.123Z`: two of the same second are two.
fn stamp() -> String {
    let since = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default();
    let digits = date::digits(since.as_secs().try_into().unwrap_or(i64::MAX));
    let (day, clock) = digits.split_at(8.min(digits.len()));
    format!("{day}T{clock}.{:03}Z", since.subsec_millis())
}

fn seconds(time: SystemTime) -> i64 {
    let since = time.duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default();
    since.as_secs().try_into().unwrap_or(i64::MAX)
}
