//! Signals by the names SSH has for them (RFC 4254 §6.9, §6.10): without `SIG`.

use nix::sys::signal::Signal;

/// The standard's names, and those a user may meet beyond them.
const NAMES: [(&str, Signal); 29] = [
    ("ABRT", Signal::SIGABRT),
    ("ALRM", Signal::SIGALRM),
    ("FPE", Signal::SIGFPE),
    ("HUP", Signal::SIGHUP),
    ("ILL", Signal::SIGILL),
    ("INT", Signal::SIGINT),
    ("KILL", Signal::SIGKILL),
    ("PIPE", Signal::SIGPIPE),
    ("QUIT", Signal::SIGQUIT),
    ("SEGV", Signal::SIGSEGV),
    ("TERM", Signal::SIGTERM),
    ("USR1", Signal::SIGUSR1),
    ("USR2", Signal::SIGUSR2),
    ("BUS", Signal::SIGBUS),
    ("CHLD", Signal::SIGCHLD),
    ("CONT", Signal::SIGCONT),
    ("IO", Signal::SIGIO),
    ("PROF", Signal::SIGPROF),
    ("PWR", Signal::SIGPWR),
    ("STOP", Signal::SIGSTOP),
    ("SYS", Signal::SIGSYS),
    ("TRAP", Signal::SIGTRAP),
    ("TSTP", Signal::SIGTSTP),
    ("TTIN", Signal::SIGTTIN),
    ("TTOU", Signal::SIGTTOU),
    ("URG", Signal::SIGURG),
    ("VTALRM", Signal::SIGVTALRM),
    ("WINCH", Signal::SIGWINCH),
    ("XCPU", Signal::SIGXCPU),
];

pub fn by_name(name: &str) -> Option<Signal> {
    NAMES.iter().find(|(known, _)| *known == name).map(|(_, signal)| *signal)
}

/// The name of a signal by its number; those without one (real-time signals, for example) get
/// the number with an `@`, as §6.10 asks of local names.
pub fn name(number: i32) -> String {
    NAMES
        .iter()
        .find(|(_, signal)| *signal as i32 == number)
        .map_or_else(|| format!("{number}@hermitage"), |(name, _)| (*name).to_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_and_numbers_agree_both_ways() {
        for (text, signal) in NAMES {
            assert_eq!(by_name(text), Some(signal));
            assert_eq!(name(signal as i32), text);
            assert_eq!(signal.as_str(), format!("SIG{text}"));
        }
        assert_eq!(by_name("SIGINT"), None);
        assert_eq!(name(34), "34@hermitage");
    }
}
