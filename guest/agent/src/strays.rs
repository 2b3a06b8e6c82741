//! Whether there may be processes of the user's in the root cgroup, which can't be frozen.
//!
//! Looking is dear at every save: the kernel counts itself a user of each thread that it lists, its own as well, so each one's
//! page is written to, copied, and compared by the save. So what could bring one there is known instead.
//! Sessions start in another cgroup. From there into this one a process gets by a write to its `cgroup.procs` or
//! `cgroup.threads` (inotify(7) tells), or as a child of one that has. The kernel starts programs there as well: a
//! handler of core dumps while there is one (core(5)), and what loads modules and keys, for a process that waits
//! for it and does not stop before. clone3(2) can start a child there without a write (CLONE_INTO_CGROUP): her own
//! root does that on purpose, and has other ways to run without standing still.

use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::Path;

use anyhow::{Context, Result};
use nix::errno::Errno;
use nix::sys::inotify::{AddWatchFlags, InitFlags, Inotify};

/// First byte of the handler of core dumps, if that is a program: `|`.
const HANDLER: &str = "/proc/sys/kernel/core_pattern";

pub struct Strays {
    /// None: it can't be known.
    watched: Option<Watched>,
    seen: bool,
}

struct Watched {
    writes: Inotify,
    handler: File,
}

impl Strays {
    /// From here on. `cgroups` is the root cgroup's directory.
    pub fn watch(cgroups: &Path) -> Result<Self> {
        Self::watch_with(cgroups, Path::new(HANDLER))
    }

    fn watch_with(cgroups: &Path, handler: &Path) -> Result<Self> {
        let flags = InitFlags::IN_NONBLOCK | InitFlags::IN_CLOEXEC;
        let writes = Inotify::init(flags).context("inotify")?;
        for name in ["cgroup.procs", "cgroup.threads"] {
            // Once, so that nothing piles up.
            let wanted = AddWatchFlags::IN_MODIFY | AddWatchFlags::IN_ONESHOT;
            let path = cgroups.join(name);
            writes
                .add_watch(&path, wanted)
                .with_context(|| format!("watching {}", path.display()))?;
        }
        let handler =
            File::open(handler).with_context(|| format!("opening {}", handler.display()))?;
        Ok(Self { watched: Some(Watched { writes, handler }), seen: false })
    }

    /// Has to be taken to be so.
    pub fn unknown() -> Self {
        Self { watched: None, seen: true }
    }

    /// Once something was written there, always: a process there may have children at any time.
    pub fn may_be_there(&mut self) -> bool {
        let Some(Watched { writes, handler }) = &self.watched else { return true };
        // Whatever else it says than that there is nothing to read.
        self.seen |= !matches!(writes.read_events(), Err(Errno::EAGAIN));
        let mut first = [0];
        self.seen || handler.read_at(&mut first, 0).is_err() || first == *b"|"
    }
}

#[cfg(test)]
mod tests {
    use std::fs;
    use std::os::fd::AsFd;

    use nix::fcntl::OFlag;

    use super::*;
    use crate::freeze::{HOME, Home, open};

    fn root(name: &str) -> std::path::PathBuf {
        let name = format!("hermitage-agent-strays-{name}-{}", std::process::id());
        let dir = std::env::temp_dir().join(name);
        fs::create_dir_all(dir.join(HOME)).unwrap();
        for file in ["cgroup.procs", "cgroup.threads", "hermitage/cgroup.procs", "handler"] {
            fs::write(dir.join(file), "core\n").unwrap();
        }
        dir
    }

    #[test]
    fn what_is_written_to_the_root_cgroup_is_known_for_good() {
        for file in ["cgroup.procs", "cgroup.threads"] {
            let root = root(file);
            let mut strays = Strays::watch_with(&root, &root.join("handler")).unwrap();
            fs::read(root.join(file)).unwrap();
            fs::write(root.join("hermitage/cgroup.procs"), "7").unwrap();
            assert!(!strays.may_be_there() && !strays.may_be_there());
            let file = File::options().write(true).open(root.join(file)).unwrap();
            file.write_at(b"7", 0).unwrap();
            assert!(strays.may_be_there() && strays.may_be_there());
            fs::remove_dir_all(root).unwrap();
        }
    }

    #[test]
    fn a_handler_of_core_dumps_may_run_while_there_is_one() {
        let root = root("handler");
        let handler = root.join("handler");
        let mut strays = Strays::watch_with(&root, &handler).unwrap();
        fs::write(&handler, "|/usr/bin/handler\n").unwrap();
        assert!(strays.may_be_there());
        fs::write(&handler, "core\n").unwrap();
        assert!(!strays.may_be_there());
        fs::remove_dir_all(root).unwrap();
    }

    #[test]
    fn a_session_that_can_not_leave_the_root_cgroup_is_known() {
        let root = root("session");
        let mut strays = Strays::watch_with(&root, &root.join("handler")).unwrap();
        let dir = File::open(&root).unwrap();
        let home = Home::open(dir.as_fd()).unwrap();
        home.enter();
        assert!(!strays.may_be_there());
        // A file that can't be written stands for a cgroup that is gone.
        let gone = open(&dir, "handler", OFlag::O_RDONLY).unwrap();
        home.with_group(gone).enter();
        assert!(strays.may_be_there());
        fs::remove_dir_all(root).unwrap();
    }

    #[test]
    fn what_is_not_watched_is_not_known() {
        assert!(Strays::watch(Path::new("/nowhere")).is_err());
        assert!(Strays::unknown().may_be_there());
    }
}
