//! Memory and processors beyond those that every machine of a base boots with.
//!
//! The kernel knows of all of it from the boot on: memory devices whose memory it has added and left out of use
//! (memory-hotplug.rst, "Onlining and Offlining Memory Blocks"), processors that it was told not to start (`maxcpus=`). The host
//! gives this machine as much as its account may have and says how much that is.

use std::fs;
use std::io;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail};
use hermitage_guest_proto::Resources;

const MEMORY: &str = "/sys/devices/system/memory";
const CPUS: &str = "/sys/devices/system/cpu";

/// So many times the memory that its own data may lie in, the kernel has for programs alone: that can be taken
/// out of use again, and more of it would leave the kernel short (memory-hotplug.rst, "ZONE_MOVABLE Sizing
/// Considerations").
const MOVABLE: u64 = 3;

/// Takes into use what is there of `wanted` and not in use. Returns what is in use then, and the first thing
/// that did not go.
pub fn take(wanted: Resources) -> (Resources, Option<String>) {
    let mut in_use = Resources::default();
    let memory = take_memory(Path::new(MEMORY), wanted.memory_bytes, &mut in_use.memory_bytes);
    let vcpus = take_cpus(Path::new(CPUS), wanted.vcpus, &mut in_use.vcpus);
    let fault = memory.and(vcpus).err().map(|error| format!("{error:#}"));
    (in_use, fault)
}

struct Block {
    number: u64,
    dir: PathBuf,
}

fn take_memory(dir: &Path, wanted: u64, in_use: &mut u64) -> Result<()> {
    let size = read(&dir.join("block_size_bytes"))?;
    let size = u64::from_str_radix(&size, 16).with_context(|| format!("a size of {size:?}"))?;
    let mut free = Vec::new();
    let mut movable = 0;
    for block in blocks(dir)? {
        if read(&block.dir.join("state"))? == "offline" {
            free.push(block);
            continue;
        }
        *in_use += size;
        let zones = read(&block.dir.join("valid_zones")).unwrap_or_default();
        movable += if zones.starts_with("Movable") { size } else { 0 };
    }
    for block in free {
        if in_use.saturating_add(size) > wanted {
            return Ok(());
        }
        let is_movable = movable + size <= MOVABLE * (*in_use - movable);
        let how = if is_movable { "online_movable" } else { "online_kernel" };
        write(&block.dir.join("state"), how)?;
        *in_use += size;
        movable += if is_movable { size } else { 0 };
    }
    if in_use.saturating_add(size) <= wanted {
        bail!("the kernel knows of {} MiB of memory, not of {}", *in_use >> 20, wanted >> 20);
    }
    Ok(())
}

/// In the order of their addresses.
fn blocks(dir: &Path) -> Result<Vec<Block>> {
    let mut found = Vec::new();
    for entry in fs::read_dir(dir).with_context(|| format!("reading {}", dir.display()))? {
        let entry = entry?;
        let name = entry.file_name();
        let number = name.to_str().and_then(|name| name.strip_prefix("memory"));
        if let Some(number) = number.and_then(|number| number.parse().ok()) {
            found.push(Block { number, dir: entry.path() });
        }
    }
    found.sort_by_key(|block| block.number);
    Ok(found)
}

fn take_cpus(dir: &Path, wanted: u8, in_use: &mut u8) -> Result<()> {
    // The first one has no such file: it always runs.
    *in_use = 1;
    for number in 1..=u8::MAX {
        let file = dir.join(format!("cpu{number}/online"));
        let state = match fs::read_to_string(&file) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => break,
            state => state.with_context(|| format!("reading {}", file.display()))?,
        };
        if state.trim() == "1" {
            *in_use += 1;
        } else if *in_use < wanted {
            write(&file, "1")?;
            *in_use += 1;
        }
    }
    if *in_use < wanted {
        bail!("the kernel knows of {in_use} processors, not of {wanted}");
    }
    Ok(())
}

