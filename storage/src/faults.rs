//! Named places in the way of a snapshot where a test can have this very process die, fail or wait.
//!
//! What a crash between two steps leaves behind decides whether stale memory can meet a newer disk
//! (`docs/formats/diff.md`), and such moments are microseconds wide: found by chance they are not found.
//! So each has a name. The places are in the programs that ship, because what is tested should be what
//! runs; `docs/decisions/0004-fault-points-are-in-what-ships.md` says why that is safe. Nothing happens at
//! them unless the process was started with [`VARIABLE`], which names a folder of the same user's with
//!
//! - `plan`: lines of `POINT ACTION N`. The first time that point is passed N (one digit) times, and once
//!   more, the action is taken, and the line's first byte made a `#`: a plan outlives the processes that
//!   it ends, and must not end their successors. Actions: `kill`, `eio`, `enospc`, `hang` (for
//!   [`HANG`], or until somebody ends the process);
//! - `log`, which gets a line `POINT PID ACTION` for every pass (`-`: no action).
//!
//! Both are open from the start, so that a machine's process in its jail can use them.

use nix::sys::signal::{Signal, raise};
use nix::unistd::Uid;
use std::fs::{File, OpenOptions};
use std::io::{self, ErrorKind, Write as _};
use std::os::unix::fs::{FileExt as _, MetadataExt as _};
use std::path::Path;
use std::sync::OnceLock;
use std::time::Duration;

/// In the environment of `hermitage serve`, which passes it on to its machines.
pub const VARIABLE: &str = "HERMITAGE_FAULTS";

/// Longer than a test takes to look and to kill somebody.
pub const HANG: Duration = Duration::from_secs(3);

/// Most of a plan that is read.
const MOST: usize = 4096;

/// Which process passes a point.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Process {
    Serve,
    Machine,
    /// Whoever works on an account at rest.
    Rest,
}

macro_rules! points {
    ($($point:ident $name:literal $process:ident $when:literal;)*) => {
        /// The places, in the order in which a save and then a resume come by.
        #[derive(Clone, Copy, Debug, PartialEq, Eq)]
        pub enum Point {
            $(#[doc = $when] $point,)*
        }

        impl Point {
            pub const ALL: &[Point] = &[$(Point::$point,)*];

            pub fn name(self) -> &'static str {
                match self { $(Point::$point => $name,)* }
            }

            pub fn process(self) -> Process {
                match self { $(Point::$point => Process::$process,)* }
            }
        }
    };
}

points! {
    SaveCreate "save.create" Serve "The guest stands still; the new file is not there.";
    SaveDisk "save.disk" Machine "The machine is paused; its disk is to be synced.";
    SavePages "save.pages" Machine "Some pages are to be written.";
    SaveIndex "save.index" Machine "Index and state are to be written.";
    SaveHeader "save.header" Machine "The header is to be written, in a small snapshot all of it.";
    SaveSync "save.sync" Machine "The snapshot is written and not synced.";
    SaveSynced "save.synced" Machine "The snapshot is on the medium; nobody was told.";
    SaveTold "save.told" Machine "The service was told.";
    PublishTag "publish.tag" Serve "The disk is to get the snapshot's tag.";
    PublishTagSync "publish.tag-sync" Serve "The tag is set, and the snapshot has its name, if it gets one; neither is synced.";
    PublishRename "publish.rename" Serve "The tag is set and not synced; the snapshot has no name yet.";
    PublishDirSync "publish.dir-sync" Serve "The tag is on the medium; the name is not synced.";
    PublishDone "publish.done" Serve "All of it is on the medium; the machine is still there.";
    WithdrawBegin "withdraw.begin" Serve "What there is of a snapshot is to be taken back.";
    ResumeFind "resume.find" Serve "A login looks for a snapshot.";
    ResumeChecked "resume.checked" Machine "The snapshot was read and found whole.";
    ResumeBuilt "resume.built" Machine "The machine is whole; the service was not told.";
    ResumeTold "resume.told" Machine "The service was told, and uses the snapshot up.";
    Untag "untag.begin" Serve "The disk is to lose its tag.";
    UntagSync "untag.sync" Serve "The tag is removed, and that is not synced.";
    ConsumeDone "consume.done" Serve "The snapshot is used up; the machine does not run yet.";
    ResumeGo "resume.go" Machine "The machine may run, and does not yet.";
    ResumeRuns "resume.runs" Machine "The first guest instructions run.";
    ResumeRemove "resume.remove" Serve "The machine runs; the used snapshot is to be deleted.";
    ResumeRemoved "resume.removed" Serve "It is deleted.";
    WithdrawRemove "withdraw.remove" Serve "The tag is gone; the files are to be deleted.";
    WithdrawDone "withdraw.done" Serve "They are deleted.";
    AsideRename "aside.rename" Serve "A snapshot that can't be used is to be put aside.";
    AsideDone "aside.done" Serve "It was.";
    CheckpointCopy "checkpoint.copy" Rest "A checkpoint's folder is there, its disk is to be copied.";
    CheckpointPublish "checkpoint.publish" Rest "All of a checkpoint is synced beside.";
    CheckpointDone "checkpoint.done" Rest "It has its name.";
    RollbackMark "rollback.mark" Rest "The new disk and memory are whole beside; the old state's folder is to be made.";
    RollbackKeep "rollback.keep" Rest "The old state's folder is whole, but for its disk, and has no name.";
    RollbackExchange "rollback.exchange" Rest "It has its name; the disks are to change places.";
    RollbackSync "rollback.sync" Rest "They have, and that is not synced.";
    RollbackMemory "rollback.memory" Rest "The new disk is in its place, its memory is not.";
    RollbackUnmark "rollback.unmark" Rest "Both are; the mark is to be removed.";
    RollbackDone "rollback.done" Rest "It is.";
}

