//! The recipe, top down.

use std::fs;
use std::path::Path;
use std::time::Instant;

use anyhow::{Context, Result, bail};

use crate::BuildArgs;
use crate::manifest::Manifest;
use crate::workdir::WorkDir;
use crate::{initrd, kernel, packages, rootfs, tool};

/// Builds the image and returns its id.
pub fn build(args: &BuildArgs) -> Result<String> {
    let started = Instant::now();
    tool::require()?;
    initrd::check_agent(&args.agent)?;
    let list = match &args.packages {
        Some(file) => fs::read_to_string(file)
            .with_context(|| format!("reading the package list {}", file.display()))?,
        None => packages::DEFAULT.to_owned(),
    };
    let include = packages::parse(&list).context("in the package list")?;
    if let Some(files) = &args.files
        && !files.is_dir()
    {
        bail!("--files {}: not a directory", files.display());
    }
    packages::check_suite(&args.suite)?;

    let work = WorkDir::create(&args.out)?;
    let tree = work.path("tree");
    let out = work.path("out");
    fs::create_dir(&out)?;

    step(started, &format!("installing {} packages of {}", include.len(), args.suite));
    let package = rootfs::bootstrap(&tree, work.root(), &args.suite, &include)?;
    step(started, "unpacking the kernel");
    let kernel = kernel::unpack(&package, &work.path("kernel"), &tree)?;
    fs::copy(&kernel.vmlinuz, out.join("vmlinuz")).context("copying the kernel")?;
    step(started, "writing the disk template");
    let template = out.join("disk-template.img");
    rootfs::write_disk_template(&work.path("disk"), &template)?;
    step(started, &format!("packing the initrd for {}", kernel.version));
    let parts = initrd::Parts {
        agent: &args.agent,
        modules: &tree.join("usr/lib/modules").join(&kernel.version),
        disk_template: &template,
    };
    initrd::write(&out.join("initrd.img"), &parts)?;
    step(started, "tailoring the root file system");
    rootfs::tailor(&tree, &args.agent, args.files.as_deref())?;
    step(started, "writing root.erofs");
    rootfs::write_erofs(&tree, &out.join("root.erofs"))?;

    step(started, "hashing");
    let manifest = Manifest::of(&out, &args.suite, &kernel.version)?;
    manifest.write(&out.join("image.json"))?;
    sync_files(&out)?;
    work.publish(&out, &args.out)?;
    step(started, &format!("{} is complete", args.out.display()));
    Ok(manifest.id)
}

/// The rename must not reach the medium before what it names.
fn sync_files(dir: &Path) -> Result<()> {
    for entry in fs::read_dir(dir)? {
        let path = entry?.path();
        fs::File::open(&path)?.sync_all().with_context(|| format!("syncing {}", path.display()))?;
    }
    fs::File::open(dir)?.sync_all()?;
    Ok(())
}

fn step(started: Instant, what: &str) {
    eprintln!("[{:6.1} s] {what}", started.elapsed().as_secs_f64());
}
