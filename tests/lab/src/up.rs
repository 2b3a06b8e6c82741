//! Bringing a lab up and down, step by step; each step does nothing when its result is there.

use std::path::Path;

use anyhow::{Context, Result, bail};

use crate::MachineOptions;
use crate::emulator::image::MachineImage;
use crate::emulator::recipe::{BARE, DEBIAN, Recipe};
use crate::emulator::{self, Shape};
use crate::guest_image::GuestImage;
use crate::layout::Layout;
use crate::process::{privileged, run_captured};
use crate::programs::{self, Brought};
use crate::service::{self, Demo};
use crate::serving::Serving;
use crate::state::{Claim, Place, State};
use crate::steps::{note, skip, step};
use crate::tools;

const DEFAULT_PORT: u16 = 2222;
const DEFAULT_MEMORY_MIB: u32 = 4096;
/// With two, nested guests die by themselves, and at times the machine with them (docs/lab.md).
const DEFAULT_CPUS: u32 = 1;

/// From nothing, or from whatever is there, to a service that answers.
pub fn up(layout: &Layout, options: &MachineOptions) -> Result<Serving> {
    make_folder(layout)?;
    tools::install_missing(false, &layout.step_log())?;
    step("build the programs", || programs::build(layout))?;
    let image = guest_image(layout)?;
    let mut serving = place(layout, options)?;
    let brought = bring(&mut serving)?;
    service::install(&mut serving)?;
    base(&mut serving, &image)?;
    serve(&serving, &brought)?;
    Ok(serving)
}

/// The demo account and what a person types to reach it.
pub fn greet(serving: &Serving) -> Result<()> {
    let Demo { password, identity } =
        step("make sure of the account demo", || service::demo(serving))?;
    let key = identity.map(|file| format!(" -i {}", file.display())).unwrap_or_default();
    note("");
    note(&format!("    ssh -p {}{key} demo@127.0.0.1", serving.state().port));
    note(&format!("    password: {password}"));
    note("");
    Ok(())
}

/// The emulated machine alone, with whatever programs are built.
pub fn boot(layout: &Layout, options: &MachineOptions) -> Result<Serving> {
    make_folder(layout)?;
    let mut serving = emulated(layout, options)?;
    bring(&mut serving)?;
    service::install(&mut serving)?;
    Ok(serving)
}

/// New programs into a running lab; the service is restarted when it runs an old one.
pub fn sync(serving: &mut Serving, build: bool) -> Result<()> {
    serving.connect()?;
    if build {
        step("build the programs", || programs::build(serving.layout()))?;
        guest_image(serving.layout())?;
    }
    let brought = bring(serving)?;
    service::install(serving)?;
    // Without building, the image for these very programs may not be there: serve what is.
    if let Ok(image) = GuestImage::current(serving.layout())
        && image.exists()
        && serving.layout().program("hermitage-vmm").exists()
    {
        base(serving, &image)?;
    }
    if !service::has_base(serving) {
        skip("start the service", "there is no base snapshot yet; `cargo lab up` makes one");
        return Ok(());
    }
    serve(serving, &brought)
}

pub fn down(layout: &Layout) -> Result<()> {
    let serving = match Serving::find(layout) {
        Ok(serving) => serving,
        Err(why) => {
            skip("stop the lab", &format!("{why:#}"));
            return State::remove(layout);
        }
    };
    let stopped = step("stop the service", || {
        serving.connect()?;
        service::stop(&serving)
    });
    // A machine that can't be reached any more is ended all the same.
    let ended = step("stop the lab machine", || serving.end());
    stopped.and(ended)
}

pub fn make_folder(layout: &Layout) -> Result<()> {
    std::fs::create_dir_all(layout.own())
        .with_context(|| format!("make {}", layout.own().display()))?;
    // What is kept is what this run's failure will point at.
    std::fs::write(layout.step_log(), "").context("empty the log of steps")
}

pub fn guest_image(layout: &Layout) -> Result<GuestImage> {
    let _claim = Claim::images(layout)?;
    let image = GuestImage::current(layout)?;
    if image.exists() {
        skip("build the guest image", "up to date");
    } else {
        step("build the guest image (Debian)", || image.build(layout))?;
    }
    Ok(image)
}

/// Where to serve: on what already runs, else here if KVM is real, else emulated.
fn place(layout: &Layout, options: &MachineOptions) -> Result<Serving> {
    let running = State::load(layout)?;
    let native = match running.as_ref().map(|state| &state.place) {
        Some(Place::Emulated { process, .. }) if process.is_alive() => {
            if options.native {
                bail!("lab {} runs emulated; `cargo lab down` first", layout.name());
            }
            false
        }
        _ if options.native => true,
        _ if options.emulated => false,
        _ => {
            match step("look whether this machine's KVM is real", || Ok(why_not_native(layout)))? {
                None => true,
                Some(why) => {
                    note(&format!("           it is not ({why}): serving in an emulated machine"));
                    false
                }
            }
        }
    };
    if !native {
        return emulated(layout, options);
    }
    note("           serving on this machine");
    let port = options.port.or(running.as_ref().map(|state| state.port)).unwrap_or(DEFAULT_PORT);
    let pushed = running.map(|state| state.pushed).unwrap_or_default();
    Serving::new(layout, State { place: Place::Native, port, pushed })
}