struct Faults {
    plan: File,
    log: File,
}

static FAULTS: OnceLock<Faults> = OnceLock::new();

#[derive(Debug, thiserror::Error)]
#[error("{VARIABLE} is {dir:?}, which is for tests of crashes: {source}")]
pub struct ArmError {
    dir: std::ffi::OsString,
    source: io::Error,
}

/// To be called once, early, by the programs that pass points. True: the environment asked for faults.
pub fn arm() -> Result<bool, ArmError> {
    let Some(dir) = std::env::var_os(VARIABLE) else { return Ok(false) };
    match open(Path::new(&dir)) {
        Ok(faults) => {
            let _ = FAULTS.set(faults);
            Ok(true)
        }
        Err(source) => Err(ArmError { dir, source }),
    }
}

/// Who can write there can end this process, which only its own user may.
fn open(dir: &Path) -> io::Result<Faults> {
    let meta = dir.symlink_metadata()?;
    if !meta.is_dir() || meta.uid() != Uid::effective().as_raw() || meta.mode() & 0o022 != 0 {
        let words = "it has to be a folder of this process's user that nobody else can write to";
        return Err(io::Error::new(ErrorKind::PermissionDenied, words));
    }
    let mut options = OpenOptions::new();
    options.read(true).write(true).create(true).truncate(false);
    let plan = options.open(dir.join("plan"))?;
    let log = OpenOptions::new().create(true).append(true).open(dir.join("log"))?;
    Ok(Faults { plan, log })
}

/// This process is at a point. An error is what the plan wants the next step to fail with.
pub fn at(point: Point) -> io::Result<()> {
    match FAULTS.get() {
        None => Ok(()),
        Some(faults) => faults.at(point),
    }
}

impl Faults {
    fn at(&self, point: Point) -> io::Result<()> {
        let action = self.planned(point);
        let word = action.map_or("-", Action::word);
        let line = format!("{} {} {word}\n", point.name(), std::process::id());
        // One write of an appended line is whole whoever else writes.
        let _ = (&self.log).write_all(line.as_bytes());
        match action {
            None => Ok(()),
            Some(Action::Kill) => loop {
                let _ = raise(Signal::SIGKILL);
            },
            Some(Action::Eio) => Err(nix::errno::Errno::EIO.into()),
            Some(Action::Enospc) => Err(nix::errno::Errno::ENOSPC.into()),
            Some(Action::Hang) => {
                std::thread::sleep(HANG);
                Ok(())
            }
        }
    }

