//! Copies of a disk that a guest goes on using.

use std::sync::mpsc;

use rustix::fs::{MemfdFlags, memfd_create};

use super::{
    full::{fill, put, small_file_system, until},
    *,
};
use hermitage_storage::sparse;

pub(super) fn bytes_of(file: &File) -> Vec<u8> {
    let mut bytes = vec![0; file.metadata().unwrap().len() as usize];
    file.read_exact_at(&mut bytes, 0).unwrap();
    bytes
}

/// A disk with data at some places; the same MiB again and again, which is made in no time.
pub(super) fn sparse_disk(length: u64, pieces: &[(u64, u64)]) -> File {
    let file = tempfile::tempfile().unwrap();
    file.set_len(length).unwrap();
    for (start, count) in pieces {
        let end = length.min(start + count);
        let bytes = Dice::new(start + 1).bytes((*count).min(1 << 20) as usize);
        let mut at = *start;
        while at < end {
            let part = &bytes[..(end - at).min(bytes.len() as u64) as usize];
            file.write_all_at(part, at).unwrap();
            at += part.len() as u64;
        }
    }
    file
}

/// For a copy: in memory, so that it is copied to whatever file system the tests' disks are on.
pub(super) fn side() -> File {
    memfd_create("side", MemfdFlags::CLOEXEC).unwrap().into()
}

/// Of each copy here, but where two are told apart.
const NUMBER: u64 = 1;

/// What came of a copy.
struct Asked(mpsc::Receiver<CopyNews>);

fn order(side: &File, room: u64) -> (CopyOrder, Asked) {
    let (sender, news) = mpsc::channel();
    let tell = Box::new(move |one| drop(sender.send(one)));
    (CopyOrder { number: NUMBER, side: side.try_clone().unwrap(), room, tell }, Asked(news))
}

impl Asked {
    fn next(&self) -> CopyNews {
        self.0.recv_timeout(Duration::from_secs(10)).expect("no word of the copy")
    }

    fn over(&self) -> Result<u64, String> {
        loop {
            if let CopyNews::Over(outcome) = self.next() {
                assert!(self.0.try_recv().is_err(), "a word after the last");
                return outcome;
            }
        }
    }
}

impl Guest {
    fn on(disk: &File) -> Self {
        let guest = Self::start();
        guest.driver.device.attach(disk.try_clone().unwrap()).unwrap();
        guest.driver.acknowledge();
        guest
    }

    /// All of a large disk; does not wait for it.
    fn discard_all(&mut self) {
        let range = [0, LARGE / 512].map(u64::to_le_bytes);
        self.driver.put(self.data, range.as_flattened());
        self.submit(DISCARD, 0, &[(self.data, 16, false)]);
    }

    fn copy(&self, side: &File, room: u64) -> Asked {
        let (order, asked) = order(side, room);
        self.driver.device.copy(order).unwrap();
        asked
    }
}

#[test]
fn a_guest_that_goes_on_writing_is_copied_as_it_was() {
    for seed in 0..4 {
        let mut dice = Dice::new(seed);
        const SECTORS: u64 = 128 << 11;
        let disk =
            sparse_disk(SECTORS * 512, &[(0, 5 << 20), (9 << 20, 14 << 20), (40 << 20, 80 << 20)]);
        let mut guest = Guest::on(&disk);
        assert_eq!(guest.write(7, &dice.bytes(4096)), OK);
        let expected = bytes_of(&disk);
        let mut mirror = expected.clone();
        let side = side();
        let asked = guest.copy(&side, u64::MAX);
        assert!(matches!(asked.next(), CopyNews::Begun(103_000_000..104_000_000)));
        for round in 0..150 {
            // At first where the copy comes late.
            let sector = match round {
                0..20 => SECTORS / 2 + dice.below(SECTORS / 2 - 2048),
                _ => dice.below(SECTORS - 2048),
            };
            let at = sector as usize * 512;
            match dice.below(8) {
                // More than can be copied on its way.
                0 => {
                    let count = 2048 + dice.below(8 << 10).min(SECTORS - 2048 - sector);
                    assert_eq!(guest.range(WRITE_ZEROES, sector, count as u32, 1), OK);
                    mirror[at..at + count as usize * 512].fill(0);
                }
                1 => {
                    let bytes = guest.read(sector, 8192);
                    assert!(bytes == mirror[at..at + 8192], "read during a copy");
                }
                2 => assert_eq!(guest.ask(FLUSH, 0, &[]).0, OK),
                _ => {
                    let length = 512 * (1 + dice.below(200) as usize);
                    let bytes = dice.bytes(length);
                    assert_eq!(guest.write(sector, &bytes), OK);
                    mirror[at..at + length].copy_from_slice(&bytes);
                }
            }
        }
        asked.over().unwrap();
        assert!(bytes_of(&side) == expected, "seed {seed}");
        assert!(bytes_of(&disk) == mirror, "the guest's own disk, seed {seed}");
        assert_eq!(guest.driver.device.stats().errors, 0);
        assert!(side.metadata().unwrap().blocks() * 512 < 104_000_000);
    }
}

