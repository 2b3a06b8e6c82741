use std::os::unix::fs::FileExt as _;

use super::*;
use crate::disk::DiskError;
use crate::rest::Resting;
use crate::saved;
use crate::snapshot::{Description, PAGE, Snapshot, Writer};

/// An account whose disk and memory say in which generation they are.
struct Host {
    _dir: tempfile::TempDir,
    state: StateDir,
    account: Uuid,
}

const ROOM: u64 = 1 << 30;

impl Host {
    fn new() -> Self {
        let dir = tempfile::tempdir().unwrap();
        let state = StateDir::new(dir.path());
        let account = Uuid::from_u128(7);
        fs::create_dir_all(state.account_dir(account)).unwrap();
        fs::create_dir_all(state.base(&base())).unwrap();
        let disk = File::create(state.disk(account)).unwrap();
        disk.set_len(1 << 20).unwrap();
        Self { _dir: dir, state, account }
    }

    fn rest(&self) -> AtRest {
        AtRest::take(&self.state, self.account).unwrap()
    }

    /// A machine runs until this generation and is saved, or ends.
    fn live(&self, generation: u8, save: bool) {
        let at_rest = self.rest();
        if at_rest.saved().is_some() {
            saved::consume(&self.state, self.account).unwrap();
        }
        saved::withdraw(&self.state, self.account).unwrap();
        at_rest.disk.write_all_at(&[generation], 8192).unwrap();
        if save {
            let file = saved::create(&self.state, self.account).unwrap();
            let page = [[generation; PAGE]];
            let mut writer = Writer::new(&file).unwrap();
            writer.data(3, &page).unwrap();
            let disk_tag = *Uuid::new_v4().as_bytes();
            let (account, ram) = (self.account, 64 * PAGE as u64);
            let base = base();
            let about = Description {
                base,
                account,
                disk_tag,
                created: 0,
                ram,
                vcpus: 1,
                state_version: 1,
            };
            writer.finish(about, &[generation]).unwrap();
            saved::publish(&self.state, self.account, disk_tag).unwrap();
        }
    }

    /// The generation of the disk, and that of the memory if it can be resumed.
    fn now(&self) -> (u8, Option<u8>) {
        let at_rest = self.rest();
        let mut byte = [0];
        at_rest.disk.read_exact_at(&mut byte, 8192).unwrap();
        let memory = at_rest.saved().map(|(file, _)| {
            let snapshot = Snapshot::open(file.try_clone().unwrap()).unwrap();
            snapshot.state[0]
        });
        (byte[0], memory)
    }

    fn tag(&self) -> Option<Tag> {
        disk::tag(&File::open(self.state.disk(self.account)).unwrap()).unwrap()
    }

    fn create(&self, name: &str) -> Result<About, CheckpointError> {
        create(&self.state, &self.rest(), &named(name), known(), 1, ROOM)
    }

    fn back(&self, to: &str, keep: &str) -> Result<RolledBack, CheckpointError> {
        rollback(&self.state, self.rest(), &named(to), &named(keep), known(), 2, ROOM)
    }

    fn names(&self) -> Vec<String> {
        let all = list(&self.state, self.account).unwrap();
        all.into_iter().map(|one| one.name.to_string()).collect()
    }

    /// What is in the account's folder beside the checkpoints.
    fn files(&self) -> Vec<String> {
        let entries = fs::read_dir(self.state.account_dir(self.account)).unwrap();
        let mut names: Vec<_> =
            entries.map(|e| e.unwrap().file_name().into_string().unwrap()).collect();
        names.sort();
        names
    }
}

