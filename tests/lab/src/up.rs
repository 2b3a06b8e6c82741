//! Bringing a lab up and down, step by step; each step does nothing when its result is there.

use anyhow::{Result, bail};

use crate::MachineOptions;
use crate::emulator::{self, image::MachineImage};
use crate::layout::Layout;
use crate::programs;
use crate::serving::Serving;
use crate::state::{Place, State};
use crate::steps::{note, skip, step};
use crate::tools;

/// The emulated machine alone, with whatever programs are built.
pub fn boot(layout: &Layout, options: &MachineOptions) -> Result<Serving> {
    std::fs::create_dir_all(layout.own())?;
    tools::install_missing(true, &layout.step_log())?;
    let mut serving = emulated(layout, options)?;
    let brought = step("bring the programs", || programs::bring(&mut serving))?;
    if !brought.absent.is_empty() {
        note(&format!("          not built yet: {}", brought.absent.join(", ")));
    }
    Ok(serving)
}

/// The emulated machine, started when it does not run.
fn emulated(layout: &Layout, options: &MachineOptions) -> Result<Serving> {
    if let Some(state) = State::load(layout)?
        && let Place::Emulated { process, memory_mib, cpus, .. } = &state.place
        && process.is_alive()
    {
        if (*memory_mib, *cpus, state.port) != (options.memory, options.cpus, options.port) {
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
    let image = MachineImage::current(layout);
    if image.exists() {
        skip("build the lab machine", "up to date");
    } else {
        step("build the lab machine (Debian, once)", || image.build(layout))?;
    }
    let shape =
        emulator::Shape { memory_mib: options.memory, cpus: options.cpus, port: options.port };
    let started = step("start the lab machine", || emulator::start(layout, &image, shape))?;
    Serving::new(
        layout,
        State {
            place: Place::Emulated {
                process: started.process,
                ssh_port: started.ssh_port,
                memory_mib: options.memory,
                cpus: options.cpus,
            },
            port: options.port,
            pushed: Default::default(),
        },
    )
}

pub fn sync(serving: &mut Serving) -> Result<()> {
    serving.connect()?;
    let brought = step("bring the programs", || programs::bring(serving))?;
    match brought.changed.as_slice() {
        [] => skip("changed programs", "none"),
        changed => note(&format!("          brought: {}", changed.join(", "))),
    }
    if !brought.absent.is_empty() {
        note(&format!("          not built yet: {}", brought.absent.join(", ")));
    }
    Ok(())
}

pub fn down(layout: &Layout) -> Result<()> {
    match Serving::find(layout) {
        Ok(serving) => step("stop the lab", || serving.end()),
        Err(why) => {
            skip("stop the lab", &why.to_string());
            State::remove(layout)
        }
    }
}
