use super::*;
use crate::StateDir;
use proptest::prelude::*;
use std::fs::{self, OpenOptions, Permissions};
use std::os::unix::fs::{FileExt, PermissionsExt, symlink};
use std::path::{Path, PathBuf};

const MEMORY_BYTES: u64 = 9 << 20;

fn host() -> HostKind {
    HostKind {
        snapshot_version: 3,
        cpu_vendor: "AuthenticAMD".into(),
        cpu_family: 23,
        cpu_model: 49,
        cpuid_digest: "c0ffee".into(),
        kernel_release: "6.12.1".into(),
    }
}

fn description() -> Description {
    Description {
        image: "0123456789abcdef".into(),
        agent_protocol: 1,
        guest_kernel: "6.12.1-cloud".into(),
        machine: Machine { memory_bytes: MEMORY_BYTES, vcpus: 2, most: None },
        restorable_on: host(),
    }
}

/// A base of some data and holes at `dir`/base, and its id.
fn write(dir: &Path) -> (PathBuf, BaseId) {
    let target = dir.join("base");
    let root = dir.join("image-root.erofs");
    fs::write(&root, vec![5; 20_000]).unwrap();
    let writer = BaseWriter::create(&target, MEMORY_BYTES).unwrap();
    writer.memory().write_all_at(&[1; 5000], 100).unwrap();
    writer.memory().write_all_at(&[2; 4096], 8 << 20).unwrap();
    let id = writer.finish(description(), &[3; 1000], &root).unwrap();
    (target, id)
}

/// Writes over sealed files, as damage does.
fn damage(path: &Path, change: impl FnOnce(&fs::File)) {
    fs::set_permissions(path, Permissions::from_mode(0o600)).unwrap();
    change(&OpenOptions::new().read(true).write(true).open(path).unwrap());
}

/// The file that was found damaged, and what was said.
fn refused(dir: &Path) -> (&'static str, String) {
    match Base::open(dir) {
        Err(error @ (BaseError::Damaged { file, .. } | BaseError::Read { file, .. })) => {
            (file, error.to_string())
        }
        other => panic!("should have been refused: {other:?}"),
    }
}

#[test]
fn a_base_is_read_as_written() {
    let dir = tempfile::tempdir().unwrap();
    let (target, id) = write(dir.path());
    let base = Base::open(&target).unwrap();
    assert_eq!(*base.id(), id);
    assert_eq!(base.state, [3; 1000]);
    let content = &base.manifest.content;
    assert_eq!(content.machine, description().machine);
    assert_eq!(content.restorable_on, host());
    let mut page = [0; 4096];
    base.memory.read_exact_at(&mut page, 8 << 20).unwrap();
    assert_eq!(page, [2; 4096]);
    for name in [MANIFEST, MEMORY, STATE, ROOT] {
        let mode = fs::metadata(target.join(name)).unwrap().permissions().mode();
        assert_eq!(mode & 0o222, 0, "{name} is sealed");
    }
    assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 2, "nothing is left beside");
}

#[test]
fn the_same_content_has_the_same_id() {
    let (a, b) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
    assert_eq!(write(a.path()).1, write(b.path()).1);
}

#[test]
fn what_is_not_finished_never_was() {
    let dir = tempfile::tempdir().unwrap();
    let target = dir.path().join("base");
    drop(BaseWriter::create(&target, 4096).unwrap());
    let writer = BaseWriter::create(&target, 4096).unwrap();
    let missing = dir.path().join("no.erofs");
    assert!(matches!(
        writer.finish(description(), &[], &missing),
        Err(BaseError::Write { path, .. }) if path == missing
    ));
    let writer = BaseWriter::create(&target, 4096).unwrap();
    let long = vec![0; MAX_STATE + 1];
    assert!(matches!(
        writer.finish(description(), &long, &missing),
        Err(BaseError::StateTooLong(_))
    ));
    assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 0);
    assert!(matches!(Base::open(&target), Err(BaseError::Missing(_))));
}

#[test]
fn a_base_is_not_replaced() {
    let dir = tempfile::tempdir().unwrap();
    let (target, id) = write(dir.path());
    let writer = BaseWriter::create(&target, 4096).unwrap();
    assert!(writer.finish(description(), &[], &target.join(ROOT)).is_err());
    assert_eq!(*Base::open(&target).unwrap().id(), id);
}

