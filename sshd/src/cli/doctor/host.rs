//! The host: processor, KVM, kernel, the programs beside this one.
//!
//! That `/dev/kvm` opens proves nothing: there are paravirtual KVMs whose ioctls answer and whose guests
//! die at once. So the processor's flag is looked at *and* a probe guest is run.

use super::{Finding, MAKE_BASE};
use crate::cli::context::Context;
use crate::cli::tool;
use hermitage::cgroup::CONTROLLERS;
use std::fs::{self, OpenOptions};
use std::io::{self, Read};
use std::path::Path;
use std::process::{Command, Stdio};
use std::thread;
use std::time::{Duration, Instant};

/// The probe guest runs for milliseconds, under emulation for some tenths of a second.
const PROBE_PATIENCE: Duration = Duration::from_secs(30);

/// A base is hashed first: gigabytes, from a slow disk.
const BASE_PATIENCE: Duration = Duration::from_secs(300);

const PROBE: &str = "probe guest";
const WHERE: &str = "hermitage-vmm has to be beside hermitage, or where HERMITAGE_LIBEXEC says";

const NX_HUGE_PAGES: &str = "/sys/module/kvm/parameters/nx_huge_pages";
const MULTIHIT: &str = "/sys/devices/system/cpu/vulnerabilities/itlb_multihit";

pub fn check(context: &Context) -> Vec<Finding> {
    let cpu = processor(&fs::read_to_string("/proc/cpuinfo").unwrap_or_default());
    let device = device();
    let usable = device.level == super::Level::Ok;
    let mut findings = vec![cpu, device, programs(context)];
    if usable {
        findings.push(probe(context));
    }
    let release = fs::read_to_string("/proc/sys/kernel/osrelease").unwrap_or_default();
    findings.push(kernel(release.trim()));
    let read = |path| fs::read_to_string(path).map(|text| text.trim().to_owned()).ok();
    findings.extend(huge_pages(read(NX_HUGE_PAGES).as_deref(), read(MULTIHIT).as_deref()));
    let mounts = fs::read_to_string("/proc/self/mounts").unwrap_or_default();
    let controllers = mount_of_groups(&mounts).map(|(point, options)| {
        let there = fs::read_to_string(Path::new(point).join("cgroup.controllers"));
        (there.unwrap_or_default(), options.to_owned())
    });
    findings.push(control_groups(controllers));
    findings
}

/// Where control groups of version 2 are mounted, and how (proc_mounts(5)).
fn mount_of_groups(mounts: &str) -> Option<(&str, &str)> {
    mounts.lines().find_map(|line| {
        let mut fields = line.split(' ').skip(1);
        let (point, kind, options) = (fields.next()?, fields.next()?, fields.next()?);
        (kind == "cgroup2").then_some((point, options))
    })
}

/// What limits of machines are enforced by, as far as the host is concerned; `status` says whether the
/// service has a place in it.
fn control_groups(found: Option<(String, String)>) -> Finding {
    const CHECK: &str = "control groups";
    let Some((controllers, options)) = found else {
        return Finding::warning(
            CHECK,
            "version 2 is not mounted: limits of machines are not enforced",
            "boot with systemd.unified_cgroup_hierarchy=1, or mount cgroup2 (docs/limits.md)",
        );
    };
    let there: Vec<_> = controllers.split_ascii_whitespace().collect();
    let missing: Vec<_> = CONTROLLERS.into_iter().filter(|name| !there.contains(name)).collect();
    if !missing.is_empty() {
        return Finding::warning(
            CHECK,
            format!("version 2 has no {}: such limits are not enforced", missing.join(", ")),
            "controllers that version 1 has are missing in version 2: boot with \
             systemd.unified_cgroup_hierarchy=1 (docs/limits.md)",
        );
    }
    if options.split(',').any(|option| option == "favordynmods") {
        return Finding::ok(CHECK, "version 2, with favordynmods: machines enter theirs at once");
    }
    Finding::warning(
        CHECK,
        "version 2, without favordynmods: every machine's start waits some 10 ms to enter its group",
        "at boot: mount -o remount,favordynmods /sys/fs/cgroup (Linux 6.0; docs/limits.md)",
    )
}

fn processor(cpuinfo: &str) -> Finding {
    let flags = cpuinfo.lines().find(|line| line.starts_with("flags")).unwrap_or_default();
    match flags.split_whitespace().find(|flag| matches!(*flag, "vmx" | "svm")) {
        Some(flag) => Finding::ok("processor", format!("has hardware virtualisation ({flag})")),
        None => Finding::failure(
            "processor",
            "shows no hardware virtualisation (neither vmx nor svm)",
            "switch it on in the firmware; in a virtual machine, have its host allow nested \
             virtualisation; or try Hermitage in its emulated lab: cargo lab up",
        ),
    }
}

