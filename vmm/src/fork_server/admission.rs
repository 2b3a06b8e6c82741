//! What a machine's process starts with: the descriptors that came with the request, and the control group
//! that bounds what it takes of the host (`docs/limits.md`).

use std::{fs::File, io::Write as _, os::fd::OwnedFd};

/// A request's descriptors, in the order of the protocol.
pub struct Passed {
    pub control: OwnedFd,
    pub agent: OwnedFd,
    pub disk: OwnedFd,
    pub snapshot: Option<OwnedFd>,
    /// `cgroup.procs`, open for writing.
    pub cgroup: Option<OwnedFd>,
}

impl Passed {
    pub fn fork(descriptors: Vec<OwnedFd>, cgroup: bool) -> Result<Self, String> {
        Self::of("a fork", descriptors, false, cgroup)
    }

    pub fn resume(descriptors: Vec<OwnedFd>, cgroup: bool) -> Result<Self, String> {
        Self::of("a resume", descriptors, true, cgroup)
    }

    fn of(
        what: &str,
        descriptors: Vec<OwnedFd>,
        snapshot: bool,
        cgroup: bool,
    ) -> Result<Self, String> {
        let wanted = 3 + usize::from(snapshot) + usize::from(cgroup);
        let wrong = format!("{what} needs {wanted} descriptors, {} came", descriptors.len());
        if descriptors.len() != wanted {
            return Err(wrong);
        }
        let mut each = descriptors.into_iter();
        let (Some(control), Some(agent), Some(disk)) = (each.next(), each.next(), each.next())
        else {
            return Err(wrong);
        };
        let snapshot = if snapshot { each.next() } else { None };
        Ok(Self { control, agent, disk, snapshot, cgroup: each.next() })
    }
}

/// Moves the calling process. It has no rights of its own to: the kernel looks at those of whoever opened
/// the file (cgroup-v2.rst, "Delegation Containment"; since Linux 5.16, and in what was still maintained
/// then).
pub fn enter(cgroup: OwnedFd) -> Result<(), String> {
    // "0" is whoever writes.
    File::from(cgroup).write_all(b"0").map_err(|e| format!("enter the control group: {e}"))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn descriptors(count: usize) -> Vec<OwnedFd> {
        (0..count).map(|_| File::open("/dev/null").unwrap().into()).collect()
    }

    #[test]
    fn each_request_has_its_descriptors_and_no_others() {
        assert!(Passed::fork(descriptors(3), false).is_ok_and(|passed| passed.cgroup.is_none()));
        let resumed = Passed::resume(descriptors(5), true).unwrap();
        assert!(resumed.snapshot.is_some() && resumed.cgroup.is_some());
        let forked = Passed::fork(descriptors(4), true).unwrap();
        assert!(forked.snapshot.is_none() && forked.cgroup.is_some());
        for (count, snapshot, cgroup) in [
            (2, false, false),
            (4, false, false),
            (3, false, true),
            (4, true, true),
            (6, true, true),
        ] {
            let wrong = match snapshot {
                true => Passed::resume(descriptors(count), cgroup),
                false => Passed::fork(descriptors(count), cgroup),
            };
            let words = wrong.err().unwrap();
            assert!(words.contains(&format!("{count} came")), "{words}");
        }
    }

    #[test]
    fn the_process_writes_itself_into_the_group() {
        let file = tempfile::NamedTempFile::new().unwrap();
        enter(file.reopen().unwrap().into()).unwrap();
        assert_eq!(std::fs::read_to_string(file.path()).unwrap(), "0");
        // Not open for writing.
        assert!(enter(File::open(file.path()).unwrap().into()).is_err());
    }
}
