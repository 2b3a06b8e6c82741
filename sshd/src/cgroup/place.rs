//! Where machines' groups can be.
//!
//! A group whose controllers are passed on to groups below it may have no processes itself. So the service has
//! to be in a leaf beside the machines' groups. It is put there by whoever starts it: systemd does with
//! `DelegateSubgroup=` (since 254). It does not move itself: systemd could not start it again in the group
//! that it was started in while a machine of before lives on below (`KillMode=process`).

use std::{
    fs,
    os::unix::fs::MetadataExt,
    path::{Path, PathBuf},
};

use super::{CONTROLLERS, CgroupError};

/// The leaf that the unit asks for.
const LEAF: &str = "service";

/// Made below the root where the service is in the root itself: no service manager uses control groups.
const OF_ROOT: &str = "hermitage";

/// What an operator can do where there is no place.
const HINT: &str = "start it by the unit that comes with it (Delegate=yes, DelegateSubgroup=service, \
                        systemd 254 or later), or name a delegated group by machines.cgroup";

/// The group below which machines' groups go: the one above the service's leaf.
pub fn find() -> Result<PathBuf, CgroupError> {
    let read = |path: &str| {
        fs::read_to_string(path).map_err(|source| CgroupError::File {
            doing: "read",
            path: path.into(),
            source,
        })
    };
    let own = own(&read("/proc/self/cgroup")?, &read("/proc/self/mountinfo")?)?;
    if own.file_name().is_some_and(|name| name == LEAF)
        && let Some(above) = own.parent()
    {
        return configured(above);
    }
    // Only groups other than the root have a type.
    if own.join("cgroup.type").exists() {
        return Err(CgroupError::NoPlace(format!(
            "the service is in the control group {}, which is no leaf of its own for it; {HINT}",
            own.display()
        )));
    }
    // First, so that nothing is made where nothing can be limited.
    enable(&own)?;
    let path = own.join(OF_ROOT);
    super::make_dir(&path)?;
    Ok(path)
}

/// A group that somebody made for it.
pub fn configured(path: &Path) -> Result<PathBuf, CgroupError> {
    controllers(path, "cgroup.controllers")?;
    Ok(path.to_owned())
}

/// Passes the controllers that there are on to the groups below; those that are on then.
pub fn enable(group: &Path) -> Result<Vec<&'static str>, CgroupError> {
    let there = controllers(group, "cgroup.controllers")?;
    if there.is_empty() {
        return Err(CgroupError::NoPlace(format!(
            "{} has none of the controllers {}: the host uses version 1 of control groups, or its service \
             manager does not pass them on; {HINT}",
            group.display(),
            CONTROLLERS.join(", ")
        )));
    }
    let path = group.join("cgroup.subtree_control");
    // One by one: one that can't be had leaves the others. On already is fine.
    let on = |name: &&'static str| match fs::write(&path, format!("+{name}")) {
        Ok(()) => true,
        Err(error) => {
            tracing::warn!(path = %path.display(), controller = name, %error, "can't switch it on");
            false
        }
    };
    let on: Vec<_> = there.into_iter().filter(on).collect();
    match on.is_empty() {
        true => Err(CgroupError::NoPlace(format!(
            "no controller can be switched on in {}; {HINT}",
            path.display()
        ))),
        false => Ok(on),
    }
}

/// The disk that a directory's file system is on, as `io.max` wants it: whole, not a partition.
pub fn device(dir: &Path) -> Option<String> {
    let dev = fs::metadata(dir).ok()?.dev();
    let number = format!("{}:{}", nix::sys::stat::major(dev), nix::sys::stat::minor(dev));
    // None for file systems on no device, or on several.
    let device = fs::canonicalize(format!("/sys/dev/block/{number}")).ok()?;
    if !device.join("partition").exists() {
        return Some(number);
    }
    let whole = fs::read_to_string(device.parent()?.join("dev")).ok()?;
    Some(whole.trim().to_owned())
}

fn controllers(group: &Path, file: &'static str) -> Result<Vec<&'static str>, CgroupError> {
    let path = group.join(file);
    let text = fs::read_to_string(&path).map_err(|source| CgroupError::File {
        doing: "read",
        path,
        source,
    })?;
    let there: Vec<_> = text.split_ascii_whitespace().collect();
    Ok(CONTROLLERS.into_iter().filter(|name| there.contains(name)).collect())
}

/// The folder of the calling process' group: `/proc/self/cgroup` (cgroups(7)) below the mount of version 2
/// (proc_pid_mountinfo(5)).
fn own(cgroup: &str, mountinfo: &str) -> Result<PathBuf, CgroupError> {
    let none = |what: &str| {
        CgroupError::NoPlace(format!("{what}: there are no control groups of version 2"))
    };
    let path = cgroup.lines().find_map(|line| line.strip_prefix("0::"));
    let path = path.ok_or_else(|| none("/proc/self/cgroup has no line \"0::\""))?;
    let mount = mountinfo.lines().find_map(|line| {
        let (mount, file_system) = line.split_once(" - ")?;
        let mut fields = mount.split(' ').skip(3);
        let (root, point) = (fields.next()?, fields.next()?);
        file_system.starts_with("cgroup2 ").then_some((root, point))
    });
    let (root, point) = mount.ok_or_else(|| none("nothing of type cgroup2 is mounted"))?;
    let below = Path::new(path).strip_prefix(root).map_err(|_| {
        CgroupError::NoPlace(format!(
            "the group {path} is not below {root}, which is mounted on {point}"
        ))
    })?;
    Ok(Path::new(point).join(below))
}

#[cfg(test)]
mod tests {
    use super::*;

    const MOUNTS: &str = "30 25 0:26 / /sys rw - sysfs sysfs rw\n\
                          31 30 0:27 / /sys/fs/cgroup rw,nosuid shared:9 - cgroup2 cgroup2 rw,nsdelegate\n";

    #[test]
    fn the_own_group_is_found_below_the_mount() {
        let path = own("0::/system.slice/hermitage.service/service\n", MOUNTS).unwrap();
        assert_eq!(path, Path::new("/sys/fs/cgroup/system.slice/hermitage.service/service"));
        let hybrid = "4:memory:/x\n0::/\n";
        assert_eq!(own(hybrid, MOUNTS).unwrap(), Path::new("/sys/fs/cgroup/"));
        let bound = "31 30 0:27 /a /c rw - cgroup2 cgroup2 rw\n";
        assert_eq!(own("0::/a/b\n", bound).unwrap(), Path::new("/c/b"));
        for (cgroup, mounts) in [
            ("4:memory:/x\n", MOUNTS),
            ("0::/\n", "30 25 0:26 / /sys rw - sysfs s rw"),
            ("0::/b\n", bound),
        ] {
            assert!(own(cgroup, mounts).is_err(), "{cgroup} {mounts}");
        }
    }

    #[test]
    fn a_file_system_in_memory_is_on_no_disk() {
        assert_eq!(device(Path::new("/proc")), None);
    }

    #[test]
    fn without_controllers_there_is_no_place() {
        let dir = tempfile::tempdir().unwrap();
        assert!(enable(dir.path()).is_err());
        let write = |text: &str| fs::write(dir.path().join("cgroup.controllers"), text).unwrap();
        write("hugetlb rdma misc\n");
        let error = enable(dir.path()).unwrap_err().to_string();
        assert!(error.contains("DelegateSubgroup=service"), "{error}");
        write("cpuset cpu memory\n");
        assert_eq!(enable(dir.path()).unwrap(), ["cpu", "memory"]);
    }
}
