//! What else of the host matters to machines, is easily overlooked, and costs one line each to put right.

use super::Finding;
use crate::cli::context::Context;
use crate::cli::{account_size, size, status};
use std::fs;
use std::io::ErrorKind;
use std::net::{SocketAddr, TcpListener};
use std::path::Path;

/// 2026-01-01: before this program was.
const TOO_EARLY: i64 = 1_767_225_600;

pub fn check(context: &Context) -> Vec<Finding> {
    let read = |path: &str| fs::read_to_string(path).ok().map(|text| text.trim().to_owned());
    let on_metal = |text: Option<String>| text.as_deref().map(virtual_host);
    let running = status::query(context).ok().flatten();
    let mut findings = Vec::new();
    findings.extend(on_metal(read("/proc/cpuinfo")));
    findings.extend(read("/proc/swaps").as_deref().map(swap));
    if let Some(mode) = read("/proc/sys/vm/overcommit_memory") {
        let most = account_size::of_base(context).map(|machine| machine.most().memory_bytes);
        findings.push(overcommit(&mode, read("/proc/meminfo").as_deref().and_then(limit), most));
    }
    findings.extend(read("/sys/kernel/mm/ksm/run").as_deref().map(ksm));
    findings.extend(read("/sys/kernel/mm/transparent_hugepage/enabled").as_deref().map(huge_pages));
    findings.extend(read("/proc/sys/kernel/random/entropy_avail").as_deref().map(entropy));
    let source = read("/sys/devices/system/clocksource/clocksource0/current_clocksource");
    findings.push(clock(hermitage::time::now(), source.as_deref(), is_kept_right()));
    let pid = running.as_ref().map_or("self".to_owned(), |running| running.pid.to_string());
    if let Some(text) = read(&format!("/proc/{pid}/limits")) {
        findings.extend(limits(&text, context.config.ssh.max_connections, running.is_some()));
    }
    if running.is_none() {
        findings.extend(context.config.ssh.listen.iter().filter_map(port));
    }
    findings
}

/// The flag that a hypervisor shows its guests.
fn virtual_host(cpuinfo: &str) -> Finding {
    const CHECK: &str = "nested";
    let flags = cpuinfo.lines().find(|line| line.starts_with("flags")).unwrap_or_default();
    if flags.split_whitespace().any(|flag| flag == "hypervisor") {
        Finding::warning(
            CHECK,
            "this host is a virtual machine itself",
            "every exit of a machine passes two hypervisors, which costs several times as much: fine to try, slow to \
             serve many",
        )
    } else {
        Finding::ok(CHECK, "this host is no virtual machine")
    }
}

/// proc_swaps(5): a line of titles, then one for each.
fn swap(swaps: &str) -> Finding {
    const CHECK: &str = "swap";
    let in_use: Vec<_> =
        swaps.lines().skip(1).filter_map(|line| line.split_whitespace().next()).collect();
    if in_use.is_empty() {
        return Finding::ok(CHECK, "none");
    }
    Finding::warning(
        CHECK,
        format!("machines' memory may be written to {}", in_use.join(", ")),
        "keys in it outlive the machine there, and a swapped machine answers late: swapoff -a, or encrypt it \
         (crypttab(5), swap) if the host needs it",
    )
}

/// With 2 the kernel charges whoever maps memory with all of it, `MAP_NORESERVE` or not, and gives out no more than its
/// limit (linux, Documentation/mm/overcommit-accounting.rst). `limit` and `most`, what a machine of the base can have,
/// are in bytes.
fn overcommit(mode: &str, limit: Option<u64>, most: Option<u64>) -> Finding {
    const CHECK: &str = "overcommit";
    if mode != "2" {
        return Finding::ok(CHECK, format!("vm.overcommit_memory is {mode}"));
    }
    let each = most.map_or("the most memory that its base has".into(), size::show);
    let mut found =
        format!("vm.overcommit_memory is 2: each machine is charged {each}, used or not");
    if let Some(limit) = limit {
        found.push_str(&format!(
            ", of the {} that the host gives out (CommitLimit)",
            size::show(limit)
        ));
    }
    Finding::warning(
        CHECK,
        found,
        "logins are refused when that is given out, however much memory is free: sysctl vm.overcommit_memory=0 (or 1), or \
         give out much more (vm.overcommit_ratio, swap), or make a base that has less at most (base build \
         --max-memory-mib)",
    )
}