fn device() -> Finding {
    match OpenOptions::new().read(true).write(true).open("/dev/kvm") {
        Ok(_) => Finding::ok("kvm device", "/dev/kvm opens"),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Finding::failure(
            "kvm device",
            "there is no /dev/kvm",
            "load the module: modprobe kvm_amd (or kvm_intel); in a container, pass the device in",
        ),
        Err(error) => Finding::failure(
            "kvm device",
            format!("/dev/kvm: {error}"),
            "run this as root, or as a member of the group that owns /dev/kvm",
        ),
    }
}

fn programs(context: &Context) -> Finding {
    let missing: Vec<_> = ["hermitage-vmm", "hermitage-image", "hermitage-agent"]
        .into_iter()
        .filter(|name| !tool::path(context, name).is_file())
        .collect();
    let dir = context.config.libexec_dir();
    let dir = dir.display();
    if missing.is_empty() {
        return Finding::ok("programs", format!("all are in {dir}"));
    }
    let found = format!("not in {dir}: {}", missing.join(", "));
    let advice = "install them there, or name their folder by libexec_dir in the configuration";
    if missing.contains(&"hermitage-vmm") {
        Finding::failure("programs", found, advice)
    } else {
        let advice = format!("only building images needs them; for that, {advice}");
        Finding::warning("programs", found, advice)
    }
}

/// Whether machines of the current base can run here: what KVM offers, and that it takes the base's state. Only
/// where the probe guest ran.
pub fn base(context: &Context, findings: &[Finding]) -> Option<Finding> {
    const CHECK: &str = "base restores";
    let ran = |finding: &Finding| finding.check == PROBE && finding.level == super::Level::Ok;
    let id = context.state.current_base().ok().flatten().filter(|_| findings.iter().any(ran))?;
    let dir = context.state.base(&id);
    let mut command = Command::new(tool::path(context, "hermitage-vmm"));
    command.arg("check-base").arg("--base").arg(dir);
    Some(match finish(command, BASE_PATIENCE) {
        Ok(Ok(_)) => Finding::ok(CHECK, "KVM takes the state of its machines"),
        Ok(Err(reason)) => refused(CHECK, reason),
        Err(error) => Finding::failure(CHECK, format!("could not be tried: {error}"), WHERE),
    })
}

/// The vmm's words mostly have the command in them already.
fn refused(check: &'static str, reason: String) -> Finding {
    let kept = "what is saved of machines of another resumes where that one can be used";
    let advice = match reason.contains(MAKE_BASE) {
        true => kept.to_owned(),
        false => format!("make a base on this host: {MAKE_BASE}; {kept}"),
    };
    Finding::failure(check, reason, advice)
}

fn probe(context: &Context) -> Finding {
    const CHECK: &str = PROBE;
    let advice = "this KVM can't run guests (some hosts' nested or paravirtual ones can't): use a host \
                  with real hardware virtualisation, or the emulated lab: cargo lab up";
    match run_probe(context) {
        Ok(Ok(time)) => Finding::ok(CHECK, format!("ran to its end in {} ms", time.as_millis())),
        Ok(Err(reason)) => Finding::failure(CHECK, reason, advice),
        Err(error) => Finding::failure(CHECK, format!("could not be run: {error}"), WHERE),
    }
}

/// How long the probe took, or why this KVM doesn't do.
fn run_probe(context: &Context) -> io::Result<Result<Duration, String>> {
    let mut command = Command::new(tool::path(context, "hermitage-vmm"));
    command.arg("probe");
    finish(command, PROBE_PATIENCE)
}

/// How long the command took, or in its words why it failed.
fn finish(mut command: Command, patience: Duration) -> io::Result<Result<Duration, String>> {
    let start = Instant::now();
    let mut child = command
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .stderr(Stdio::piped())
        .env("RUST_LOG", "off")
        .spawn()?;
    let status = loop {
        if let Some(status) = child.try_wait()? {
            break status;
        }
        if start.elapsed() > patience {
            child.kill()?;
            child.wait()?;
            return Ok(Err(format!("did not end within {} s", patience.as_secs())));
        }
        thread::sleep(Duration::from_millis(5));
    };
    if status.success() {
        return Ok(Ok(start.elapsed()));
    }
    let mut reason = String::new();
    if let Some(stderr) = child.stderr.take() {
        stderr.take(4096).read_to_string(&mut reason)?;
    }
    let reason = reason.trim();
    Ok(Err(if reason.is_empty() { format!("ended with {status}") } else { reason.to_owned() }))
}

