use std::fs::{self, File};
use std::os::unix::fs::{FileExt as _, MetadataExt as _};

use proptest::prelude::*;
use uuid::Uuid;

use super::record::{Coding, Header, Kind};
use super::*;
use crate::StateDir;
use crate::accounts::{
    AccountName, Accounts, AccountsError, Intent, MachineState, NewAccount, hash_password,
    parse_keys,
};
use crate::base::BaseId;
use crate::incoming::{self, Incoming};
use crate::rest::{AtRest, Resting};
use crate::snapshot::{Description, PAGE, Writer};
use crate::{saved, sparse};

const KEYS: &str = include_str!("../../testdata/authorized_keys");
const DISK: u64 = 8 << 20;

/// A host with one account, saved.
pub(crate) struct Host {
    _dir: tempfile::TempDir,
    pub state: StateDir,
}

fn base() -> BaseId {
    BaseId::parse("00112233445566778899aabbccddeeff").unwrap()
}

impl Host {
    pub fn new() -> Self {
        let dir = tempfile::tempdir().unwrap();
        let state = StateDir::new(dir.path());
        state.create().unwrap();
        fs::create_dir_all(state.base(&base())).unwrap();
        Self { _dir: dir, state }
    }

    pub fn accounts(&self) -> Accounts {
        Accounts::open(&self.state.database()).unwrap()
    }

    /// With data here and there on its disk, and memory.
    pub fn account(&self, name: &str, password: bool) -> Uuid {
        let mut new = NewAccount::new(AccountName::parse(name).unwrap());
        new.keys = parse_keys(KEYS).unwrap();
        new.password_hash = password.then(|| hash_password(b"a password").unwrap());
        new.disk_bytes = DISK;
        new.linger_s = Some(7);
        let id = self.accounts().create(&new).unwrap().id;
        fs::create_dir(self.state.account_dir(id)).unwrap();
        let disk = File::create(self.state.disk(id)).unwrap();
        disk.set_len(DISK).unwrap();
        for (at, length, byte) in
            [(4096u64, 5000usize, 1u8), (3 << 20, 1 << 20, 2), (DISK - 4096, 4096, 3)]
        {
            disk.write_all_at(&vec![byte; length], at).unwrap();
        }
        disk.sync_all().unwrap();
        let memory = saved::create(&self.state, id).unwrap();
        let pages: Vec<_> = (0..40u8).map(|page| [page; PAGE]).collect();
        let mut writer = Writer::new(&memory).unwrap();
        writer.data(0, &pages).unwrap();
        let disk_tag = *Uuid::new_v4().as_bytes();
        let (ram, created) = (64 * PAGE as u64, 5);
        let base = base();
        let about =
            Description { base, account: id, disk_tag, created, ram, vcpus: 1, state_version: 1 };
        writer.finish(about, b"state").unwrap();
        saved::publish(&self.state, id, disk_tag).unwrap();
        id
    }

    fn archive(&self, name: &str) -> Vec<u8> {
        let accounts = self.accounts();
        let account = accounts.named(name).unwrap();
        let at_rest = AtRest::take(&self.state, account.id).unwrap();
        let intent = Intent {
            account: account.id,
            state: MachineState::Saved,
            pid: None,
            base: None,
            detail: None,
            terminals: Some("3 0".into()),
            paused: Some("make (pid 812)".into()),
            since: 0,
        };
        accounts.record_intent(&intent).unwrap();
        let manifest = describe(&accounts, &account, at_rest.kept(), true, "0", 9).unwrap();
        let (memory, _) = at_rest.saved().unwrap();
        let mut archive = Vec::new();
        let source = Source { manifest: &manifest, disk: &at_rest.disk, memory: Some(memory) };
        let written = write(&mut archive, &source).unwrap();
        assert_eq!(written.bytes, archive.len() as u64);
        archive
    }

    fn restore(&self, archive: &[u8], name: Option<&str>) -> Result<Restored, RestoreError> {
        let wish = Wish { name, memory: true, room: 1 << 30 };
        restore(&self.state, &mut self.accounts(), Reader::new(archive)?, &wish)
    }

    /// Nothing is left of what was tried.
    pub fn assert_empty(&self) {
        assert!(self.accounts().list(true).unwrap().is_empty());
        let left: Vec<_> = fs::read_dir(self.state.accounts_dir()).unwrap().collect();
        assert!(left.is_empty(), "{left:?}");
    }
}

