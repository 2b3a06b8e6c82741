//! `hermitage base …`: making base snapshots and choosing the one that machines are forked from.

use super::context::Context;
use super::output::table;
use super::{NotFound, admin, base_removal, size, snapshot, time, tool};
use anyhow::{Context as _, bail};
use clap::Subcommand;
use hermitage_storage::base::{self, Base, BaseId, MEMORY_BLOCK, Size};
use hermitage_storage::image::{self, Image, ImageId};
use hermitage_storage::publish;
use nix::fcntl::{Flock, FlockArg};
use serde_json::json;
use std::fs::{self, File};
use std::io;
use std::path::{Path, PathBuf};

#[derive(Debug, Subcommand)]
pub enum Command {
    /// Boot a guest image once and keep the running machine as the base of all others
    #[command(after_help = "\
New machines are forked from the new base; running ones go on as they are. Files of accounts stay.

A machine has --memory-mib and --vcpus unless its account or class is given more (account set --memory, --vcpus),
which it can have up to --max-memory-mib and --max-vcpus. Memory that is there to be given and is not takes nothing.

Examples:
  hermitage base build
  hermitage base build --memory-mib 1024 --vcpus 2 --max-memory-mib 16384 --max-vcpus 8")]
    Build(Build),
    /// List the bases
    List,
    /// Fork new machines from another base
    Use { id: String },
    /// Delete a base that is not in use any more
    Remove { id: String },
    /// Delete every base that nothing needs any more
    #[command(after_help = "\
A base is needed if it is the current one, if a machine runs on it, or if a machine that was saved on it
can still be resumed: that one goes on with its base until its next start from the disk.

Examples:
  hermitage base gc --dry-run        what would be deleted, and who needs the others
  hermitage base gc --keep 1         leave the latest of the unneeded ones, to go back to")]
    Gc {
        /// Leave this many of the unneeded bases, the latest
        #[arg(long, value_name = "N", default_value_t = 0)]
        keep: usize,
        /// Only say what would be done
        #[arg(long)]
        dry_run: bool,
    },
}

#[derive(Debug, clap::Args)]
pub struct Build {
    /// Folder of the guest image [default: the latest in the state directory]
    #[arg(long, value_name = "DIR")]
    image: Option<PathBuf>,
    /// Memory of machines of which nothing else is said; what is not touched takes nothing
    #[arg(long, value_name = "MIB", default_value_t = 512, value_parser = clap::value_parser!(u64).range(128..=1 << 20))]
    memory_mib: u64,
    /// Virtual CPUs of machines of which nothing else is said
    #[arg(long, value_name = "N", default_value_t = 1, value_parser = clap::value_parser!(u8).range(1..=i64::from(base::MAX_VCPUS)))]
    vcpus: u8,
    /// Memory that an account can be given at most [default: 4096, or --memory-mib if that is more]
    #[arg(long, value_name = "MIB", value_parser = clap::value_parser!(u64).range(128..=base::MAX_MEMORY >> 20))]
    max_memory_mib: Option<u64>,
    /// Virtual CPUs that an account can be given at most [default: 2, or --vcpus if that is more]
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u8).range(1..=i64::from(base::MAX_VCPUS)))]
    max_vcpus: Option<u8>,
    /// Write what the guest says while it boots to this file
    #[arg(long, value_name = "FILE")]
    serial_log: Option<PathBuf>,
}

/// What accounts can be given where the operator says nothing. Memory that there may be costs the others nothing;
/// CPUs cost each machine what its kernel keeps for every one that there may be (docs/bench.md).
const USUAL_MEMORY_MIB: u64 = 4096;
const USUAL_VCPUS: u8 = 2;

impl Build {
    /// Of each of its machines, and at most.
    fn sizes(&self) -> anyhow::Result<base::Machine> {
        let size = |mib: u64, vcpus| Size { memory_bytes: mib << 20, vcpus };
        let least = size(self.memory_mib, self.vcpus);
        // Memory grows by whole blocks from where it ends.
        let can_grow = least.memory_bytes.is_multiple_of(MEMORY_BLOCK);
        let most = size(
            self.max_memory_mib
                .unwrap_or(if can_grow { USUAL_MEMORY_MIB } else { 0 })
                .max(self.memory_mib),
            self.max_vcpus.unwrap_or(USUAL_VCPUS).max(self.vcpus),
        );
        for (option, wanted, least) in [
            ("memory-mib", self.max_memory_mib, self.memory_mib),
            ("vcpus", self.max_vcpus.map(u64::from), self.vcpus.into()),
        ] {
            if let Some(wanted) = wanted.filter(|wanted| *wanted < least) {
                bail!("--max-{option} {wanted} is less than --{option} {least}");
            }
        }
        let grows = most.memory_bytes > least.memory_bytes;
        if grows && !(can_grow && most.memory_bytes.is_multiple_of(MEMORY_BLOCK)) {
            let block = MEMORY_BLOCK >> 20;
            bail!("memory that can grow does so by {block} MiB: give both in multiples of that");
        }
        Ok(base::Machine::new(least, most))
    }
}

