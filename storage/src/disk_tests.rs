use super::*;
use std::io::{BufRead, BufReader};
use std::os::unix::fs::FileExt;
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

fn state() -> (tempfile::TempDir, StateDir, PathBuf) {
    let dir = tempfile::tempdir().unwrap();
    let state = StateDir::new(dir.path().join("state"));
    state.create().unwrap();
    let template = dir.path().join("template");
    let file = File::create(&template).unwrap();
    file.set_len(64 << 20).unwrap();
    file.write_all_at(&[7; 10_000], 1024).unwrap();
    file.write_all_at(&[8; 10_000], 50 << 20).unwrap();
    (dir, state, template)
}

#[test]
fn a_disk_is_the_template_extended() {
    let (_dir, state, template) = state();
    let account = Uuid::new_v4();
    let start = Instant::now();
    assert!(provision(&state, account, &template, 10 << 30).unwrap());
    assert!(start.elapsed() < Duration::from_secs(1), "{:?}", start.elapsed());
    let disk = open_locked(&state.disk(account)).unwrap();
    assert_eq!(disk.metadata().unwrap().len(), 10 << 30);
    let mut bytes = [0; 10_000];
    disk.read_exact_at(&mut bytes, 50 << 20).unwrap();
    assert_eq!(bytes, [8; 10_000]);
    assert!(allocated(&state.disk(account)).unwrap() < 1 << 20, "holes stay holes");
    assert_eq!(disk.metadata().unwrap().mode() & 0o777, 0o600);
}

#[test]
fn a_disk_that_is_there_is_kept() {
    let (_dir, state, template) = state();
    let account = Uuid::new_v4();
    provision(&state, account, &template, 1 << 30).unwrap();
    let mine = b"what the account wrote";
    open_locked(&state.disk(account)).unwrap().write_all_at(mine, 0).unwrap();
    assert!(!provision(&state, account, &template, 2 << 30).unwrap());
    assert!(create(&template, &state.disk(account), 1 << 30).is_err());
    let kept = fs::read(state.disk(account)).unwrap();
    assert_eq!(&kept[..mine.len()], mine);
    assert_eq!(fs::read_dir(state.account_dir(account)).unwrap().count(), 1, "nothing left beside");
}

#[test]
fn impossible_sizes_and_templates_are_refused() {
    let (_dir, state, template) = state();
    let disk = state.root().join("disk");
    for size in [0, 32 << 20, (64 << 20) + 1] {
        assert!(matches!(create(&template, &disk, size), Err(DiskError::Size { .. })), "{size}");
    }
    let error = create(Path::new("/nonexistent/template"), &disk, 1 << 30).unwrap_err();
    assert!(error.to_string().contains("/nonexistent/template"), "{error}");
    assert!(!disk.exists());
}

#[test]
fn a_lock_lives_with_the_open_file() {
    let (_dir, state, template) = state();
    let disk = state.root().join("disk");
    create(&template, &disk, 1 << 30).unwrap();
    let first = open_locked(&disk).unwrap();
    let copy = first.try_clone().unwrap();
    drop(first);
    // The process closing *another* descriptor of the file must not end it, as it would a POSIX lock.
    drop(File::open(&disk).unwrap());
    assert!(matches!(open_locked(&disk), Err(DiskError::InUse(path)) if path == disk));
    drop(copy);
    open_locked(&disk).unwrap();
}

/// Not a test of its own: what [`another_process_holds_the_lock_until_it_is_killed`] starts.
#[test]
fn holder() {
    let Some(path) = std::env::var_os("TEST_HOLD_DISK") else { return };
    let _held = open_locked(Path::new(&path)).unwrap();
    println!("\nholding");
    std::thread::sleep(Duration::from_secs(60));
}

/// Between a file's opening and its lock the one who had it may have put another in its place.
#[test]
fn a_disk_that_was_replaced_before_it_was_locked_is_not_taken() {
    let dir = tempfile::tempdir().unwrap();
    let [path, new] = ["disk.img", "new"].map(|name| dir.path().join(name));
    std::fs::write(&path, "old").unwrap();
    let opened = File::options().read(true).write(true).open(&path).unwrap();
    std::fs::write(&new, "new").unwrap();
    std::fs::rename(&new, &path).unwrap();
    assert!(matches!(lock_as(&path, &opened), Err(DiskError::InUse(_))));
    open_locked(&path).unwrap();
}