#[test]
fn an_account_is_the_same_on_another_host() {
    let (here, there) = (Host::new(), Host::new());
    let old = here.account("alice", true);
    let archive = here.archive("alice");
    assert!(archive.len() < 100_000, "{} bytes: holes and zeroes cost nothing", archive.len());
    let restored = there.restore(&archive, None).unwrap();
    assert_eq!(restored.memory, BackMemory::Kept(base().to_string()));

    let (before, account) = (here.accounts().named("alice").unwrap(), restored.account);
    assert_ne!(account.id, old);
    assert_eq!((account.machine_id, &account.password), (before.machine_id, &before.password));
    assert_eq!((account.linger_s, account.disk_bytes), (Some(7), DISK));
    let keys = |host: &Host, id| {
        let keys = host.accounts().keys(id).unwrap();
        keys.into_iter().map(|key| (key.blob, key.comment, key.options)).collect::<Vec<_>>()
    };
    assert_eq!(keys(&there, account.id), keys(&here, old));
    let digest =
        |host: &Host, id| sparse::digest(&File::open(host.state.disk(id)).unwrap()).unwrap();
    assert_eq!(digest(&there, account.id), digest(&here, old));
    let blocks = fs::metadata(there.state.disk(account.id)).unwrap().blocks();
    assert!(blocks * 512 < 2 << 20, "as sparse as it was: {blocks}");
    let intent = there.accounts().intent(account.id).unwrap().unwrap();
    assert_eq!(intent.terminals.as_deref(), Some("3 0"));
    let names: Vec<_> = fs::read_dir(there.state.account_dir(account.id))
        .unwrap()
        .map(|entry| entry.unwrap().file_name().into_string().unwrap())
        .collect();
    assert_eq!(names.len(), 2, "{names:?}");

    // Its memory is of its disk, and of nothing else: each pair is resumed on its own.
    let at_rest = AtRest::take(&there.state, account.id).unwrap();
    let (file, header) = at_rest.saved().expect("it can be resumed");
    assert_eq!(header.description.account, account.id);
    crate::snapshot::verify(file).unwrap();
    saved::consume(&there.state, account.id).unwrap();
    drop(at_rest);
    assert!(matches!(AtRest::take(&there.state, account.id).unwrap().memory, Resting::Unusable(_)));
    assert!(AtRest::take(&here.state, old).unwrap().saved().is_some());
}

#[test]
fn a_name_that_is_there_is_refused_and_another_one_starts_from_the_disk() {
    let host = Host::new();
    host.account("alice", false);
    let archive = host.archive("alice");
    let taken = host.restore(&archive, None).unwrap_err();
    assert!(matches!(taken, RestoreError::Accounts(AccountsError::NameTaken(_))), "{taken}");
    assert!(host.restore(&archive, Some("../x")).is_err());
    let twin = host.restore(&archive, Some("alice2")).unwrap();
    assert!(matches!(twin.memory, BackMemory::LeftOut(_)));
    assert!(matches!(AtRest::take(&host.state, twin.account.id).unwrap().memory, Resting::Nothing));
    assert_ne!(twin.account.machine_id, host.accounts().named("alice").unwrap().machine_id);
    assert_eq!(host.accounts().list(true).unwrap().len(), 2);
}

#[test]
fn without_room_nothing_is_written() {
    let (here, there) = (Host::new(), Host::new());
    here.account("alice", false);
    let archive = here.archive("alice");
    let wish = Wish { name: None, memory: true, room: 1 << 20 };
    let reader = Reader::new(&archive[..]).unwrap();
    let error = restore(&there.state, &mut there.accounts(), reader, &wish).unwrap_err();
    assert!(matches!(error, RestoreError::NoRoom { .. }), "{error}");
    there.assert_empty();
}

#[test]
fn a_flipped_byte_anywhere_is_found_and_leaves_nothing() {
    let (here, there) = (Host::new(), Host::new());
    here.account("alice", true);
    let mut archive = here.archive("alice");
    // All of the first records, and samples of the rest.
    let length = archive.len();
    let places = (0..512).chain((512..length).step_by(97)).chain(length - 120..length);
    for at in places {
        let mask = 1 << (at % 8);
        archive[at] ^= mask;
        let outcome = there.restore(&archive, None);
        assert!(outcome.is_err(), "byte {at} of {length}");
        archive[at] ^= mask;
    }
    there.assert_empty();
    there.restore(&archive, None).unwrap();
}