impl Command {
    /// Whether it is noted in the audit log ([`super::audit`]).
    pub fn changes(&self) -> bool {
        match self {
            Self::List | Self::Gc { dry_run: true, .. } => false,
            Self::Build(_) | Self::Use { .. } | Self::Remove { .. } | Self::Gc { .. } => true,
        }
    }
}

pub fn run(context: &Context, command: Command) -> anyhow::Result<()> {
    match command {
        Command::Build(build) => self::build(context, &build),
        Command::List => list(context),
        Command::Use { id } => use_base(context, &id),
        Command::Remove { id } => base_removal::remove(context, &id),
        Command::Gc { keep, dry_run } => base_removal::gc(context, keep, dry_run),
    }
}

fn build(context: &Context, build: &Build) -> anyhow::Result<()> {
    let sizes = build.sizes()?;
    context.state.create().with_context(|| context.not_ours())?;
    let bases = context.state.bases_dir();
    let _lock = only_one(&bases)?;
    publish::sweep(&bases)?;
    publish::sweep(&context.state.images_dir())?;

    let image = match &build.image {
        Some(dir) => Image::open(dir)?.import(&context.state)?,
        None => latest_image(context)?,
    };
    // Its id is known when it is done. Until then a name that is swept up should we be killed.
    let unnamed = bases.join(format!(".new-{}", uuid::Uuid::new_v4().simple()));
    let mut arguments = vec![
        "build-base".into(),
        "--image".into(),
        image.dir.clone().into_os_string(),
        "--out".into(),
        unnamed.clone().into_os_string(),
        "--memory-mib".into(),
        build.memory_mib.to_string().into(),
        "--vcpus".into(),
        build.vcpus.to_string().into(),
        "--max-memory-mib".into(),
        (sizes.most().memory_bytes >> 20).to_string().into(),
        "--max-vcpus".into(),
        sizes.most().vcpus.to_string().into(),
    ];
    if let Some(file) = &build.serial_log {
        arguments.extend(["--serial-log".into(), file.into()]);
    }
    tool::run(context, "hermitage-vmm", &arguments)
        .map_err(|error| blame(context, &image, error))?;
    let id = {
        let _turn = base_removal::turn(context)?;
        let id = take_in(context, &unnamed)?;
        context.state.set_current_base(&id)?;
        id
    };
    admin::base_changed(context);
    let provisioned = provision_all(context)?;

    let object = json!({
        "id": id.as_str(),
        "image": image.id.as_str(),
        "memory_mib": build.memory_mib,
        "vcpus": build.vcpus,
        "max_memory_mib": sizes.most().memory_bytes >> 20,
        "max_vcpus": sizes.most().vcpus,
        "current": true,
        "disks_made": provisioned,
    });
    context.out.show(&object, || {
        let mut text = format!("base {id} is ready; new machines are forked from it");
        if provisioned > 0 {
            text.push_str(&format!("\naccounts that had no disk got one: {provisioned}"));
        }
        text
    })
}

/// A build that failed over a damaged image must not fail over it for ever: the copy goes, so that the
/// next build takes a good one.
fn blame(context: &Context, image: &Image, error: anyhow::Error) -> anyhow::Error {
    let Err(damage) = image.verify() else { return error };
    match image::discard(&context.state, &image.id) {
        Ok(()) => {
            error.context(format!("{damage}; it was deleted: build it again or name a good copy"))
        }
        Err(discard) => error.context(format!("{damage}; it could not be deleted: {discard}")),
    }
}

/// Gives a finished base the name of its content.
fn take_in(context: &Context, unnamed: &Path) -> anyhow::Result<BaseId> {
    let id = Base::manifest(unnamed)?.id;
    let target = context.state.base(&id);
    if target.exists() {
        fs::remove_dir_all(unnamed)?;
    } else {
        fs::rename(unnamed, &target).with_context(|| format!("naming the base {id}"))?;
    }
    publish::sync_dir(&context.state.bases_dir())?;
    Ok(id)
}

/// Accounts that were made before there was a base have no disk yet.
fn provision_all(context: &Context) -> anyhow::Result<usize> {
    let mut made = 0;
    for account in context.accounts()?.list(false)? {
        if !context.state.disk(account.id).exists() {
            made += usize::from(context.provision(&account)?);
        }
    }
    Ok(made)
}

fn latest_image(context: &Context) -> anyhow::Result<Image> {
    let built =
        |image: &Image| fs::metadata(image.path(image::MANIFEST)).and_then(|m| m.modified()).ok();
    let images = image::list(&context.state)?.into_iter().filter_map(Result::ok);
    images.max_by_key(built).with_context(|| {
        format!(
            "there is no guest image in {} (hermitage image build makes one; --image names one elsewhere)",
            context.state.images_dir().display()
        )
    })
}

