//! Starting a session's first program.

use std::ffi::CString;
use std::fs::File;
use std::io::Read;
use std::os::fd::{AsFd, BorrowedFd};
use std::os::unix::ffi::OsStrExt;
use std::path::Path;

use anyhow::{Context, Result};
use nix::sys::signal::{SigSet, SigmaskHow, sigprocmask};
use nix::unistd::{self, AccessFlags, Gid, Pid, Uid};

use crate::account::User;
use crate::freeze::Home;
use crate::{forward, sys};

/// Where the program's standard streams are.
pub enum Standard<'fd> {
    /// All three on a terminal, which becomes the session's controlling one.
    Terminal(BorrowedFd<'fd>),
    Streams {
        stdio: BorrowedFd<'fd>,
        stderr: BorrowedFd<'fd>,
    },
}

/// What to run.
pub enum Run<'a> {
    /// The user's shell as a login shell; reads commands from its standard input.
    /// On a terminal it comes after the greeting and the message of the day.
    LoginShell { greeting: &'a str },
    /// The user's shell with `-c`.
    Command(&'a [u8]),
    /// A program of the image.
    Program(&'a Path),
    /// This program, as what forwards connections ([`crate::forward`]).
    Forwarder,
}

/// Starts the program as leader of a new session and returns its process id.
pub fn spawn(
    user: &User,
    run: &Run,
    environment: &[CString],
    standard: &Standard,
    home_group: &Home,
) -> Result<Pid> {
    let invocation = Invocation::new(user, run)?;
    let home = CString::new(user.home.as_os_str().as_bytes()).context("the home directory")?;
    let groups: Vec<Gid> = user.groups.iter().map(|group| Gid::from_raw(*group)).collect();
    let greeting = match (run, standard) {
        (Run::LoginShell { greeting }, Standard::Terminal(_)) => Some(*greeting),
        _ => None,
    };

    sys::start(|| {
        home_group.enter();
        if let Err(what) = become_session(standard, user, &groups) {
            return fail(what);
        }
        // A home that is gone or unreadable must not lock her out.
        if unistd::chdir(home.as_c_str()).is_err() {
            let _ = unistd::chdir("/");
        }
        if let Some(greeting) = greeting {
            greet(&user.home, greeting);
        }
        let _ = unistd::execve(&invocation.path, &invocation.arguments, environment);
        fail("cannot run the program")
    })
    .context("starting a process")
}

struct Invocation {
    path: CString,
    arguments: Vec<CString>,
}

impl Invocation {
    fn new(user: &User, run: &Run) -> Result<Invocation> {
        let path = match run {
            Run::Program(path) => path,
            Run::Forwarder => Path::new("/proc/self/exe"),
            Run::LoginShell { .. } | Run::Command(_) => usable_shell(&user.shell),
        };
        let name = path.file_name().map(OsStrExt::as_bytes).unwrap_or(b"sh");
        let arguments = match run {
            Run::LoginShell { .. } => vec![CString::new([b"-", name].concat())?],
            Run::Command(command) => {
                let command = CString::new(*command).context("the command contains a NUL byte")?;
                vec![CString::new(name)?, c"-c".to_owned(), command]
            }
            Run::Program(_) => vec![CString::new(name)?],
            Run::Forwarder => vec![CString::new(forward::NAME)?],
        };
        Ok(Invocation { path: CString::new(path.as_os_str().as_bytes())?, arguments })
    }
}

/// Her shell, or the nearest that runs: after a wrong chsh, or when the shell she installed is gone.
fn usable_shell(shell: &Path) -> &Path {
    [shell, Path::new("/bin/bash")]
        .into_iter()
        .find(|path| path.is_absolute() && unistd::access(*path, AccessFlags::X_OK).is_ok())
        .unwrap_or(Path::new("/bin/sh"))
}

/// In the child: session, streams, signals, identity. The error says what failed.
fn become_session(standard: &Standard, user: &User, groups: &[Gid]) -> Result<(), &'static str> {
    unistd::setsid().map_err(|_| "setsid")?;
    let streams = match standard {
        Standard::Terminal(terminal) => {
            sys::make_controlling(terminal).map_err(|_| "cannot take the terminal")?;
            [*terminal; 3]
        }
        Standard::Streams { stdio, stderr } => [*stdio, *stdio, *stderr],
    };
    sys::set_standard_streams(streams).map_err(|_| "cannot set the standard streams")?;

    // PID 1 ignores SIGPIPE and blocks what it reads from a signalfd; exec would keep both.
    sys::default_sigpipe().map_err(|_| "signal")?;
    sigprocmask(SigmaskHow::SIG_SETMASK, Some(&SigSet::empty()), None)
        .map_err(|_| "sigprocmask")?;

    let gid = Gid::from_raw(user.gid);
    let uid = Uid::from_raw(user.uid);
    unistd::setgroups(groups).map_err(|_| "setgroups")?;
    unistd::setresgid(gid, gid, gid).map_err(|_| "setgid")?;
    unistd::setresuid(uid, uid, uid).map_err(|_| "setuid")
}

/// The host's line and /etc/motd, as sshd prints them: for logins on a terminal, unless ~/.hushlogin says not to.
fn greet(home: &Path, greeting: &str) {
    if unistd::access(&home.join(".hushlogin"), AccessFlags::F_OK).is_ok() {
        return;
    }
    let mut text = [0; 4096];
    let count = File::open("/etc/motd").and_then(|mut file| file.read(&mut text)).unwrap_or(0);
    // Not through std's stdout: its buffer is the parent's.
    let stdout = std::io::stdout();
    if !greeting.is_empty() {
        let _ = unistd::write(stdout.as_fd(), greeting.as_bytes());
        let _ = unistd::write(stdout.as_fd(), b"\n");
    }
    let _ = unistd::write(stdout.as_fd(), &text[..count]);
}

/// In the child: says why on the session's standard error; the exit code is the shell's for "could
/// not be run". errno is still that of what failed.
fn fail(what: &str) -> i32 {
    let error = nix::errno::Errno::last();
    let stderr = std::io::stderr();
    for part in ["hermitage: ", what, ": ", error.desc(), "\n"] {
        let _ = unistd::write(stderr.as_fd(), part.as_bytes());
    }
    127
}

/// Lets a program have a socket the way it expects one.
pub fn set_blocking(file: impl AsFd, blocking: bool) -> nix::Result<()> {
    use nix::fcntl::{FcntlArg, OFlag, fcntl};
    let mut flags = OFlag::from_bits_retain(fcntl(file.as_fd(), FcntlArg::F_GETFL)?);
    flags.set(OFlag::O_NONBLOCK, !blocking);
    fcntl(file.as_fd(), FcntlArg::F_SETFL(flags)).map(drop)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn user(shell: &str) -> User {
        User {
            name: "alice".to_owned(),
            uid: 1000,
            gid: 1000,
            home: "/".into(),
            shell: shell.into(),
            groups: Vec::new(),
        }
    }

    #[test]
    fn a_login_shell_is_told_by_its_name_and_a_command_is_one_argument() {
        let login = Invocation::new(&user("/bin/sh"), &Run::LoginShell { greeting: "" }).unwrap();
        assert_eq!(login.arguments, [c"-sh".to_owned()]);
        let command = Invocation::new(&user("/bin/sh"), &Run::Command(b"echo \xff; id")).unwrap();
        assert_eq!(command.arguments[1], c"-c".to_owned());
        assert_eq!(command.arguments[2].as_bytes(), b"echo \xff; id");
        assert!(Invocation::new(&user("/bin/sh"), &Run::Command(b"a\0b")).is_err());
    }

    #[test]
    fn a_shell_that_is_gone_does_not_lock_her_out() {
        for shell in ["/no/such/shell", "", "bash", "/etc/passwd"] {
            let login = Invocation::new(&user(shell), &Run::LoginShell { greeting: "" }).unwrap();
            assert!(login.path.to_bytes().ends_with(b"sh"), "{shell}: {:?}", login.path);
            assert!(login.path.to_bytes().starts_with(b"/bin/"), "{shell}: {:?}", login.path);
        }
    }
}