fn kernel(release: &str) -> Finding {
    const CHECK: &str = "host kernel";
    let mut numbers = release.split(|c: char| !c.is_ascii_digit()).map_while(|n| n.parse().ok());
    let version: (u32, u32) = (numbers.next().unwrap_or(0), numbers.next().unwrap_or(0));
    match version {
        (0, _) => Finding::warning(CHECK, format!("release \"{release}\" is not understood"), ""),
        version if version < (5, 10) => Finding::failure(
            CHECK,
            format!("Linux {release}"),
            "use Linux 5.10 or later; 6.1 or later is what Hermitage is tested with",
        ),
        version if version < (6, 1) => Finding::warning(
            CHECK,
            format!("Linux {release}"),
            "6.1 or later is what Hermitage is tested with",
        ),
        _ => Finding::ok(CHECK, format!("Linux {release}")),
    }
}

/// With the mitigation's machinery there, making a VM starts a kernel thread: some twenty milliseconds
/// more for every login. Only `never` leaves it out, and only where the processor has not the bug it
/// is for may it be left out.
fn huge_pages(setting: Option<&str>, multihit: Option<&str>) -> Option<Finding> {
    const CHECK: &str = "kvm nx_huge_pages";
    let setting = setting?;
    let unaffected = multihit == Some("Not affected");
    Some(match (setting, unaffected) {
        ("never", true) => Finding::ok(CHECK, "never: machines start fast"),
        ("never", false) => Finding::warning(
            CHECK,
            "never, but this processor has the bug (iTLB multihit) that the setting is about",
            "a guest could stop the host: remove kvm.nx_huge_pages=never from its kernel command line",
        ),
        (_, true) => Finding::warning(
            CHECK,
            format!("{setting}: every machine's start takes some 20 ms more than it has to"),
            "this processor has not the bug it is for: add kvm.nx_huge_pages=never to the host's kernel \
             command line and boot",
        ),
        (_, false) => {
            Finding::ok(CHECK, format!("{setting}: slower starts, but this processor may need it"))
        }
    })
}

#[cfg(test)]
mod tests {
    use super::super::Level;
    use super::*;

    #[test]
    fn how_a_base_is_made_is_said_once() {
        let said = |reason: &str| {
            let Finding { found, advice, .. } = refused("base restores", reason.into());
            (format!("{found} {advice}").matches(MAKE_BASE).count(), advice)
        };
        let own = said(
            "this base can't be used on this host: x; make a new one with: hermitage base build",
        );
        let other = said("KVM: no such device");
        assert_eq!((own.0, other.0), (1, 1));
        for advice in [own.1, other.1] {
            assert!(advice.contains("what is saved of machines of another"), "{advice}");
        }
    }

    #[test]
    fn the_flag_is_looked_for_as_a_word() {
        let with = "processor\t: 0\nflags\t\t: fpu svm sse\n";
        assert_eq!(processor(with).level, Level::Ok);
        let without = "flags\t\t: fpu vmxnet svm_lock\n";
        assert_eq!(processor(without).level, Level::Failure);
        assert!(processor(without).advice.contains("lab"));
    }

    #[test]
    fn kernels_are_judged_by_version() {
        for (release, level) in [
            ("6.12.57+deb13-cloud-amd64", Level::Ok),
            ("6.1.0-40", Level::Ok),
            ("5.15.0-91-generic", Level::Warning),
            ("4.19.0", Level::Failure),
            ("unheard of", Level::Warning),
        ] {
            assert_eq!(kernel(release).level, level, "{release}");
        }
    }

    #[test]
    fn groups_are_judged_by_their_controllers_and_their_mount() {
        let mounts = "sysfs /sys sysfs rw 0 0\ncgroup2 /sys/fs/cgroup cgroup2 rw,nsdelegate 0 0\n";
        assert_eq!(mount_of_groups(mounts), Some(("/sys/fs/cgroup", "rw,nsdelegate")));
        assert_eq!(mount_of_groups("cgroup /sys/fs/cgroup/cpu cgroup rw,cpu 0 0\n"), None);
        let all = "cpuset cpu io memory hugetlb pids";
        let judged =
            |there: &str, options: &str| control_groups(Some((there.into(), options.into())));
        assert_eq!(judged(all, "rw,favordynmods").level, Level::Ok);
        assert!(judged(all, "rw").advice.contains("remount,favordynmods"));
        let partial = judged("cpuset cpu", "rw,favordynmods");
        assert!(partial.found.contains("io, memory, pids"), "{}", partial.found);
        assert_eq!(control_groups(None).level, Level::Warning);
    }

    #[test]
    fn never_is_advised_only_where_it_is_safe() {
        let judged = |setting, bug| huge_pages(Some(setting), Some(bug)).unwrap();
        assert_eq!(judged("never", "Not affected").level, Level::Ok);
        assert_eq!(judged("never", "KVM: Vulnerable").level, Level::Warning);
        assert!(judged("Y", "Not affected").advice.contains("kvm.nx_huge_pages=never"));
        assert!(judged("N", "KVM: Mitigation: VMX disabled").advice.is_empty());
        assert!(huge_pages(None, None).is_none());
    }
}
