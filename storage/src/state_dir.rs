//! Where things are in the state directory (`docs/architecture.md`). Nothing else builds its paths.

use crate::base::BaseId;
use crate::disk;
use crate::image::ImageId;
use crate::publish;
use nix::errno::Errno;
use std::fs::{self, DirBuilder, File, OpenOptions};
use std::io;
use std::os::unix::fs::{DirBuilderExt, OpenOptionsExt, PermissionsExt};
use std::path::{Path, PathBuf};
use uuid::Uuid;

/// The state directory, by default `/var/lib/hermitage`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct StateDir {
    root: PathBuf,
}

impl StateDir {
    pub const DISK: &'static str = "disk.img";
    pub const SNAPSHOT: &'static str = "resume.snap";
    pub const CHECKPOINTS: &'static str = "checkpoints";
    const NEW_SNAPSHOT: &'static str = "resume.snap.new";
    const UNUSABLE_SNAPSHOT: &'static str = "unusable.snap";
    const CURRENT_BASE: &'static str = "current-base";
    const SERVICE_LOCK: &'static str = "serve.lock";

    pub fn new(root: impl Into<PathBuf>) -> Self {
        Self { root: root.into() }
    }

    /// Makes what is missing of the folders, and sets their modes: what belongs to accounts is for the
    /// service only, images and bases hold no secret.
    pub fn create(&self) -> io::Result<()> {
        for (path, mode) in self.folders() {
            DirBuilder::new()
                .recursive(true)
                .mode(mode)
                .create(&path)
                .and_then(|()| fs::set_permissions(&path, fs::Permissions::from_mode(mode)))
                .map_err(|error| {
                    io::Error::new(error.kind(), format!("making {}: {error}", path.display()))
                })?;
        }
        publish::sync_dir(&self.root)
    }

    /// The folders there have to be, and their modes.
    pub fn folders(&self) -> [(PathBuf, u32); 6] {
        [
            (self.root.clone(), 0o711),
            (self.host_keys_dir(), 0o700),
            (self.images_dir(), 0o755),
            (self.bases_dir(), 0o755),
            (self.accounts_dir(), 0o700),
            (self.removed_accounts_dir(), 0o700),
        ]
    }

    pub fn root(&self) -> &Path {
        &self.root
    }

    pub fn database(&self) -> PathBuf {
        self.root.join("accounts.db")
    }

    pub fn host_keys_dir(&self) -> PathBuf {
        self.root.join("host-keys")
    }

    pub fn host_key(&self) -> PathBuf {
        self.host_keys_dir().join("ssh_host_ed25519_key")
    }

    pub fn images_dir(&self) -> PathBuf {
        self.root.join("images")
    }

    pub fn image(&self, id: &ImageId) -> PathBuf {
        self.images_dir().join(id.as_str())
    }

    /// Disk templates of the sizes that accounts have, made from the image's.
    pub fn disk_templates_dir(&self) -> PathBuf {
        self.root.join("disk-templates")
    }

    pub fn disk_template(&self, image: &ImageId, size: u64) -> PathBuf {
        self.disk_templates_dir().join(format!("{image}-{size}.img"))
    }

    pub fn bases_dir(&self) -> PathBuf {
        self.root.join("bases")
    }

    pub fn base(&self, id: &BaseId) -> PathBuf {
        self.bases_dir().join(id.as_str())
    }

    pub fn accounts_dir(&self) -> PathBuf {
        self.root.join("accounts")
    }

    pub fn account_dir(&self, account: Uuid) -> PathBuf {
        self.accounts_dir().join(account.to_string())
    }

    pub fn disk(&self, account: Uuid) -> PathBuf {
        self.account_dir(account).join(Self::DISK)
    }

    /// What the account's machine is resumed from, if it was saved.
    pub fn snapshot(&self, account: Uuid) -> PathBuf {
        self.account_dir(account).join(Self::SNAPSHOT)
    }

    /// A snapshot that is being written.
    pub fn new_snapshot(&self, account: Uuid) -> PathBuf {
        self.account_dir(account).join(Self::NEW_SNAPSHOT)
    }