/// `CommitLimit:     2015128 kB` (proc_meminfo(5)), in bytes.
fn limit(meminfo: &str) -> Option<u64> {
    let line = meminfo.lines().find_map(|line| line.strip_prefix("CommitLimit:"))?;
    line.trim().strip_suffix(" kB")?.trim().parse::<u64>().ok()?.checked_mul(1024)
}

fn ksm(run: &str) -> Finding {
    const CHECK: &str = "ksm";
    match run {
        "1" => Finding::warning(
            CHECK,
            "the kernel merges equal pages of different processes",
            "accounts can find out by timing what others have in memory; machines share their base without it: echo \
             0 > /sys/kernel/mm/ksm/run",
        ),
        _ => Finding::ok(CHECK, "off"),
    }
}

fn huge_pages(enabled: &str) -> Finding {
    const CHECK: &str = "huge pages";
    match enabled.split(['[', ']']).nth(1) {
        Some("always") => Finding::warning(
            CHECK,
            "transparent huge pages are always taken",
            "each machine's process then takes 2 MiB where 4 KiB would do; the base's are made by request: echo madvise \
             > /sys/kernel/mm/transparent_hugepage/enabled",
        ),
        Some(other) => Finding::ok(CHECK, format!("transparent ones: {other}")),
        None => Finding::ok(CHECK, "the kernel has none"),
    }
}

/// random(4): 256 since Linux 5.18 as soon as the generator is ready.
fn entropy(bits: &str) -> Finding {
    const CHECK: &str = "entropy";
    match bits.parse::<u32>() {
        Ok(bits) if bits >= 128 => Finding::ok(CHECK, format!("{bits} bits")),
        _ => Finding::warning(
            CHECK,
            format!("{bits} bits"),
            "machines wait for random numbers until there are more: give the host a hardware generator (in a virtual \
             machine: virtio-rng), or install rng-tools",
        ),
    }
}

fn clock(now: i64, source: Option<&str>, kept_right: bool) -> Finding {
    const CHECK: &str = "clock";
    let utc = format!("{} UTC", hermitage::time::short(now));
    if now < TOO_EARLY {
        let advice = "certificates, expiries and guests' clocks follow it: set it, and have it kept right (chrony)";
        return Finding::failure(CHECK, utc, advice);
    }
    match source {
        Some(slow @ ("hpet" | "acpi_pm" | "jiffies" | "refined-jiffies")) => Finding::warning(
            CHECK,
            format!("{utc}, from {slow}"),
            "each reading costs a microsecond, in guests too: the kernel's log says why it does not trust the TSC",
        ),
        _ if !kept_right => Finding::warning(
            CHECK,
            format!("{utc}; nothing was found that keeps it right"),
            "guests take their time from the host: install chrony, or switch on systemd-timesyncd",
        ),
        source => Finding::ok(CHECK, format!("{utc}, from {}", source.unwrap_or("the kernel"))),
    }
}

/// By what the usual services leave while they run.
fn is_kept_right() -> bool {
    let signs = [
        "/run/systemd/timesync/synchronized",
        "/run/chrony/chronyd.pid",
        "/run/chrony/chronyd.sock",
        "/run/ntpd.pid",
        "/run/ntpsec/ntpd.pid",
    ];
    signs.iter().any(|sign| Path::new(sign).exists())
}

/// proc_pid_limits(5), of the service if it runs: a line has a name, the soft and the hard limit.
fn limits(text: &str, connections: usize, service: bool) -> Vec<Finding> {
    let whose = if service { "the service" } else { "whoever starts the service from here" };
    let limit = |name: &str| -> Option<u64> {
        let line = text.lines().find_map(|line| line.strip_prefix(name))?;
        match line.split_whitespace().next()? {
            "unlimited" => Some(u64::MAX),
            number => number.parse().ok(),
        }
    };
    // A connection has its socket and its streams'; a machine three of its own.
    let wanted = [
        (
            "open files",
            "Max open files",
            (connections as u64).saturating_mul(4).max(4096),
            "LimitNOFILE",
        ),
        ("processes", "Max processes", 4096, "LimitNPROC"),
    ];
    let judge = |(check, name, wanted, setting): (&'static str, &str, u64, &str)| {
        let has = limit(name)?;
        let shown = if has == u64::MAX { "no limit".to_owned() } else { format!("{has}") };
        Some(if has < wanted {
            Finding::warning(
                check,
                format!("{whose} may have {shown}"),
                format!(
                    "{wanted} or more are wanted for ssh.max_connections = {connections}: {setting}= in its unit, or ulimit"
                ),
            )
        } else {
            Finding::ok(check, shown)
        })
    };
    wanted.into_iter().filter_map(judge).collect()
}

