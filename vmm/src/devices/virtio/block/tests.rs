use std::{
    fs::File,
    os::unix::fs::{FileExt, MetadataExt},
    thread,
    time::{Duration, Instant},
};

mod copy;
mod full;
mod instant;

use super::*;
use crate::devices::virtio::{
    testing::{Buffer, Dice, Driver},
    transport::register,
};

const IN: u32 = 0;
const OUT: u32 = 1;
const FLUSH: u32 = 4;
const GET_ID: u32 = 8;
const DISCARD: u32 = 11;
const WRITE_ZEROES: u32 = 13;

const OK: u8 = 0;
const IO_ERROR: u8 = 1;
const UNSUPPORTED: u8 = 2;

const DISK: u64 = 4 << 20;
const DATA: u32 = 1 << 20;

struct Guest {
    driver: Driver<Block>,
    header: u64,
    data: u64,
    status: u64,
}

impl Guest {
    fn start() -> Self {
        let mut driver = Driver::start(Block::new());
        let [header, data, status] = [64, DATA, 1].map(|length| driver.allocate(length));
        Self { driver, header, data, status }
    }

    fn with_disk() -> (Self, File) {
        let guest = Self::start();
        let file = disk();
        assert_eq!(guest.driver.device.attach(file.try_clone().unwrap()).unwrap(), DISK);
        assert_eq!(guest.driver.acknowledge(), 2);
        (guest, file)
    }

    fn capacity(&self) -> u64 {
        u64::from_le_bytes(self.driver.config(0))
    }

    /// Submits a request and waits for it: its status, and the number of bytes written to us.
    fn ask(&mut self, kind: u32, sector: u64, data: &[Buffer]) -> (u8, u32) {
        self.submit(kind, sector, data);
        let (_, written) = self.wait(1)[0];
        (self.driver.bytes(self.status, 1)[0], written)
    }

    fn submit(&mut self, kind: u32, sector: u64, data: &[Buffer]) {
        self.driver.put(self.header, &kind.to_le_bytes());
        self.driver.put(self.header + 8, &sector.to_le_bytes());
        self.driver.put(self.status, &[0xee]);
        let mut chain = vec![(self.header, 16, false)];
        chain.extend(data);
        chain.push((self.status, 1, true));
        self.driver.submit(0, &chain).unwrap();
    }

    fn wait(&mut self, count: usize) -> Vec<(u16, u32)> {
        let deadline = Instant::now() + Duration::from_secs(10);
        let mut done = Vec::new();
        while done.len() < count {
            assert!(Instant::now() < deadline, "{} of {count} requests came back", done.len());
            // The interrupt follows the ring by an instant, as on real hardware.
            if self.driver.line.is_high() {
                self.driver.acknowledge();
                self.driver.device.drain(Duration::from_secs(1));
                done.extend(self.driver.used_quietly(0));
            } else {
                thread::sleep(Duration::from_micros(50));
            }
        }
        done
    }

    fn write(&mut self, sector: u64, bytes: &[u8]) -> u8 {
        self.driver.put(self.data, bytes);
        self.ask(OUT, sector, &[(self.data, bytes.len() as u32, false)]).0
    }

    fn read(&mut self, sector: u64, length: u32) -> Vec<u8> {
        let (status, written) = self.ask(IN, sector, &[(self.data, length, true)]);
        assert_eq!((status, written), (OK, length + 1));
        self.driver.bytes(self.data, length as usize)
    }

    fn range(&mut self, kind: u32, sector: u64, count: u32, flags: u32) -> u8 {
        self.driver.put(self.data, &sector.to_le_bytes());
        self.driver.put(self.data + 8, &count.to_le_bytes());
        self.driver.put(self.data + 12, &flags.to_le_bytes());
        self.ask(kind, 0, &[(self.data, 16, false)]).0
    }
}

fn disk() -> File {
    let file = tempfile::tempfile().unwrap();
    file.set_len(DISK).unwrap();
    file
}