#[test]
fn every_bit_of_the_manifest_counts() {
    let dir = tempfile::tempdir().unwrap();
    let (target, _) = write(dir.path());
    let path = target.join(MANIFEST);
    let whole = fs::read(&path).unwrap();
    fs::set_permissions(&path, Permissions::from_mode(0o600)).unwrap();
    for at in 0..whole.len() {
        for bit in 0..8 {
            let mut altered = whole.clone();
            altered[at] ^= 1 << bit;
            fs::write(&path, altered).unwrap();
            assert!(Base::manifest(&target).is_err(), "bit {bit} of byte {at}");
        }
    }
    for altered in [&whole[..whole.len() - 1], &[&whole[..], b" "].concat(), b"", b"{}"] {
        fs::write(&path, altered).unwrap();
        assert_eq!(refused(&target).0, MANIFEST);
    }
    fs::write(&path, whole).unwrap();
    Base::open(&target).unwrap();
}

#[test]
fn another_version_is_named() {
    let dir = tempfile::tempdir().unwrap();
    let (target, _) = write(dir.path());
    let path = target.join(MANIFEST);
    let other = fs::read_to_string(&path).unwrap().replace("\"version\": 1", "\"version\": 7");
    fs::remove_file(&path).unwrap();
    fs::write(&path, other).unwrap();
    let (file, words) = refused(&target);
    assert_eq!(file, MANIFEST);
    assert!(words.contains("format version is 7") && words.contains("base build"), "{words}");
}

#[test]
fn a_truncated_or_lengthened_file_is_named() {
    for name in [MEMORY, STATE, ROOT] {
        let dir = tempfile::tempdir().unwrap();
        let (target, _) = write(dir.path());
        let length = fs::metadata(target.join(name)).unwrap().len();
        damage(&target.join(name), |file| file.set_len(length - 1).unwrap());
        let (file, words) = refused(&target);
        assert_eq!(file, name);
        assert!(words.contains("truncated") && words.contains(&length.to_string()), "{words}");
        damage(&target.join(name), |file| file.set_len(length + 4096).unwrap());
        assert!(refused(&target).1.contains("lengthened"));
        // The last byte is back, but as a zero.
        damage(&target.join(name), |file| file.set_len(length).unwrap());
        if name != MEMORY {
            assert!(refused(&target).1.contains("altered"), "{name}");
        }
    }
}

#[test]
fn only_regular_files_are_read() {
    for name in [MANIFEST, MEMORY, STATE, ROOT] {
        let dir = tempfile::tempdir().unwrap();
        let (target, _) = write(dir.path());
        let aside = dir.path().join("aside");
        fs::rename(target.join(name), &aside).unwrap();
        assert_eq!(refused(&target).0, name, "missing");
        symlink(&aside, target.join(name)).unwrap();
        assert_eq!(refused(&target).0, name, "a symbolic link");
        fs::remove_file(target.join(name)).unwrap();
        let mode = nix::sys::stat::Mode::S_IRUSR;
        nix::unistd::mkfifo(&target.join(name), mode).unwrap();
        assert_eq!(refused(&target).0, name, "a FIFO, without waiting for its writer");
    }
}

#[test]
fn bases_are_listed_with_their_damage() {
    let dir = tempfile::tempdir().unwrap();
    let state = StateDir::new(dir.path().join("state"));
    assert!(list(&state).unwrap().is_empty());
    state.create().unwrap();
    let (target, id) = write(dir.path());
    let wrong = BaseId::parse(&"0".repeat(32)).unwrap();
    fs::rename(&target, state.base(&id)).unwrap();
    fs::create_dir(state.base(&wrong)).unwrap();
    fs::copy(state.base(&id).join(MANIFEST), state.base(&wrong).join(MANIFEST)).unwrap();
    fs::create_dir(state.bases_dir().join(".new-1-base")).unwrap();

    let listed = list(&state).unwrap();
    let find = |id: &BaseId| listed.iter().find(|listed| listed.id == *id).unwrap();
    assert_eq!(listed.len(), 2);
    assert_eq!(find(&id).manifest.as_ref().unwrap().id, id);
    assert!(find(&id).allocated < MEMORY_BYTES / 2, "holes take nothing");
    let error = find(&wrong).manifest.as_ref().unwrap_err().to_string();
    assert!(error.contains(id.as_str()), "{error}");

    Removal::begin(&state, &id).unwrap().unwrap().finish().unwrap();
    assert!(!state.base(&id).exists());
}

