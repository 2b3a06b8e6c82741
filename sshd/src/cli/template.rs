//! What new disks are copies of: the image's disk template, grown to the account's size.
//!
//! A guest can grow the small template itself, while it is mounted, but does so on the way of somebody's
//! first login. `resize2fs` does it here, once for each size: this file system is ours, no guest has ever
//! written to it. What it makes is kept, so that the next account's disk is a copy again.

use hermitage_storage::StateDir;
use hermitage_storage::image::ImageId;
use hermitage_storage::publish::{self, NewFile};
use hermitage_storage::sparse;
use std::fs::{self, File};
use std::io;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

#[derive(Debug, thiserror::Error)]
enum TemplateError {
    #[error("{0}: {1}")]
    Io(&'static str, io::Error),
    #[error("resize2fs: {0}")]
    Tool(String),
}

/// The template for disks of `size` bytes; `small` itself where growing it is not possible, which is said
/// on standard error.
pub fn of_size(state: &StateDir, image: &ImageId, small: PathBuf, size: u64) -> PathBuf {
    let grown = state.disk_template(image, size);
    if grown.is_file() {
        return grown;
    }
    // Somebody else may be making it, too: the last one stays, and both are the same.
    match make(state, image, &small, &grown, size) {
        Ok(()) => grown,
        Err(error) => {
            eprintln!(
                "hermitage: the disk will grow at its first login, which takes a moment, as it \
                 can't be grown now: {error}"
            );
            small
        }
    }
}

fn make(
    state: &StateDir,
    image: &ImageId,
    small: &Path,
    grown: &Path,
    size: u64,
) -> Result<(), TemplateError> {
    let io = |doing| move |error| TemplateError::Io(doing, error);
    let dir = state.disk_templates_dir();
    fs::create_dir_all(&dir).map_err(io("making the folder of disk templates"))?;
    publish::sweep(&dir).map_err(io("sweeping the folder of disk templates"))?;
    forget_other_images(&dir, image).map_err(io("removing former disk templates"))?;
    let source = File::open(small).map_err(io("opening the image's disk template"))?;
    let new = NewFile::create(grown, 0o600).map_err(io("making a disk template"))?;
    sparse::copy(&source, new.file()).map_err(io("copying the image's disk template"))?;
    new.file().set_len(size).map_err(io("extending a disk template"))?;
    resize(new.file())?;
    new.publish().map_err(io("publishing a disk template"))
}

/// Grows the ext4 file system in `file` to the file's length.
fn resize(file: &File) -> Result<(), TemplateError> {
    let tool = |error: io::Error| match error.kind() {
        io::ErrorKind::NotFound => {
            TemplateError::Tool("it is not installed (Debian's package e2fsprogs has it)".into())
        }
        _ => TemplateError::Tool(error.to_string()),
    };
    let itself = file.try_clone().map_err(tool)?;
    let output = Command::new("resize2fs")
        // -f: nobody has checked it, as nobody has ever mounted it.
        .args(["-f", "/proc/self/fd/0"])
        .env("PATH", "/usr/sbin:/usr/bin:/sbin:/bin")
        .stdin(itself)
        .stdout(Stdio::null())
        .stderr(Stdio::piped())
        .output()
        .map_err(tool)?;
    if !output.status.success() {
        let words = String::from_utf8_lossy(&output.stderr).trim().to_owned();
        return Err(TemplateError::Tool(format!("{}: {words}", output.status)));
    }
    Ok(())
}

fn forget_other_images(dir: &Path, image: &ImageId) -> io::Result<()> {
    for entry in fs::read_dir(dir)? {
        let entry = entry?;
        let name = entry.file_name();
        if !name.to_string_lossy().starts_with(image.as_str()) && !publish::is_beside(&name) {
            match fs::remove_file(entry.path()) {
                Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
                _ => {}
            }
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::MetadataExt as _;

    const SMALL: u64 = 64 << 20;
    const LARGE: u64 = 1 << 30;

    fn small_template(dir: &Path) -> PathBuf {
        let path = dir.join("small.img");
        File::create(&path).unwrap().set_len(SMALL).unwrap();
        let made = Command::new("mke2fs")
            .args(["-q", "-F", "-t", "ext4", "-b", "4096"])
            .arg(&path)
            .status();
        assert!(made.unwrap().success());
        path
    }

    /// Blocks of 4 KiB that the superblock says (Documentation/filesystems/ext4/super.rst).
    fn blocks(path: &Path) -> u32 {
        let bytes = fs::read(path).unwrap();
        u32::from_le_bytes(bytes[1024 + 4..1024 + 8].try_into().unwrap())
    }

    #[test]
    fn a_template_is_grown_once_and_stays_sparse() {
        let temp = tempfile::tempdir().unwrap();
        let state = StateDir::new(temp.path());
        let small = small_template(temp.path());
        let [first, second] = ["1", "2"].map(|digit| ImageId::parse(&digit.repeat(16)).unwrap());
        let grown = of_size(&state, &first, small.clone(), LARGE);
        assert_ne!(grown, small);
        let meta = fs::metadata(&grown).unwrap();
        assert_eq!((meta.len(), u64::from(blocks(&grown)) * 4096), (LARGE, LARGE));
        assert!(meta.blocks() * 512 < LARGE / 8);
        assert_eq!(of_size(&state, &first, "/nowhere".into(), LARGE), grown);
        // A new image's templates replace the old one's.
        let other = of_size(&state, &second, small, LARGE);
        assert!(other.exists() && !grown.exists());
    }

    #[test]
    fn what_can_not_grow_is_used_as_it_is() {
        let temp = tempfile::tempdir().unwrap();
        let state = StateDir::new(temp.path());
        let image = ImageId::parse(&"3".repeat(16)).unwrap();
        let garbage = temp.path().join("garbage.img");
        fs::write(&garbage, [7; 8192]).unwrap();
        assert_eq!(of_size(&state, &image, garbage.clone(), LARGE), garbage);
        assert!(!state.disk_template(&image, LARGE).exists());
    }
}
