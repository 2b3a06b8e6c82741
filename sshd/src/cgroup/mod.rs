//! What the host enforces of a machine's limits: its process is in a control group of its own, below the
//! service's (docs/limits.md says which file does what, and why).
//!
//! Only version 2 will do, and the kernel's rule that processes are in leaves only ("no internal processes",
//! cgroup-v2.rst) decides where the groups can be: [`place`]. Where they can't be anywhere the service says so,
//! and goes on without, unless `machines.require_limits` wants otherwise.

mod ceilings;
mod group;
mod place;
mod usage;

use std::{
    collections::HashSet,
    fs, io,
    path::{Path, PathBuf},
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::Duration,
};

use hermitage_storage::base::Size as Shape;
use uuid::Uuid;

use crate::{
    config::Machines,
    limits::{Resources, Share},
};
pub use ceilings::Ceilings;
pub use group::Group;
pub use usage::{Usage, charged_to, held_back, kept_by};

/// The controllers whose files are written.
pub const CONTROLLERS: [&str; 4] = ["cpu", "io", "memory", "pids"];

/// What is below the service's group.
const MACHINES: &str = "machines";

/// How often, and how many times, a group that could not be removed is tried again: a machine whose service
/// was killed takes 20 seconds to power off.
const SWEEP: (Duration, u32) = match cfg!(test) {
    true => (Duration::from_millis(20), 120),
    false => (Duration::from_secs(1), 120),
};

#[derive(Debug, thiserror::Error)]
pub enum CgroupError {
    #[error("{0}")]
    NoPlace(String),
    #[error("can't {doing} {path}: {source}", path = path.display())]
    File { doing: &'static str, path: PathBuf, source: io::Error },
    #[error("can't write \"{value}\" to {path}: {source}", path = path.display())]
    Write { value: String, path: PathBuf, source: io::Error },
    #[error(
        "an i/o limit is set, and the file system of the state directory is on no one block device that \
         could be limited"
    )]
    NoDevice,
    #[error("{0} is limited, and this host's control groups have no {0} controller")]
    NoController(&'static str),
    #[error("interrupted: {0}")]
    Interrupted(String),
}

/// The folder of machines' groups.
pub struct Tree {
    machines: PathBuf,
    /// Of [`CONTROLLERS`], those that are on in it.
    enabled: Vec<&'static str>,
    /// `8:0`: the disk that the state directory is on.
    device: Option<String>,
    /// Groups of ended machines that are still there.
    left: Mutex<HashSet<String>>,
}

impl Tree {
    /// Finds and makes it. `state` is the state directory.
    pub fn open(settings: &Machines, state: &Path) -> Result<Self, CgroupError> {
        let service = match &settings.cgroup {
            Some(path) => place::configured(path)?,
            None => place::find()?,
        };
        Self::below(&service, place::device(state))
    }

    fn below(service: &Path, device: Option<String>) -> Result<Self, CgroupError> {
        place::enable(service)?;
        let machines = service.join(MACHINES);
        make_dir(&machines)?;
        let enabled = place::enable(&machines)?;
        let left = fs::read_dir(&machines)
            .map_err(|source| CgroupError::File { doing: "list", path: machines.clone(), source })?
            .filter_map(|entry| entry.ok()?.file_name().into_string().ok())
            .filter(|name| name.parse::<Uuid>().is_ok())
            .collect();
        Ok(Self { machines, enabled, device, left: Mutex::new(left) })
    }

    pub fn path(&self) -> &Path {
        &self.machines
    }

