//! The jail around every machine. The fork server puts itself into it once, when all it needs is open;
//! machines are its children and are born inside; each then gives up what only the server needs
//! ([`MachineJail`]).
//!
//! Inside: no file system (an empty, read-only root), no network, no privileges, no other program
//! (`execve` is not allowed), nothing but the descriptors it was given and the system calls below.

mod arguments;
pub mod check;
mod machine;

use std::{
    collections::BTreeMap,
    io,
    path::{Path, PathBuf},
};

use nix::{
    mount::{MsFlags, mount},
    sched::{CloneFlags, unshare},
    sys::{
        prctl,
        resource::{Resource, setrlimit},
    },
    unistd::{Gid, Uid, chdir, chroot, setgroups, setresgid, setresuid},
};
use seccompiler::{BpfProgram, SeccompAction, SeccompFilter, SeccompRule, apply_filter};

pub use machine::MachineJail;

#[derive(Debug, thiserror::Error)]
pub enum SandboxError {
    #[error("sandbox: {step}: {source} (run as root, or with --no-sandbox for a trial)")]
    System { step: &'static str, source: io::Error },
    #[error("sandbox: system call filter: {0}")]
    Filter(String),
}

fn step<T>(step: &'static str, result: nix::Result<T>) -> Result<T, SandboxError> {
    result.map_err(|e| SandboxError::System { step, source: e.into() })
}

/// Enters the jail for good. `root` is an existing directory to mount the empty root on (seen by this
/// process only); `uid` is who machines run as.
pub fn enter(root: &Path, uid: u32) -> Result<(), SandboxError> {
    step(
        "unshare",
        unshare(
            CloneFlags::CLONE_NEWNS
                | CloneFlags::CLONE_NEWNET
                | CloneFlags::CLONE_NEWIPC
                | CloneFlags::CLONE_NEWUTS,
        ),
    )?;
    let none = None::<&str>;
    let private = MsFlags::MS_REC | MsFlags::MS_PRIVATE;
    step("make mounts private", mount(none, "/", none, private, none))?;
    let flags = MsFlags::MS_NOSUID | MsFlags::MS_NODEV | MsFlags::MS_NOEXEC | MsFlags::MS_RDONLY;
    step(
        "mount an empty root",
        mount(Some("none"), root, Some("tmpfs"), flags, Some("size=4k,mode=555")),
    )?;
    step("chroot", chroot(root))?;
    step("chdir", chdir("/"))?;
    // A core file would hold an account's memory.
    step("limit core files", setrlimit(Resource::RLIMIT_CORE, 0, 0))?;
    step("drop groups", setgroups(&[]))?;
    let (uid, gid) = (Uid::from_raw(uid), Gid::from_raw(uid));
    step("change group", setresgid(gid, gid, gid))?;
    step("change user", setresuid(uid, uid, uid))?;
    step("no new privileges", prctl::set_no_new_privs())?;
    for program in [no_clone3(), arguments::filter(), filter()] {
        program
            .and_then(|program| apply_filter(&program).map_err(|e| e.to_string()))
            .map_err(SandboxError::Filter)?;
    }
    Ok(())
}

/// Where the empty root is mounted unless told otherwise.
pub fn default_root() -> PathBuf {
    PathBuf::from("/var/empty")
}

/// All else fails with EPERM. That rather than a kill: the C library tries a few files now and then
/// and does without.
fn filter() -> Result<BpfProgram, String> {
    build(whole(ALLOWED), SeccompAction::Allow, SeccompAction::Errno(libc::EPERM as u32))
}

/// clone3 takes its flags from memory, where no filter can look; without it the C library uses clone.
fn no_clone3() -> Result<BpfProgram, String> {
    let missing = SeccompAction::Errno(libc::ENOSYS as u32);
    build(whole(&[libc::SYS_clone3]), missing, SeccompAction::Allow)
}

/// Calls, whatever their arguments are.
fn whole(calls: &[libc::c_long]) -> BTreeMap<libc::c_long, Vec<SeccompRule>> {
    calls.iter().map(|&call| (call, Vec::new())).collect()
}

fn build(
    rules: BTreeMap<libc::c_long, Vec<SeccompRule>>,
    these: SeccompAction,
    others: SeccompAction,
) -> Result<BpfProgram, String> {
    let arch = std::env::consts::ARCH.try_into().map_err(|e| format!("{e}"))?;
    SeccompFilter::new(rules, others, these, arch)
        .and_then(BpfProgram::try_from)
        .map_err(|e| e.to_string())
}

const ALLOWED: &[libc::c_long] = &[
    // KVM, sockets' blocking mode
    libc::SYS_ioctl,
    // descriptors we were given
    libc::SYS_read,
    libc::SYS_write,
    libc::SYS_readv,
    libc::SYS_writev,
    libc::SYS_pread64,
    libc::SYS_pwrite64,
    libc::SYS_preadv,
    libc::SYS_pwritev,
    libc::SYS_preadv2,
    libc::SYS_pwritev2,
    libc::SYS_lseek,
    libc::SYS_fstat,
    libc::SYS_newfstatat,
    libc::SYS_statx,
    libc::SYS_fcntl,
    libc::SYS_fallocate,
    // a copy of the disk
    libc::SYS_ftruncate,
    libc::SYS_fdatasync,
    libc::SYS_sync_file_range,
    libc::SYS_fsync,
    libc::SYS_sendmsg,
    libc::SYS_recvmsg,
    libc::SYS_sendto,
    libc::SYS_recvfrom,
    libc::SYS_shutdown,
    libc::SYS_close,
    libc::SYS_dup3,
    // waiting
    libc::SYS_epoll_create1,
    libc::SYS_epoll_ctl,
    libc::SYS_epoll_wait,
    libc::SYS_epoll_pwait,
    libc::SYS_eventfd2,
    libc::SYS_timerfd_create,
    libc::SYS_timerfd_settime,
    libc::SYS_poll,
    libc::SYS_ppoll,
    libc::SYS_signalfd4,
    libc::SYS_futex,
    libc::SYS_nanosleep,
    libc::SYS_clock_nanosleep,
    libc::SYS_clock_gettime,
    libc::SYS_gettimeofday,
    libc::SYS_restart_syscall,
    // memory
    libc::SYS_mmap,
    libc::SYS_munmap,
    libc::SYS_mremap,
    libc::SYS_mprotect,
    libc::SYS_madvise,
    libc::SYS_brk,
    // threads and machines
    libc::SYS_clone,
    // answered by `no_clone3`
    libc::SYS_clone3,
    libc::SYS_rseq,
    libc::SYS_set_robust_list,
    libc::SYS_sigaltstack,
    libc::SYS_rt_sigaction,
    libc::SYS_rt_sigprocmask,
    libc::SYS_rt_sigreturn,
    libc::SYS_sched_getaffinity,
    libc::SYS_sched_yield,
    libc::SYS_gettid,
    libc::SYS_getpid,
    libc::SYS_tgkill,
    libc::SYS_kill,
    libc::SYS_wait4,
    libc::SYS_prctl,
    // to become narrower
    libc::SYS_seccomp,
    libc::SYS_landlock_restrict_self,
    libc::SYS_getrandom,
    libc::SYS_exit,
    libc::SYS_exit_group,
];
