use super::*;
use proptest::prelude::*;

const FILE: &str = include_str!("../../testdata/authorized_keys");
const ED25519: &str =
    "ssh-ed25519 AAAAC3NzaC1lZDI1NTE5AAAAIC3xCeYOSad4glWcZZfQzhMEqcp8IQ/BZiS57yjDzU8e";

fn refused(line: &str) -> KeyError {
    PublicKey::parse_line(line).unwrap_err()
}

#[test]
fn fingerprints_are_those_of_ssh_keygen() {
    let keys = parse_keys(FILE).unwrap();
    let expected: Vec<_> = FILE.lines().filter_map(|l| l.strip_prefix("# SHA256:")).collect();
    let found: Vec<_> = keys.iter().map(PublicKey::fingerprint).collect();
    assert_eq!(found.len(), TYPES.len());
    for (found, expected) in found.iter().zip(expected) {
        assert_eq!(found.strip_prefix("SHA256:"), Some(expected));
    }
    for (_, name) in TYPES {
        assert!(keys.iter().any(|key| key.key_type() == *name), "{name}");
    }
}

#[test]
fn a_key_prints_as_it_was_read() {
    for line in FILE.lines().filter(|line| !line.starts_with('#')) {
        assert_eq!(PublicKey::parse_line(line).unwrap().unwrap().to_string(), line);
    }
}

#[test]
fn the_same_key_twice_is_one_key() {
    let twice = format!("{ED25519} one\r\n\r\n\t\n{ED25519}\tother name\n");
    let keys = parse_keys(&twice).unwrap();
    assert_eq!(keys.len(), 1);
    assert_eq!(keys[0].comment(), "one");
}

#[test]
fn refusals_say_what_was_given() {
    assert_eq!(refused("-----BEGIN OPENSSH PRIVATE KEY-----"), KeyError::PrivateKey);
    assert_eq!(refused("ssh-dss AAAA"), KeyError::Dsa);
    assert!(matches!(refused("ssh-ed25519-cert-v01@openssh.com AAAA"), KeyError::Certificate(_)));
    assert!(matches!(refused(&format!("no-ptty {ED25519}")), KeyError::UnknownType(_)));
    assert!(matches!(refused(&format!("no-ptty,pty {ED25519}")), KeyError::Options(_)));
    assert!(matches!(refused("ssh-foo,pty AAAA"), KeyError::Options(_)));
    assert_eq!(refused("no-pty"), KeyError::NoKey);
    assert!(matches!(refused("no-pty ssh-dss AAAA"), KeyError::Dsa));
    assert_eq!(refused("ssh-ed25519"), KeyError::NoBlob("ssh-ed25519"));
    assert_eq!(refused(&format!("{ED25519}!")), KeyError::NotBase64("ssh-ed25519"));
    assert!(matches!(refused(&ED25519[..ED25519.len() - 4]), KeyError::Malformed { .. }));
    assert!(matches!(
        refused(&ED25519.replace("ssh-ed25519", "ssh-rsa")),
        KeyError::Malformed { .. }
    ));
    assert_eq!(refused(include_str!("../../testdata/rsa1024.pub")), KeyError::RsaSize(1024));
    assert!(matches!(refused(&"x".repeat(MAX_LINE + 1)), KeyError::TooLong(_)));
    assert_eq!(parse_keys("# nothing\n"), Err(KeyFileError::Empty));
    let message = parse_keys(&format!("{ED25519}\nrubbish\n")).unwrap_err().to_string();
    assert!(message.starts_with("line 2: ") && message.contains("\"rubbish\""), "{message}");
}

#[test]
fn options_before_a_key_are_its_own() {
    let line = format!("restrict,command=\"borg serve --path '/a b'\" \t{ED25519} alice@laptop");
    let key = PublicKey::parse_line(&line).unwrap().unwrap();
    assert_eq!(key.options().command.as_deref(), Some("borg serve --path '/a b'"));
    assert!(!key.options().pty && key.comment() == "alice@laptop");
    assert_eq!(PublicKey::parse_line(&key.to_string()).unwrap().unwrap(), key);
    let twice = format!("{ED25519}\nrestrict {ED25519}\n");
    assert_eq!(parse_keys(&twice), Err(KeyFileError::Twice(2)));
}

proptest! {
    /// No text makes the parser panic, and what it takes has no control characters left.
    #[test]
    fn any_text_is_judged(line in "(ssh-ed25519|ssh-rsa|ecdsa-sha2-nistp256)? ?[A-Za-z0-9+/=]{0,80} ?\\PC{0,20}") {
        if let Ok(Some(key)) = PublicKey::parse_line(&line) {
            prop_assert!(!key.to_string().chars().any(char::is_control));
        }
    }

    /// A blob is a whole key or refused: no prefix of one, nothing appended.
    #[test]
    fn no_part_of_a_key_is_a_key(cut in 0usize..51, extra in proptest::collection::vec(any::<u8>(), 1..9)) {
        let key = PublicKey::parse_line(ED25519).unwrap().unwrap();
        let line = |blob: &[u8]| format!("ssh-ed25519 {}", Base64::encode_string(blob));
        prop_assert!(PublicKey::parse_line(&line(&key.blob[..cut])).is_err());
        prop_assert!(PublicKey::parse_line(&line(&[key.blob(), &extra].concat())).is_err());
    }
}