#[test]
fn a_copy_without_room_is_refused_with_figures() {
    let disk = sparse_disk(8 << 20, &[(0, 3 << 20)]);
    let guest = Guest::on(&disk);
    let side = side();
    let reason = guest.copy(&side, 1 << 20).over().unwrap_err();
    assert!(reason.contains("takes 3145728 bytes") && reason.contains("1048576"), "{reason}");
    assert_eq!(side.metadata().unwrap().len(), 0);
    side.set_len(1).unwrap();
    let reason = guest.copy(&side, u64::MAX).over().unwrap_err();
    assert!(reason.contains("not empty"), "{reason}");
}

/// With temporary files on XFS or Btrfs (TMPDIR): then it takes neither time nor room.
#[test]
fn where_files_can_share_blocks_the_copy_is_whole_at_once() {
    let disk = sparse_disk(8 << 20, &[(0, 3 << 20)]);
    let side = tempfile::tempfile().unwrap();
    if !sparse::share(&disk, &tempfile::tempfile().unwrap()).unwrap() {
        eprintln!("skipped: temporary files share no blocks here");
        return;
    }
    let mut guest = Guest::on(&disk);
    let expected = bytes_of(&disk);
    let asked = guest.copy(&side, 0);
    assert_eq!(asked.next(), CopyNews::Begun(0));
    assert_eq!(guest.write(9, &[1; 4096]), OK);
    assert_eq!(asked.over(), Ok(0));
    assert!(bytes_of(&side) == expected && bytes_of(&disk) != expected);
}

#[test]
fn a_machine_without_a_disk_has_no_copy() {
    let guest = Guest::start();
    let side = side();
    assert!(guest.copy(&side, u64::MAX).over().unwrap_err().contains("no disk"));
}

const LARGE: u64 = 128 << 20;

/// A disk whose copy takes a while: the guest's writes alternate with its steps.
fn large() -> (File, Guest) {
    let disk = sparse_disk(LARGE, &[(0, LARGE)]);
    let guest = Guest::on(&disk);
    (disk, guest)
}

#[test]
fn one_at_a_time_and_each_can_be_called_off() {
    let (_, mut guest) = large();
    let (one, other) = (side(), side());
    let first = guest.copy(&one, u64::MAX);
    assert!(matches!(first.next(), CopyNews::Begun(_)));
    let second = guest.copy(&other, u64::MAX);
    assert!(second.over().unwrap_err().contains("already"));
    guest.driver.device.no_copy(WhichCopy::Number(NUMBER), "it was called off");
    assert_eq!(first.over(), Err("it was called off".into()));
    assert_eq!(guest.write(5, &[1; 512]), OK);
    // A word too many means nothing, and the next copy is one again.
    guest.driver.device.no_copy(WhichCopy::Number(NUMBER), "it was called off");
    assert_eq!(guest.write(6, &[1; 512]), OK);
    let expected = bytes_of(&other).len();
    assert_eq!(expected, 0);
    guest.copy(&other, u64::MAX).over().unwrap();
}

#[test]
fn calling_off_a_copy_that_is_over_does_not_call_off_the_next() {
    let (_, mut guest) = large();
    let side = side();
    let (order, asked) = order(&side, u64::MAX);
    guest.driver.device.copy(CopyOrder { number: 8, ..order }).unwrap();
    guest.driver.device.no_copy(WhichCopy::Number(7), "it was called off");
    assert!(matches!(asked.next(), CopyNews::Begun(_)));
    guest.driver.device.no_copy(WhichCopy::Number(7), "it was called off");
    assert_eq!(guest.write(5, &[1; 512]), OK);
    asked.over().unwrap();
}