#[test]
fn a_state_in_use_is_kept_as_it_was_copied() {
    let host = Host::new();
    host.live(1, true);
    // What a machine's process makes: a copy of the disk and the memory of that moment, of a tag that the live disk
    // does not have.
    let dir = host.state.account_dir(host.account);
    let (disk, memory) = (dir.join("copy"), dir.join("memory"));
    fs::copy(host.state.disk(host.account), &disk).unwrap();
    fs::copy(host.state.snapshot(host.account), &memory).unwrap();
    let copy = File::open(&disk).unwrap();
    disk::clear_tag(&copy).unwrap();
    host.live(2, false);
    // Its machine runs on, and has the disk.
    let running = host.rest();
    let copies = InUse { disk: &disk, memory: Some(&memory) };
    let take = |copies: &InUse<'_>, name: &str| {
        create_in_use(&host.state, host.account, copies, &named(name), known(), 1)
    };
    let about = take(&copies, "used").unwrap();
    assert!(about.memory.is_some() && !about.kept);
    assert!(matches!(take(&copies, "used"), Err(CheckpointError::Taken(_))));
    let files = InUse { disk: &disk, memory: None };
    assert!(take(&files, "files").unwrap().memory.is_none());
    fs::remove_file(&disk).unwrap();
    fs::remove_file(&memory).unwrap();
    assert!(take(&copies, "late").is_err());
    drop(running);
    assert_eq!(host.now(), (2, None));
    assert_eq!(host.names(), ["files", "used"]);

    host.back("used", "kept").unwrap();
    assert_eq!(host.now(), (1, Some(1)));
    host.back("files", "kept-2").unwrap();
    assert_eq!(host.now(), (1, None));
}

#[test]
fn memory_that_is_damaged_or_anothers_is_not_kept() {
    let host = Host::new();
    host.live(1, true);
    let dir = host.state.account_dir(host.account);
    let (disk, memory) = (dir.join("copy"), dir.join("memory"));
    fs::copy(host.state.disk(host.account), &disk).unwrap();
    fs::copy(host.state.snapshot(host.account), &memory).unwrap();
    let copies = InUse { disk: &disk, memory: Some(&memory) };
    let other = Uuid::from_u128(8);
    fs::create_dir_all(host.state.account_dir(other)).unwrap();
    let taken = create_in_use(&host.state, other, &copies, &named("one"), known(), 1);
    assert!(matches!(taken, Err(CheckpointError::Io { .. })));
    let file = OpenOptions::new().write(true).open(&memory).unwrap();
    file.write_all_at(&[9], 5000).unwrap();
    let taken = create_in_use(&host.state, host.account, &copies, &named("one"), known(), 1);
    assert!(matches!(taken, Err(CheckpointError::Memory(_))));
    assert_eq!(host.names(), [""; 0]);
    assert!(list(&host.state, other).unwrap().is_empty());
}

fn base() -> BaseId {
    BaseId::parse("00112233445566778899aabbccddeeff").unwrap()
}

fn named(name: &str) -> Name {
    Name::parse(name).unwrap()
}

fn known() -> Known {
    Known { terminals: Some("1 0".into()), paused: None }
}

#[test]
fn files_and_memory_go_back_together_and_come_forth_again() {
    let host = Host::new();
    host.live(1, true);
    let about = host.create("one").unwrap();
    assert_eq!(about.memory.unwrap().terminals.as_deref(), Some("1 0"));
    assert_eq!(host.now(), (1, Some(1)), "it is resumed as if nothing had been");
    host.live(2, true);
    let done = host.back("one", "before").unwrap();
    // Whoever it was done for has the account until it is written down.
    assert!(matches!(AtRest::take(&host.state, host.account), Err(DiskError::InUse(_))));
    drop(done.held);
    assert_eq!((done.kept.as_str(), done.dropped), ("before", None));
    assert_eq!(host.now(), (1, Some(1)));
    assert_eq!(host.files(), ["checkpoints", "disk.img", "resume.snap"]);
    host.back("before", "between").unwrap();
    assert_eq!(host.now(), (2, Some(2)));
    assert_eq!(host.names(), ["one", "before", "between"]);
}

