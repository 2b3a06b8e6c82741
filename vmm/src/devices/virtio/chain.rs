//! Descriptor chains (virtio 1.2 §2.7.5): read once from guest memory, checked, and from then on plain
//! values of ours that the guest can't change any more.

use vm_memory::{Bytes, GuestAddress, GuestMemoryBackend};

use crate::memory::GuestMemory;

const NEXT: u16 = 1;
const WRITE: u16 = 2;
const INDIRECT: u16 = 4;

const DESCRIPTOR_SIZE: u64 = 16;

/// Most descriptors of one chain. The specification's bound is the queue size; an indirect table
/// (§2.7.5.3) gets the same one, whatever length it claims.
pub const MAX_DESCRIPTORS: usize = 256;

/// A piece of guest memory, known to lie in RAM. Never empty.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Segment {
    pub address: GuestAddress,
    pub length: u32,
}

/// One request of the guest: buffers it wrote, then buffers it wants written.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Chain {
    pub head: u16,
    pub readable: Vec<Segment>,
    pub writable: Vec<Segment>,
}

impl Chain {
    pub fn readable_bytes(&self) -> u64 {
        total(&self.readable)
    }

    pub fn writable_bytes(&self) -> u64 {
        total(&self.writable)
    }
}

/// Sum of the lengths. Can't overflow: at most `MAX_DESCRIPTORS` times 4 GiB.
pub fn total(segments: &[Segment]) -> u64 {
    segments.iter().map(|s| u64::from(s.length)).sum()
}

/// The part of `segments` that starts `skip` bytes in and is at most `limit` bytes long.
pub fn window(segments: &[Segment], skip: u64, limit: u64) -> Vec<Segment> {
    let (mut skip, mut limit) = (skip, limit);
    let mut out = Vec::with_capacity(segments.len());
    for segment in segments {
        let length = u64::from(segment.length);
        if skip >= length {
            skip -= length;
            continue;
        }
        let take = (length - skip).min(limit);
        if take == 0 {
            break;
        }
        // Both fit: `take` ≤ `length`, and the whole segment was checked to lie in RAM.
        out.push(Segment {
            address: GuestAddress(segment.address.0.wrapping_add(skip)),
            length: take as u32,
        });
        limit -= take;
        skip = 0;
    }
    out
}

/// Copies the first bytes of `segments` out of guest memory. False if there are fewer than asked for.
pub fn read_prefix(memory: &GuestMemory, segments: &[Segment], mut out: &mut [u8]) -> bool {
    for segment in segments {
        let count = out.len().min(segment.length as usize);
        let (now, rest) = out.split_at_mut(count);
        if memory.read_slice(now, segment.address).is_err() {
            return false;
        }
        out = rest;
        if out.is_empty() {
            break;
        }
    }
    out.is_empty()
}

/// Copies `data` to the start of `segments`. False if it does not fit.
pub fn write_prefix(memory: &GuestMemory, segments: &[Segment], mut data: &[u8]) -> bool {
    for segment in segments {
        let count = data.len().min(segment.length as usize);
        if memory.write_slice(&data[..count], segment.address).is_err() {
            return false;
        }
        data = &data[count..];
        if data.is_empty() {
            break;
        }
    }
    data.is_empty()
}

/// Where a queue's descriptors are and what its driver may do with them.
#[derive(Clone, Copy, Debug)]
pub struct Table {
    pub address: GuestAddress,
    pub size: u16,
    /// VIRTIO_F_INDIRECT_DESC was negotiated.
    pub indirect: bool,
}

struct Descriptor {
    address: u64,
    length: u32,
    flags: u16,
    next: u16,
}

/// Reads the chain that starts at `head`. The error says what is wrong with it.
pub fn read(memory: &GuestMemory, table: Table, head: u16) -> Result<Chain, String> {
    let mut chain = Chain { head, ..Chain::default() };
    let (mut base, mut size, mut index) = (table.address, table.size, head);
    let mut inside_indirect = false;
    let mut seen = 0;
    loop {
        if index >= size {
            return Err(format!("descriptor {index} is outside its table of {size}"));
        }
        // More descriptors than the table has can only be a loop.
        if seen == usize::from(size).min(MAX_DESCRIPTORS) {
            return Err(format!("the chain at {head} is longer than {seen} descriptors"));
        }
        seen += 1;
        let descriptor = read_descriptor(memory, base, index)?;
        if descriptor.flags & INDIRECT != 0 {
            if !table.indirect || inside_indirect {
                return Err(format!("descriptor {index} is indirect where none may be"));
            }
            if descriptor.flags & (NEXT | WRITE) != 0 {
                return Err(format!("the indirect descriptor {index} has other flags"));
            }
            (base, size) = indirect_table(&descriptor)?;
            (index, seen, inside_indirect) = (0, 0, true);
            continue;
        }
        add_segment(memory, &mut chain, &descriptor)?;
        if descriptor.flags & NEXT == 0 {
            return Ok(chain);
        }
        index = descriptor.next;
    }
}

