//! What the two machines are made of: the lab's own, bare so that it boots in seconds, and a fresh Debian
//! with systemd, where the package is tried.

/// Where files go in the root disk: path, mode, content.
pub type File = (&'static str, u32, &'static str);

#[derive(Debug)]
pub struct Recipe {
    pub name: &'static str,
    /// For the person who waits for it.
    pub what: &'static str,
    /// One a line; `#` begins a comment.
    pub packages: &'static str,
    pub files: &'static [File],
    /// Symbolic links, which take the place of what is there: path, target.
    pub links: &'static [(&'static str, &'static str)],
    /// Folders of `/usr/share` that packages leave out, here and when they are installed later.
    pub left_out: &'static [&'static str],
    pub disk_mib: u64,
    /// Added to the kernel's command line.
    pub arguments: &'static str,
    /// It comes up again after a reboot; else that is its end.
    pub reboots: bool,
}

const SSHD_CONFIG: File = ("etc/ssh/sshd_config", 0o644, include_str!("../../machine/sshd_config"));
const HOLD_KVM: File = ("etc/lab/hold-kvm", 0o755, include_str!("../../machine/hold-kvm"));
const HOSTNAME: File = ("etc/hostname", 0o644, "lab\n");
const HOSTS: File = ("etc/hosts", 0o644, "127.0.0.1 localhost\n127.0.1.1 lab\n");

/// systemd would take most of a minute, so busybox starts a few shell lines.
pub static BARE: Recipe = Recipe {
    name: "bare",
    what: "Debian",
    packages: include_str!("../../machine/packages.txt"),
    files: &[
        ("etc/inittab", 0o644, include_str!("../../machine/inittab")),
        ("etc/lab/rc", 0o755, include_str!("../../machine/rc")),
        ("etc/lab/down", 0o755, include_str!("../../machine/down")),
        HOLD_KVM,
        SSHD_CONFIG,
        HOSTNAME,
        HOSTS,
    ],
    links: &[
        ("usr/sbin/init", "../bin/busybox"),
        ("usr/sbin/poweroff", "../bin/busybox"),
        ("usr/sbin/reboot", "../bin/busybox"),
        ("usr/sbin/halt", "../bin/busybox"),
    ],
    left_out: &["doc", "man", "locale"],
    disk_mib: 2048,
    arguments: "",
    reboots: false,
};

const NOTHING: &str = "/dev/null";

/// As Debian installs it. What is masked has no part in running a service and would cost emulated seconds:
/// logins on terminals, and what runs by the clock.
pub static DEBIAN: Recipe = Recipe {
    name: "debian",
    what: "Debian with systemd",
    packages: include_str!("../../machine/debian/packages.txt"),
    files: &[
        ("etc/lab/rc", 0o755, include_str!("../../machine/debian/rc")),
        ("etc/systemd/system/lab-setup.service", 0o644, SETUP),
        ("etc/systemd/system/lab-ready.service", 0o644, READY),
        ("etc/systemd/system/lab-hold-kvm.service", 0o644, HOLD_KVM_SERVICE),
        // Without one this boot is the machine's first, and systemd presets every unit.
        ("etc/machine-id", 0o444, "6c6162206f66206865726d6974616765\n"),
        HOLD_KVM,
        SSHD_CONFIG,
        HOSTNAME,
        HOSTS,
    ],
    links: &[
        ("etc/systemd/system/multi-user.target.wants/lab-setup.service", "../lab-setup.service"),
        ("etc/systemd/system/multi-user.target.wants/lab-ready.service", "../lab-ready.service"),
        (
            "etc/systemd/system/multi-user.target.wants/lab-hold-kvm.service",
            "../lab-hold-kvm.service",
        ),
        ("etc/systemd/system/getty@tty1.service", NOTHING),
        ("etc/systemd/system/serial-getty@ttyS0.service", NOTHING),
        ("etc/systemd/system/apt-daily.timer", NOTHING),
        ("etc/systemd/system/apt-daily-upgrade.timer", NOTHING),
        ("etc/systemd/system/dpkg-db-backup.timer", NOTHING),
        ("etc/systemd/system/e2scrub_all.timer", NOTHING),
        ("etc/systemd/system/e2scrub_reap.service", NOTHING),
        ("etc/systemd/system/fstrim.timer", NOTHING),
        ("etc/systemd/system/systemd-udev-settle.service", NOTHING),
    ],
    left_out: &["locale"],
    disk_mib: 8192,
    arguments: "net.ifnames=0 systemd.show_status=auto systemd.ssh_auto=no",
    reboots: true,
};

const SETUP: &str = include_str!("../../machine/debian/lab-setup.service");
const READY: &str = include_str!("../../machine/debian/lab-ready.service");
const HOLD_KVM_SERVICE: &str = include_str!("../../machine/debian/lab-hold-kvm.service");

impl Recipe {
    pub fn named(name: &str) -> Option<&'static Self> {
        [&BARE, &DEBIAN].into_iter().find(|recipe| recipe.name == name)
    }

    pub fn package_names(&self) -> impl Iterator<Item = &'static str> {
        self.packages
            .lines()
            .map(str::trim)
            .filter(|line| !line.is_empty() && !line.starts_with('#'))
    }
}
