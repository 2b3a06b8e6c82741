//! Tests of [`super`], in a file of their own for its length.

use super::*;

const PASSWD: &str =
    "root:x:0:0:root:/root:/bin/bash\ngames:x:5:60:games:/usr/games:/usr/sbin/nologin\n";
const GROUP: &str = "root:x:0:\nsudo:x:27:\nusers:x:100:bob\n";

/// A root file system of what these functions look at.
struct Root(PathBuf);

impl Root {
    fn new(name: &str) -> Root {
        let root =
            std::env::temp_dir().join(format!("hermitage-agent-{}-{name}", std::process::id()));
        let _ = fs::remove_dir_all(&root);
        fs::create_dir_all(root.join("etc/skel/.config")).unwrap();
        fs::create_dir_all(root.join("home")).unwrap();
        fs::write(root.join("etc/skel/.bashrc"), "# bashrc\n").unwrap();
        fs::write(root.join("etc/passwd"), PASSWD).unwrap();
        fs::write(root.join("etc/group"), GROUP).unwrap();
        fs::write(root.join("etc/shadow"), "root:*:19000:0:99999:7:::\n").unwrap();
        fs::set_permissions(root.join("etc/shadow"), Permissions::from_mode(0o640)).unwrap();
        fs::write(root.join("etc/gshadow"), "root:*::\nsudo:*::\n").unwrap();
        Root(root)
    }

    fn read(&self, path: &str) -> String {
        String::from_utf8(fs::read(self.0.join(path)).unwrap()).unwrap()
    }
}

impl Drop for Root {
    fn drop(&mut self) {
        let _ = fs::remove_dir_all(&self.0);
    }
}

/// Only root may give files away; the owner of the tests can always keep them.
fn own_uid() -> u32 {
    let uid = nix::unistd::getuid().as_raw();
    if uid == 0 { 1000 } else { uid }
}

#[test]
fn a_new_user_is_complete_and_doing_it_again_changes_nothing() {
    let root = Root::new("new");
    let uid = own_uid();
    ensure(&root.0, "alice", uid).unwrap();

    let user = find(&root.0, "alice").unwrap().unwrap();
    assert_eq!(user.uid, uid);
    assert_eq!(user.gid, uid);
    assert_eq!(user.home, Path::new("/home/alice"));
    assert_eq!(user.shell, Path::new("/bin/bash"));
    assert_eq!(user.groups, [27], "sudo");
    assert!(root.read("etc/shadow").ends_with("alice:*:::::::\n"));
    assert_eq!(
        fs::metadata(root.0.join("etc/shadow")).unwrap().permissions().mode() & 0o777,
        0o640
    );
    assert!(root.read("etc/gshadow").contains("sudo:*::alice\n"));
    assert_eq!(root.read("etc/subuid"), "alice:100000:65536\n");
    assert_eq!(root.read("home/alice/.bashrc"), "# bashrc\n");
    assert!(root.0.join("home/alice/.config").is_dir());
    assert_eq!(
        fs::metadata(root.0.join("home/alice")).unwrap().permissions().mode() & 0o777,
        0o700
    );

    let before: Vec<String> =
        ["passwd", "group", "shadow"].map(|f| root.read(&format!("etc/{f}"))).into();
    fs::write(root.0.join("home/alice/.bashrc"), "mine\n").unwrap();
    ensure(&root.0, "alice", uid).unwrap();
    let after: Vec<String> =
        ["passwd", "group", "shadow"].map(|f| root.read(&format!("etc/{f}"))).into();
    assert_eq!(before, after);
    assert_eq!(root.read("home/alice/.bashrc"), "mine\n");
    let left: Vec<_> = fs::read_dir(root.0.join("etc"))
        .unwrap()
        .map(|entry| entry.unwrap().file_name().into_string().unwrap())
        .filter(|name| name.ends_with(".hermitage"))
        .collect();
    assert!(left.is_empty(), "{left:?}");
}

#[test]
fn a_half_made_home_is_made_again() {
    let root = Root::new("half");
    fs::create_dir_all(root.0.join("home/.alice.new/junk")).unwrap();
    ensure(&root.0, "alice", own_uid()).unwrap();
    assert!(!root.0.join("home/alice/junk").exists());
    assert!(!root.0.join("home/.alice.new").exists());
}

