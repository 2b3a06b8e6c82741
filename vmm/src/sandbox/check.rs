//! `hermitage-vmm check-sandbox`: goes into the jail as a machine does and tries what must not work there.
//!
//! The attempts are real calls, so the same list shows outside of the jail that they could have worked:
//! an attempt that fails everywhere proves nothing.

use std::{
    ffi::CStr,
    fmt::Write as _,
    io::{self, Read as _, Write as _},
    os::fd::{AsRawFd as _, OwnedFd},
    path::Path,
};

use nix::{
    sys::wait::waitpid,
    unistd::{ForkResult, Pid, fork, pipe},
};

use super::{MachineJail, SandboxError, enter};

/// One attempt: what it is, and what came of it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Attempt {
    pub what: String,
    /// The machine itself needs it.
    pub needed: bool,
    pub worked: bool,
}

impl Attempt {
    /// As it is to be in the jail.
    pub fn is_right(&self) -> bool {
        self.worked == self.needed
    }
}

/// Enters the jail and reports on it from a process that is in it as a machine is, beside another. To be
/// called in a process of one thread.
pub fn inside(root: &Path, uid: u32, jail: &MachineJail) -> Result<Vec<Attempt>, SandboxError> {
    report(|| enter(root, uid), || jail.enter())
}

/// The same attempts by a process that is in no jail.
pub fn outside() -> Result<Vec<Attempt>, SandboxError> {
    report(|| Ok(()), || Ok(()))
}

/// `enter` is what the fork server does with itself, `narrow` what a machine then does.
fn report(
    enter: impl FnOnce() -> Result<(), SandboxError>,
    narrow: impl FnOnce() -> Result<(), SandboxError>,
) -> Result<Vec<Attempt>, SandboxError> {
    let system = |step| move |e: nix::Error| SandboxError::System { step, source: e.into() };
    // The other machine: waits until our end of its pipe is gone.
    let (wait, hold) = pipe().map_err(system("pipe"))?;
    let (result, say) = pipe().map_err(system("pipe"))?;
    enter()?;
    // SAFETY: this process has one thread.
    let other = match unsafe { fork() }.map_err(system("fork"))? {
        ForkResult::Parent { child } => child,
        ForkResult::Child => {
            drop((hold, say));
            let _ = std::fs::File::from(wait).read(&mut [0]);
            // SAFETY: _exit has no preconditions.
            unsafe { libc::_exit(0) }
        }
    };
    // SAFETY: as above.
    let trying = match unsafe { fork() }.map_err(system("fork"))? {
        ForkResult::Parent { child } => child,
        ForkResult::Child => {
            let text = match narrow() {
                Ok(()) => attempts(other, &wait),
                Err(e) => format!("failed {e}\n"),
            };
            let _ = std::fs::File::from(say).write_all(text.as_bytes());
            // SAFETY: as above.
            unsafe { libc::_exit(0) }
        }
    };
    drop(say);
    let mut text = String::new();
    let read = std::fs::File::from(result).read_to_string(&mut text);
    drop(hold);
    for child in [trying, other] {
        waitpid(child, None).map_err(system("wait for a process of the check"))?;
    }
    read.map_err(|source| SandboxError::System { step: "read what was tried", source })?;
    text.lines().map(parse).collect()
}

fn parse(line: &str) -> Result<Attempt, SandboxError> {
    let mut words = line.splitn(3, ' ');
    match (words.next(), words.next(), words.next()) {
        (Some(needed), Some(worked), Some(what)) if needed != "failed" => Ok(Attempt {
            what: what.to_owned(),
            needed: needed == "needed",
            worked: worked == "worked",
        }),
        _ => Err(SandboxError::Filter(format!("the check said {line:?}"))),
    }
}

/// linux/fs.h; libc does not name it for this target.
const FICLONE: libc::c_long = 0x4004_9409;