/// An address that somebody else listens on. What only the service may do, or a protocol that this host has not, is
/// no matter here.
fn port(address: &SocketAddr) -> Option<Finding> {
    const CHECK: &str = "port";
    match TcpListener::bind(address) {
        Err(error) if error.kind() == ErrorKind::AddrInUse && address.port() != 0 => {
            Some(Finding::failure(
                CHECK,
                format!("something else listens on {address}"),
                format!(
                    "ss -ltnp 'sport = {}' says what; stop it, or set ssh.listen",
                    address.port()
                ),
            ))
        }
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use super::super::Level;
    use super::*;

    #[test]
    fn each_setting_is_judged_by_what_the_kernel_says_of_it() {
        assert_eq!(virtual_host("flags\t: fpu svm hypervisor sse").level, Level::Warning);
        assert_eq!(virtual_host("flags\t: fpu svm hypervisors").level, Level::Ok);
        let title = "Filename\t\t\t\tType\t\tSize\t\tUsed\t\tPriority\n";
        assert_eq!(swap(title).level, Level::Ok);
        let with = swap(&format!("{title}/dev/sda2 partition 1 0 -2\n/swap file 1 0 -3\n"));
        assert!(
            with.found.contains("/dev/sda2, /swap") && with.advice.contains("swapoff"),
            "{}",
            with.found
        );
        assert_eq!(
            [ksm("0").level, ksm("1").level, ksm("2").level],
            [Level::Ok, Level::Warning, Level::Ok]
        );
        assert_eq!(
            [overcommit("0", None, None).level, overcommit("1", None, None).level],
            [Level::Ok; 2]
        );
        let strict =
            overcommit("2", limit("MemFree: 1 kB\nCommitLimit:     4194304 kB\n"), Some(2 << 30));
        assert_eq!(strict.level, Level::Warning);
        assert!(
            strict.found.contains("charged 2 GiB") && strict.found.contains("of the 4 GiB"),
            "{}",
            strict.found
        );
        assert!(strict.advice.contains("vm.overcommit_memory=0"), "{}", strict.advice);
        let unknown = overcommit("2", limit("CommitLimit: much\n"), None);
        assert!(
            unknown.found.ends_with("the most memory that its base has, used or not"),
            "{}",
            unknown.found
        );
        assert_eq!(huge_pages("[always] madvise never").level, Level::Warning);
        assert_eq!(huge_pages("always [madvise] never").level, Level::Ok);
        assert_eq!(
            [entropy("256").level, entropy("12").level, entropy("").level],
            [Level::Ok, Level::Warning, Level::Warning]
        );
    }

    #[test]
    fn a_clock_is_of_now_quick_and_kept_right() {
        let now = TOO_EARLY + 1;
        assert_eq!(clock(now, Some("tsc"), true).level, Level::Ok);
        assert_eq!(clock(5, Some("tsc"), true).level, Level::Failure);
        assert!(clock(now, Some("hpet"), true).found.contains("from hpet"));
        assert!(clock(now, None, false).advice.contains("chrony"));
    }

    #[test]
    fn limits_are_those_of_the_service_and_measured_by_its_connections() {
        let text = "Limit                     Soft Limit           Hard Limit           Units     \n\
                    Max processes             unlimited            unlimited            processes \n\
                    Max open files            1024                 1048576              files     \n";
        let found = limits(text, 4000, true);
        let levels: Vec<_> = found.iter().map(|finding| (finding.check, finding.level)).collect();
        assert_eq!(levels, [("open files", Level::Warning), ("processes", Level::Ok)]);
        assert!(
            found[0].advice.contains("16000 or more") && found[0].advice.contains("LimitNOFILE")
        );
        assert!(limits("nonsense", 1, false).is_empty());
    }

    #[test]
    fn a_port_that_is_taken_is_a_failure() {
        let taken = TcpListener::bind("127.0.0.1:0").unwrap();
        let address = taken.local_addr().unwrap();
        assert!(port(&address).unwrap().found.contains(&address.to_string()));
        drop(taken);
        assert!(port(&address).is_none());
        // Not ours to try here.
        assert!(port(&"192.0.2.1:22".parse().unwrap()).is_none());
    }
}