#[test]
fn system_names_and_taken_ids_are_refused_by_name() {
    let root = Root::new("taken");
    let error = ensure(&root.0, "games", 1000).unwrap_err().to_string();
    assert!(error.contains("games") && error.contains("uid 5"), "{error}");
    let error = ensure(&root.0, "alice", 5).unwrap_err().to_string();
    assert!(error.contains("belongs to games"), "{error}");
    assert_eq!(root.read("etc/passwd"), PASSWD);
}

#[test]
fn login_names() {
    for good in ["a", "alice", "_x", "a-b_c9"] {
        assert!(is_login_name(good), "{good}");
    }
    let long = "a".repeat(33);
    for bad in ["", "9a", "-a", "Alice", "a b", "a/b", "..", "a:b", "a\n", "ä", "root.x", &long] {
        assert!(!is_login_name(bad), "{bad:?}");
    }
}

#[test]
fn what_the_owner_wrote_survives() {
    let mut group = GROUP.replace("sudo:x:27:", "sudo:x:27:carol").into_bytes();
    group.extend_from_slice(b"\xff\xfe odd line\nlast:x:9:");
    let edited = with_member(&group, "sudo", "alice");
    let expected = [
        &b"root:x:0:\nsudo:x:27:carol,alice\nusers:x:100:bob\n"[..],
        b"\xff\xfe odd line\nlast:x:9:",
    ]
    .concat();
    assert_eq!(edited, expected);
    assert_eq!(with_member(&edited, "sudo", "alice"), edited);
    assert_eq!(with_member(b"other:x:1:\n", "sudo", "alice"), b"other:x:1:\n");
    assert_eq!(with_line(b"no newline", "x"), b"no newline\nx\n");
    // a member's name inside another's is not the member
    assert_eq!(groups_of(b"g:x:7:malice,bob\n", "alice"), [0u32; 0]);
}

#[test]
fn a_changed_shell_counts_and_nonsense_is_an_error() {
    let root = Root::new("shell");
    let line = "alice:x:1000:1000::/home/alice:\n";
    fs::write(root.0.join("etc/passwd"), line).unwrap();
    assert_eq!(find(&root.0, "alice").unwrap().unwrap().shell, Path::new("/bin/sh"));
    fs::write(root.0.join("etc/passwd"), "alice:x:many\n").unwrap();
    assert!(find(&root.0, "alice").is_err());
    assert_eq!(find(&root.0, "nobody").unwrap(), None);
}

#[test]
fn a_disk_of_another_name_gives_its_user_the_new_one() {
    let root = Root::new("renamed");
    let passwd = "alice:x:1000:1000:alice:/home/alice:/bin/zsh\nalice2:x:1001:1001::/:/bin/sh\n";
    fs::write(root.0.join("etc/passwd"), format!("{PASSWD}{passwd}")).unwrap();
    let group = "sudo:x:27:alice,alice2\nalice:x:1000:\nmusic:x:1002:carol,alice\n";
    fs::write(root.0.join("etc/group"), group).unwrap();
    fs::write(root.0.join("etc/shadow"), "root:*:19000:0:99999:7:::\nalice:*:::::::\n").unwrap();
    fs::write(root.0.join("etc/gshadow"), "sudo:*::alice\nmusic:!:alice:alice,carol\n").unwrap();
    fs::write(root.0.join("etc/subuid"), "alice:100000:65536\n").unwrap();
    fs::create_dir(root.0.join("home/alice")).unwrap();
    for _ in 0..2 {
        ensure(&root.0, "bob", 1000).unwrap();
        let bob = find(&root.0, "bob").unwrap().unwrap();
        assert_eq!((bob.home.as_path(), bob.groups), (Path::new("/home/alice"), vec![27, 1002]));
        assert_eq!(find(&root.0, "alice").unwrap(), None);
        let group = "sudo:x:27:bob,alice2\nalice:x:1000:\nmusic:x:1002:carol,bob\n";
        assert_eq!(root.read("etc/group"), group);
        assert!(root.read("etc/passwd").contains("\nbob:x:1000:1000:alice:/home/alice:/bin/zsh\n"));
        assert!(root.read("etc/shadow").contains("\nbob:*:"));
        assert_eq!(root.read("etc/gshadow"), "sudo:*::bob\nmusic:!:bob:bob,carol\n");
        assert_eq!(root.read("etc/subuid"), "bob:100000:65536\n");
        assert!(!root.0.join("home/bob").exists());
    }
}