#[test]
fn a_disk_appears_by_change_of_configuration() {
    let mut guest = Guest::start();
    assert_eq!(guest.capacity(), 0);
    let sector = [(guest.data, 512, true)];
    assert_eq!(guest.ask(IN, 0, &sector).0, IO_ERROR);
    assert_eq!(guest.ask(FLUSH, 0, &[]).0, IO_ERROR);
    let generation = guest.driver.get(register::CONFIG_GENERATION);
    let file = disk();
    guest.driver.device.attach(file.try_clone().unwrap()).unwrap();
    assert_eq!(guest.driver.acknowledge(), 2);
    assert_eq!(guest.capacity(), DISK / 512);
    assert_ne!(guest.driver.get(register::CONFIG_GENERATION), generation);
    assert_eq!(guest.ask(IN, 0, &sector), (OK, 513));
    // It grows.
    file.set_len(2 * DISK + 100).unwrap();
    guest.driver.device.attach(file).unwrap();
    assert_eq!(guest.driver.acknowledge(), 2);
    assert_eq!(guest.capacity(), 2 * DISK / 512);
}

#[test]
fn what_is_written_is_read_back_and_is_in_the_file() {
    let (mut guest, file) = Guest::with_disk();
    let mut dice = Dice::new(11);
    let mut expected = vec![0; DISK as usize];
    for _ in 0..100 {
        let count = 1 + dice.below(64);
        let sector = dice.below(DISK / 512 - count);
        let bytes = dice.bytes(count as usize * 512);
        assert_eq!(guest.write(sector, &bytes), OK);
        expected[sector as usize * 512..][..bytes.len()].copy_from_slice(&bytes);
    }
    let mut found = vec![0; DISK as usize];
    file.read_exact_at(&mut found, 0).unwrap();
    assert!(found == expected);
    for sector in (0..DISK / 512).step_by(2048) {
        let bytes = guest.read(sector, DATA);
        assert!(bytes == expected[sector as usize * 512..][..bytes.len()]);
    }
    assert_eq!(guest.driver.device.stats().errors, 0);
    assert_eq!(guest.driver.device.stats().read_bytes, DISK);
}

#[test]
fn data_may_be_cut_anywhere_also_in_the_header_and_before_the_status() {
    let (mut guest, _) = Guest::with_disk();
    let bytes = Dice::new(12).bytes(1024);
    guest.write(3, &bytes);
    let Guest { header, data, .. } = guest;
    guest.driver.put(header, &IN.to_le_bytes());
    guest.driver.put(header + 8, &3u64.to_le_bytes());
    // The status is the last writable byte, here in one buffer with the data's tail.
    let chain = [
        (header, 5, false),
        (header + 5, 11, false),
        (data, 1, true),
        (data + 1, 700, true),
        (data + 701, 324, true),
    ];
    guest.driver.submit(0, &chain).unwrap();
    assert_eq!(guest.wait(1)[0].1, 1025);
    assert_eq!(guest.driver.bytes(data, 1024), bytes);
    assert_eq!(guest.driver.bytes(data + 1024, 1), [OK]);
}

#[test]
fn nothing_reaches_behind_the_end() {
    let (mut guest, file) = Guest::with_disk();
    let end = DISK / 512;
    assert_eq!(guest.write(end - 1, &[1; 512]), OK);
    for sector in [end, end - 1 + (1 << 32), u64::MAX, u64::MAX / 512, 1 << 55] {
        assert_eq!(guest.write(sector, &[1; 512]), IO_ERROR, "{sector}");
    }
    assert_eq!(guest.write(end - 1, &[1; 1024]), IO_ERROR);
    assert_eq!(guest.write(0, &[1; 100]), IO_ERROR);
    for kind in [DISCARD, WRITE_ZEROES] {
        assert_eq!(guest.range(kind, end - 1, 2, 0), IO_ERROR);
        assert_eq!(guest.range(kind, u64::MAX, 2, 0), IO_ERROR);
        assert_eq!(guest.range(kind, 0, u32::MAX, 0), IO_ERROR);
        assert_eq!(guest.range(kind, 0, 8, 6), UNSUPPORTED);
        let odd = [(guest.data, 15, false)];
        assert_eq!(guest.ask(kind, 0, &odd).0, IO_ERROR);
        assert_eq!(guest.ask(kind, 0, &[]).0, IO_ERROR);
        let many = [(guest.data, 17 * 16, false)];
        assert_eq!(guest.ask(kind, 0, &many).0, IO_ERROR);
    }
    assert_eq!(guest.range(DISCARD, 0, 8, 1), UNSUPPORTED);
    assert_eq!(file.metadata().unwrap().len(), DISK);
}