    fn planned(&self, point: Point) -> Option<Action> {
        let mut plan = vec![0; MOST];
        let length = self.plan.read_at(&mut plan, 0).ok()?;
        let mut at = 0;
        for line in plan[..length].split_inclusive(|byte| *byte == b'\n') {
            let begin = at;
            at += line.len();
            let Some((action, passes)) = parse(line, point) else { continue };
            let Some(fewer) = passes.checked_sub(1) else {
                self.plan.write_all_at(b"#", begin as u64).ok()?;
                return Some(action);
            };
            let digit = begin + line.trim_ascii_end().len() - 1;
            self.plan.write_all_at(&[b'0' + fewer], digit as u64).ok()?;
            return None;
        }
        None
    }
}

#[derive(Clone, Copy)]
enum Action {
    Kill,
    Eio,
    Enospc,
    Hang,
}

impl Action {
    fn word(self) -> &'static str {
        match self {
            Action::Kill => "kill",
            Action::Eio => "eio",
            Action::Enospc => "enospc",
            Action::Hang => "hang",
        }
    }
}

/// What a line of the plan wants at this point, and after how many passes.
fn parse(line: &[u8], point: Point) -> Option<(Action, u8)> {
    let line = std::str::from_utf8(line).ok()?;
    let mut words = line.split_ascii_whitespace();
    if words.next()? != point.name() {
        return None;
    }
    let word = words.next()?;
    let action = [Action::Kill, Action::Eio, Action::Enospc, Action::Hang]
        .into_iter()
        .find(|action| action.word() == word)?;
    match words.next()?.as_bytes() {
        [digit @ b'0'..=b'9'] => Some((action, digit - b'0')),
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::fs;
    use std::os::unix::fs::PermissionsExt as _;

    fn faults(plan: &str) -> (tempfile::TempDir, Faults) {
        let dir = tempfile::tempdir().unwrap();
        fs::write(dir.path().join("plan"), plan).unwrap();
        let faults = open(dir.path()).unwrap();
        (dir, faults)
    }

    #[test]
    fn a_plan_strikes_once_after_so_many_passes() {
        let (dir, faults) = faults("resume.go kill 0\nsave.sync eio 2\nsave.sync enospc 0\n");
        for _ in 0..2 {
            faults.at(Point::SaveSync).unwrap();
        }
        let error = faults.at(Point::SaveSync).unwrap_err();
        assert_eq!(error.raw_os_error(), Some(nix::libc::EIO));
        assert_eq!(faults.at(Point::SaveSync).unwrap_err().kind(), ErrorKind::StorageFull);
        faults.at(Point::SaveSync).unwrap();
        faults.at(Point::SaveIndex).unwrap();
        let pid = std::process::id();
        let log = fs::read_to_string(dir.path().join("log")).unwrap();
        let actions = ["-", "-", "eio", "enospc", "-"];
        let wanted: String =
            actions.iter().map(|action| format!("save.sync {pid} {action}\n")).collect();
        assert_eq!(log, wanted + &format!("save.index {pid} -\n"));
        let plan = fs::read_to_string(dir.path().join("plan")).unwrap();
        assert_eq!(plan, "resume.go kill 0\n#ave.sync eio 0\n#ave.sync enospc 0\n");
    }

    #[test]
    fn a_plan_that_makes_no_sense_does_nothing() {
        for plan in ["", "save.sync", "save.sync burn 0\n", "save.sync kill 10\n", "\u{fffd}\n"] {
            faults(plan).1.at(Point::SaveSync).unwrap();
        }
    }

    #[test]
    fn names_are_told_apart() {
        let mut names: Vec<_> = Point::ALL.iter().map(|point| point.name()).collect();
        names.sort_unstable();
        names.dedup();
        assert_eq!(names.len(), Point::ALL.len());
    }

    #[test]
    fn a_folder_that_others_can_write_to_is_refused() {
        let dir = tempfile::tempdir().unwrap();
        fs::set_permissions(dir.path(), fs::Permissions::from_mode(0o770)).unwrap();
        assert!(open(dir.path()).is_err());
        fs::set_permissions(dir.path(), fs::Permissions::from_mode(0o750)).unwrap();
        assert!(open(dir.path()).is_ok());
        let file = dir.path().join("file");
        fs::write(&file, "").unwrap();
        assert!(open(&file).is_err() && open(&dir.path().join("nowhere")).is_err());
    }
}
