//! The initrd: the agent as `/init`, the modules it loads, the order to load them in, and an account
//! disk for it to practise on before the snapshot. It is neither compressed nor signed: the kernel
//! unpacks it once per base, and the modules inside are decompressed here so that PID 1 needs no
//! decompressor.

use std::fs::{self, File};
use std::io::BufWriter;
use std::path::Path;

use anyhow::{Context, Result, bail};

use crate::cpio;
use crate::modules::{self, Dependencies};
use crate::tool;

/// A dynamically linked agent would find no loader in the initrd, and the kernel would only say
/// "No working init found" at the end of a long build.
pub fn check_agent(agent: &Path) -> Result<()> {
    let bytes =
        fs::read(agent).with_context(|| format!("reading the agent {}", agent.display()))?;
    match has_interpreter(&bytes) {
        Some(false) => Ok(()),
        Some(true) => bail!(
            "{} is dynamically linked: build it with -C target-feature=+crt-static",
            agent.display()
        ),
        None => bail!("{} is not a 64-bit little-endian ELF program", agent.display()),
    }
}

/// What goes in.
pub struct Parts<'a> {
    pub agent: &'a Path,
    /// Directory of the kernel's modules.
    pub modules: &'a Path,
    pub disk_template: &'a Path,
}

pub fn write(out: &Path, parts: &Parts) -> Result<()> {
    let read = |name: &str| {
        let path = parts.modules.join(name);
        fs::read_to_string(&path).with_context(|| format!("reading {}", path.display()))
    };
    let order = Dependencies::parse(&read("modules.dep")?, &read("modules.builtin")?)?
        .load_order(&modules::WANTED)?;

    let file = File::create(out).with_context(|| format!("creating {}", out.display()))?;
    let mut archive = cpio::Writer::new(BufWriter::new(file));
    archive.directory("dev", 0o755)?;
    // The kernel opens it for PID 1 before devtmpfs is mounted.
    archive.character_device("dev/console", 0o600, (5, 1))?;
    archive.file("init", 0o755, &fs::read(parts.agent)?)?;
    archive.directory("modules", 0o755)?;
    let mut list = String::new();
    for path in &order {
        let name = format!("{}.ko", modules::name_of(path));
        archive.file(
            &format!("modules/{name}"),
            0o644,
            &plain_module(&parts.modules.join(path))?,
        )?;
        list.push_str(&name);
        list.push('\n');
    }
    archive.file("modules/order", 0o644, list.as_bytes())?;
    let blocks = occupied_blocks(&fs::read(parts.disk_template)?);
    archive.file("warm-disk", 0o600, &blocks)?;
    archive.finish().with_context(|| format!("writing {}", out.display()))?;
    Ok(())
}

/// A sparse file for an archive that has none: its length, then each 4 KiB block that isn't all
/// zeroes, after its offset. Numbers are `u64`, little endian. The agent's `warm` reads it.
fn occupied_blocks(file: &[u8]) -> Vec<u8> {
    const BLOCK: usize = 4096;
    let mut packed = (file.len() as u64).to_le_bytes().to_vec();
    for (number, block) in file.chunks_exact(BLOCK).enumerate() {
        if block.iter().any(|byte| *byte != 0) {
            packed.extend_from_slice(&((number * BLOCK) as u64).to_le_bytes());
            packed.extend_from_slice(block);
        }
    }
    packed
}

fn plain_module(path: &Path) -> Result<Vec<u8>> {
    match path.extension().and_then(|extension| extension.to_str()) {
        Some("ko") => fs::read(path).with_context(|| format!("reading {}", path.display())),
        Some("xz") => tool::output("xz", ["-dc".as_ref(), path.as_os_str()])
            .with_context(|| format!("decompressing {}", path.display())),
        _ => bail!("{}: neither .ko nor .ko.xz", path.display()),
    }
}

/// Whether an ELF64 program has a PT_INTERP segment (ELF-64 object file format, §2 and §8). None:
/// not one.
fn has_interpreter(elf: &[u8]) -> Option<bool> {
    const PT_INTERP: u32 = 3;
    let number = |at: usize, width: usize| -> Option<usize> {
        let bytes = elf.get(at..at.checked_add(width)?)?;
        Some(bytes.iter().rev().fold(0, |value, byte| value << 8 | usize::from(*byte)))
    };
    if elf.get(..6)? != b"\x7fELF\x02\x01" {
        return None;
    }
    let (table, size, count) = (number(32, 8)?, number(54, 2)?, number(56, 2)?);
    for index in 0..count {
        let at = table.checked_add(index.checked_mul(size)?)?;
        if number(at, 4)? == PT_INTERP as usize {
            return Some(true);
        }
    }
    Some(false)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_occupied_blocks_are_packed() {
        let mut file = vec![0; 5 * 4096];
        file[2 * 4096 + 9] = 7;
        let packed = occupied_blocks(&file);
        assert_eq!(packed.len(), 8 + 8 + 4096);
        assert_eq!(packed[..8], (5u64 * 4096).to_le_bytes());
        assert_eq!(packed[8..16], (2u64 * 4096).to_le_bytes());
        assert_eq!(packed[16 + 9], 7);
    }

    #[test]
    fn a_dynamic_program_is_told_from_a_static_one() {
        // The test itself is dynamically linked.
        let ours = fs::read("/proc/self/exe").unwrap();
        assert_eq!(has_interpreter(&ours), Some(true));
        let mut none = ours.clone();
        none[56..58].fill(0); // no program headers
        assert_eq!(has_interpreter(&none), Some(false));
        assert_eq!(has_interpreter(b"#!/bin/sh\n"), None);
        assert_eq!(has_interpreter(&ours[..40]), None);
    }
}
