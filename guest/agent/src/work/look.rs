//! One look at the user's processes.
//!
//! They are found through the cgroups, which list what there is without a directory of `/proc` for each
//! thread of the kernel: those would be pages that the next save has to look at. For the same reason the root
//! cgroup is left out where nothing but such threads can be in it ([`crate::strays`]).

use std::fs::{self, File};
use std::io::Read;
use std::os::fd::{AsFd, OwnedFd};

use hermitage_guest_proto::WaitsFor;
use nix::dir::{Dir, Type};
use nix::fcntl::{OFlag, openat};
use nix::sys::stat::Mode;
use nix::unistd::{Pid, getsid};

use super::tcp::Connections;
use crate::strays::Strays;

/// Clock ticks are hundredths of a second for every program (USER_HZ; linux, include/asm-generic/param.h).
pub const TICK_MS: u64 = 10;

/// Processes that are looked at; a machine with more does something anyway.
const MOST: usize = 4096;

/// Cgroups that are looked into, and how deep they lie: the user may make her own.
const MOST_CGROUPS: usize = 256;
const DEEPEST: usize = 8;

pub struct Look {
    pub processes: Vec<Seen>,
    /// Ticks of those that have ended and were ours to reap.
    pub reaped: u64,
    pub connections: Connections,
}

pub struct Seen {
    pub pid: u32,
    /// In ticks since the boot: a number given again is another process.
    pub started: u64,
    /// Its processor time and its ended children's.
    pub ticks: u64,
    pub waits_for: WaitsFor,
    pub name: String,
}

impl Look {
    pub fn take(cgroups: impl AsFd, strays: &mut Strays) -> Self {
        let mut look = Self {
            processes: Vec::new(),
            // Its own is that of relaying what others print.
            reaped: stat(Pid::from_raw(1)).map_or(0, |init| init.reaped),
            connections: Connections::look(),
        };
        let pids = processes(cgroups, strays);
        look.processes = pids.filter_map(stat).map(Stat::seen).take(MOST).collect();
        look
    }

    pub fn find(&self, process: &Seen) -> Option<&Seen> {
        self.processes
            .iter()
            .find(|seen| seen.pid == process.pid && seen.started == process.started)
    }

    pub fn ticks(&self) -> u64 {
        self.reaped + self.processes.iter().map(|seen| seen.ticks).sum::<u64>()
    }
}

/// The user's processes.
pub fn processes(cgroups: impl AsFd, strays: &mut Strays) -> impl Iterator<Item = Pid> {
    let mut pids = Vec::new();
    if let Ok(root) = cgroups.as_fd().try_clone_to_owned() {
        if strays.may_be_there() {
            list(&root, &mut pids);
        }
        let mut left = MOST_CGROUPS;
        collect_below(&root, DEEPEST, &mut left, &mut pids);
    }
    // Threads of the kernel, and this program, belong to no session.
    let of_a_session = |pid: &Pid| {
        pid.as_raw() > 1 && getsid(Some(*pid)).is_ok_and(|session| session.as_raw() != 0)
    };
    pids.into_iter().map(Pid::from_raw).filter(of_a_session)
}

/// The processes of a cgroup. What can't be read (a threaded cgroup, one that is gone by now) has none.
fn list(cgroup: &OwnedFd, pids: &mut Vec<i32>) {
    let mut list = String::new();
    let opened = openat(cgroup, "cgroup.procs", OFlag::O_RDONLY | OFlag::O_CLOEXEC, Mode::empty());
    if let Ok(file) = opened
        && File::from(file).read_to_string(&mut list).is_ok()
    {
        pids.extend(list.lines().filter_map(|line| line.parse::<i32>().ok()));
    }
}

/// Those of the cgroups below it.
fn collect_below(cgroup: &OwnedFd, depth: usize, left: &mut usize, pids: &mut Vec<i32>) {
    let flags = OFlag::O_RDONLY | OFlag::O_DIRECTORY | OFlag::O_CLOEXEC;
    let Ok(mut dir) = Dir::openat(cgroup, ".", flags, Mode::empty()) else { return };
    for entry in dir.iter().flatten() {
        if entry.file_type() != Some(Type::Directory) || entry.file_name().to_bytes()[0] == b'.' {
            continue;
        }
        if depth == 0 || *left == 0 {
            return;
        }
        *left -= 1;
        if let Ok(below) = openat(cgroup, entry.file_name(), flags, Mode::empty()) {
            list(&below, pids);
            collect_below(&below, depth - 1, left, pids);
        }
    }
}

