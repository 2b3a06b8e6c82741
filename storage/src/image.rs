//! Guest images: `image.json` as far as the host needs it. `docs/guest-image.md` is the normative text.

use crate::StateDir;
use crate::publish::{self, NewDir};
use crate::sparse;
use serde::Deserialize;
use std::collections::BTreeMap;
use std::fmt;
use std::fs::{self, File, OpenOptions};
use std::io::{self, Read};
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};

pub const KERNEL: &str = "vmlinuz";
pub const INITRD: &str = "initrd.img";
pub const ROOT: &str = "root.erofs";
pub const DISK_TEMPLATE: &str = "disk-template.img";
pub const MANIFEST: &str = "image.json";
const NEEDED: &[&str] = &[KERNEL, INITRD, ROOT, DISK_TEMPLATE];

const MAX_MANIFEST: u64 = 64 * 1024;

/// An image's id: hexadecimal digits, safe as a name.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct ImageId(String);

impl ImageId {
    pub fn parse(text: &str) -> Option<Self> {
        let digit = |b: u8| matches!(b, b'0'..=b'9' | b'a'..=b'f');
        let fits = (16..=64).contains(&text.len()) && text.bytes().all(digit);
        fits.then(|| Self(text.to_owned()))
    }

    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl fmt::Display for ImageId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

#[derive(Debug, thiserror::Error)]
pub enum ImageError {
    #[error("there is no guest image {} (hermitage image build makes one)", .0.display())]
    Missing(PathBuf),
    #[error("the guest image {} can't be used: {file}: {reason}", dir.display())]
    Damaged { dir: PathBuf, file: String, reason: String },
    #[error("the guest image {}: {doing}: {source}", dir.display())]
    Io { dir: PathBuf, doing: String, source: io::Error },
}

/// An image whose manifest was read.
#[derive(Clone, Debug)]
pub struct Image {
    pub dir: PathBuf,
    pub id: ImageId,
    files: BTreeMap<String, FileEntry>,
}

#[derive(Clone, Debug, Deserialize)]
struct FileEntry {
    bytes: u64,
    /// BLAKE3 of the bytes, 64 hexadecimal digits.
    blake3: String,
}

/// The fields the host reads; others are the image builder's.
#[derive(Deserialize)]
struct ManifestFile {
    id: String,
    files: BTreeMap<String, FileEntry>,
}

impl Image {
    /// Reads the manifest and looks whether each file is there with its length. [`Self::verify`]
    /// reads the files, too.
    pub fn open(dir: &Path) -> Result<Self, ImageError> {
        let mut bytes = Vec::new();
        let io = |doing: &str, source| ImageError::Io {
            dir: dir.to_owned(),
            doing: doing.to_owned(),
            source,
        };
        let file = match File::open(dir.join(MANIFEST)) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => {
                return Err(ImageError::Missing(dir.to_owned()));
            }
            file => file,
        };
        file.and_then(|file| file.take(MAX_MANIFEST).read_to_end(&mut bytes))
            .map_err(|source| io("reading image.json", source))?;
        let damaged = |file: &str, reason: String| ImageError::Damaged {
            dir: dir.to_owned(),
            file: file.to_owned(),
            reason,
        };
        let manifest: ManifestFile =
            serde_json::from_slice(&bytes).map_err(|error| damaged(MANIFEST, error.to_string()))?;
        let id = ImageId::parse(&manifest.id)
            .ok_or_else(|| damaged(MANIFEST, "its id is not one".to_owned()))?;
        for name in NEEDED {
            let entry = manifest
                .files
                .get(*name)
                .ok_or_else(|| damaged(name, "image.json does not list it".to_owned()))?;
            let length = fs::metadata(dir.join(name))
                .map_err(|source| io(&format!("looking at {name}"), source))?
                .len();
            if length != entry.bytes {
                let reason = format!("it has {length} bytes and should have {}", entry.bytes);
                return Err(damaged(name, reason));
            }
        }
        Ok(Self { dir: dir.to_owned(), id, files: manifest.files })
    }

    /// Reads every file and compares its digest.
    pub fn verify(&self) -> Result<(), ImageError> {
        for name in NEEDED {
            let Some(entry) = self.files.get(*name) else { continue };
            let mut hasher = blake3::Hasher::new();
            let hashed = File::open(self.dir.join(name))
                .and_then(|file| hasher.update_reader(file).map(drop));
            hashed.map_err(|source| ImageError::Io {
                dir: self.dir.clone(),
                doing: format!("reading {name}"),
                source,
            })?;
            let digest = hasher.finalize().to_string();
            if digest != entry.blake3 {
                return Err(ImageError::Damaged {
                    dir: self.dir.clone(),
                    file: (*name).to_owned(),
                    reason: format!(
                        "it was altered: its digest is {digest} and should be {}",
                        entry.blake3
                    ),
                });
            }
        }
        Ok(())
    }

    pub fn path(&self, name: &str) -> PathBuf {
        self.dir.join(name)
    }