#[test]
fn an_archive_that_is_cut_or_lengthened_leaves_nothing() {
    let (here, there) = (Host::new(), Host::new());
    here.account("alice", false);
    let mut archive = here.archive("alice");
    for end in (0..archive.len()).step_by(61).chain([archive.len() - 1]) {
        let error = there.restore(&archive[..end], None).unwrap_err();
        assert!(matches!(error, RestoreError::Archive(ArchiveError::Truncated)), "{end}: {error}");
    }
    archive.push(0);
    let error = there.restore(&archive, None).unwrap_err();
    assert!(matches!(error, RestoreError::Archive(ArchiveError::Trailing)), "{error}");
    there.assert_empty();
}

/// An archive of hand-made records; each has a right sum and number.
fn forged(records: &[(Kind, u64, Vec<u8>)]) -> Vec<u8> {
    let mut bytes = MAGIC.to_vec();
    bytes.extend_from_slice(&VERSION.to_le_bytes());
    bytes.extend_from_slice(&[0; 4]);
    for (number, (kind, offset, payload)) in (0..).zip(records) {
        let payload = match kind {
            Kind::End if payload.is_empty() => blake3::hash(&bytes).as_bytes().to_vec(),
            _ => payload.clone(),
        };
        let (stored, raw) = (payload.len() as u32, payload.len() as u32);
        let header =
            Header { kind: *kind, coding: Coding::Plain, stored, raw, offset: *offset, number };
        bytes.extend_from_slice(&header.encode(&payload));
        bytes.extend_from_slice(&payload);
    }
    bytes
}

fn manifest() -> Manifest {
    let account = Settings {
        id: Uuid::nil(),
        name: "mallory".into(),
        machine_id: "0f".repeat(16),
        password: None,
        guest_name: "mallory".into(),
        disabled: false,
        disabled_until: None,
        expires: None,
        created: 0,
        class: None,
        policy: None,
        max_sessions: None,
        max_streams: None,
        quota_bytes: None,
        linger_s: None,
        max_linger_s: None,
        memory_bytes: None,
        vcpus: None,
        cpu_weight: None,
        cpu_percent: None,
        io_rate: None,
        io_operations: None,
        processes: None,
        disk_bytes: DISK,
    };
    let disk = Disk { bytes: DISK, data_bytes: 8192 };
    Manifest { created: 0, hermitage: String::new(), account, keys: vec![], disk, memory: None }
}

#[test]
fn records_have_their_places() {
    let there = Host::new();
    let about = (Kind::Manifest, 0, serde_json::to_vec(&manifest()).unwrap());
    let disk = |offset, length| (Kind::Disk, offset, vec![7; length]);
    let (memory, end) = ((Kind::Memory, 0, vec![7; 10]), (Kind::End, 0, vec![]));
    let about = || about.clone();
    for (why, records) in [
        ("no manifest", vec![disk(0, 4096), end.clone()]),
        ("a second manifest", vec![about(), about(), end.clone()]),
        ("out of order", vec![about(), disk(4096, 4096), disk(0, 4096), end.clone()]),
        ("overlap", vec![about(), disk(0, 4096), disk(4095, 10), end.clone()]),
        ("beyond", vec![about(), disk(DISK - 10, 11), end.clone()]),
        ("far beyond", vec![about(), disk(u64::MAX - 3, 11), end.clone()]),
        ("more than announced", vec![about(), disk(0, 8192), disk(8192, 1), end.clone()]),
        ("memory of nobody", vec![about(), memory, end.clone()]),
        ("no end", vec![about(), disk(0, 4096)]),
        ("another's total", vec![about(), disk(0, 4096), (Kind::End, 0, vec![7; 32])]),
    ] {
        assert!(there.restore(&forged(&records), None).is_err(), "{why}");
        there.assert_empty();
    }
    there.restore(&forged(&[about(), disk(0, 8192), end]), None).unwrap();
}