/// A `/dev/kvm` that opens proves nothing: the CPU has to have the extension, and a guest to run.
fn why_not_native(layout: &Layout) -> Option<String> {
    let cpu = std::fs::read_to_string("/proc/cpuinfo").unwrap_or_default();
    let has_extension = cpu.lines().find(|line| line.starts_with("flags")).is_some_and(|line| {
        line.split_ascii_whitespace().any(|flag| flag == "svm" || flag == "vmx")
    });
    if !has_extension {
        return Some("the CPU shows neither svm nor vmx".to_owned());
    }
    if !Path::new("/dev/kvm").exists() {
        return Some("there is no /dev/kvm".to_owned());
    }
    let probe = run_captured(privileged(layout.program("hermitage-vmm")).arg("probe"));
    probe.err().map(|error| format!("{error:#}"))
}

/// The emulated machine, started when it does not run.
fn emulated(layout: &Layout, options: &MachineOptions) -> Result<Serving> {
    if let Some(state) = State::load(layout)?
        && let Place::Emulated { process, memory_mib, cpus, .. } = &state.place
        && process.is_alive()
    {
        let other = options.port.is_some_and(|port| port != state.port)
            || options.memory.is_some_and(|memory| memory != *memory_mib)
            || options.cpus.is_some_and(|wanted| wanted != *cpus);
        if other {
            bail!(
                "lab {} runs with --port {} --memory {memory_mib} --cpus {cpus}; `cargo lab down` first to change that",
                layout.name(),
                state.port
            );
        }
        let serving = Serving::new(layout, state)?;
        serving.connect()?;
        skip("start the lab machine", "it runs");
        return Ok(serving);
    }
    start_machine(layout, &BARE, options)
}

/// A machine with a fresh Debian and nothing of Hermitage's; one that an earlier run left goes.
pub fn fresh_debian(layout: &Layout, options: &MachineOptions) -> Result<Serving> {
    if let Ok(left) = Serving::find(layout) {
        left.discard()?;
    }
    start_machine(layout, &DEBIAN, options)
}

fn start_machine(
    layout: &Layout,
    recipe: &'static Recipe,
    options: &MachineOptions,
) -> Result<Serving> {
    tools::install_missing(true, &layout.step_log())?;
    let claim = Claim::images(layout)?;
    let image = MachineImage::current(layout, recipe);
    let what = format!("build the lab machine ({}, once)", recipe.what);
    if image.exists() {
        skip(&what, "up to date");
    } else {
        step(&what, || image.build(layout))?;
    }
    drop(claim);
    let shape = Shape {
        memory_mib: options.memory.unwrap_or(DEFAULT_MEMORY_MIB),
        cpus: options.cpus.unwrap_or(DEFAULT_CPUS),
        port: options.port.unwrap_or(DEFAULT_PORT),
    };
    let started = step("start the lab machine", || emulator::start(layout, &image, shape))?;
    let place = Place::Emulated {
        process: started.process,
        ssh_port: started.ssh_port,
        memory_mib: shape.memory_mib,
        cpus: shape.cpus,
    };
    Serving::new(layout, State { place, port: shape.port, pushed: Default::default() })
}

fn bring(serving: &mut Serving) -> Result<Brought> {
    let brought = step("bring the programs", || programs::bring(serving))?;
    if !brought.changed.is_empty() {
        note(&format!("           new: {}", brought.changed.join(", ")));
    }
    if !brought.absent.is_empty() {
        note(&format!("           not built: {}", brought.absent.join(", ")));
    }
    Ok(brought)
}

fn base(serving: &mut Serving, image: &GuestImage) -> Result<()> {
    let key = service::base_key(serving, image)?;
    if service::base_is_current(serving, &key) {
        skip("make the base snapshot", "up to date");
        return Ok(());
    }
    let place = step("bring the guest image", || service::bring_image(serving, image))?;
    step("make the base snapshot", || service::make_base(serving, &place, &key))
}

fn serve(serving: &Serving, brought: &Brought) -> Result<()> {
    let stale = brought.has_changed("hermitage") || brought.has_changed("hermitage-vmm");
    if !stale && service::is_serving(serving) {
        skip("start the service", "it runs");
        return Ok(());
    }
    step("start the service", || service::start(serving))
}
