//! What the repository promises about itself beyond what compilers and tests see: licences of what is
//! linked in, who may import whom, and documents that name files which exist. Offline but for cargo's
//! own fetching.

mod imports;
mod licences;
mod paths;

use anyhow::{Context, Result, bail};
use serde::Deserialize;

use crate::layout::Layout;
use crate::process::run_captured;
use crate::programs::cargo;
use crate::steps::note;

pub fn all(layout: &Layout) -> Result<()> {
    let metadata = metadata(layout)?;
    let checks = [
        ("licences", licences::findings(&metadata)),
        ("imports", imports::findings(&metadata)),
        ("paths in documents", paths::findings(layout.root())?),
    ];
    let mut found = 0;
    for (name, findings) in checks {
        if findings.is_empty() {
            note(&format!("{name}: ok"));
        }
        for finding in &findings {
            note(&format!("{name}: {finding}"));
        }
        found += findings.len();
    }
    if found > 0 {
        bail!("{found} findings");
    }
    Ok(())
}

/// The part of `cargo metadata` that is looked at.
#[derive(Debug, Deserialize)]
struct Metadata {
    packages: Vec<Package>,
    workspace_members: Vec<String>,
}

#[derive(Debug, Deserialize)]
struct Package {
    id: String,
    name: String,
    version: String,
    license: Option<String>,
    dependencies: Vec<Dependency>,
}

#[derive(Debug, Deserialize)]
struct Dependency {
    name: String,
    /// `dev`, `build` or nothing.
    kind: Option<String>,
}

impl Metadata {
    fn is_ours(&self, package: &Package) -> bool {
        self.workspace_members.contains(&package.id)
    }
}

fn metadata(layout: &Layout) -> Result<Metadata> {
    let output = run_captured(cargo(layout).args([
        "metadata",
        "--format-version=1",
        "--locked",
        "--filter-platform=x86_64-unknown-linux-gnu",
    ]))?;
    serde_json::from_slice(&output.stdout).context("understand cargo metadata")
}