    /// Controllers that there are none of.
    pub fn missing(&self) -> Vec<&'static str> {
        CONTROLLERS.into_iter().filter(|name| !self.enabled.contains(name)).collect()
    }

    /// An account's group, empty yet. It may be there: of a machine whose service was killed.
    pub fn group(self: &Arc<Self>, account: Uuid) -> Result<Group, CgroupError> {
        let name = account.to_string();
        // From here on nobody else removes it.
        let mut left = self.left();
        left.remove(&name);
        let path = self.machines.join(&name);
        make_dir(&path)?;
        drop(left);
        Group::new(self.clone(), name, path)
    }

    /// Removes a group if nothing is in it, else sees to it that it is tried again.
    fn remove(&self, name: &str) -> bool {
        let path = self.machines.join(name);
        match fs::remove_dir(&path) {
            Ok(()) => true,
            Err(error) if error.kind() == io::ErrorKind::NotFound => true,
            Err(error) => {
                tracing::debug!(path = %path.display(), %error, "can't remove a control group yet");
                false
            }
        }
    }

    /// Tries again what is left of ended machines, for a while.
    pub fn sweep(self: &Arc<Self>) {
        let tree = self.clone();
        tokio::spawn(async move {
            for _ in 0..SWEEP.1 {
                // With the lock: nobody moves in meanwhile. Each is one system call.
                tree.left().retain(|name| !tree.remove(name));
                if tree.left().is_empty() {
                    return;
                }
                tokio::time::sleep(SWEEP.0).await;
            }
            for name in tree.left().drain() {
                let path = tree.machines.join(name);
                tracing::warn!(path = %path.display(), "a control group of no machine stays behind");
            }
        });
    }

    fn left(&self) -> MutexGuard<'_, HashSet<String>> {
        self.left.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Where machines' groups are, or why there are none.
#[derive(Clone)]
pub struct Cgroups(Result<Arc<Tree>, Arc<str>>);

impl Cgroups {
    /// An error only if the configuration wants one.
    pub fn open(settings: &Machines, state: &Path) -> Result<Self, CgroupError> {
        match Tree::open(settings, state) {
            Ok(tree) => {
                let tree = Arc::new(tree);
                let (path, missing) = (tree.path(), tree.missing());
                match missing.first() {
                    None => {
                        tracing::info!(path = %path.display(), "limits of machines are enforced")
                    }
                    Some(first) if settings.require_limits => {
                        return Err(CgroupError::NoController(first));
                    }
                    Some(_) => tracing::warn!(
                        path = %path.display(),
                        missing = missing.join(", "),
                        "only a part of machines' limits is enforced"
                    ),
                }
                Ok(Self(Ok(tree)))
            }
            Err(error) if settings.require_limits => Err(error),
            Err(error) => {
                tracing::warn!(%error, "limits of machines' memory, processors and i/o are not enforced");
                Ok(Self(Err(error.to_string().into())))
            }
        }
    }

    /// Removes what a former service left.
    pub fn sweep(&self) {
        if let Ok(tree) = &self.0 {
            tree.sweep();
        }
    }

    /// For an operator: where, or why not.
    pub fn describe(&self) -> Result<String, String> {
        match &self.0 {
            Ok(tree) => Ok(tree.path().display().to_string()),
            Err(reason) => Err(reason.to_string()),
        }
    }

    /// Makes a machine's group and writes its limits. `None`: there are no groups here.
    pub async fn admit(
        &self,
        admission: &Admission,
        shape: Option<Shape>,
    ) -> Result<Option<Group>, CgroupError> {
        let Ok(tree) = &self.0 else { return Ok(None) };
        let (tree, admission) = (tree.clone(), admission.clone());
        let made = tokio::task::spawn_blocking(move || {
            let group = tree.group(admission.account)?;
            match group.apply(&Ceilings { shape, share: admission.share }) {
                Err(error) if admission.required => return Err(error),
                Err(error) => tracing::error!(%error, "a limit of a machine is not enforced"),
                Ok(()) => {}
            }
            Ok(Some(group))
        });
        made.await.map_err(|error| CgroupError::Interrupted(error.to_string()))?
    }
}

/// Whose machine a group is for, and what it may take.
#[derive(Clone, Debug)]
pub struct Admission {
    pub account: Uuid,
    pub resources: Resources,
    pub share: Share,
    /// Of its user's; her guest's kernel keeps it.
    pub processes: Option<u32>,
    /// No machine without its limits.
    pub required: bool,
}

fn make_dir(path: &Path) -> Result<(), CgroupError> {
    match fs::create_dir(path) {
        Err(error) if error.kind() == io::ErrorKind::AlreadyExists => Ok(()),
        made => {
            made.map_err(|source| CgroupError::File { doing: "make", path: path.into(), source })
        }
    }
}

#[cfg(test)]
mod tests;