    /// The last snapshot that could not be resumed, for the operator.
    pub fn unusable_snapshot(&self, account: Uuid) -> PathBuf {
        self.account_dir(account).join(Self::UNUSABLE_SNAPSHOT)
    }

    /// States of the account that can be gone back to.
    pub fn checkpoints_dir(&self, account: Uuid) -> PathBuf {
        self.account_dir(account).join(Self::CHECKPOINTS)
    }

    pub fn removed_accounts_dir(&self) -> PathBuf {
        self.root.join("removed")
    }

    pub fn removed_dir(&self, account: Uuid) -> PathBuf {
        self.removed_accounts_dir().join(account.to_string())
    }

    /// The base that new machines are forked from. An error also if the file holds no base id.
    pub fn current_base(&self) -> io::Result<Option<BaseId>> {
        let path = self.root.join(Self::CURRENT_BASE);
        let text = match fs::read_to_string(&path) {
            Ok(text) => text,
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
            Err(error) => return Err(error),
        };
        let id = BaseId::parse(text.trim_end_matches('\n')).ok_or_else(|| {
            let message = format!(
                "{} does not hold a base id; set it with: hermitage base use ID",
                path.display()
            );
            io::Error::new(io::ErrorKind::InvalidData, message)
        })?;
        Ok(Some(id))
    }

    /// Durable when it returns.
    pub fn set_current_base(&self, id: &BaseId) -> io::Result<()> {
        publish::write_file(
            &self.root.join(Self::CURRENT_BASE),
            format!("{id}\n").as_bytes(),
            0o644,
        )
    }

    /// Whether a service has [`Self::lock_service`]'s lock. One that is just starting is not disturbed by the look.
    pub fn service_is_locked(&self) -> io::Result<bool> {
        match File::open(self.service_lock()) {
            Ok(file) => Ok(disk::is_locked(&file)?),
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(false),
            Err(error) => Err(error),
        }
    }

    pub fn service_lock(&self) -> PathBuf {
        self.root.join(Self::SERVICE_LOCK)
    }

    /// For the service, which must be the only one: `None` if another has it. Held as long as the
    /// returned file is open.
    pub fn lock_service(&self) -> io::Result<Option<File>> {
        let file = OpenOptions::new()
            .create(true)
            .truncate(false)
            .write(true)
            .mode(0o600)
            .open(self.service_lock())?;
        match disk::lock(&file) {
            Ok(()) => Ok(Some(file)),
            Err(Errno::EAGAIN | Errno::EACCES) => Ok(None),
            Err(errno) => Err(errno.into()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_current_base_is_kept_and_checked() {
        let dir = tempfile::tempdir().unwrap();
        let state = StateDir::new(dir.path().join("state"));
        state.create().unwrap();
        state.create().unwrap();
        assert_eq!(state.current_base().unwrap(), None);
        let id = BaseId::parse(&"0f".repeat(16)).unwrap();
        state.set_current_base(&id).unwrap();
        assert_eq!(state.current_base().unwrap(), Some(id));
        for bad in ["../../etc", "", &"0F".repeat(16)] {
            fs::write(state.root().join("current-base"), bad).unwrap();
            assert_eq!(state.current_base().unwrap_err().kind(), io::ErrorKind::InvalidData);
        }
    }

    #[test]
    fn one_service_at_a_time() {
        let dir = tempfile::tempdir().unwrap();
        let state = StateDir::new(dir.path());
        assert!(!state.service_is_locked().unwrap(), "there is no such file yet");
        let held = state.lock_service().unwrap().expect("nobody has it");
        assert!(state.lock_service().unwrap().is_none());
        assert!(state.service_is_locked().unwrap());
        drop(held);
        assert!(!state.service_is_locked().unwrap());
        assert!(state.lock_service().unwrap().is_some());
    }

    #[test]
    fn accounts_are_not_for_others() {
        let dir = tempfile::tempdir().unwrap();
        let state = StateDir::new(dir.path());
        state.create().unwrap();
        for private in [state.accounts_dir(), state.removed_accounts_dir(), state.host_keys_dir()] {
            assert_eq!(fs::metadata(private).unwrap().permissions().mode() & 0o777, 0o700);
        }
    }
}
