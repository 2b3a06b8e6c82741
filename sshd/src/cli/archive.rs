//! `hermitage account export|restore`: an account as a file.

use super::audit::CopyNote;
use super::context::Context;
use super::rest::{self, Held};
use super::{account_quota, size, time};
use anyhow::{Context as _, bail};
use hermitage::watch::Copied;
use hermitage_storage::accounts::{Account, Accounts};
use hermitage_storage::archive::{
    self, BackMemory, Manifest, Parts, Reader, RestoreError, Restored, Source, Wish, Written,
};
use hermitage_storage::base::BaseId;
use hermitage_storage::incoming;
use hermitage_storage::publish::{self, NewFile};
use hermitage_storage::rest::{AtRest, Resting};
use hermitage_storage::sparse;
use serde_json::{Value, json};
use std::fs::File;
use std::io::{self, BufReader, BufWriter, IsTerminal, Read, Write};
use std::path::{Path, PathBuf};

pub const EXPORT_HELP: &str = "\
The archive holds settings, keys, the password's hash and every file, and with --memory what the machine's programs
knew: it is as secret as the account.

A machine that runs goes on: the service copies its disk as it is at one moment, with all that programs have written
by then, which they notice as a pause of a moment; with --memory, as long as that takes to be written. There must be
room for the copies beside the disk.

Of an account whose machine does not run: while the archive is written nobody logs in, unless the file system can copy
a disk at once (XFS, Btrfs).

Examples:
  hermitage account export alice -o alice.hermitage
  hermitage account export alice --memory --stop -o - | ssh other hermitage account restore -
  hermitage account export alice -o - | age -r KEY > alice.hermitage.age";

pub const RESTORE_HELP: &str = "\
All of the archive is checked before anything of it counts. The account is a new one with the old one's name, keys,
password, files and, if it is there, memory. Under another name it starts from its files.

Examples:
  hermitage account restore alice.hermitage
  hermitage account restore alice.hermitage --name alice-before";

#[derive(Debug, clap::Args)]
pub struct Export {
    name: String,
    /// Where to: a file that is not there yet, or - for standard output
    #[arg(short, long, value_name = "FILE")]
    output: PathBuf,
    /// Also its machine's memory
    #[arg(long)]
    memory: bool,
    /// End its sessions and put its machine to rest first, if it runs, instead of copying its disk
    #[arg(long)]
    stop: bool,
}

#[derive(Debug, clap::Args)]
pub struct Restore {
    /// The archive, or - for standard input
    file: PathBuf,
    /// Under another name
    #[arg(long, value_name = "NEW")]
    name: Option<String>,
    /// Leave the memory out, should there be some: start from the files
    #[arg(long)]
    no_memory: bool,
}

pub fn export(context: &Context, wanted: &Export) -> anyhow::Result<()> {
    let to_stdout = wanted.output.as_os_str() == "-";
    if to_stdout && io::stdout().is_terminal() {
        bail!(
            "an archive is nothing for a terminal; name a file with -o FILE, or pipe it somewhere"
        );
    }
    if !to_stdout && wanted.output.exists() {
        bail!("there is {} already", wanted.output.display());
    }
    let accounts = context.accounts()?;
    let account = accounts.named(&wanted.name)?;
    let note = CopyNote::of(context, Copied::Export, &account, wanted.output.display());
    let exported = take_out(context, &accounts, &account, wanted);
    note.over(exported.as_ref().map(|exported| exported.written.bytes));
    let Exported { written, memory, in_use, left_out } = exported?;
    let object = json!({
        "account": account.name,
        "bytes": written.bytes,
        "disk_bytes": written.disk_data,
        "memory": memory,
        "in_use": in_use,
        "has_password": account.password.is_some(),
    });
    if let Some(reason) = left_out {
        context.out.note(format!("without memory: {reason}"));
    }
    if to_stdout {
        return Ok(());
    }
    context.out.show(&object, || {
        let memory = match (in_use, memory) {
            (true, false) => ", as its disk was while in use",
            (true, true) => ", with its memory, as they were while in use",
            (false, true) => ", with its memory",
            (false, false) => "",
        };
        let secret = match account.password {
            Some(_) => " It has the password's hash in it.",
            None => "",
        };
        format!(
            "{} is in {}{memory}: {} of files in {}.{secret} Keep it as secret as the account.",
            account.name,
            wanted.output.display(),
            size::show(written.disk_data),
            size::show(written.bytes),
        )
    })
}

/// An archive that is written.
struct Exported {
    written: Written,
    /// It has some.
    memory: bool,
    in_use: bool,
    /// Why it has no memory, though that was asked for.
    left_out: Option<String>,
}

fn take_out(
    context: &Context,
    accounts: &Accounts,
    account: &Account,
    wanted: &Export,
) -> anyhow::Result<Exported> {
    let held = match wanted.stop {
        true => Held::Rest(rest::take(context, account, true)?),
        false => rest::take_or_copy(context, account, wanted.memory)?,
    };
    let version = env!("CARGO_PKG_VERSION");
    let described =
        archive::describe(accounts, account, held.kept(), wanted.memory, version, time::now());
    let manifest = described.with_context(|| format!("looking at {}'s disk", account.name))?;
    let left_out = match &held {
        Held::Rest(AtRest { memory: Resting::Unusable(reason), .. }) if wanted.memory => {
            Some(reason.clone())
        }
        Held::Rest(AtRest { memory: Resting::Nothing, .. }) if wanted.memory => {
            Some("nothing is saved of its machine".into())
        }
        _ => None,
    };
    let in_use = held.is_in_use();
    let written = if wanted.output.as_os_str() == "-" {
        write(context, account, &manifest, held, io::stdout().lock())?
    } else {
        let path = &wanted.output;
        let making = || format!("making {}", path.display());
        let new = NewFile::create(path, 0o600).with_context(making)?;
        let written = write(context, account, &manifest, held, new.file())?;
        new.publish_new().with_context(making)?;
        written
    };
    Ok(Exported { written, memory: manifest.memory.is_some(), in_use, left_out })
}