/// Nobody holds the file of a copy that is over.
#[test]
fn nothing_of_a_copy_remains() {
    let (_, guest) = large();
    let side: File = memfd_create("nothing-remains", MemfdFlags::CLOEXEC).unwrap().into();
    let is_it = |to: std::path::PathBuf| to.to_string_lossy().contains("nothing-remains");
    let holders = || {
        let mine = std::fs::read_dir("/proc/self/fd").unwrap().flatten();
        mine.filter(|fd| std::fs::read_link(fd.path()).is_ok_and(is_it)).count()
    };
    let alone = holders();
    let asked = guest.copy(&side, u64::MAX);
    assert!(matches!(asked.next(), CopyNews::Begun(_)));
    assert_eq!(holders(), alone + 1);
    guest.driver.device.no_copy(WhichCopy::Number(NUMBER), "it was called off");
    asked.over().unwrap_err();
    until("the file to be closed", || holders() == alone);
}

#[test]
fn a_discard_of_gigabytes_lets_others_pass_and_frees_its_room_in_the_end() {
    let (disk, mut guest) = large();
    let side = side();
    let expected = bytes_of(&disk);
    let asked = guest.copy(&side, u64::MAX);
    assert!(matches!(asked.next(), CopyNews::Begun(_)));
    guest.discard_all();
    let [_, _, status] = guest.turn_to_other_buffers();
    let sector = [(guest.data, 512, true)];
    assert_eq!(guest.ask_meanwhile(IN, 8, &sector), OK);
    assert_eq!(guest.driver.bytes(status, 1), [0xee], "done before it was copied");
    asked.over().unwrap();
    until("the discard", || guest.driver.bytes(status, 1) == [OK]);
    assert!(bytes_of(&side) == expected);
    assert_eq!(disk.metadata().unwrap().blocks(), 0);
}

#[test]
fn a_reset_does_not_wait_for_a_copy() {
    let (_, mut guest) = large();
    let side = side();
    let asked = guest.copy(&side, u64::MAX);
    assert!(matches!(asked.next(), CopyNews::Begun(_)));
    guest.discard_all();
    guest.driver.set(register::STATUS, 0).unwrap();
    assert_eq!(guest.driver.bytes(guest.status, 1), [OK]);
    assert!(asked.over().unwrap_err().contains("reset"));
}

/// The room for the copy runs out in the middle: there is no copy, and the guest notices nothing.
#[test]
fn a_copy_that_meets_the_end_of_the_room_disturbs_nobody() {
    for seed in 0..4 {
        let Some([side, ballast]) = small_file_system(24 << 20) else { return };
        let disk = sparse_disk(16 << 20, &[(0, 16 << 20)]);
        let mut guest = Guest::on(&disk);
        let mut dice = Dice::new(seed);
        fill(&ballast, dice.below(12 << 20) as i64);
        let mut expected = bytes_of(&disk);
        let asked = guest.copy(&side, u64::MAX);
        for _ in 0..60 {
            let sector = dice.below((16 << 11) - 64);
            let length = 512 * (1 + dice.below(64) as usize);
            let bytes = dice.bytes(length);
            assert_eq!(guest.write(sector, &bytes), OK);
            expected[sector as usize * 512..][..bytes.len()].copy_from_slice(&bytes);
        }
        let reason = asked.over().unwrap_err();
        assert!(reason.contains("no room for the copy"), "{reason}");
        assert!(bytes_of(&disk) == expected);
        assert_eq!((guest.driver.device.stats().errors, guest.driver.device.held_writes()), (0, 0));
    }
}

#[test]
fn a_disk_that_gets_shorter_or_another_ends_the_copy() {
    let (disk, mut guest) = large();
    let side = side();
    let asked = guest.copy(&side, u64::MAX);
    assert!(matches!(asked.next(), CopyNews::Begun(_)));
    put(&guest, disk.try_clone().unwrap());
    assert_eq!(guest.write(0, &[1; 512]), OK);
    assert!(asked.over().unwrap_err().contains("another disk"));
}

/// Before a save the copy is called off, and then nothing is under way.
#[test]
fn a_copy_does_not_keep_a_machine_from_being_saved() {
    let (_, mut guest) = large();
    let side = side();
    let asked = guest.copy(&side, u64::MAX);
    assert!(matches!(asked.next(), CopyNews::Begun(_)));
    guest.discard_all();
    guest.driver.device.no_copy(WhichCopy::Any, "the machine is being saved");
    assert!(guest.driver.device.drain(Duration::from_secs(5)));
    asked.over().unwrap_err();
    guest.driver.device.save().unwrap();
}