fn read_descriptor(
    memory: &GuestMemory,
    table: GuestAddress,
    index: u16,
) -> Result<Descriptor, String> {
    let mut raw = [0; DESCRIPTOR_SIZE as usize];
    let address = table.0.checked_add(u64::from(index) * DESCRIPTOR_SIZE);
    address
        .and_then(|address| memory.read_slice(&mut raw, GuestAddress(address)).ok())
        .ok_or_else(|| format!("descriptor {index} at {table:?} is not in memory"))?;
    let [a0, a1, a2, a3, a4, a5, a6, a7, l0, l1, l2, l3, f0, f1, n0, n1] = raw;
    Ok(Descriptor {
        address: u64::from_le_bytes([a0, a1, a2, a3, a4, a5, a6, a7]),
        length: u32::from_le_bytes([l0, l1, l2, l3]),
        flags: u16::from_le_bytes([f0, f1]),
        next: u16::from_le_bytes([n0, n1]),
    })
}

fn indirect_table(descriptor: &Descriptor) -> Result<(GuestAddress, u16), String> {
    let length = u64::from(descriptor.length);
    if length == 0 || !length.is_multiple_of(DESCRIPTOR_SIZE) {
        return Err(format!("an indirect table of {length} bytes"));
    }
    // A longer table than the bound is fine as long as its chain is not.
    let size = u16::try_from(length / DESCRIPTOR_SIZE).unwrap_or(u16::MAX);
    Ok((GuestAddress(descriptor.address), size))
}

