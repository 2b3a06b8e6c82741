//! An account's life, the storage's part of it: started from disk or snapshot, worked with, saved, and so
//! on, until the fault strikes or some time is over. A *generation* is a number at a fixed place of the
//! disk that grows with everything the machine writes; its memory is the same number.

use crate::private_dir;
use hermitage_storage::StateDir;
use hermitage_storage::base::BaseId;
use hermitage_storage::disk::{self, Tag};
use hermitage_storage::saved::{self, Found};
use hermitage_storage::snapshot::{Content, Description, PAGE, Snapshot, SnapshotError, Writer};
use std::fs::File;
use std::io::{self, Write as _};
use std::os::unix::fs::FileExt as _;
use std::path::{Path, PathBuf};
use uuid::Uuid;

/// Starts and saves of one process, should no fault end it.
const LIVES: u64 = 8;
const RAM_PAGES: u64 = 256;

pub struct Account {
    pub state: StateDir,
    pub id: Uuid,
    root: PathBuf,
}

/// SplitMix64.
pub struct Random(pub u64);

impl Random {
    pub fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    pub fn below(&mut self, end: u64) -> u64 {
        self.next() % end
    }

    pub fn one_of<'a, T>(&mut self, of: &'a [T]) -> &'a T {
        &of[self.below(of.len() as u64) as usize]
    }
}

impl Account {
    pub fn new(root: &Path) -> Self {
        Self { state: StateDir::new(root), id: Uuid::from_u128(7), root: root.to_owned() }
    }

    /// A disk whose blocks are there, so that writing to them changes nothing else of the file.
    pub fn make(&self) {
        private_dir(&self.state.account_dir(self.id));
        private_dir(&self.state.base(&base()));
        let disk = File::create(self.disk()).unwrap();
        disk.write_all_at(&[0; 64 * 1024], 0).unwrap();
        disk.sync_all().unwrap();
        for dir in [self.state.account_dir(self.id), self.state.accounts_dir(), self.root.clone()] {
            File::open(dir).unwrap().sync_all().unwrap();
        }
    }

    pub fn disk(&self) -> PathBuf {
        self.state.disk(self.id)
    }

    pub fn generation(&self, disk: &File) -> u64 {
        let mut raw = [0; 8];
        disk.read_exact_at(&mut raw, 8192).unwrap();
        u64::from_le_bytes(raw)
    }
}

fn base() -> BaseId {
    BaseId::parse("00112233445566778899aabbccddeeff").unwrap()
}

/// The generation that a snapshot's memory is of.
pub fn memory(snapshot: &Snapshot) -> u64 {
    let of_state = u64::from_le_bytes(snapshot.state[..8].try_into().unwrap());
    for run in &snapshot.runs {
        let Content::Data { at } = run.content else { continue };
        let mut raw = [0; 8];
        snapshot.file.read_exact_at(&mut raw, at).unwrap();
        assert_eq!(u64::from_le_bytes(raw), of_state, "memory is not of one generation");
    }
    of_state
}

pub fn tell(words: &str) {
    println!("{words}");
    io::stdout().flush().unwrap();
}

/// What the child does. Whatever must not be ends it with a panic.
pub fn live(account: Account, seed: u64) {
    hermitage_storage::faults::arm().unwrap();
    let mut random = Random(seed);
    for _ in 0..LIVES {
        let disk = disk::open_locked(&account.disk()).unwrap();
        // A reset, which drops memory without looking at it.
        if random.below(5) == 0 && saved::withdraw(&account.state, account.id).is_err() {
            continue;
        }
        // A login that is refused because of an error comes again.
        if let Ok(used) = start(&account, &disk) {
            run(&account, &disk, used, &mut random);
        }
    }
}

/// Up to the machine's first instruction; the snapshot that was used.
fn start(account: &Account, disk: &File) -> io::Result<Option<File>> {
    let (state, id) = (&account.state, account.id);
    match saved::find(state, id, disk) {
        Found::Usable(file, header) => {
            let used = file.try_clone()?;
            let snapshot = Snapshot::open(file).expect("a snapshot that is tagged is whole");
            saved::consume(state, id)?;
            assert_eq!(memory(&snapshot), account.generation(disk), "stale memory was resumed");
            tell(&format!("resumed {:032x}", u128::from_be_bytes(header.description.disk_tag)));
            Ok(Some(used))
        }
        Found::Unusable(_) => saved::set_aside(state, id).map(|()| None),
        Found::Nothing => saved::forget(state, id, disk).map(|()| None),
    }
}

/// The machine runs, and is saved or ends without; perhaps the save fails or is called off, and it runs on.
fn run(account: &Account, disk: &File, used: Option<File>, random: &mut Random) {
    let mut generation = account.generation(disk);
    let mut work = |synced: bool| {
        generation += 1;
        disk.write_all_at(&generation.to_le_bytes(), 8192).unwrap();
        if synced {
            // As a guest's flush.
            disk.sync_data().unwrap();
            tell(&format!("synced {generation}"));
        }
        generation
    };
    work(random.below(2) == 0);
    if let Some(used) = used {
        // Not being deleted is no harm.
        let _ = saved::remove_used(&account.state, account.id, &used);
    }
    for _ in 0..3 {
        let memory = work(random.below(2) == 0);
        let called_off = random.below(3) == 0;
        match save(account, disk, memory, random, called_off) {
            Ok(()) => return,
            Err(_) if saved::withdraw(&account.state, account.id).is_err() => return,
            // Not synced: the most that a power cut can take.
            Err(_) => drop(work(false)),
        }
    }
}

pub fn save(
    account: &Account,
    disk: &File,
    memory: u64,
    random: &mut Random,
    called_off: bool,
) -> Result<(), SnapshotError> {
    let failed = |source| SnapshotError::Io { doing: "publish", source };
    let file = saved::create(&account.state, account.id).map_err(failed)?;
    disk.sync_data().map_err(failed)?;
    let mut page = [[0; PAGE]];
    page[0][..8].copy_from_slice(&memory.to_le_bytes());
    let mut writer = Writer::new(&file)?;
    for n in (0..RAM_PAGES).step_by(1 + random.below(4) as usize) {
        writer.data(n, &page)?;
    }
    let mut tag: Tag = [0; 16];
    tag[..8].copy_from_slice(&random.next().to_le_bytes());
    tag[8..].copy_from_slice(&random.next().to_le_bytes());
    let description = Description {
        base: base(),
        account: account.id,
        disk_tag: tag,
        created: 0,
        ram: RAM_PAGES * PAGE as u64,
        vcpus: 1,
        state_version: 1,
    };
    writer.finish(description, &memory.to_le_bytes())?;
    if called_off && random.below(2) == 0 {
        return Err(failed(io::Error::other("called off")));
    }
    saved::publish(&account.state, account.id, tag).map_err(failed)?;
    if called_off {
        return Err(failed(io::Error::other("called off")));
    }
    Ok(())
}
