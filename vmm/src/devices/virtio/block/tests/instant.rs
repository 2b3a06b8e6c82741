//! A copy of the disk is the disk of one instant, whatever is done to it meanwhile.

use std::sync::Arc;

use proptest::prelude::*;
use vm_memory::GuestAddress;

use super::{
    copy::{bytes_of, side, sparse_disk},
    *,
};
use crate::devices::virtio::{
    block::{
        copy::{Begun, DiskCopy, cluster_for},
        disk::Disk,
        request::{Range, Work},
        work::attempt,
    },
    chain::Segment,
    testing::memory,
};

const CLUSTER: u64 = 64 << 10;

fn begin(disk: &Arc<Disk>, side: &File) -> DiskCopy {
    match DiskCopy::begin(disk.clone(), side.try_clone().unwrap(), u64::MAX).unwrap() {
        Begun::Copying(copy, _) => *copy,
        Begun::Whole => {
            panic!("memory shares blocks with a disk")
        }
    }
}

/// What a guest may do to its disk, or the thread for the copy.
#[derive(Clone, Debug)]
enum Act {
    Step,
    /// Bytes from somewhere.
    Write(u64, u64, u8),
    Zero(u64, u64),
    Discard(u64, u64),
    /// A discard that is copied for in steps, with others in between.
    Aside(u64, u64),
}

const LENGTH: u64 = 37 * CLUSTER + 4096;

fn act() -> impl Strategy<Value = Act> {
    let place = (0..LENGTH / 512, 1..300u64);
    let place = place.prop_map(|(at, count)| (at * 512, (count * 512).min(LENGTH - at * 512)));
    prop_oneof![
        3 => Just(Act::Step),
        4 => (place.clone(), any::<u8>()).prop_map(|((at, count), byte)| Act::Write(at, count, byte)),
        1 => place.clone().prop_map(|(at, count)| Act::Zero(at, count)),
        2 => place.clone().prop_map(|(at, count)| Act::Discard(at, count)),
        1 => place.prop_map(|(at, count)| Act::Aside(at, count * 20 % LENGTH)),
    ]
}

fn work(zeroes: bool, offset: u64, length: u64) -> Work {
    let length = length.min(LENGTH - offset);
    let ranges = vec![Range { offset, length, unmap: false }];
    if zeroes { Work::WriteZeroes(ranges) } else { Work::Discard(ranges) }
}

fn write(offset: u64, length: u64) -> Work {
    let segment = Segment { address: GuestAddress(0), length: length as u32 };
    Work::Write { offset, from: vec![segment] }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(96))]
    /// The copy is the disk as it was at the instant it began, byte for byte, and no less sparse.
    #[test]
    fn the_copy_is_of_the_instant(
        pieces in proptest::collection::vec((0..LENGTH, 1..400_000u64), 0..8),
        acts in proptest::collection::vec(act(), 0..120),
    ) {
        let disk = Arc::new(Disk::new(sparse_disk(LENGTH, &pieces)));
        let side = side();
        let expected = bytes_of(&disk);
        let data = disk.metadata().unwrap().blocks();
        let mut copy = begin(&disk, &side);
        let mut asides = vec![];
        let punch = |work: &Work| {
            let mut stats = BlockStats::default();
            let memory = memory();
            let done = attempt(work, &disk, &memory, &mut stats);
            assert!(done.is_ok());
        };
        for act in acts {
            match act {
                Act::Step => {
                    match asides.last() {
                        Some(waiting) => if copy.step_for(waiting).unwrap() {
                            let waiting = asides.pop().unwrap();
                            copy.protect(&waiting).unwrap();
                            punch(&waiting);
                        }
                        None => { copy.step().unwrap(); }
                    }
                }
                Act::Write(at, count, byte) => {
                    copy.protect(&write(at, count)).unwrap();
                    disk.write_all_at(&vec![byte; count as usize], at).unwrap();
                }
                Act::Zero(at, count) => {
                    let work = work(true, at, count);
                    copy.protect(&work).unwrap();
                    punch(&work);
                }
                Act::Discard(at, count) => {
                    let work = work(false, at, count);
                    copy.protect(&work).unwrap();
                    punch(&work);
                }
                Act::Aside(at, count) => asides.push(work(false, at, count)),
            }
        }
        while !copy.step().unwrap() {}
        prop_assert!(bytes_of(&side) == expected);
        prop_assert!(side.metadata().unwrap().blocks() <= data, "holes were filled");
    }
}

/// The memory a copy takes does not depend on the disk, and every disk has clusters.
#[test]
fn the_largest_disk_has_few_clusters() {
    for length in [4096, 1 << 30, 256 << 30, (256 << 30) + 4096, 64 << 40] {
        let cluster = cluster_for(length);
        assert!(length.div_ceil(cluster) <= 4 << 20 && cluster.is_power_of_two(), "{length}");
    }
}
