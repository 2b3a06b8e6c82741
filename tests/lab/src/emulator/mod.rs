//! The emulated lab machine: QEMU in pure software emulation of a CPU with SVM, whose stock Debian
//! kernel then has a working `/dev/kvm` (design: "the lab, KVM anywhere").

pub mod image;
pub mod recipe;

use std::fs;
use std::net::TcpListener;
use std::path::Path;
use std::process::Command;
use std::time::Duration;

use anyhow::{Context, Result, bail};
use nix::sys::signal::Signal;

use crate::layout::Layout;
use crate::process::{self, Process, run_logged, wait_until};
use crate::ssh::{self, Ssh};
use crate::tools::tool;
use image::MachineImage;

const DATA_DISK_BYTES: u64 = 40 << 30;
const EXCHANGE_DISK_BYTES: u64 = 8 << 30;
/// Under load of everything else on a two-core host; alone it takes about five seconds.
const BOOT_BOUND: Duration = Duration::from_secs(240);
const READY: &str = "lab: ready";
const DOWN_BOUND: Duration = Duration::from_secs(90);

/// The exchange disk as the machine sees it (third in the order of [`qemu`]'s drives).
pub const EXCHANGE_DEVICE: &str = "/dev/vdc";

#[derive(Clone, Copy, Debug)]
pub struct Shape {
    pub memory_mib: u32,
    pub cpus: u32,
    /// Port on the host's loopback that leads to Hermitage's port.
    pub port: u16,
}

#[derive(Debug)]
pub struct Started {
    pub process: Process,
    pub ssh_port: u16,
}

pub fn start(layout: &Layout, image: &MachineImage, shape: Shape) -> Result<Started> {
    end_orphan(layout)?;
    ssh::ensure_key(layout)?;
    ensure_data_disk(layout)?;
    ensure_exchange_disk(layout)?;
    if TcpListener::bind(("127.0.0.1", shape.port)).is_err() {
        bail!("port {} on 127.0.0.1 is taken; choose another with --port", shape.port);
    }
    let ssh_port = free_port()?;
    let serial = layout.serial_log();
    if serial.exists() {
        fs::rename(&serial, serial.with_extension("log.1"))
            .context("put the last serial log aside")?;
    }
    let pidfile = pid_file(layout);
    let key = ssh::public_blob(&ssh::key_file(layout).with_extension("pub"))?;
    run_logged(&mut qemu(layout, image, shape, ssh_port, &key, &pidfile), &layout.step_log())
        .context("start the emulator")?;
    let pid = fs::read_to_string(&pidfile).context("read the emulator's pid file")?;
    let process = pid.trim().parse().ok().and_then(Process::find);
    let Some(process) = process else {
        bail!("the emulator ended at once; serial log:\n{}", process::tail(&serial, 40));
    };
    let ssh = Ssh::new(layout, ssh_port);
    ssh.disconnect();
    ssh.trust(&image.host_key()?)?;
    if let Err(error) = wait_ready(&process, &serial, 1).and_then(|()| connect(&ssh)) {
        let log = process::tail(&serial, 40);
        process.signal(Signal::SIGKILL)?;
        return Err(
            error.context(format!("the lab machine did not come up; {}:\n{log}", serial.display()))
        );
    }
    Ok(Started { process, ssh_port })
}

/// Reboots the machine in order, as its own system does it; returns when it takes commands again. What was
/// written to its root disk is there, as long as the emulator lives.
pub fn reboot(layout: &Layout, process: &Process, ssh_port: u16) -> Result<()> {
    let ssh = Ssh::new(layout, ssh_port);
    let serial = layout.serial_log();
    let boots = times_said(&serial, READY);
    // Its answer may be cut off by what it asks for.
    let _ = ssh.command(&["systemctl", "reboot"], false).output();
    let up = wait_ready(process, &serial, boots + 1);
    // Of the former boot.
    ssh.disconnect();
    up.and_then(|()| connect(&ssh)).with_context(|| {
        format!(
            "the lab machine did not come up again; {}:\n{}",
            serial.display(),
            process::tail(&serial, 40)
        )
    })
}

/// The first may time out where everything else starts at the same time.
fn connect(ssh: &Ssh) -> Result<()> {
    ssh.connect().or_else(|_| ssh.connect())
}

/// Waits until the machine has come up so many times since its emulator began.
fn wait_ready(process: &Process, serial: &Path, times: usize) -> Result<()> {
    let what = format!("the lab machine's {READY:?} on its serial console");
    wait_until(&what, BOOT_BOUND, || {
        if !process.is_alive() {
            bail!("the emulator ended");
        }
        Ok(times_said(serial, READY) >= times)
    })
}

fn pid_file(layout: &Layout) -> std::path::PathBuf {
    layout.own().join("qemu.pid")
}

/// A `cargo lab` that was interrupted between starting the emulator and writing that down leaves one
/// behind that nobody knows of.
fn end_orphan(layout: &Layout) -> Result<()> {
    let Ok(text) = fs::read_to_string(pid_file(layout)) else { return Ok(()) };
    let Some(process) = text.trim().parse().ok().and_then(Process::find) else { return Ok(()) };
    let arguments = fs::read(format!("/proc/{}/cmdline", process.pid())).unwrap_or_default();
    let ours = format!("pidfile\0{}\0", pid_file(layout).display());
    if String::from_utf8_lossy(&arguments).contains(&ours) {
        process.signal(Signal::SIGKILL)?;
        process.wait_end("an emulator left behind", Duration::from_secs(10))?;
    }
    Ok(())
}

