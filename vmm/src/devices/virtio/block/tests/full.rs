//! The host's disk is full. `/dev/full` answers every write with ENOSPC and gives zeroes to every read;
//! where the tests run as root a file system of fixed size shows the same with files.

use std::{io, path::Path, sync::mpsc};

use nix::{
    mount::{MsFlags, mount},
    sched::{CloneFlags, unshare},
};

use super::*;

fn dev_full() -> File {
    File::options().read(true).write(true).open("/dev/full").unwrap()
}

/// Puts a file behind the device whatever its size is.
pub(super) fn put(guest: &Guest, file: File) {
    let put = |block: &mut Block, context: &mut Context<'_>| {
        block.put(file, DISK / 512, context);
        Ok(())
    };
    guest.driver.device.with(put).unwrap();
    if guest.driver.line.is_high() {
        guest.driver.acknowledge();
    }
}

/// A guest whose write of `bytes` to sector 0 waits for room.
fn held(bytes: &[u8]) -> Guest {
    let mut guest = Guest::start();
    put(&guest, dev_full());
    guest.driver.put(guest.data, bytes);
    guest.submit(OUT, 0, &[(guest.data, bytes.len() as u32, false)]);
    until("the write is held", || guest.driver.device.held_writes() == 1);
    guest
}

pub(super) fn until(what: &str, mut true_yet: impl FnMut() -> bool) {
    let deadline = Instant::now() + Duration::from_secs(10);
    while !true_yet() {
        assert!(Instant::now() < deadline, "waited for: {what}");
        thread::sleep(Duration::from_millis(1));
    }
}

impl Guest {
    /// Turns to other buffers, so that those of a request under way stay as they are. Returns them.
    pub(super) fn turn_to_other_buffers(&mut self) -> [u64; 3] {
        let fresh = [64, 4096, 1].map(|length| self.driver.allocate(length));
        let former = [self.header, self.data, self.status];
        [self.header, self.data, self.status] = fresh;
        former
    }

    /// As `ask`, with other requests under way.
    pub(super) fn ask_meanwhile(&mut self, kind: u32, sector: u64, data: &[Buffer]) -> u8 {
        self.submit(kind, sector, data);
        let status = self.status;
        until("an answer meanwhile", || self.driver.bytes(status, 1) != [0xee]);
        until("its interrupt", || self.driver.line.is_high());
        self.driver.acknowledge();
        assert_eq!(self.driver.used_quietly(0).len(), 1);
        self.driver.bytes(status, 1)[0]
    }
}

#[test]
fn a_write_waits_for_room_and_then_is_whole() {
    let bytes = Dice::new(21).bytes(64 * 1024);
    let mut guest = held(&bytes);
    thread::sleep(Duration::from_millis(300));
    assert!(!guest.driver.line.is_high(), "an answer, and there is no room yet");
    assert_eq!(guest.driver.bytes(guest.status, 1), [0xee]);
    let file = disk();
    put(&guest, file.try_clone().unwrap());
    assert_eq!(guest.wait(1)[0].1, 1);
    assert_eq!(guest.driver.bytes(guest.status, 1), [OK]);
    assert_eq!(guest.driver.device.held_writes(), 0);
    let mut found = vec![0; bytes.len()];
    file.read_exact_at(&mut found, 0).unwrap();
    assert!(found == bytes);
    let stats = guest.driver.device.stats();
    assert_eq!((stats.errors, stats.written_bytes), (0, bytes.len() as u64));
}

#[test]
fn others_go_on_while_a_write_waits() {
    let mut guest = held(&[7; 4096]);
    let [_, _, first] = guest.turn_to_other_buffers();
    let sector = [(guest.data, 512, true)];
    assert_eq!(guest.ask_meanwhile(IN, 8, &sector), OK);
    assert_eq!(guest.ask_meanwhile(GET_ID, 0, &[(guest.data, 20, true)]), OK);
    // A flush is not held: it is done or not, at once (this file can't be synced, invariant 4).
    assert_eq!(guest.ask_meanwhile(FLUSH, 0, &[]), IO_ERROR);
    assert_eq!(guest.driver.device.stats().flushes, 0);
    assert_eq!(guest.driver.bytes(first, 1), [0xee]);
    put(&guest, disk());
    assert_eq!(guest.ask_meanwhile(FLUSH, 0, &[]), OK);
    until("the write", || guest.driver.bytes(first, 1) == [OK]);
}

#[test]
fn a_whole_queue_may_wait() {
    let mut guest = held(&[1; 512]);
    for sector in 1..40 {
        guest.turn_to_other_buffers();
        guest.driver.put(guest.data, &[1; 512]);
        guest.submit(OUT, sector, &[(guest.data, 512, false)]);
    }
    until("all to be held", || guest.driver.device.held_writes() == 40);
    let file = disk();
    put(&guest, file.try_clone().unwrap());
    until("all to be written", || guest.driver.device.held_writes() == 0);
    assert_eq!(guest.wait(40).len(), 40);
    let mut found = vec![0; 40 * 512];
    file.read_exact_at(&mut found, 0).unwrap();
    assert!(found.iter().all(|byte| *byte == 1));
}

#[test]
fn a_reset_does_not_wait_for_room() {
    let mut guest = held(&[2; 512]);
    let begun = Instant::now();
    guest.driver.set(register::STATUS, 0).unwrap();
    assert!(begun.elapsed() < Duration::from_secs(5));
    assert_eq!(guest.driver.bytes(guest.status, 1), [IO_ERROR]);
    // And after it a write waits again.
    guest.driver.initialise().unwrap();
    guest.submit(OUT, 0, &[(guest.data, 512, false)]);
    until("the write is held", || guest.driver.device.held_writes() == 1);
}

