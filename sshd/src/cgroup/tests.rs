//! On a folder that stands for the tree: its files are plain ones.

use super::*;

struct Folder {
    dir: tempfile::TempDir,
    tree: Arc<Tree>,
}

impl Folder {
    fn new(controllers: &str) -> Self {
        let dir = tempfile::tempdir().unwrap();
        fs::create_dir(dir.path().join(MACHINES)).unwrap();
        for group in [dir.path().to_owned(), dir.path().join(MACHINES)] {
            fs::write(group.join("cgroup.controllers"), controllers).unwrap();
        }
        let tree = Arc::new(Tree::below(dir.path(), Some("8:16".into())).unwrap());
        Self { dir, tree }
    }

    fn read(&self, name: &str, file: &str) -> Option<String> {
        fs::read_to_string(self.tree.path().join(name).join(file)).ok()
    }

    /// What the kernel does by itself when a group is removed.
    fn empty(&self, name: &str) {
        for entry in fs::read_dir(self.tree.path().join(name)).unwrap() {
            fs::remove_file(entry.unwrap().path()).unwrap();
        }
    }
}

const ALICE: Uuid = Uuid::from_u128(7);

fn share(cpu_percent: Option<u32>, io_rate: Option<u64>) -> Share {
    Share { cpu_percent, io_rate, ..Share::default() }
}

fn ceilings(share: Share) -> Ceilings {
    Ceilings { shape: Some(Shape { memory_bytes: 1 << 29, vcpus: 1 }), share }
}

#[test]
fn a_machines_group_has_its_limits_and_takes_others() {
    let folder = Folder::new("cpuset cpu io memory pids");
    let group = folder.tree.group(ALICE).unwrap();
    let name = ALICE.to_string();
    group.apply(&ceilings(share(Some(20), None))).unwrap();
    let read = |file| folder.read(&name, file).unwrap();
    assert_eq!((read("cpu.max"), read("memory.max")), ("10000 50000".into(), "704643072".into()));
    assert_eq!(folder.read(&name, "io.max"), None, "nobody asked for it");
    group.change(share(Some(50), Some(1 << 20))).unwrap();
    assert_eq!(read("cpu.max"), "25000 50000");
    assert_eq!(read("io.max"), "8:16 rbps=1048576 wbps=1048576 riops=max wiops=max");
    group.change(share(None, None)).unwrap();
    assert_eq!(read("cpu.max"), "max 50000");
    assert_eq!(read("io.max"), "8:16 rbps=max wbps=max riops=max wiops=max");
    assert_eq!(read("memory.max"), "704643072", "it stays");
    folder.empty(&name);
    drop(group);
    assert!(!folder.tree.path().join(&name).exists());
}

#[test]
fn what_can_not_be_enforced_is_named_and_the_rest_is() {
    let folder = Folder::new("cpu memory");
    assert_eq!(folder.tree.missing(), ["io", "pids"]);
    let group = folder.tree.group(ALICE).unwrap();
    let error = group.apply(&ceilings(share(Some(20), Some(1 << 20)))).unwrap_err().to_string();
    assert!(error.contains("pids controller"), "{error}");
    assert_eq!(folder.read(&ALICE.to_string(), "cpu.max").unwrap(), "10000 50000");
    let unlimited = Ceilings { shape: None, share: Share::default() };
    group.apply(&unlimited).unwrap_err();
    let fresh = folder.tree.group(Uuid::from_u128(8)).unwrap();
    fresh.apply(&unlimited).unwrap();
}

#[tokio::test]
async fn what_a_killed_service_left_is_removed_once_it_is_empty() {
    let folder = Folder::new("cpu memory pids");
    let left = [1, 2].map(|n| folder.tree.path().join(Uuid::from_u128(n).to_string()));
    left.iter().for_each(|path| fs::create_dir(path).unwrap());
    fs::create_dir(folder.tree.path().join("somebody-else")).unwrap();
    // Stands for a process that is still in it.
    fs::write(left[0].join("busy"), "").unwrap();
    let tree = Arc::new(Tree::below(folder.dir.path(), None).unwrap());
    tree.sweep();
    tokio::time::sleep(SWEEP.0 * 3).await;
    assert_eq!(left.each_ref().map(|path| path.exists()), [true, false]);
    fs::remove_file(left[0].join("busy")).unwrap();
    tokio::time::sleep(SWEEP.0 * 3).await;
    assert!(!left[0].exists() && folder.tree.path().join("somebody-else").exists());
}

#[tokio::test]
async fn a_group_that_is_used_again_is_not_swept_away() {
    let folder = Folder::new("cpu memory pids");
    let path = folder.tree.path().join(ALICE.to_string());
    fs::create_dir(&path).unwrap();
    let tree = Arc::new(Tree::below(folder.dir.path(), None).unwrap());
    let group = tree.group(ALICE).unwrap();
    // A folder with files in it would stay anyway.
    fs::remove_file(path.join("cgroup.procs")).unwrap();
    tree.sweep();
    tokio::time::sleep(SWEEP.0 * 3).await;
    assert!(path.exists());
    drop(group);
    assert!(!path.exists());
}