#[test]
fn each_time_is_a_pair_of_its_own_that_is_resumed_once() {
    let host = Host::new();
    host.live(1, true);
    host.create("one").unwrap();
    let mut tags = vec![host.tag()];
    for round in 0..3 {
        host.back("one", &format!("before-{round}")).unwrap();
        tags.push(host.tag());
        assert_eq!(host.now(), (1, Some(1)));
        // Used up: this pair never comes again, whatever is still in its place.
        saved::consume(&host.state, host.account).unwrap();
        assert!(matches!(host.rest().memory, Resting::Unusable(_)));
    }
    tags.sort();
    tags.dedup();
    assert_eq!(tags.len(), 4);
    assert!(!tags.contains(&None));
}

#[test]
fn without_memory_files_alone_go_back() {
    let host = Host::new();
    host.live(1, false);
    host.create("files").unwrap();
    host.live(2, true);
    host.back("files", "asleep").unwrap();
    assert_eq!((host.now(), host.tag()), ((1, None), None));
    assert_eq!(host.files(), ["checkpoints", "disk.img"]);
    host.live(3, false);
    host.back("asleep", "third").unwrap();
    assert_eq!(host.now(), (2, Some(2)));
}

#[test]
fn a_damaged_checkpoint_changes_nothing() {
    let host = Host::new();
    host.live(1, true);
    host.create("one").unwrap();
    host.live(2, true);
    let dir = host.state.checkpoints_dir(host.account).join("one");
    let damage = |file: &str, at: u64| {
        let file = OpenOptions::new().write(true).open(dir.join(file)).unwrap();
        let mut byte = [0];
        File::open(dir.join("resume.snap")).unwrap().read_exact_at(&mut byte, at).unwrap();
        file.write_all_at(&[byte[0] ^ 1], at).unwrap();
        move || file.write_all_at(&byte, at).unwrap()
    };
    for at in [20, 5000, 8192] {
        let repair = damage("resume.snap", at);
        let error = host.back("one", "before").unwrap_err();
        assert!(matches!(error, CheckpointError::Damaged { .. }), "{error}");
        repair();
    }
    disk::set_tag(&File::open(dir.join("disk.img")).unwrap(), [1; 16]).unwrap();
    let error = host.back("one", "before").unwrap_err().to_string();
    assert!(error.contains("not taken with its disk"), "{error}");
    fs::write(dir.join(ABOUT), r#"{"version":1,"surprise":2}"#).unwrap();
    assert!(host.back("one", "before").is_err());
    assert_eq!((host.now(), host.names()), ((2, Some(2)), vec!["one".to_owned()]));
    assert_eq!(host.files(), ["checkpoints", "disk.img", "resume.snap"]);
    remove(&host.state, host.account, &named("one")).unwrap();
    assert!(matches!(host.back("one", "x").unwrap_err(), CheckpointError::Unknown(_)));
}

#[test]
fn there_are_not_more_than_there_may_be_and_what_was_kept_goes_first() {
    let host = Host::new();
    host.live(1, true);
    for number in 0..MOST {
        host.create(&format!("c{number}")).unwrap();
    }
    assert!(matches!(host.create("more").unwrap_err(), CheckpointError::TooMany));
    assert!(matches!(host.back("c1", "before").unwrap_err(), CheckpointError::TooMany));
    remove(&host.state, host.account, &named("c0")).unwrap();
    assert!(matches!(host.create("c1").unwrap_err(), CheckpointError::Taken(_)));
    assert_eq!(host.back("c1", "kept-1").unwrap().dropped, None);
    let second = host.back("c1", "kept-2").unwrap();
    drop(second.held);
    assert_eq!(second.dropped.unwrap().as_str(), "kept-1");
    assert!(matches!(host.back("kept-2", "kept-3").unwrap_err(), CheckpointError::TooMany));
    assert!(usage(&host.state, host.account) > 0);
    assert!(bases(&host.state, host.account).unwrap().iter().all(|(id, _)| *id == base()));
}

#[test]
fn without_room_for_a_copy_there_is_no_checkpoint() {
    let host = Host::new();
    host.live(1, true);
    let made = create(&host.state, &host.rest(), &named("one"), known(), 1, 0);
    if let Err(error) = made {
        assert!(matches!(error, CheckpointError::NoRoom { .. }), "{error}");
        assert!(host.names().is_empty());
    }
}