#[test]
fn flush_identify_and_the_unheard_of() {
    let (mut guest, _) = Guest::with_disk();
    guest.write(0, &[7; 512]);
    assert_eq!(guest.ask(FLUSH, 0, &[]), (OK, 1));
    assert_eq!(guest.driver.device.stats().flushes, 1);
    let id = [(guest.data, 20, true)];
    assert_eq!(guest.ask(GET_ID, 0, &id), (OK, 21));
    assert_eq!(guest.driver.bytes(guest.data, 20), b"hermitage-account\0\0\0");
    let small = [(guest.data, 19, true)];
    assert_eq!(guest.ask(GET_ID, 0, &small).0, IO_ERROR);
    assert_eq!(guest.ask(0xbeef, 0, &[]), (UNSUPPORTED, 1));
}

#[test]
fn what_was_written_is_synced_when_nothing_more_comes() {
    let (mut guest, _file) = Guest::with_disk();
    let disk = guest.driver.device.look(|block| block.disk.clone()).unwrap();
    let begin = Instant::now();
    while begin.elapsed() < 2 * disk::REST {
        assert_eq!(guest.write(0, &[1; 512]), OK);
        assert!(disk.is_unsynced(), "it is not at rest");
        thread::sleep(disk::REST / 8);
    }
    let begin = Instant::now();
    while disk.is_unsynced() {
        assert!(begin.elapsed() < Duration::from_secs(30), "nobody has synced it");
        thread::sleep(Duration::from_millis(10));
    }
    assert_eq!(guest.ask(FLUSH, 0, &[]), (OK, 1));
}

#[test]
fn every_change_is_for_the_next_flush_and_nothing_else_is() {
    let (mut guest, _) = Guest::with_disk();
    let disk = guest.driver.device.look(|block| block.disk.clone()).unwrap();
    for kind in [OUT, DISCARD, WRITE_ZEROES] {
        let status = match kind {
            OUT => guest.write(8, &[7; 512]),
            _ => guest.range(kind, 8, 8, 0),
        };
        assert_eq!(status, OK);
        assert!(disk.sync().unwrap(), "request {kind} changed nothing");
        assert_eq!(guest.write(8, &[7; 512]), OK);
        assert_eq!(guest.ask(FLUSH, 0, &[]), (OK, 1));
        guest.read(8, 512);
        assert!(!disk.sync().unwrap(), "the flush left something");
    }
}

#[test]
fn discard_and_unmapping_zeroes_give_space_back() {
    let (mut guest, file) = Guest::with_disk();
    let all = vec![0xaa; DATA as usize];
    for kind in [DISCARD, WRITE_ZEROES] {
        assert_eq!(guest.write(0, &all), OK);
        let before = file.metadata().unwrap().blocks();
        let flags = u32::from(kind == WRITE_ZEROES);
        assert_eq!(guest.range(kind, 0, DATA / 512, flags), OK);
        assert!(file.metadata().unwrap().blocks() < before);
        assert!(guest.read(0, DATA).iter().all(|byte| *byte == 0));
    }
    assert_eq!(guest.write(0, &all), OK);
    assert_eq!(guest.range(WRITE_ZEROES, 1, 3, 0), OK);
    let bytes = guest.read(0, 5 * 512);
    let expected = [vec![0xaa; 512], vec![0; 3 * 512], vec![0xaa; 512]].concat();
    assert!(bytes == expected);
    assert_eq!(file.metadata().unwrap().len(), DISK);
}

#[test]
fn many_requests_at_once_all_come_back() {
    let (mut guest, file) = Guest::with_disk();
    let mut dice = Dice::new(13);
    let areas: Vec<u64> = (0..40).map(|_| guest.driver.allocate(8192)).collect();
    for round in 0..20u64 {
        for (i, area) in areas.iter().enumerate() {
            guest.driver.put(*area, &OUT.to_le_bytes());
            guest.driver.put(*area + 8, &(i as u64 * 8).to_le_bytes());
            guest.driver.put(*area + 64, &dice.bytes(4096));
            let chain = [(*area, 16, false), (*area + 64, 4096, false), (*area + 5000, 1, true)];
            guest.driver.submit(0, &chain).unwrap();
        }
        guest.wait(areas.len());
        for (i, area) in areas.iter().enumerate() {
            let mut found = vec![0; 4096];
            file.read_exact_at(&mut found, i as u64 * 4096).unwrap();
            assert!(found == guest.driver.bytes(*area + 64, 4096), "round {round}, request {i}");
        }
    }
}