#[test]
fn what_a_manifest_says_is_doubted() {
    let there = Host::new();
    let change = |change: &dyn Fn(&mut Manifest)| {
        let mut changed = manifest();
        change(&mut changed);
        forged(&[
            (Kind::Manifest, 0, serde_json::to_vec(&changed).unwrap()),
            (Kind::End, 0, vec![]),
        ])
    };
    let dear = "$argon2id$v=19$m=4000000,t=2,p=1$tADriiEtTJAqnC5mXaFaqQ$nQewTROgDfIzMn9L+BtfnuBEAwKqeTjzLZPAlgoAPPk";
    let memory = |base: &str, paused: &str| {
        let (base, paused) = (base.to_owned(), Some(paused.to_owned()));
        Some(Memory { bytes: 1 << 20, base, terminals: None, paused })
    };
    let changes: [&dyn Fn(&mut Manifest); 17] = [
        &|m| m.account.name = "../../etc".into(),
        &|m| m.account.name = "root".into(),
        &|m| m.account.machine_id = "x".repeat(32),
        &|m| m.account.machine_id = "+".to_owned() + &"0".repeat(31),
        &|m| m.account.password = Some(dear.into()),
        &|m| m.account.password = Some("secret".into()),
        &|m| m.account.policy = Some("always".into()),
        &|m| m.account.class = Some("../x".into()),
        &|m| m.account.guest_name = "a:0:0".into(),
        &|m| m.account.max_sessions = Some(0),
        &|m| m.account.disk_bytes = u64::MAX,
        &|m| m.keys = vec!["ssh-ed25519 AAAA".into()],
        &|m| m.disk.bytes = 4097,
        &|m| m.disk.bytes = !4095,
        &|m| m.disk.data_bytes = DISK + 1,
        &|m| m.memory = memory("../../../etc", ""),
        &|m| m.memory = memory(base().as_str(), "\x1b]0;x"),
    ];
    for (number, by) in changes.iter().enumerate() {
        assert!(there.restore(&change(by), None).is_err(), "change {number}");
    }
    let unknown = br#"{"created":0,"surprise":1}"#.to_vec();
    assert!(Reader::new(&forged(&[(Kind::Manifest, 0, unknown)])[..]).is_err());
    there.assert_empty();
    there.restore(&change(&|_| {}), None).unwrap();
}

/// A record that says it is small and is not.
#[test]
fn a_frame_that_explodes_is_refused() {
    let packed = zstd::bulk::compress(&vec![0; 64 << 20], 19).unwrap();
    let about = serde_json::to_vec(&manifest()).unwrap();
    let mut archive = forged(&[(Kind::Manifest, 0, about)]);
    let header = Header {
        kind: Kind::Disk,
        coding: Coding::Zstd,
        stored: packed.len() as u32,
        raw: 8192,
        offset: 0,
        number: 1,
    };
    archive.extend_from_slice(&header.encode(&packed));
    archive.extend_from_slice(&packed);
    let mut reader = Reader::new(&archive[..]).unwrap();
    assert!(matches!(reader.part(), Err(ArchiveError::Record { number: 1, .. })));
}

#[test]
fn what_a_crash_leaves_is_swept_and_what_it_completed_is_kept() {
    let host = Host::new();
    let mut accounts = host.accounts();
    let id = host.account("alice", false);
    // Before the row.
    let cut = Incoming::begin(&host.state, Uuid::new_v4(), DISK).unwrap();
    std::mem::forget(cut);
    let orphan = host.state.account_dir(Uuid::new_v4());
    fs::create_dir(&orphan).unwrap();
    fs::write(orphan.join("restoring"), "").unwrap();
    // After it.
    fs::write(host.state.account_dir(id).join("restoring"), "").unwrap();
    // Held: somebody is at it.
    let held = host.state.account_dir(Uuid::new_v4());
    fs::create_dir(&held).unwrap();
    fs::write(held.join("restoring"), "").unwrap();
    let lock = File::open(&held).unwrap();
    rustix::fs::flock(&lock, rustix::fs::FlockOperation::LockExclusive).unwrap();
    incoming::sweep(&host.state, &accounts).unwrap();
    assert!(!orphan.exists() && held.exists());
    assert!(host.state.disk(id).exists());
    assert!(!host.state.account_dir(id).join("restoring").exists());
    drop(lock);
    incoming::sweep(&host.state, &accounts).unwrap();
    assert!(!held.exists());
    accounts.remove(id).unwrap();
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(48))]
    /// Whatever bytes come, the answer is an error, in bounded memory; and any flip of a sound one is found.
    #[test]
    fn any_bytes_are_survived(bytes in proptest::collection::vec(any::<u8>(), 0..4000), flip in any::<(u32, u8)>()) {
        let read = |bytes: &[u8]| -> Result<(), ArchiveError> {
            let mut reader = Reader::new(bytes)?;
            while !matches!(reader.part()?, Part::End) {}
            Ok(())
        };
        prop_assert!(read(&bytes).is_err());
        let about = serde_json::to_vec(&manifest()).unwrap();
        let mut archive = forged(&[(Kind::Manifest, 0, about), (Kind::Disk, 0, bytes), (Kind::End, 0, vec![])]
            .into_iter().filter(|(kind, _, payload)| *kind != Kind::Disk || !payload.is_empty()).collect::<Vec<_>>());
        prop_assert!(read(&archive).is_ok());
        let at = flip.0 as usize % archive.len();
        archive[at] ^= flip.1 | 1;
        prop_assert!(read(&archive).is_err(), "byte {at}");
    }
}
