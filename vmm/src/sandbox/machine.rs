//! What a machine gives up that its fork server needs: signals to others. All machines are one user's
//! processes that see each other's ids; without this, one that was broken out of could end the others.
//!
//! It is on the way of every fork, so the kernel's own means comes first: Landlock's scope for signals
//! (Linux 6.12) takes one system call. A filter of system calls has to name the process id, which is known
//! only after the fork, and the kernel compiles it anew for each machine.

use std::{
    collections::BTreeMap,
    io,
    os::fd::{AsFd as _, AsRawFd as _, BorrowedFd, FromRawFd as _, OwnedFd},
};

use seccompiler::{
    BpfProgram, SeccompAction, SeccompCmpArgLen::Dword, SeccompCmpOp, SeccompCondition,
    SeccompRule, apply_filter,
};

use super::SandboxError;

/// Made once, before the sandbox; entered by each machine.
pub enum MachineJail {
    Scope(OwnedFd),
    /// The program for some process id, and where in it that goes.
    Filter {
        program: BpfProgram,
        holes: Vec<usize>,
    },
}

impl MachineJail {
    pub fn new() -> Result<Self, SandboxError> {
        match scope() {
            Ok(ruleset) => Ok(Self::Scope(ruleset)),
            Err(error) => {
                tracing::info!(%error, "no Landlock scope for signals: a filter for each machine");
                Self::filter()
            }
        }
    }

    /// The means of older kernels.
    pub fn filter() -> Result<Self, SandboxError> {
        // Where two programs for different ids differ is where the id is.
        let compiled = |id| compile(id).map_err(SandboxError::Filter);
        let (program, other) = (compiled(0x1111_1111)?, compiled(0x2222_2222)?);
        let differ = |(_, (a, b)): &(usize, (_, _))| a != b;
        let holes: Vec<_> =
            program.iter().zip(&other).enumerate().filter(differ).map(|(at, _)| at).collect();
        if program.len() != other.len() || holes.is_empty() {
            return Err(SandboxError::Filter("the process id has no place in it".into()));
        }
        Ok(Self::Filter { program, holes })
    }

    /// Narrows the calling process, which has one thread yet, for good.
    pub fn enter(&self) -> Result<(), SandboxError> {
        match self {
            Self::Scope(ruleset) => {
                // SAFETY: takes a descriptor and no flags, and only takes rights away.
                let result = unsafe {
                    libc::syscall(libc::SYS_landlock_restrict_self, ruleset.as_raw_fd(), 0)
                };
                let source = io::Error::last_os_error();
                let step = "scope of signals";
                if result == 0 { Ok(()) } else { Err(SandboxError::System { step, source }) }
            }
            Self::Filter { program, holes } => {
                let mut program = program.clone();
                for at in holes {
                    program[*at].k = std::process::id();
                }
                apply_filter(&program).map_err(|e| SandboxError::Filter(e.to_string()))
            }
        }
    }

    /// For a machine to let go of once it has entered.
    pub fn descriptor(&self) -> Option<BorrowedFd<'_>> {
        match self {
            Self::Scope(ruleset) => Some(ruleset.as_fd()),
            Self::Filter { .. } => None,
        }
    }
}

/// A Landlock ruleset that restricts nothing but signals to processes outside (linux/landlock.h, ABI 6).
fn scope() -> io::Result<OwnedFd> {
    #[repr(C)]
    struct Attributes {
        handled_access_fs: u64,
        handled_access_net: u64,
        scoped: u64,
    }
    const SCOPE_SIGNAL: u64 = 1 << 1;
    let attributes =
        Attributes { handled_access_fs: 0, handled_access_net: 0, scoped: SCOPE_SIGNAL };
    // SAFETY: pointer and size are those of a live value, which the kernel only reads.
    let fd = unsafe {
        libc::syscall(
            libc::SYS_landlock_create_ruleset,
            &raw const attributes,
            size_of::<Attributes>(),
            0,
        )
    };
    let fd = i32::try_from(fd).ok().filter(|fd| *fd >= 0).ok_or_else(io::Error::last_os_error)?;
    // SAFETY: the call has just made it for us; it is close-on-exec.
    Ok(unsafe { OwnedFd::from_raw_fd(fd) })
}

fn compile(process: u32) -> Result<BpfProgram, String> {
    let other = SeccompCondition::new(0, Dword, SeccompCmpOp::Ne, u64::from(process))
        .and_then(|condition| SeccompRule::new(vec![condition]))
        .map_err(|e| e.to_string())?;
    let rules: BTreeMap<libc::c_long, Vec<SeccompRule>> =
        [(libc::SYS_kill, vec![]), (libc::SYS_tgkill, vec![other])].into();
    super::build(rules, SeccompAction::Errno(libc::EPERM as u32), SeccompAction::Allow)
}
