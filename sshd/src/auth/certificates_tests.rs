use std::{fs, process::Command};

use super::*;

/// 2026-06-30 00:00:00 UTC.
const NOW: u64 = 1_782_777_600;
const HERE: [u8; 4] = [192, 0, 2, 1];

/// An authority's files in a folder of their own, and a user's key.
struct Desk {
    dir: tempfile::TempDir,
}

impl Desk {
    fn new() -> Self {
        let desk = Self { dir: tempfile::tempdir().unwrap() };
        for name in ["ca", "stranger", "alice"] {
            desk.keygen(&["-q", "-t", "ed25519", "-N", "", "-C", name, "-f"], name);
        }
        desk
    }

    fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    fn keygen(&self, options: &[&str], name: &str) {
        let path = self.path(name);
        let made = Command::new("ssh-keygen").args(options).arg(path).output().unwrap();
        assert!(made.status.success(), "{}", String::from_utf8_lossy(&made.stderr));
    }

    /// What `ca` signs with these options of `ssh-keygen -s`.
    fn sign(&self, ca: &str, options: &[&str]) -> Certificate {
        let ca = self.path(ca).display().to_string();
        let all = [&["-q", "-s", &ca, "-I", "the id", "-z", "7"], options].concat();
        self.keygen(&all, "alice.pub");
        self.certificate("alice")
    }

    fn certificate(&self, name: &str) -> Certificate {
        let text = fs::read_to_string(self.path(&format!("{name}-cert.pub"))).unwrap();
        Certificate::from_openssh(&text).unwrap()
    }

    fn trust(&self) -> Trust {
        Trust { authorities: Some(self.path("ca.pub")), revoked: None }
    }

    fn revoking(&self, list: &str) -> Trust {
        fs::write(self.path("revoked"), list).unwrap();
        Trust { revoked: Some(self.path("revoked")), ..self.trust() }
    }
}

fn refused(trust: &Trust, certificate: &Certificate) -> String {
    trust.judge(certificate, "alice", HERE.into(), NOW).unwrap_err().to_string()
}

#[test]
fn a_certificate_is_for_its_names_and_of_its_authority() {
    let desk = Desk::new();
    let good = desk.sign("ca", &["-n", "bob,alice"]);
    let options = desk.trust().judge(&good, "alice", HERE.into(), NOW).unwrap();
    assert!(options.pty && options.agent_forwarding && options.port_forwarding);
    assert_eq!(options.command, None);
    let other = desk.trust().judge(&good, "carol", HERE.into(), NOW).unwrap_err().to_string();
    assert_eq!(other, "it is for bob, alice");
    assert!(refused(&Trust::default(), &good).contains("ssh.user_ca_keys"));

    assert!(refused(&desk.trust(), &desk.sign("ca", &[])).contains("nobody"));
    assert!(refused(&desk.trust(), &desk.sign("ca", &["-h", "-n", "alice"])).contains("host"));
    desk.keygen(&["-q", "-t", "rsa", "-b", "1024", "-N", "", "-f"], "short");
    let ca = desk.path("ca").display().to_string();
    desk.keygen(&["-q", "-s", &ca, "-I", "x", "-n", "alice"], "short.pub");
    assert!(refused(&desk.trust(), &desk.certificate("short")).contains("1024 bits"));
    let strange = desk.sign("stranger", &["-n", "alice"]);
    assert!(refused(&desk.trust(), &strange).contains("no authority here"));
}