/// Ends the machine in order; kills it when that takes too long, and says so.
pub fn stop(layout: &Layout, process: Process, ssh_port: u16) -> Result<()> {
    if !process.is_alive() {
        return Ok(());
    }
    let ssh = Ssh::new(layout, ssh_port);
    let asked =
        ssh.connect().and_then(|()| process::run_captured(&mut ssh.command(&["poweroff"], false)));
    let ended = match asked {
        Ok(_) => process.wait_end("the lab machine", DOWN_BOUND),
        Err(error) => Err(error),
    };
    ssh.disconnect();
    if let Err(error) = ended {
        let log = process::tail(&layout.serial_log(), 30);
        process.signal(Signal::SIGKILL)?;
        process.wait_end("the killed lab machine", Duration::from_secs(10))?;
        return Err(
            error.context(format!("the lab machine did not stop by itself and was killed:\n{log}"))
        );
    }
    Ok(())
}

/// Ends a machine that nobody will look into again, with all that it has.
pub fn discard(layout: &Layout, process: Process, ssh_port: u16) -> Result<()> {
    Ssh::new(layout, ssh_port).disconnect();
    process.signal(Signal::SIGKILL)?;
    process.wait_end("the killed lab machine", Duration::from_secs(10))
}

/// Why the machine is no more, as far as the console tells.
pub fn last_words(layout: &Layout) -> String {
    process::tail(&layout.serial_log(), 30)
}

fn qemu(
    layout: &Layout,
    image: &MachineImage,
    shape: Shape,
    ssh_port: u16,
    key: &str,
    pidfile: &Path,
) -> Command {
    let mut qemu = Command::new("qemu-system-x86_64");
    qemu.args(["-accel", "tcg,thread=multi,tb-size=512", "-M", "q35"]);
    qemu.args(["-cpu", "EPYC-Rome-v1,-arch-capabilities"]);
    qemu.args((!image.reboots()).then_some("-no-reboot"));
    qemu.args(["-smp", &shape.cpus.to_string(), "-m", &shape.memory_mib.to_string()]);
    qemu.arg("-name").arg(format!("hermitage-lab-{}", layout.name()));
    qemu.arg("-kernel").arg(image.kernel()).arg("-initrd").arg(image.initrd());
    // nx_huge_pages: with it KVM_CREATE_VM takes 24 ms here, without 0.75.
    qemu.arg("-append").arg(format!(
        "console=ttyS0 loglevel=4 panic=-1 mitigations=off tsc=reliable kvm.nx_huge_pages=never hermitage_lab_key={key} {}",
        image.arguments()
    ));
    // What is installed in the running machine goes with it: each boot starts from the same root disk.
    drive(&mut qemu, "root", &image.root_disk(), "snapshot=on,cache=unsafe");
    drive(&mut qemu, "data", &layout.data_disk(), "cache=writeback,discard=unmap");
    drive(&mut qemu, "exchange", &layout.exchange_disk(), "cache=writeback,readonly=on");
    qemu.arg("-netdev").arg(format!(
        "user,id=net,hostfwd=tcp:127.0.0.1:{}-:2222,hostfwd=tcp:127.0.0.1:{ssh_port}-:22",
        shape.port
    ));
    qemu.args(["-device", "virtio-net-pci,netdev=net,romfile=", "-device", "virtio-rng-pci"]);
    qemu.args(["-display", "none", "-vga", "none", "-monitor", "none"]);
    qemu.arg("-serial").arg(format!("file:{}", escaped(&layout.serial_log())));
    qemu.arg("-pidfile").arg(pidfile).arg("-daemonize");
    qemu
}

fn drive(qemu: &mut Command, name: &str, file: &Path, options: &str) {
    qemu.arg("-drive")
        .arg(format!("if=none,id={name},format=raw,file={},{options}", escaped(file)));
    // The default for a full disk of this host is to stop the machine until somebody tells it to go on:
    // that would be a hang. An error shows in its log.
    qemu.arg("-device").arg(format!("virtio-blk-pci,drive={name},werror=report,rerror=report"));
}

/// A path in a QEMU option: commas are doubled.
fn escaped(path: &Path) -> String {
    path.to_string_lossy().replace(',', ",,")
}

fn times_said(serial: &Path, text: &str) -> usize {
    let count =
        |said: Vec<u8>| said.windows(text.len()).filter(|part| *part == text.as_bytes()).count();
    fs::read(serial).map_or(0, count)
}

fn ensure_data_disk(layout: &Layout) -> Result<()> {
    let disk = layout.data_disk();
    if disk.exists() {
        return Ok(());
    }
    let part = disk.with_extension("part");
    fs::File::create(&part)?.set_len(DATA_DISK_BYTES)?;
    run_logged(
        tool("mke2fs").args(["-q", "-F", "-t", "ext4", "-L", "lab-data", "-m", "0"]).arg(&part),
        &layout.step_log(),
    )?;
    fs::rename(&part, &disk).context("put the data disk in place")
}

fn ensure_exchange_disk(layout: &Layout) -> Result<()> {
    let path = layout.exchange_disk();
    fs::OpenOptions::new()
        .create(true)
        .truncate(false)
        .write(true)
        .open(&path)
        .and_then(|file| file.set_len(EXCHANGE_DISK_BYTES))
        .with_context(|| format!("make {}", path.display()))
}

/// A port that was free a moment ago; should somebody take it meanwhile, the emulator says so.
fn free_port() -> Result<u16> {
    let listener = TcpListener::bind(("127.0.0.1", 0)).context("find a free port")?;
    Ok(listener.local_addr()?.port())
}