#[test]
fn another_host_is_told_apart() {
    assert!(host().mismatches(&HostKind { kernel_release: "6.13".into(), ..host() }).is_empty());
    let other = HostKind { cpu_model: 1, snapshot_version: 4, ..host() };
    let found = host().mismatches(&other);
    assert_eq!(found.len(), 2);
    assert!(found[1].contains("family 23 model 49") && found[1].contains("model 1"), "{found:?}");
    let here = HostKind::here(3, "c0ffee".into()).unwrap();
    assert!(!here.kernel_release.is_empty() && !here.cpu_vendor.is_empty());
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]
    /// One flipped bit, wherever it is, is found and its file named.
    #[test]
    fn a_flipped_bit_is_found(
        name in proptest::sample::select(vec![MEMORY, STATE, ROOT]),
        at in any::<u64>(),
        bit in 0u32..8,
    ) {
        let dir = tempfile::tempdir().unwrap();
        let (target, _) = write(dir.path());
        damage(&target.join(name), |file| {
            let at = at % file.metadata().unwrap().len();
            let mut byte = [0];
            file.read_exact_at(&mut byte, at).unwrap();
            file.write_all_at(&[byte[0] ^ (1u8 << bit)], at).unwrap();
        });
        let (file, words) = refused(&target);
        prop_assert_eq!(file, name);
        prop_assert!(words.contains("altered"), "{}", words);
    }
}

#[test]
fn a_base_in_use_is_not_removed() {
    use std::time::{Duration, Instant};

    let dir = tempfile::tempdir().unwrap();
    let state = StateDir::new(dir.path());
    state.create().unwrap();
    let (made, id) = write(dir.path());
    fs::rename(made, state.base(&id)).unwrap();

    let base = Base::open(&state.base(&id)).unwrap();
    assert!(Removal::begin(&state, &id).unwrap().is_none());
    // As in a machine's process, which has a duplicate of the descriptor.
    let mapped = base.memory.try_clone().unwrap();
    drop(base);
    assert!(Removal::begin(&state, &id).unwrap().is_none());
    drop(mapped);

    // Somebody only looks: whoever wants to use the base waits that long.
    let looking = Removal::begin(&state, &id).unwrap().unwrap();
    let other = state.base(&id);
    let user = std::thread::spawn(move || {
        let begun = Instant::now();
        Base::open(&other).map(|_| begun.elapsed())
    });
    std::thread::sleep(Duration::from_millis(100));
    drop(looking);
    assert!(user.join().unwrap().unwrap() >= Duration::from_millis(50));

    Removal::begin(&state, &id).unwrap().unwrap().finish().unwrap();
    assert!(matches!(Base::open(&state.base(&id)), Err(BaseError::Missing(_))));
}

#[test]
fn half_a_base_can_be_removed() {
    let dir = tempfile::tempdir().unwrap();
    let state = StateDir::new(dir.path());
    state.create().unwrap();
    let (made, id) = write(dir.path());
    fs::rename(made, state.base(&id)).unwrap();
    fs::remove_file(state.base(&id).join(MANIFEST)).unwrap();
    fs::remove_file(state.base(&id).join(MEMORY)).unwrap();
    Removal::begin(&state, &id).unwrap().unwrap().finish().unwrap();
    assert!(!state.base(&id).exists());
}

#[test]
fn a_machine_has_what_is_wanted_between_the_least_and_the_most() {
    let size = |mib: u64, vcpus| Size { memory_bytes: mib << 20, vcpus };
    let base = Machine::new(size(512, 1), size(2048, 4));
    let fit = |mib: u64, vcpus| base.fit(Some(mib << 20), Some(vcpus));
    assert_eq!(base.fit(None, None), size(512, 1));
    assert_eq!(fit(1024, 2), size(1024, 2));
    assert_eq!(fit(100, 0), size(512, 1));
    assert_eq!(fit(1000, 2), size(1024, 2), "in whole blocks, none less than was asked for");
    assert_eq!(fit(100_000, 200), size(2048, 4));
    assert_eq!(base.fit(Some(u64::MAX), None), size(2048, 1));
    assert!(base.allows(size(640, 3)) && base.allows(size(512, 1)));
    for not in [size(600, 1), size(256, 1), size(4096, 1), size(512, 0), size(512, 5)] {
        assert!(!base.allows(not), "{not:?}");
    }
    let fixed = Machine::new(size(500, 2), size(500, 2));
    assert_eq!((fixed.most, fixed.fit(Some(u64::MAX), Some(9))), (None, size(500, 2)));
}

#[test]
fn a_base_whose_machines_can_grow_says_to_what() {
    let dir = tempfile::tempdir().unwrap();
    let root = dir.path().join("root");
    fs::write(&root, vec![5; 4096]).unwrap();
    let writer = BaseWriter::create(&dir.path().join("base"), 4 * MEMORY_BLOCK).unwrap();
    let least = Size { memory_bytes: MEMORY_BLOCK, vcpus: 1 };
    let most = Size { memory_bytes: 4 * MEMORY_BLOCK, vcpus: 2 };
    let description = Description { machine: Machine::new(least, most), ..description() };
    writer.finish(description, &[], &root).unwrap();
    let machine = Base::open(&dir.path().join("base")).unwrap().manifest.content.machine;
    assert_eq!((machine.least(), machine.most()), (least, most));
}
