//! The image that accounts' machines boot: built here by `hermitage-image`, once for each set of
//! inputs.

use std::fs;
use std::path::PathBuf;
use std::time::SystemTime;

use anyhow::{Context, Result};

use crate::layout::Layout;
use crate::process::{privileged, run_logged};
use crate::programs::digest_of;

/// Images kept beside the current one: going back a commit should not cost a build.
const KEPT: usize = 2;

pub struct GuestImage {
    dir: PathBuf,
    key: String,
}

impl GuestImage {
    /// The image for the programs as they are built now.
    pub fn current(layout: &Layout) -> Result<Self> {
        let inputs = [layout.agent(), layout.program("hermitage-image"), packages(layout)];
        let mut key = digest_of(&inputs, &[])?;
        key.truncate(16);
        Ok(Self { dir: layout.shared().join("image").join(&key), key })
    }

    pub fn dir(&self) -> &PathBuf {
        &self.dir
    }

    pub fn key(&self) -> &str {
        &self.key
    }

    pub fn exists(&self) -> bool {
        self.dir.join("image.json").exists()
    }

    pub fn build(&self, layout: &Layout) -> Result<()> {
        let parent = self.dir.parent().context("the image folder has a parent")?;
        fs::create_dir_all(parent).with_context(|| format!("make {}", parent.display()))?;
        // The builder publishes its folder whole or not at all.
        run_logged(
            privileged(layout.program("hermitage-image"))
                .arg("build")
                .arg("--out")
                .arg(&self.dir)
                .arg("--agent")
                .arg(layout.agent())
                .arg("--packages")
                .arg(packages(layout)),
            &layout.step_log(),
        )?;
        self.remove_old(parent.to_owned(), layout)
    }

    fn remove_old(&self, parent: PathBuf, layout: &Layout) -> Result<()> {
        let mut others: Vec<(SystemTime, PathBuf)> = Vec::new();
        for entry in fs::read_dir(&parent).with_context(|| format!("list {}", parent.display()))? {
            let entry = entry?;
            if entry.path() != self.dir && entry.path().join("image.json").exists() {
                others.push((entry.metadata()?.modified()?, entry.path()));
            }
        }
        others.sort();
        let surplus = others.len().saturating_sub(KEPT);
        for (_, dir) in others.drain(..surplus) {
            run_logged(privileged("rm").arg("-rf").arg(&dir), &layout.step_log())?;
        }
        Ok(())
    }
}

fn packages(layout: &Layout) -> PathBuf {
    layout.root().join("guest/image/packages.txt")
}
