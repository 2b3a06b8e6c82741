//! Processes: this one, and what the kernel counts of machines'.

use std::{fs, sync::OnceLock};

use nix::{
    sys::{
        prctl::set_dumpable,
        resource::{Resource, setrlimit},
    },
    unistd::{SysconfVar, sysconf},
};

/// Passwords and keys of a process that crashes stay out of files. The limit is for programs that it starts as well; a
/// program that takes cores from the kernel (core(5)) gets them whatever the limit, and none of a process that can't be
/// dumped. What does not work is no reason to do nothing.
pub fn leave_no_core() {
    let _ = setrlimit(Resource::RLIMIT_CORE, 0, 0);
    let _ = set_dumpable(false);
}

/// Time that a process had on processors, of user and system, in milliseconds (proc_pid_stat(5), fields 14 and 15). A
/// guest's time is in the former. `None`: it is gone.
pub fn cpu_ms(pid: i32) -> Option<u64> {
    Some(ticks(pid)?.saturating_mul(1000) / per_second())
}

fn ticks(pid: i32) -> Option<u64> {
    let stat = fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
    // Its name, in parentheses, may have blanks and parentheses.
    let fields = stat.get(stat.rfind(')')? + 2..)?;
    let mut fields = fields.split_ascii_whitespace().skip(11);
    let (user, system): (u64, u64) = (fields.next()?.parse().ok()?, fields.next()?.parse().ok()?);
    Some(user + system)
}

/// Ticks of a second; 100 on all Linux that Debian has.
fn per_second() -> u64 {
    static PER_SECOND: OnceLock<u64> = OnceLock::new();
    *PER_SECOND.get_or_init(|| {
        let asked = sysconf(SysconfVar::CLK_TCK).ok().flatten();
        asked.and_then(|ticks| u64::try_from(ticks).ok()).filter(|ticks| *ticks > 0).unwrap_or(100)
    })
}

#[cfg(test)]
mod tests {
    use std::time::{Duration, Instant};

    use super::*;

    #[test]
    fn a_busy_process_has_time_and_one_that_is_gone_has_none() {
        let begun = Instant::now();
        let mut sum = 0u64;
        while begun.elapsed() < Duration::from_millis(200) {
            sum = std::hint::black_box(sum.wrapping_add(1));
        }
        assert!(cpu_ms(std::process::id() as i32).unwrap() > 0);
        assert_eq!(cpu_ms(i32::MAX), None);
    }
}