#[test]
fn another_process_holds_the_lock_until_it_is_killed() {
    let (_dir, state, template) = state();
    let disk = state.root().join("disk");
    create(&template, &disk, 1 << 30).unwrap();
    let mut other = Command::new(std::env::current_exe().unwrap())
        .args(["--exact", "disk::tests::holder", "--nocapture"])
        .env("TEST_HOLD_DISK", &disk)
        .stdout(Stdio::piped())
        .spawn()
        .unwrap();
    let output = BufReader::new(other.stdout.take().unwrap());
    assert!(output.lines().any(|line| line.unwrap() == "holding"));
    assert!(matches!(open_locked(&disk), Err(DiskError::InUse(_))));
    other.kill().unwrap();
    other.wait().unwrap();
    open_locked(&disk).unwrap();
}

#[test]
fn only_a_regular_file_is_a_disk() {
    let (_dir, state, template) = state();
    let disk = state.root().join("disk");
    assert!(matches!(open_locked(&disk), Err(DiskError::Missing(_))));
    std::os::unix::fs::symlink(&template, &disk).unwrap();
    assert!(matches!(open_locked(&disk), Err(DiskError::Io { .. })), "no way to another file");
}

#[test]
fn a_removed_accounts_disk_waits_for_purge() {
    let (_dir, state, template) = state();
    let account = Uuid::new_v4();
    provision(&state, account, &template, 1 << 30).unwrap();
    let held = open_locked(&state.disk(account)).unwrap();
    assert!(matches!(retire(&state, account), Err(DiskError::InUse(_))), "its machine still runs");
    drop(held);
    retire(&state, account).unwrap();
    retire(&state, account).unwrap();
    assert!(!state.account_dir(account).exists());
    assert!(state.removed_dir(account).join(StateDir::DISK).exists());
    assert!(purge(&state, account).unwrap() > 0);
    assert_eq!(purge(&state, account).unwrap(), 0);
    assert!(!state.removed_dir(account).exists());
}

#[test]
fn a_tag_stays_with_the_disk_until_it_is_cleared() {
    let (_dir, state, template) = state();
    let account = Uuid::new_v4();
    provision(&state, account, &template, 1 << 30).unwrap();
    let disk = open_locked(&state.disk(account)).unwrap();
    assert_eq!(tag(&disk).unwrap(), None);
    clear_tag(&disk).unwrap();
    set_tag(&disk, [1; 16]).unwrap();
    set_tag(&disk, [2; 16]).unwrap();
    drop(disk);
    let disk = open_locked(&state.disk(account)).unwrap();
    assert_eq!(tag(&disk).unwrap(), Some([2; 16]));
    for odd in [&[3; 15][..], &[3; 17], &[3; 400], &[]] {
        fsetxattr(&disk, TAG, odd, XattrFlags::empty()).unwrap();
        assert_eq!(tag(&disk).unwrap(), None, "{} bytes", odd.len());
    }
    clear_tag(&disk).unwrap();
    assert_eq!(tag(&disk).unwrap(), None);
    let copy = state.disk(account).with_file_name("copy");
    fs::copy(state.disk(account), &copy).unwrap();
    assert_eq!(tag(&File::open(&copy).unwrap()).unwrap(), None);
}

#[test]
fn a_new_disk_takes_the_place_of_one_that_nobody_has() {
    let dir = tempfile::tempdir().unwrap();
    let (template, disk) = (dir.path().join("template"), dir.path().join("disk.img"));
    fs::write(&template, vec![7; 8192]).unwrap();
    assert!(matches!(renew(&disk, &template, 16384), Err(DiskError::Missing(_))));
    create(&template, &disk, 16384).unwrap();
    fs::write(&disk, vec![1; 16384]).unwrap();
    let held = open_locked(&disk).unwrap();
    set_tag(&held, [9; 16]).unwrap();
    assert!(matches!(renew(&disk, &template, 16384), Err(DiskError::InUse(_))));
    assert_eq!(fs::read(&disk).unwrap(), vec![1; 16384]);
    drop(held);
    renew(&disk, &template, 32768).unwrap();
    assert_eq!(fs::read(&disk).unwrap(), [vec![7; 8192], vec![0; 24576]].concat());
    assert_eq!(tag(&File::open(&disk).unwrap()).unwrap(), None, "no memory is of it");
}
