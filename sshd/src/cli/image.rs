//! `hermitage image …`: building guest images, and listing them.

use super::context::Context;
use super::output::table;
use super::{NotFound, base, tool};
use anyhow::{Context as _, bail};
use clap::Subcommand;
use hermitage_storage::base::Base;
use hermitage_storage::image::{self, Image, ImageId};
use hermitage_storage::publish;
use serde_json::json;
use std::ffi::OsString;
use std::fs;
use std::path::PathBuf;

#[derive(Debug, Subcommand)]
pub enum Command {
    /// Build the guest's kernel and root file system (needs root and mmdebstrap; takes minutes)
    #[command(after_help = "\
Examples:
  hermitage image build
  hermitage image build --packages my-packages.txt --files overlay/")]
    Build(Build),
    /// List the images
    List,
    /// Delete an image that is not needed any more
    Remove { id: String },
}

#[derive(Debug, clap::Args)]
pub struct Build {
    /// The agent to put in [default: hermitage-agent beside this program]
    #[arg(long, value_name = "FILE")]
    agent: Option<PathBuf>,
    /// List of Debian packages instead of the built-in one
    #[arg(long, value_name = "FILE")]
    packages: Option<PathBuf>,
    /// Files to put over the root file system
    #[arg(long, value_name = "DIR")]
    files: Option<PathBuf>,
    /// Debian suite
    #[arg(long, value_name = "NAME")]
    suite: Option<String>,
}

impl Command {
    /// Whether it is noted in the audit log ([`super::audit`]).
    pub fn changes(&self) -> bool {
        match self {
            Self::List => false,
            Self::Build(_) | Self::Remove { .. } => true,
        }
    }
}

pub fn run(context: &Context, command: Command) -> anyhow::Result<()> {
    match command {
        Command::Build(build) => self::build(context, build),
        Command::List => list(context),
        Command::Remove { id } => remove(context, &id),
    }
}

fn build(context: &Context, build: Build) -> anyhow::Result<()> {
    context.state.create().with_context(|| context.not_ours())?;
    let images = context.state.images_dir();
    let _lock = base::only_one(&images)?;
    publish::sweep(&images)?;

    let unnamed = images.join(format!(".new-{}", uuid::Uuid::new_v4().simple()));
    let agent = build.agent.unwrap_or_else(|| tool::path(context, "hermitage-agent"));
    let mut arguments: Vec<OsString> = vec![
        "build".into(),
        "--out".into(),
        unnamed.clone().into(),
        "--agent".into(),
        agent.into(),
    ];
    let options = [
        ("--packages", build.packages.map(OsString::from)),
        ("--files", build.files.map(OsString::from)),
        ("--suite", build.suite.map(OsString::from)),
    ];
    for (option, value) in options {
        if let Some(value) = value {
            arguments.extend([option.into(), value]);
        }
    }
    tool::run(context, "hermitage-image", &arguments)?;
    let id = Image::open(&unnamed)?.id;
    let target = context.state.image(&id);
    if target.exists() {
        fs::remove_dir_all(&unnamed)?;
    } else {
        fs::rename(&unnamed, &target).with_context(|| format!("naming the image {id}"))?;
    }
    publish::sync_dir(&images)?;
    let object = json!({ "id": id.as_str(), "path": target });
    context.out.show(&object, || {
        format!("image {id} is ready; next: hermitage base build\n{}", target.display())
    })
}

fn list(context: &Context) -> anyhow::Result<()> {
    let images = image::list(&context.state)?;
    let object = json!({
        "images": images.iter().map(|image| match image {
            Ok(image) => json!({ "id": image.id.as_str(), "path": image.dir, "error": null }),
            Err(error) => json!({ "id": null, "path": null, "error": error.to_string() }),
        }).collect::<Vec<_>>(),
    });
    context.out.show(&object, || {
        if images.is_empty() {
            return "no images (hermitage image build makes one)".to_owned();
        }
        let mut table = table(["IMAGE", "FOLDER"]);
        for image in &images {
            match image {
                Ok(image) => table.add_row([image.id.to_string(), image.dir.display().to_string()]),
                Err(error) => table.add_row(["?".to_owned(), error.to_string()]),
            };
        }
        table.trim_fmt()
    })
}

fn remove(context: &Context, id: &str) -> anyhow::Result<()> {
    let id = ImageId::parse(id).filter(|id| context.state.image(id).exists()).ok_or_else(|| {
        NotFound(format!("there is no image \"{id}\" (hermitage image list shows them)"))
    })?;
    if let Some(current) = context.state.current_base()? {
        // New accounts' disks are made from its template.
        if Base::manifest(&context.state.base(&current))?.content.image == id.as_str() {
            bail!("image {id} is the current base's ({current}); build another base first");
        }
    }
    image::discard(&context.state, &id).with_context(|| format!("deleting image {id}"))?;
    let object = json!({ "id": id.as_str(), "removed": true });
    context.out.show(&object, || format!("image {id} is deleted"))
}
