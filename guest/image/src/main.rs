//! Builds the guest image: the kernel, the initrd with our agent as PID 1, the root file system and
//! the account disk's template. `docs/guest-image.md` describes the result and why it is so.
//!
//! The tools of Debian do the work they are made for (mmdebstrap, mkfs.erofs, mke2fs); ours is to
//! order them, to resolve the modules the initrd needs, and to publish the whole or nothing.
#![forbid(unsafe_code)]

mod build;
mod cpio;
mod initrd;
mod kernel;
mod manifest;
mod modules;
mod packages;
mod rootfs;
mod tool;
mod workdir;

use std::path::PathBuf;
use std::process::ExitCode;

use clap::{Parser, Subcommand};

#[derive(Parser)]
#[command(name = "hermitage-image", version, about = "Build the guest image of Hermitage")]
struct Cli {
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand)]
enum Command {
    /// Build kernel, initrd, root file system and disk template into a new directory
    Build(BuildArgs),
}

#[derive(clap::Args)]
pub struct BuildArgs {
    /// Directory to make; it appears whole or not at all
    #[arg(long, value_name = "DIR")]
    out: PathBuf,
    /// The hermitage-agent binary, statically linked
    #[arg(long, value_name = "FILE")]
    agent: PathBuf,
    /// Packages of the root file system, one a line, `#` begins a comment [default: built in]
    #[arg(long, value_name = "FILE")]
    packages: Option<PathBuf>,
    /// Tree of files laid over the root file system, owned by root
    #[arg(long, value_name = "DIR")]
    files: Option<PathBuf>,
    /// Debian release
    #[arg(long, value_name = "NAME", default_value = "trixie")]
    suite: String,
}

fn main() -> ExitCode {
    let Command::Build(args) = Cli::parse().command;
    match build::build(&args) {
        Ok(id) => {
            println!("{id}");
            ExitCode::SUCCESS
        }
        Err(error) => {
            eprintln!("hermitage-image: {error:#}");
            ExitCode::FAILURE
        }
    }
}
