//! What is copied.

use std::{
    fs::{self, File},
    io::{Read as _, Write as _},
    path::{Path, PathBuf},
};

use anyhow::{Context as _, ensure};

use super::{Extent, same};

/// Bytes of a small file.
const SMALL: usize = 1024;

/// Files of one folder.
const FOLDER: u64 = 500;

pub struct Files {
    pub dir: PathBuf,
    /// Of random bytes: nothing on the way can make it smaller.
    pub big: PathBuf,
    pub tree: PathBuf,
    count: u64,
}

impl Files {
    pub fn make(dir: &Path, extent: Extent) -> anyhow::Result<Self> {
        let files = Self {
            dir: dir.to_owned(),
            big: dir.join("big"),
            tree: dir.join("tree"),
            count: extent.files,
        };
        let mut random = File::open("/dev/urandom").context("open /dev/urandom")?;
        let mut big = File::create(&files.big).context("make the big file")?;
        let mut chunk = vec![0; 1 << 20];
        for _ in 0..extent.file_mib {
            random.read_exact(&mut chunk).context("read /dev/urandom")?;
            big.write_all(&chunk).context("write the big file")?;
        }
        for number in 0..extent.files {
            let folder = files.tree.join(format!("{:03}", number / FOLDER));
            fs::create_dir_all(&folder).context("make a folder of small files")?;
            let mut bytes = vec![b'.'; SMALL];
            bytes[..8].copy_from_slice(&number.to_le_bytes());
            fs::write(folder.join(format!("{number:06}")), bytes).context("write a small file")?;
        }
        Ok(files)
    }

    /// Commands for sftp(1).
    pub fn batch(&self, commands: &str) -> anyhow::Result<PathBuf> {
        let path = self.dir.join("batch");
        fs::write(&path, commands).with_context(|| format!("write {}", path.display()))?;
        Ok(path)
    }

    /// What came back of the big file; it goes.
    pub fn compare(&self, back: &Path) -> anyhow::Result<()> {
        let read = |path: &Path| fs::read(path).with_context(|| format!("read {}", path.display()));
        same(&read(&self.big)?, &read(back)?, back)?;
        fs::remove_file(back).with_context(|| format!("remove {}", back.display()))
    }

    /// And of the small ones.
    pub fn compare_tree(&self, back: &Path) -> anyhow::Result<()> {
        let mut seen = 0;
        for folder in fs::read_dir(back).with_context(|| format!("list {}", back.display()))? {
            for file in fs::read_dir(folder?.path()).context("list a folder that came back")? {
                let path = file?.path();
                let name = path.file_name().and_then(|name| name.to_str()).unwrap_or_default();
                let number: u64 = name.parse().with_context(|| format!("a file {name:?} came"))?;
                let bytes = fs::read(&path).with_context(|| format!("read {}", path.display()))?;
                ensure!(bytes.len() == SMALL, "{} has {} bytes", path.display(), bytes.len());
                same(&bytes[..8], &number.to_le_bytes(), &path)?;
                seen += 1;
            }
        }
        ensure!(seen == self.count, "of {} files {seen} came back", self.count);
        fs::remove_dir_all(back).with_context(|| format!("remove {}", back.display()))
    }
}