fn write(
    context: &Context,
    account: &Account,
    manifest: &Manifest,
    held: Held,
    out: impl Write,
) -> anyhow::Result<Written> {
    let mut out = BufWriter::with_capacity(1 << 20, out);
    let exporting = || format!("exporting {}", account.name);
    let AtRest { disk, memory, .. } = match held {
        Held::Rest(at_rest) => at_rest,
        Held::Copy(copies) => {
            let memory = copies.memory.as_ref().map(|memory| &memory.file);
            let source = Source { manifest, disk: &copies.disk, memory };
            return archive::write(&mut out, &source).with_context(exporting);
        }
    };
    let memory = match (&manifest.memory, memory) {
        (Some(_), Resting::Saved(file, _)) => Some(file),
        _ => None,
    };
    // A copy that shares the disk's blocks is made at once; then she can log in meanwhile.
    let dir = context.state.account_dir(account.id);
    let copied = || -> io::Result<(NewFile, Option<File>)> {
        publish::sweep(&dir)?;
        let copy = NewFile::create(&dir.join("export"), 0o600)?;
        let shared = sparse::share(&disk, copy.file())?;
        Ok((copy, (!shared).then_some(disk)))
    };
    let (copy, locked) =
        copied().with_context(|| format!("copying the disk in {}", dir.display()))?;
    let source =
        Source { manifest, disk: locked.as_ref().unwrap_or(copy.file()), memory: memory.as_ref() };
    archive::write(&mut out, &source).with_context(exporting)
}

pub fn restore(context: &Context, wanted: &Restore) -> anyhow::Result<()> {
    match wanted.file.as_os_str() == "-" {
        true => restore_from(context, wanted, io::stdin().lock()),
        false => {
            let path = &wanted.file;
            let file = File::open(path).with_context(|| path.display().to_string())?;
            restore_from(context, wanted, file)
        }
    }
}

fn restore_from(context: &Context, wanted: &Restore, from: impl Read) -> anyhow::Result<()> {
    let reader = Reader::new(BufReader::with_capacity(1 << 20, from))
        .with_context(|| format!("reading {}", shown(&wanted.file)))?;
    let mut accounts = context.accounts()?;
    incoming::sweep(&context.state, &accounts).context("removing what a former restore left")?;
    let wish = Wish {
        name: wanted.name.as_deref(),
        memory: !wanted.no_memory,
        room: rest::room(context)?,
    };
    let place = shown(&wanted.file);
    bring_back(context, &mut accounts, reader, &wish, (&place, &place))
}

/// Makes an account of its parts, and says what it is. `what` it is restored from, and where that is.
pub fn bring_back(
    context: &Context,
    accounts: &mut Accounts,
    parts: impl Parts,
    wish: &Wish,
    (what, place): (&str, &str),
) -> anyhow::Result<()> {
    let name = wish.name.unwrap_or(&parts.manifest().account.name).to_owned();
    let mut note = CopyNote::named(context, Copied::Restore, &name, place);
    let restored = match archive::restore(&context.state, accounts, parts, wish) {
        // As of `account add`, with its exit status.
        Err(RestoreError::Accounts(error)) => Err(error.into()),
        restored => restored.with_context(|| format!("restoring {what}")),
    };
    if let Ok(restored) = &restored {
        note.is(restored.account.id);
    }
    note.over(restored.as_ref().map(|restored| restored.disk_data));
    tell(context, &restored?)
}

/// What a restored account is, and what there is to know of its memory.
fn tell(context: &Context, restored: &Restored) -> anyhow::Result<()> {
    let name = &restored.account.name;
    let (base, why) = match &restored.memory {
        BackMemory::None => (None, None),
        BackMemory::LeftOut(why) => (None, Some(*why)),
        BackMemory::Kept(base) => (Some(base.as_str()), None),
    };
    let missing = base
        .filter(|base| !BaseId::parse(base).is_some_and(|base| context.state.base(&base).is_dir()));
    if let Some(why) = why {
        context.out.note(format!("its memory is left out: {why}"));
    }
    if let Some(base) = missing {
        context.out.note(format!(
            "its memory is of the base {base}, which is not here: bring it to {} before {name} logs in, or her \
             machine starts from her files",
            context.state.bases_dir().display(),
        ));
    }
    if restored.account.disabled {
        context.out.note(format!("{name} is disabled, as it was: hermitage account enable {name}"));
    }
    let quota = account_quota::of(context, &restored.account);
    if quota.is_over() {
        context.out.note(format!(
            "{name} takes {}, more than its quota, so programs in its machine get no new space: hermitage account set \
             {name} --quota SIZE",
            quota.shown()
        ));
    }
    let object: Value = json!({
        "account": name,
        "id": restored.account.id,
        "disk_bytes": restored.disk_data,
        "memory": base.is_some(),
        "base": base,
        "base_missing": missing.is_some(),
    });
    context.out.show(&object, || {
        let memory = if base.is_some() { " and its memory" } else { "" };
        format!("{name} is restored: {} of files{memory}", size::show(restored.disk_data))
    })
}

fn shown(path: &Path) -> String {
    if path.as_os_str() == "-" { "standard input".into() } else { path.display().to_string() }
}