/// What `/proc/PID/stat` says.
#[derive(Debug, PartialEq, Eq)]
struct Stat {
    pid: u32,
    name: String,
    state: u8,
    flags: u64,
    own: u64,
    reaped: u64,
    started: u64,
}

impl Stat {
    fn seen(self) -> Seen {
        Seen {
            pid: self.pid,
            started: self.started,
            ticks: self.own + self.reaped,
            waits_for: match self.state {
                b'R' => WaitsFor::Processor,
                b'D' => WaitsFor::Disk,
                _ => WaitsFor::Nothing,
            },
            name: self.name,
        }
    }
}

/// The kernel's flags of a process or thread.
pub fn flags(pid: Pid) -> Option<u64> {
    stat(pid).map(|stat| stat.flags)
}

fn stat(pid: Pid) -> Option<Stat> {
    // The name may be any bytes but the last parenthesis ends it.
    let bytes = fs::read(format!("/proc/{pid}/stat")).ok()?;
    parse(pid.as_raw().try_into().ok()?, &String::from_utf8_lossy(&bytes))
}

/// Fields as numbered in proc_pid_stat(5): state 3, flags 9, utime 14, stime 15, cutime 16, cstime 17, starttime 22.
fn parse(pid: u32, text: &str) -> Option<Stat> {
    let (before, after) = text.rsplit_once(')')?;
    let (_, name) = before.split_once('(')?;
    let fields: Vec<&str> = after.split_ascii_whitespace().collect();
    let number = |field: usize| -> Option<u64> {
        // Those of ended children can be shown as negative by old kernels.
        Some(fields.get(field - 3)?.parse::<i64>().ok()?.max(0).unsigned_abs())
    };
    Some(Stat {
        pid,
        name: name.to_owned(),
        state: *fields.first()?.as_bytes().first()?,
        flags: number(9)?,
        own: number(14)?.saturating_add(number(15)?),
        reaped: number(16)?.saturating_add(number(17)?),
        started: number(22)?,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_line_of_proc_is_read() {
        let line = "812 (a) b (c)) R 1 812 812 34816 812 4194304 85 0 0 0 7 3 20 10 20 0 1 0 4711 2703360 \
                    219 18446744073709551615";
        let stat = parse(812, line).unwrap();
        assert_eq!((stat.name.as_str(), stat.state), ("a) b (c)", b'R'));
        assert_eq!(stat.flags, 4194304);
        assert_eq!((stat.own, stat.reaped, stat.started), (10, 30, 4711));
        let seen = stat.seen();
        assert_eq!((seen.ticks, seen.waits_for), (40, WaitsFor::Processor));
        for bad in ["", "812", "812 (x", "812 (x) R 1 2"] {
            assert_eq!(parse(812, bad), None, "{bad}");
        }
    }

    #[test]
    fn this_process_is_read_from_the_real_proc() {
        let pid = std::process::id();
        let stat = stat(Pid::from_raw(pid as i32)).unwrap();
        assert_eq!(stat.pid, pid);
        assert!(b"RSD".contains(&stat.state) && stat.started > 0, "{stat:?}");
    }

    /// A tree as the kernel shows it, with a cgroup of the user's below.
    #[test]
    fn processes_of_cgroups_below_are_found() {
        let root =
            std::env::temp_dir().join(format!("hermitage-agent-work-{}", std::process::id()));
        let below = root.join("hermitage/hers");
        fs::create_dir_all(&below).unwrap();
        fs::write(root.join("cgroup.procs"), "1\n2\n").unwrap();
        fs::write(root.join("hermitage/cgroup.procs"), "77\n").unwrap();
        fs::write(below.join("cgroup.procs"), "78\n").unwrap();
        let fd: OwnedFd = File::open(&root).unwrap().into();
        let mut pids = Vec::new();
        collect_below(&fd, DEEPEST, &mut 16, &mut pids);
        assert_eq!(pids, [77, 78]);
        list(&fd, &mut pids);
        assert_eq!(pids, [77, 78, 1, 2]);
        let mut few = Vec::new();
        collect_below(&fd, 1, &mut 16, &mut few);
        assert_eq!(few, [77]);
        fs::remove_dir_all(&root).unwrap();
    }
}