fn add_segment(
    memory: &GuestMemory,
    chain: &mut Chain,
    descriptor: &Descriptor,
) -> Result<(), String> {
    let Descriptor { address, length, flags, .. } = *descriptor;
    let writable = flags & WRITE != 0;
    // §2.7.4.2: readable descriptors come first.
    if !writable && !chain.writable.is_empty() {
        return Err("a readable descriptor follows a writable one".into());
    }
    // The specification does not forbid an empty buffer; there is nothing to do for it.
    if length == 0 {
        return Ok(());
    }
    if !memory.check_range(GuestAddress(address), length as usize) {
        return Err(format!("a buffer of {length} bytes at {address:#x} is not in memory"));
    }
    let segments = if writable { &mut chain.writable } else { &mut chain.readable };
    segments.push(Segment { address: GuestAddress(address), length });
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::devices::virtio::testing::{MEMORY, descriptor, memory};
    use proptest::prelude::*;

    const TABLE: u64 = 0x1000;
    const SIZE: u16 = 16;

    fn table(indirect: bool) -> Table {
        Table { address: GuestAddress(TABLE), size: SIZE, indirect }
    }

    fn put(memory: &GuestMemory, at: u64, entries: &[(u64, u32, u16, u16)]) {
        for (i, &(address, length, flags, next)) in entries.iter().enumerate() {
            let raw = descriptor(address, length, flags, next);
            memory.write_slice(&raw, GuestAddress(at + 16 * i as u64)).unwrap();
        }
    }

    fn segment(address: u64, length: u32) -> Segment {
        Segment { address: GuestAddress(address), length }
    }

    #[test]
    fn a_chain_is_read_in_order() {
        let memory = memory();
        put(&memory, TABLE, &[(0x5000, 10, NEXT, 2), (0, 0, 0, 0), (0x6000, 20, NEXT | WRITE, 5)]);
        put(&memory, TABLE + 5 * 16, &[(0x7000, 30, WRITE, 9)]);
        let chain = read(&memory, table(false), 0).unwrap();
        assert_eq!(chain.readable, [segment(0x5000, 10)]);
        assert_eq!(chain.writable, [segment(0x6000, 20), segment(0x7000, 30)]);
    }

    #[test]
    fn an_indirect_table_is_followed_once_and_only_if_allowed() {
        let memory = memory();
        put(&memory, TABLE, &[(0x9000, 48, INDIRECT, 0)]);
        put(&memory, 0x9000, &[(0x5000, 1, NEXT, 2), (0, 0, 0, 0), (0x6000, 2, WRITE, 0)]);
        let chain = read(&memory, table(true), 0).unwrap();
        assert_eq!((chain.readable_bytes(), chain.writable_bytes()), (1, 2));
        assert!(read(&memory, table(false), 0).unwrap_err().contains("indirect"));
        put(&memory, 0x9000, &[(0x9000, 48, INDIRECT, 0)]);
        assert!(read(&memory, table(true), 0).unwrap_err().contains("indirect"));
        for length in [0, 15, 17] {
            put(&memory, TABLE, &[(0x9000, length, INDIRECT, 0)]);
            assert!(read(&memory, table(true), 0).unwrap_err().contains("indirect table"));
        }
        put(&memory, TABLE, &[(0x9000, 48, INDIRECT | NEXT, 1)]);
        assert!(read(&memory, table(true), 0).unwrap_err().contains("other flags"));
    }

    #[test]
    fn loops_and_strays_are_found() {
        let memory = memory();
        put(&memory, TABLE, &[(0x5000, 1, NEXT, 1), (0x5000, 1, NEXT, 0)]);
        assert!(read(&memory, table(false), 0).unwrap_err().contains("longer than 16"));
        put(&memory, TABLE, &[(0x5000, 1, NEXT, 16)]);
        assert!(read(&memory, table(false), 0).unwrap_err().contains("outside its table"));
        assert!(read(&memory, table(false), 16).unwrap_err().contains("outside its table"));
        put(&memory, TABLE, &[(MEMORY - 1, 2, 0, 0)]);
        assert!(read(&memory, table(false), 0).unwrap_err().contains("not in memory"));
        // An indirect table of the greatest size, all of it a loop: bounded by our limit, not by its.
        let far = 0x10_0000;
        put(&memory, TABLE, &[(far, 65535 * 16, INDIRECT, 0)]);
        put(&memory, far, &[(0x5000, 1, NEXT, 0)]);
        assert!(read(&memory, table(true), 0).unwrap_err().contains("longer than 256"));
    }

    proptest! {
        #[test]
        fn whatever_the_table_says_a_chain_lies_in_memory_and_is_bounded(
            entries in prop::collection::vec(
                (
                    prop_oneof![0..MEMORY + 4096, any::<u64>()],
                    prop_oneof![0..5000u32, any::<u32>()],
                    prop_oneof![4 => 0..4u16, 1 => any::<u16>()],
                    0..SIZE + 2,
                ),
                SIZE as usize,
            ),
            head in 0..SIZE + 2,
            indirect: bool,
        ) {
            let memory = memory();
            put(&memory, TABLE, &entries);
            if let Ok(chain) = read(&memory, table(indirect), head) {
                let all: Vec<_> = chain.readable.iter().chain(&chain.writable).collect();
                prop_assert!(all.len() <= MAX_DESCRIPTORS);
                for segment in all {
                    prop_assert!(segment.length > 0);
                    let end = segment.address.0.checked_add(u64::from(segment.length));
                    prop_assert!(end.is_some_and(|end| end <= MEMORY));
                }
            }
        }

        #[test]
        fn a_window_is_what_slicing_the_bytes_would_give(
            lengths in prop::collection::vec(1..50u32, 0..8),
            skip in 0..400u64,
            limit in prop_oneof![0..400u64, Just(u64::MAX)],
        ) {
            // Each segment at an address of its own, so that bytes are told apart by theirs.
            let segments: Vec<_> = lengths
                .iter()
                .enumerate()
                .map(|(i, length)| segment(0x1000 * (i as u64 + 1), *length))
                .collect();
            let bytes = |segments: &[Segment]| -> Vec<u64> {
                segments.iter().flat_map(|s| s.address.0..s.address.0 + u64::from(s.length)).collect()
            };
            let all = bytes(&segments);
            let start = (skip as usize).min(all.len());
            let end = start + (limit.min(1 << 20) as usize).min(all.len() - start);
            prop_assert_eq!(bytes(&window(&segments, skip, limit)), &all[start..end]);
        }
    }
}
