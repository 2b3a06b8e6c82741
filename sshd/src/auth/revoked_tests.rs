use std::{fs, process::Command};

use proptest::prelude::*;

use super::*;

/// A folder with keys, in which `ssh-keygen` makes lists of a specification (ssh-keygen(1)).
struct Desk(tempfile::TempDir);

impl Desk {
    fn new() -> Self {
        let desk = Self(tempfile::tempdir().unwrap());
        for name in ["ca", "other-ca", "alice", "bob"] {
            desk.keygen(&["-q", "-t", "ed25519", "-N", "", "-f", name]);
        }
        desk
    }

    fn keygen(&self, arguments: &[&str]) {
        let mut keygen = Command::new("ssh-keygen");
        let made = keygen.args(arguments).current_dir(self.0.path()).output().unwrap();
        assert!(made.status.success(), "{}", String::from_utf8_lossy(&made.stderr));
    }

    fn blob(&self, name: &str) -> Vec<u8> {
        let line = fs::read_to_string(self.0.path().join(format!("{name}.pub"))).unwrap();
        PublicKey::parse_line(&line).unwrap().unwrap().blob().to_owned()
    }

    fn krl(&self, options: &[&str], specification: &str) -> Vec<u8> {
        fs::write(self.0.path().join("spec"), specification).unwrap();
        self.keygen(&[&["-q", "-k", "-f", "krl"], options, &["spec"]].concat());
        fs::read(self.0.path().join("krl")).unwrap()
    }
}

#[test]
fn lists_of_ssh_keygen_name_keys_and_fingerprints() {
    let desk = Desk::new();
    let line = fs::read_to_string(desk.0.path().join("alice.pub")).unwrap();
    for specification in [line.clone(), format!("key: {line}"), format!("sha256: {line}")] {
        let list = Revoked::parse(&desk.krl(&[], &specification)).unwrap();
        assert!(list.check_key(&desk.blob("alice")).is_err(), "{specification}");
        assert!(list.check_key(&desk.blob("bob")).is_ok());
    }
    let error = Revoked::parse(&desk.krl(&[], &format!("sha1: {line}"))).unwrap_err();
    assert!(error.contains("SHA-1"), "{error}");
}

#[test]
fn lists_of_ssh_keygen_name_certificates_of_an_authority() {
    let desk = Desk::new();
    // So many that some become a list, some a range, some a bitmap.
    let mut specification = String::from("id: lost laptop\nserial: 5\nserial: 1000-2000\n");
    for serial in (5_000..5_200).step_by(3) {
        specification.push_str(&format!("serial: {serial}\n"));
    }
    specification.push_str("serial: 18446744073709551615\n");
    let bytes = desk.krl(&["-s", "ca.pub"], &specification);
    let list = Revoked::parse(&bytes).unwrap();
    assert!(!list.certificates[0].bitmaps.is_empty() && !list.certificates[0].serials.is_empty());
    let ca = desk.blob("ca");
    let revoked = |serial, id: &str| list.check_certificate(&ca, serial, id).is_err();
    for serial in (1..7_000).chain([u64::MAX - 1, u64::MAX]) {
        let listed = matches!(serial, 5 | 1000..=2000 | u64::MAX)
            || (5_000..5_200).contains(&serial) && (serial - 5_000) % 3 == 0;
        assert_eq!(revoked(serial, "x"), listed, "{serial}");
    }
    assert!(revoked(1, "lost laptop") && !revoked(0, "x"));
    assert!(list.check_certificate(&desk.blob("other-ca"), 5, "lost laptop").is_ok());
    // Without an authority they are anybody's.
    let list = Revoked::parse(&desk.krl(&["-s", "none"], "serial: 5\n")).unwrap();
    assert!(list.check_certificate(&ca, 5, "x").is_err());
}

#[test]
fn a_list_is_read_whole_or_not_at_all() {
    let desk = Desk::new();
    let line = fs::read_to_string(desk.0.path().join("alice.pub")).unwrap();
    let bytes = desk.krl(&["-s", "ca.pub"], &format!("{line}serial: 7\nid: x\n"));
    Revoked::parse(&bytes).unwrap();
    let whole_sections = (0..bytes.len()).filter(|&cut| Revoked::parse(&bytes[..cut]).is_ok());
    // An end between two sections can't be told from the list's; there are two.
    assert!(whole_sections.count() <= 3);
    let with = |section: &[u8]| Revoked::parse(&[&bytes, section].concat()).unwrap_err();
    assert!(with(&[99, 0, 0, 0, 0]).contains("kind 99"));
    assert!(with(&[4, 0, 0, 0, 0]).contains("signed"));
    assert!(with(b"\xff\0\0\0\x0a\0\0\0\x01x\x01\0\0\0\0").contains("critical extension x"));
    let ignored = [&bytes, &b"\xff\0\0\0\x0a\0\0\0\x01x\0\0\0\0\0"[..]].concat();
    assert!(Revoked::parse(&ignored).unwrap().check_key(&desk.blob("alice")).is_err());
}

#[test]
fn a_line_that_names_nobody_is_an_error() {
    for (text, told) in [
        ("SHA256:short", "line 1: \"SHA256:short\" is no fingerprint"),
        ("# x\nserial: many", "line 2: \"many\" is no serial"),
        ("rubbish", "line 1"),
    ] {
        let error = Revoked::parse(text.as_bytes()).unwrap_err();
        assert!(error.contains(told), "{error}");
    }
    assert!(Revoked::parse(b"\xff\xfe").is_err());
}

proptest! {
    #[test]
    fn any_bytes_are_a_list_or_refused(tail in proptest::collection::vec(any::<u8>(), 0..200)) {
        let header = [krl::MAGIC, &[0, 0, 0, 1], &[0; 24], &[0; 8]].concat();
        let _ = Revoked::parse(&[&header[..], &tail].concat());
        let _ = Revoked::parse(&tail);
    }
}