#[test]
fn what_a_certificate_restricts_is_kept() {
    let desk = Desk::new();
    let bound = desk.sign(
        "ca",
        &["-n", "alice", "-O", "clear", "-O", "force-command=echo hi", "-O", "permit-pty"],
    );
    let options = desk.trust().judge(&bound, "alice", HERE.into(), NOW).unwrap();
    assert_eq!(options.command.as_deref(), Some("echo hi"));
    assert!(options.pty && !options.agent_forwarding && !options.port_forwarding);

    let here = desk.sign("ca", &["-n", "alice", "-O", "source-address=192.0.2.0/24,2001:db8::/32"]);
    assert!(desk.trust().judge(&here, "alice", HERE.into(), NOW).is_ok());
    let elsewhere = desk.trust().judge(&here, "alice", [10, 0, 0, 1].into(), NOW).unwrap_err();
    assert_eq!(elsewhere.to_string(), "it may not be used from 10.0.0.1");

    let odd = desk.sign("ca", &["-n", "alice", "-O", "critical:moon-phase=full"]);
    assert!(refused(&desk.trust(), &odd).contains("moon-phase"));
}

#[test]
fn a_certificate_has_its_time() {
    let desk = Desk::new();
    let june = desk.sign("ca", &["-n", "alice", "-V", "20260601Z:20260630Z"]);
    let judge = |now| desk.trust().judge(&june, "alice", HERE.into(), now);
    assert!(matches!(judge(NOW), Err(Refusal::Expired)));
    assert!(judge(NOW - 1).is_ok() && judge(NOW - 29 * 86_400).is_ok());
    assert!(matches!(judge(NOW - 29 * 86_400 - 1), Err(Refusal::Early)));
    // russh takes a time beyond 2^63 as "always".
    let never = desk.sign("ca", &["-n", "alice", "-V", "0xfffffffffffffff0:forever"]);
    assert!(matches!(desk.trust().judge(&never, "alice", HERE.into(), NOW), Err(Refusal::Early)));
}

#[test]
fn what_is_revoked_opens_nothing() {
    let desk = Desk::new();
    let good = desk.sign("ca", &["-n", "alice"]);
    let line = |name: &str| fs::read_to_string(desk.path(name)).unwrap();
    let key = PublicKey::parse_line(&line("alice.pub")).unwrap().unwrap();
    assert!(desk.revoking("# nobody\n").judge(&good, "alice", HERE.into(), NOW).is_ok());
    for list in [
        line("alice.pub"),
        line("ca.pub"),
        key.fingerprint(),
        "serial: 7\n".into(),
        "id: the id\n".into(),
    ] {
        assert!(refused(&desk.revoking(&list), &good).contains("revoked"), "{list}");
    }
    assert!(desk.revoking(&line("alice.pub")).check_key(key.blob()).is_err());
    assert!(desk.revoking(&line("stranger.pub")).check_key(key.blob()).is_ok());
}

#[test]
fn a_list_that_can_not_be_read_lets_nobody_in() {
    let desk = Desk::new();
    let good = desk.sign("ca", &["-n", "alice"]);
    for list in ["SSHKRL\n\0 cut short", "serial: many", "no key"] {
        let trust = desk.revoking(list);
        assert!(trust.check().is_err());
        assert!(refused(&trust, &good).contains("revoked:"), "{list}");
        assert!(trust.check_key(b"any").is_err());
    }
    let missing = Trust { revoked: Some(desk.path("nowhere")), ..desk.trust() };
    assert!(refused(&missing, &good).contains("nowhere"));
    let no_authorities = Trust { authorities: Some(desk.path("nowhere")), revoked: None };
    assert!(refused(&no_authorities, &good).contains("nowhere"));
    assert!(no_authorities.check().is_err() && desk.trust().check().is_ok());
    // An authority that is to be restricted is not taken as one that is not.
    let line = fs::read_to_string(desk.path("ca.pub")).unwrap();
    fs::write(desk.path("bound"), format!("no-pty {line}")).unwrap();
    let bound = Trust { authorities: Some(desk.path("bound")), revoked: None };
    assert!(bound.check().unwrap_err().to_string().contains("no-pty"));
    fs::write(desk.path("large"), vec![b'#'; MAX_FILE as usize + 1]).unwrap();
    let large = Trust { revoked: Some(desk.path("large")), ..desk.trust() };
    assert!(refused(&large, &good).contains("more than"));
}