    /// Copies the image into the state directory, unless it is there, and returns it at its new place.
    /// Not verified: whoever boots it does that, and [`discard`] takes away what turned out damaged.
    pub fn import(&self, state: &StateDir) -> Result<Image, ImageError> {
        let target = state.image(&self.id);
        if target.exists() {
            return Image::open(&target);
        }
        let failed = |source| ImageError::Io {
            dir: target.clone(),
            doing: "copying the image into the state directory".to_owned(),
            source,
        };
        let new = NewDir::create(&target, 0o755).map_err(failed)?;
        for name in NEEDED.iter().chain([&MANIFEST]) {
            copy_file(&self.dir.join(name), &new.path().join(name)).map_err(failed)?;
        }
        new.publish().map_err(failed)?;
        Image::open(&target)
    }
}

/// Takes an image away from the state directory.
pub fn discard(state: &StateDir, id: &ImageId) -> io::Result<()> {
    let dir = state.image(id);
    // The manifest first: half an image must not look like one.
    fs::remove_file(dir.join(MANIFEST))?;
    fs::remove_dir_all(&dir)?;
    publish::sync_dir(&state.images_dir())
}

fn copy_file(from: &Path, to: &Path) -> io::Result<()> {
    let from = File::open(from)?;
    let to = OpenOptions::new().read(true).write(true).create_new(true).mode(0o444).open(to)?;
    sparse::copy(&from, &to)?;
    to.sync_all()
}

/// The images in the state directory, by id.
pub fn list(state: &StateDir) -> io::Result<Vec<Result<Image, ImageError>>> {
    let entries = match fs::read_dir(state.images_dir()) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Vec::new()),
        entries => entries?,
    };
    let mut dirs = Vec::new();
    for entry in entries {
        let entry = entry?;
        if !publish::is_beside(&entry.file_name()) {
            dirs.push(entry.path());
        }
    }
    dirs.sort();
    Ok(dirs.iter().map(|dir| Image::open(dir)).collect())
}

#[cfg(test)]
mod tests {
    use super::*;

    const ID: &str = "00112233445566778899aabbccddeeff";

    fn write(dir: &Path) -> PathBuf {
        let dir = dir.join("image");
        fs::create_dir(&dir).unwrap();
        let files: BTreeMap<_, _> = NEEDED
            .iter()
            .map(|name| {
                fs::write(dir.join(name), name).unwrap();
                let digest = blake3::hash(name.as_bytes()).to_string();
                (name, serde_json::json!({ "bytes": name.len(), "blake3": digest }))
            })
            .collect();
        let manifest = serde_json::json!({ "format": 1, "id": ID, "suite": "x", "files": files });
        fs::write(dir.join(MANIFEST), manifest.to_string()).unwrap();
        dir
    }

    fn import(image: &Path, state: &StateDir) -> Result<Image, ImageError> {
        let image = Image::open(image)?.import(state)?;
        image.verify()?;
        Ok(image)
    }

    #[test]
    fn an_image_is_imported_whole() {
        let dir = tempfile::tempdir().unwrap();
        let state = StateDir::new(dir.path().join("state"));
        state.create().unwrap();
        let image = write(dir.path());
        for _ in 0..2 {
            let imported = import(&image, &state).unwrap();
            assert_eq!(imported.id.as_str(), ID);
            assert_eq!(imported.dir, state.image(&imported.id));
        }
        imported_files_are_equal(&image, &state);
        assert_eq!(list(&state).unwrap().len(), 1);
    }

    fn imported_files_are_equal(image: &Path, state: &StateDir) {
        let imported = state.images_dir().join(ID);
        for name in NEEDED.iter().chain([&MANIFEST]) {
            assert_eq!(fs::read(image.join(name)).unwrap(), fs::read(imported.join(name)).unwrap());
        }
        assert_eq!(fs::read_dir(state.images_dir()).unwrap().count(), 1, "nothing left beside");
    }

    #[test]
    fn a_damaged_image_is_found_and_can_be_discarded() {
        for name in NEEDED {
            let dir = tempfile::tempdir().unwrap();
            let state = StateDir::new(dir.path().join("state"));
            state.create().unwrap();
            let image = write(dir.path());
            let mut bytes = fs::read(image.join(name)).unwrap();
            bytes[0] ^= 1;
            fs::write(image.join(name), &bytes).unwrap();
            let error = import(&image, &state).unwrap_err().to_string();
            assert!(error.contains(name) && error.contains("altered"), "{error}");
            discard(&state, &ImageId::parse(ID).unwrap()).unwrap();
            fs::write(image.join(name), &bytes[1..]).unwrap();
            assert!(
                matches!(Image::open(&image), Err(ImageError::Damaged { file, .. }) if file == *name)
            );
            assert_eq!(fs::read_dir(state.images_dir()).unwrap().count(), 0);
        }
    }

    #[test]
    fn an_id_is_safe_as_a_name() {
        let dir = tempfile::tempdir().unwrap();
        let image = write(dir.path());
        let text = fs::read_to_string(image.join(MANIFEST)).unwrap();
        for bad in ["../../../../etc/shadow", "", &"A".repeat(32)] {
            fs::write(image.join(MANIFEST), text.replace(ID, bad)).unwrap();
            assert!(matches!(Image::open(&image), Err(ImageError::Damaged { .. })), "{bad}");
        }
        assert!(matches!(Image::open(dir.path()), Err(ImageError::Missing(_))));
    }
}