/// Tries everything; `other` is a process of the same user, `fd` any descriptor.
fn attempts(other: Pid, fd: &OwnedFd) -> String {
    let other = libc::c_long::from(other.as_raw());
    let own = libc::c_long::from(std::process::id());
    let fd = libc::c_long::from(fd.as_raw_fd());
    let number = |number: libc::c_int| libc::c_long::from(number);
    let text = |text: &'static CStr| text.as_ptr() as libc::c_long;
    let (here, root) = (number(libc::AT_FDCWD), text(c"/"));
    let nowhere = text(c"/nowhere");
    let anonymous = number(libc::MAP_PRIVATE | libc::MAP_ANONYMOUS);
    let (data, code) = (number(libc::PROT_READ), number(libc::PROT_READ | libc::PROT_EXEC));
    let seize = number(libc::PTRACE_SEIZE as libc::c_int);
    let barred: &[(&str, libc::c_long, &[libc::c_long])] = &[
        ("kill another machine", libc::SYS_kill, &[other, 0]),
        ("signal a thread of another machine", libc::SYS_tgkill, &[other, other, 0]),
        ("the same by the old call", libc::SYS_tkill, &[other, 0]),
        ("a handle to another machine", libc::SYS_pidfd_open, &[other, 0]),
        ("have the kernel signal it", libc::SYS_fcntl, &[fd, number(libc::F_SETOWN), other]),
        ("trace another machine", libc::SYS_ptrace, &[seize, other, 0, 0]),
        ("read another machine's memory", libc::SYS_process_vm_readv, &[other, 0, 0, 0, 0, 0]),
        ("see another machine's limits", libc::SYS_prlimit64, &[other, 7, 0, 0]),
        ("open a directory", libc::SYS_openat, &[here, root, 0, 0]),
        ("the same by the old call", libc::SYS_open, &[root, 0, 0]),
        ("look for a file", libc::SYS_access, &[root, 0]),
        ("run a program", libc::SYS_execve, &[nowhere, 0, 0]),
        ("a local socket", libc::SYS_socket, &[1, 1, 0]),
        ("an internet socket", libc::SYS_socket, &[2, 1, 0]),
        ("a file in memory", libc::SYS_memfd_create, &[nowhere, 0]),
        ("memory with code in it", libc::SYS_mmap, &[0, 4096, code, anonymous, -1, 0]),
        ("another user", libc::SYS_setresuid, &[-1, -1, -1]),
        ("another namespace", libc::SYS_unshare, &[0]),
    ];
    let needed: &[(&str, libc::c_long, &[libc::c_long])] = &[
        ("signal a thread of its own", libc::SYS_tgkill, &[own, own, 0]),
        ("memory", libc::SYS_mmap, &[0, 4096, data, anonymous, -1, 0]),
        ("flags of a descriptor", libc::SYS_fcntl, &[fd, number(libc::F_GETFD)]),
        ("the length of a file", libc::SYS_ftruncate, &[fd, 0]),
        ("blocks shared by two files", libc::SYS_ioctl, &[fd, FICLONE, fd]),
    ];
    let thread = std::thread::Builder::new().spawn(|| {}).map(std::thread::JoinHandle::join);
    let worked = matches!(thread, Ok(Ok(())));
    let mut all = vec![Attempt { what: "a thread".into(), needed: true, worked }];
    for (list, needed) in [(barred, false), (needed, true)] {
        all.extend(list.iter().map(|(what, call, arguments)| {
            let what = (*what).to_owned();
            Attempt { what, needed, worked: system_call(*call, arguments) }
        }));
    }
    let mut report = String::new();
    for Attempt { what, needed, worked } in all {
        let needed = if needed { "needed" } else { "barred" };
        let worked = if worked { "worked" } else { "failed" };
        // Writing to a String does not fail.
        let _ = writeln!(report, "{needed} {worked} {what}");
    }
    report
}

/// Whether the kernel took the call up: an error about its arguments is one of the call itself.
fn system_call(call: libc::c_long, arguments: &[libc::c_long]) -> bool {
    let argument = |at: usize| arguments.get(at).copied().unwrap_or(0);
    let [a, b, c, d, e, f] = [0, 1, 2, 3, 4, 5].map(argument);
    // SAFETY: the calls above take numbers, null, or strings that live as long as the program; what they
    // change (a descriptor's owner, a new mapping, a new descriptor) nothing in this process relies on.
    let result = unsafe { libc::syscall(call, a, b, c, d, e, f) };
    let error = io::Error::last_os_error().raw_os_error();
    result >= 0 || !matches!(error, Some(libc::EPERM | libc::EACCES | libc::ENOSYS))
}