/// Two builds at once would take twice the time and memory, and sweep each other's leftovers.
pub fn only_one(dir: &Path) -> anyhow::Result<Flock<File>> {
    match Flock::lock(File::open(dir)?, FlockArg::LockExclusiveNonblock) {
        Ok(lock) => Ok(lock),
        Err((_, nix::errno::Errno::EWOULDBLOCK)) => {
            bail!("another build in {} is not done yet", dir.display())
        }
        Err((_, errno)) => {
            Err(io::Error::from(errno)).context(format!("locking {}", dir.display()))
        }
    }
}

fn list(context: &Context) -> anyhow::Result<()> {
    let current = context.state.current_base()?;
    let bases = base::list(&context.state)?;
    let sleepers = snapshot::sleepers(context)?;
    let asleep = |id: &BaseId| sleepers.iter().filter(|(base, _)| base == id).count();
    let object = json!({
        "current": current.as_ref().map(BaseId::as_str),
        "bases": bases.iter().map(|listed| {
            let content = listed.manifest.as_ref().ok().map(|manifest| &manifest.content);
            json!({
                "id": listed.id.as_str(),
                "current": Some(&listed.id) == current.as_ref(),
                "created": time::rfc3339(listed.created),
                "allocated_bytes": listed.allocated,
                "saved_machines": asleep(&listed.id),
                "image": content.map(|c| &c.image),
                "guest_kernel": content.map(|c| &c.guest_kernel),
                "memory_bytes": content.map(|c| c.machine.memory_bytes),
                "vcpus": content.map(|c| c.machine.vcpus),
                "max_memory_bytes": content.map(|c| c.machine.most().memory_bytes),
                "max_vcpus": content.map(|c| c.machine.most().vcpus),
                "restorable_on": content.map(|c| &c.restorable_on),
                "error": listed.manifest.as_ref().err().map(ToString::to_string),
            })
        }).collect::<Vec<_>>(),
    });
    context.out.show(&object, || {
        if bases.is_empty() {
            return "no bases (hermitage base build makes one)".to_owned();
        }
        let mut table = table(["BASE", "CREATED", "MEMORY", "VCPUS", "GUEST KERNEL", "TAKES", ""]);
        for listed in &bases {
            let (memory, vcpus, kernel) = match &listed.manifest {
                Ok(manifest) => {
                    let machine = &manifest.content.machine;
                    let kernel = manifest.content.guest_kernel.clone();
                    (memory_range(machine), vcpu_range(machine), kernel)
                }
                Err(_) => ("?".into(), "?".into(), "?".into()),
            };
            let note = match &listed.manifest {
                Err(error) => error.to_string(),
                Ok(_) if Some(&listed.id) == current.as_ref() => "current".into(),
                Ok(_) => String::new(),
            };
            let note = match (note.as_str(), asleep(&listed.id)) {
                (_, 0) => note,
                ("", saved) => format!("saved machines: {saved}"),
                (_, saved) => format!("{note}, saved machines: {saved}"),
            };
            table.add_row([
                listed.id.to_string(),
                time::short(listed.created),
                memory,
                vcpus,
                kernel,
                size::show(listed.allocated),
                note,
            ]);
        }
        table.trim_fmt()
    })
}

/// `512 MiB - 4 GiB`, of machines of a base.
pub fn memory_range(sizes: &base::Machine) -> String {
    let (least, most) = (sizes.least().memory_bytes, sizes.most().memory_bytes);
    range(size::show(least), size::show(most))
}

pub fn vcpu_range(sizes: &base::Machine) -> String {
    range(sizes.least().vcpus.to_string(), sizes.most().vcpus.to_string())
}

fn range(least: String, most: String) -> String {
    if least == most { least } else { format!("{least} - {most}") }
}

fn use_base(context: &Context, id: &str) -> anyhow::Result<()> {
    let _turn = base_removal::turn(context)?;
    let id = find(context, id)?;
    let base = Base::open(&context.state.base(&id))?;
    // The template of new disks comes from it.
    let image = ImageId::parse(&base.manifest.content.image)
        .with_context(|| format!("base {id} names no image"))?;
    Image::open(&context.state.image(&image))?;
    context.state.set_current_base(&id)?;
    admin::base_changed(context);
    provision_all(context)?;
    let object = json!({ "id": id.as_str(), "current": true });
    context.out.show(&object, || format!("new machines are forked from base {id}"))
}

/// A base by its id or the start of it.
pub(super) fn find(context: &Context, id: &str) -> anyhow::Result<BaseId> {
    let mut found = base::list(&context.state)?
        .into_iter()
        .map(|listed| listed.id)
        .filter(|known| !id.is_empty() && known.as_str().starts_with(id));
    match (found.next(), found.next()) {
        (Some(id), None) => Ok(id),
        (None, _) => {
            Err(NotFound(format!("there is no base \"{id}\" (hermitage base list shows them)"))
                .into())
        }
        (Some(_), Some(_)) => bail!("more than one base starts with \"{id}\""),
    }
}