#[test]
fn a_file_that_shrank_is_an_error_of_the_request_and_no_more() {
    let (mut guest, file) = Guest::with_disk();
    file.set_len(4096).unwrap();
    let sector = [(guest.data, 512, true)];
    assert_eq!(guest.ask(IN, 100, &sector).0, IO_ERROR);
    assert_eq!(guest.driver.device.stats().errors, 1);
    assert_eq!(guest.write(0, &[1; 512]), OK);
}

#[test]
fn a_disk_that_can_not_be_read_is_refused_at_once() {
    let guest = Guest::start();
    let path = tempfile::NamedTempFile::new().unwrap();
    let blind = File::options().write(true).open(path.path()).unwrap();
    assert!(matches!(guest.driver.device.attach(blind), Err(Fault::Host { .. })));
}

#[test]
fn a_fork_gets_its_own_disk_and_the_interrupt_that_tells_of_it() {
    let mut guest = Guest::start();
    let generation = guest.driver.get(register::CONFIG_GENERATION);
    let driver = guest.driver.fork(Block::new());
    let file = disk();
    driver.device.attach(file).unwrap();
    assert!(!driver.line.is_high(), "nothing may be raised before the interrupt controller is");
    driver.device.resume().unwrap();
    assert!(driver.line.is_high());
    let mut fork = Guest { driver, ..guest };
    assert_eq!(fork.driver.acknowledge(), 2);
    assert_eq!(fork.capacity(), DISK / 512);
    assert_ne!(fork.driver.get(register::CONFIG_GENERATION), generation);
    assert_eq!(fork.write(5, &[9; 512]), OK);
    assert_eq!(fork.read(5, 512), [9; 512]);
    // And once more, in the middle of its life.
    assert!(fork.driver.device.drain(Duration::from_secs(1)));
    let state = fork.driver.device.save().unwrap();
    assert_eq!(state.device.capacity, DISK / 512);
    guest = Guest { driver: fork.driver.fork(Block::new()), ..fork };
    guest.driver.device.attach(disk()).unwrap();
    guest.driver.device.resume().unwrap();
    assert!(!guest.driver.line.is_high(), "the same capacity is no news");
    assert_eq!(guest.read(5, 512), [0; 512]);
}

#[test]
fn a_reset_waits_for_what_is_under_way() {
    let (mut guest, _) = Guest::with_disk();
    for _ in 0..50 {
        let data = [(guest.data, DATA, false)];
        guest.submit(OUT, 0, &data);
        guest.driver.set(register::STATUS, 0).unwrap();
        assert!(!guest.driver.line.is_high());
        guest.driver.initialise().unwrap();
        assert_eq!(guest.write(0, &[3; 512]), OK);
    }
}

#[test]
fn requests_that_can_not_be_answered_end_the_machine() {
    for (chain, why) in [
        (vec![(0x10_0000, 16, false)], "no status"),
        (vec![(0x10_0000, 15, false), (0x10_1000, 1, true)], "a short header"),
        (vec![(0x10_0000, 16, false), (1 << 40, 512, true), (0x10_1000, 1, true)], "outside"),
        (vec![(0x10_1000, 1, true), (0x10_0000, 16, false)], "the wrong order"),
        (vec![(0x10_0000, 16, false), (u64::MAX, 512, true)], "address overflow"),
    ] {
        let (mut guest, _) = Guest::with_disk();
        let fault = guest.driver.submit(0, &chain).unwrap_err();
        assert!(matches!(fault, Fault::Guest { device: "block", .. }), "{why}: {fault}");
    }
}

#[test]
fn a_request_made_at_the_moment_of_the_snapshot_is_served_after_it() {
    let mut guest = Guest::start();
    guest.driver.put(guest.header, &GET_ID.to_le_bytes());
    let chain = [(guest.header, 16, false), (guest.data, 20, true), (guest.status, 1, true)];
    guest.driver.add(0, &chain);
    let mut fork = Guest { driver: guest.driver.fork(Block::new()), ..guest };
    fork.driver.device.resume().unwrap();
    assert_eq!(fork.wait(1)[0].1, 21);
}