#[test]
fn a_machine_that_waits_for_room_can_not_be_saved_but_can_end() {
    let guest = held(&[3; 512]);
    let begun = Instant::now();
    assert!(!guest.driver.device.drain(Duration::from_millis(300)));
    assert!(begun.elapsed() < Duration::from_secs(5));
    assert!(matches!(guest.driver.device.save(), Err(StateError::Busy { .. })));
    let (sender, gone) = mpsc::channel();
    thread::spawn(move || {
        drop(guest);
        let _ = sender.send(());
    });
    gone.recv_timeout(Duration::from_secs(5)).expect("the device's end waits for room");
}

/// A file system of so many bytes that nobody else sees; it lives as long as its descriptors. None
/// without the privilege to mount it.
pub(super) fn small_file_system(bytes: u64) -> Option<[File; 2]> {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().to_owned();
    // In a thread of its own, whose view of the mounts ends with it.
    let made = thread::spawn(move || -> io::Result<[File; 2]> {
        unshare(CloneFlags::CLONE_NEWNS)?;
        let none = None::<&str>;
        mount(none, "/", none, MsFlags::MS_REC | MsFlags::MS_PRIVATE, none)?;
        let size = format!("size={bytes}");
        mount(Some("none"), &path, Some("tmpfs"), MsFlags::empty(), Some(size.as_str()))?;
        let create = |name: &str| {
            let path: &Path = path.as_ref();
            File::options().read(true).write(true).create_new(true).open(path.join(name))
        };
        Ok([create("disk")?, create("ballast")?])
    });
    match made.join().unwrap() {
        Ok(files) => Some(files),
        Err(error) if error.kind() == io::ErrorKind::PermissionDenied => {
            eprintln!("skipped: mounting a file system needs root ({error})");
            None
        }
        Err(error) => panic!("a small file system: {error}"),
    }
}

/// Random writes and zeroes, more than there is room for, while room comes and goes: each of them is
/// done in the end and nothing else is.
#[test]
fn whatever_the_room_every_write_is_there_in_the_end() {
    const ROOM: u64 = 1 << 20;
    for seed in 0..8 {
        let Some([file, ballast]) = small_file_system(ROOM) else { return };
        file.set_len(DISK).unwrap();
        let mut dice = Dice::new(seed);
        let mut guest = Guest::start();
        guest.driver.device.attach(file.try_clone().unwrap()).unwrap();
        guest.driver.acknowledge();
        let mut expected = vec![0; DISK as usize];
        let mut starved = false;
        let areas: Vec<u64> = (0..20).map(|_| guest.driver.allocate(64 * 1024)).collect();
        for round in 0..6 {
            // Less than what comes, at first.
            let free = dice.below(96 * 1024) as i64;
            fill(&ballast, free);
            // Each to a place of its own: requests under way have no order.
            for (slot, area) in areas.iter().enumerate() {
                let sector = slot as u64 * 128 + dice.below(32);
                let length = 512 * (1 + dice.below(64)) as usize;
                let at = sector as usize * 512;
                let bytes = if dice.one_in(4) {
                    guest.driver.put(*area, &WRITE_ZEROES.to_le_bytes());
                    let range = [sector.to_le_bytes(), (length as u64 / 512).to_le_bytes()];
                    guest.driver.put(*area + 64, range.as_flattened());
                    guest.driver.add(
                        0,
                        &[(*area, 16, false), (*area + 64, 16, false), (*area + 60_000, 1, true)],
                    );
                    vec![0; length]
                } else {
                    let bytes = dice.bytes(length);
                    guest.driver.put(*area, &OUT.to_le_bytes());
                    guest.driver.put(*area + 8, &sector.to_le_bytes());
                    guest.driver.put(*area + 64, &bytes);
                    guest.driver.add(
                        0,
                        &[
                            (*area, 16, false),
                            (*area + 64, length as u32, false),
                            (*area + 60_000, 1, true),
                        ],
                    );
                    bytes
                };
                expected[at..at + length].copy_from_slice(&bytes);
            }
            guest.driver.kick(0).unwrap();
            thread::sleep(Duration::from_millis(dice.below(30)));
            starved |= guest.driver.device.held_writes() > 0;
            ballast.set_len(0).unwrap();
            guest.wait(areas.len());
            for area in &areas {
                assert_eq!(guest.driver.bytes(*area + 60_000, 1), [OK], "round {round} of {seed}");
            }
        }
        assert!(starved, "seed {seed}: there was always room");
        assert_eq!(guest.driver.device.stats().errors, 0);
        let mut found = vec![0; DISK as usize];
        file.read_exact_at(&mut found, 0).unwrap();
        assert!(found == expected, "seed {seed}");
    }
}

/// Takes room away until `left` bytes are free, or as nearly as it goes.
pub(super) fn fill(ballast: &File, left: i64) {
    let stat = nix::sys::statvfs::fstatvfs(ballast).unwrap();
    let free = (stat.blocks_available() * stat.fragment_size()) as i64;
    let chunk = [0x55; 4096];
    for block in 0..(free - left).max(0) / 4096 {
        ballast.write_all_at(&chunk, block as u64 * 4096).unwrap();
    }
}