fn read(file: &Path) -> Result<String> {
    let text = fs::read_to_string(file).with_context(|| format!("reading {}", file.display()))?;
    Ok(text.trim().to_owned())
}

fn write(file: &Path, what: &str) -> Result<()> {
    fs::write(file, what).with_context(|| format!("writing {what} to {}", file.display()))
}

#[cfg(test)]
mod tests {
    use super::*;

    const BLOCK: u64 = 128 << 20;

    /// Something like the kernel's files.
    struct Machine(PathBuf);

    impl Machine {
        fn new(name: &str) -> Self {
            let name = format!("hermitage-agent-{name}-{}", std::process::id());
            let dir = std::env::temp_dir().join(name);
            fs::create_dir_all(&dir).unwrap();
            fs::write(dir.join("block_size_bytes"), "8000000\n").unwrap();
            fs::write(dir.join("auto_online_blocks"), "offline\n").unwrap();
            Self(dir)
        }

        fn block(&self, number: u32, state: &str, zone: &str) {
            let dir = self.0.join(format!("memory{number}"));
            fs::create_dir_all(&dir).unwrap();
            fs::write(dir.join("state"), format!("{state}\n")).unwrap();
            fs::write(dir.join("valid_zones"), format!("{zone}\n")).unwrap();
        }

        fn cpu(&self, number: u32, online: &str) {
            let dir = self.0.join(format!("cpu{number}"));
            fs::create_dir_all(&dir).unwrap();
            if number > 0 {
                fs::write(dir.join("online"), online).unwrap();
            }
        }

        fn says(&self, what: &str) -> String {
            read(&self.0.join(what)).unwrap()
        }
    }

    impl Drop for Machine {
        fn drop(&mut self) {
            let _ = fs::remove_dir_all(&self.0);
        }
    }

    #[test]
    fn memory_is_taken_from_the_lowest_address_on_and_no_more_than_is_the_accounts() {
        let machine = Machine::new("memory");
        (0..4).for_each(|n| machine.block(n, "online", "DMA32"));
        (4..12).for_each(|n| machine.block(n, "offline", "DMA32 Movable"));
        let mut in_use = 0;
        take_memory(&machine.0, 6 * BLOCK + 5, &mut in_use).unwrap();
        assert_eq!(in_use, 6 * BLOCK);
        let states: Vec<_> = (3..7).map(|n| machine.says(&format!("memory{n}/state"))).collect();
        assert_eq!(states, ["online", "online_movable", "online_movable", "offline"]);
        let mut in_use = 0;
        take_memory(&machine.0, BLOCK, &mut in_use).unwrap();
        assert_eq!(in_use, 6 * BLOCK, "nothing is taken away");
    }

    #[test]
    fn the_kernel_gets_its_part_of_much_memory() {
        let machine = Machine::new("zones");
        machine.block(0, "online", "DMA32");
        (1..10).for_each(|n| machine.block(n, "offline", "Normal Movable"));
        let mut in_use = 0;
        let error = take_memory(&machine.0, 12 * BLOCK, &mut in_use).unwrap_err();
        assert!(error.to_string().contains("of 1280 MiB of memory, not of 1536"), "{error}");
        assert_eq!(in_use, 10 * BLOCK);
        let kernel =
            (1..10).filter(|n| machine.says(&format!("memory{n}/state")) == "online_kernel");
        assert_eq!(kernel.collect::<Vec<_>>(), [4, 8]);
    }

    #[test]
    fn processors_are_started_in_order() {
        let machine = Machine::new("processors");
        (0..4).for_each(|n| machine.cpu(n, "0\n"));
        let mut in_use = 0;
        take_cpus(&machine.0, 3, &mut in_use).unwrap();
        assert_eq!(in_use, 3);
        let online: Vec<_> = (1..4).map(|n| machine.says(&format!("cpu{n}/online"))).collect();
        assert_eq!(online, ["1", "1", "0"]);
        let error = take_cpus(&machine.0, 9, &mut in_use).unwrap_err();
        assert!(error.to_string().contains("of 4 processors, not of 9"), "{error}");
    }
}
