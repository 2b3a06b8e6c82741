//! How many processes and threads the user's programs may be: `pids.max` of the cgroup that sessions start in (linux,
//! Documentation/admin-guide/cgroup-v2.rst, "PID").
//!
//! A fork beyond it fails with EAGAIN. Moving a process in is not bounded, so her next session starts whatever there
//! is: this program, outside of it, forks, and its child goes in. What her shell has built in, `kill` for one, it can
//! do then.

use std::fs;
use std::io::{Read, Write};
use std::os::fd::AsFd;

use anyhow::{Context, Result};
use hermitage_guest_proto::Processes;
use nix::fcntl::OFlag;

use crate::freeze::{self, HOME};

/// The least that is kept free of what the kernel can have at all, for its own threads and for this program.
const SPARE: u32 = 256;

/// Lower than this no limit is set for want of room.
const LEAST: u32 = 64;

/// Lets cgroups below the root count processes, and sets the limit of machines of which nothing is said.
pub fn begin(cgroups: impl AsFd) -> Result<()> {
    write(&cgroups, "cgroup.subtree_control", "+pids")?;
    limit(cgroups, None)
}

/// Bounds the user's processes. Those there are stay, also where they are more.
pub fn limit(cgroups: impl AsFd, most: Option<u32>) -> Result<()> {
    let of = |name: &str| {
        let path = format!("/proc/sys/kernel/{name}");
        let text = fs::read_to_string(&path).with_context(|| format!("reading {path}"))?;
        text.trim().parse().with_context(|| format!("{path}: {text:?}"))
    };
    let there_can_be = ample(of("threads-max")?, of("pid_max")?);
    let most = most.map_or(there_can_be, |most| most.min(there_can_be));
    write(cgroups, &format!("{HOME}/pids.max"), &most.to_string())
}

/// What leaves the kernel some: of an eighth a login, and what it is for, can be started in any case.
fn ample(threads: u32, pids: u32) -> u32 {
    let all = threads.min(pids);
    all.saturating_sub((all / 8).max(SPARE)).max(LEAST)
}

/// What there is now. `fault`: of what was asked for before.
pub fn look(cgroups: impl AsFd, question: u64, fault: Option<String>) -> Processes {
    let number = |file: &str| -> Result<Option<u32>> {
        let path = format!("{HOME}/{file}");
        let mut text = String::new();
        freeze::open(&cgroups, &path, OFlag::O_RDONLY)?
            .read_to_string(&mut text)
            .with_context(|| format!("reading {path} of the cgroups"))?;
        // "max" is no number.
        Ok(text.trim().parse().ok())
    };
    match number("pids.current").and_then(|count| Ok((count, number("pids.max")?))) {
        Ok((count, most)) => Processes { question, count: count.unwrap_or(0), most, fault },
        Err(error) => {
            let fault = fault.or_else(|| Some(format!("{error:#}")));
            Processes { question, fault, ..Processes::default() }
        }
    }
}

fn write(cgroups: impl AsFd, path: &str, text: &str) -> Result<()> {
    freeze::open(cgroups, path, OFlag::O_WRONLY)?
        .write_all(text.as_bytes())
        .with_context(|| format!("writing {text} to {path} of the cgroups"))
}

#[cfg(test)]
mod tests {
    use std::fs::File;
    use std::path::PathBuf;

    use super::*;

    /// A folder with files as the kernel has them.
    struct Cgroups(PathBuf);

    impl Cgroups {
        fn new(name: &str, files: &[(&str, &str)]) -> Self {
            let name = format!("hermitage-agent-pids-{name}-{}", std::process::id());
            let dir = std::env::temp_dir().join(name);
            fs::create_dir_all(dir.join(HOME)).unwrap();
            files.iter().for_each(|(file, text)| fs::write(dir.join(file), text).unwrap());
            Self(dir)
        }

        fn root(&self) -> File {
            File::open(&self.0).unwrap()
        }

        fn says(&self, file: &str) -> String {
            fs::read_to_string(self.0.join(file)).unwrap()
        }
    }

    impl Drop for Cgroups {
        fn drop(&mut self) {
            let _ = fs::remove_dir_all(&self.0);
        }
    }

    #[test]
    fn some_are_left_for_a_login() {
        assert_eq!(ample(4000, 32768), 3500);
        assert_eq!(ample(400_000, 32768), 32768 - 4096);
        assert_eq!(ample(1000, 32768), 744, "an eighth would be few");
        assert_eq!(ample(100, 32768), 64, "some have to be allowed");
    }

    #[test]
    fn a_limit_is_told_to_the_kernel_and_is_no_more_than_it_can_have() {
        let files = [("cgroup.subtree_control", ""), ("hermitage/pids.max", "")];
        let cgroups = Cgroups::new("limit", &files);
        begin(cgroups.root()).unwrap();
        assert_eq!(cgroups.says("cgroup.subtree_control"), "+pids");
        let ample: u32 = cgroups.says("hermitage/pids.max").parse().unwrap();
        fs::write(cgroups.0.join("hermitage/pids.max"), "").unwrap();
        limit(cgroups.root(), Some(60)).unwrap();
        assert_eq!(cgroups.says("hermitage/pids.max"), "60");
        fs::write(cgroups.0.join("hermitage/pids.max"), "").unwrap();
        limit(cgroups.root(), Some(u32::MAX)).unwrap();
        assert_eq!(cgroups.says("hermitage/pids.max"), ample.to_string());
    }

    #[test]
    fn what_there_is_is_told_as_the_kernel_counts_it() {
        let files = [("hermitage/pids.current", "37\n"), ("hermitage/pids.max", "60\n")];
        let cgroups = Cgroups::new("look", &files);
        let seen = look(cgroups.root(), 7, None);
        assert_eq!(seen, Processes { question: 7, count: 37, most: Some(60), fault: None });
        fs::write(cgroups.0.join("hermitage/pids.max"), "max\n").unwrap();
        assert_eq!(look(cgroups.root(), 7, None).most, None);
        fs::remove_file(cgroups.0.join("hermitage/pids.current")).unwrap();
        let fault = look(cgroups.root(), 8, None).fault.unwrap();
        assert!(fault.contains("hermitage/pids.current"), "{fault}");
    }
}
