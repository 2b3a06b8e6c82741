//! The host key and the algorithms this server speaks.

use std::{
    borrow::Cow,
    io::{ErrorKind, Write},
    os::unix::fs::{DirBuilderExt, OpenOptionsExt},
    path::{Path, PathBuf},
    time::Duration,
};

use russh::{
    MethodKind, MethodSet, Preferred, SshId, cipher, compression, kex,
    keys::{
        Algorithm, EcdsaCurve, HashAlg, PrivateKey,
        ssh_key::{LineEnding, private::Ed25519Keypair},
    },
    mac,
};

use crate::{config::Ssh, session::WINDOW};

/// Largest packet we take, in bytes.
const PACKET: u32 = 32 * 1024;

/// Failed offers and attempts after which russh itself closes the connection. Clients offer every key
/// of their agent, which is no attack; wrong passwords have a lower limit of their own.
const MAX_ATTEMPTS: usize = 32;

#[derive(Debug, thiserror::Error)]
pub enum HostKeyError {
    #[error(
        "can't read the host key {path}: {reason}; restore it from a backup, or delete it and tell the users that the host key changes"
    )]
    Read { path: PathBuf, reason: String },
    #[error("can't make the host key {path}: {reason}")]
    Make { path: PathBuf, reason: String },
}

/// Reads the host key, or makes it at the first start.
pub fn host_key(path: &Path) -> Result<PrivateKey, HostKeyError> {
    match read_host_key(path)? {
        Some(key) => Ok(key),
        None => make_host_key(path)
            .map_err(|reason| HostKeyError::Make { path: path.into(), reason: reason.to_string() }),
    }
}

/// The host key, if it was made already.
pub fn read_host_key(path: &Path) -> Result<Option<PrivateKey>, HostKeyError> {
    let unreadable = |reason: String| HostKeyError::Read { path: path.into(), reason };
    match std::fs::read_to_string(path) {
        Ok(text) => match PrivateKey::from_openssh(&text) {
            Ok(key) => Ok(Some(key)),
            Err(error) => Err(unreadable(error.to_string())),
        },
        Err(error) if error.kind() == ErrorKind::NotFound => Ok(None),
        Err(error) => Err(unreadable(error.to_string())),
    }
}

fn make_host_key(path: &Path) -> Result<PrivateKey, Box<dyn std::error::Error>> {
    let mut seed = [0; 32];
    getrandom::fill(&mut seed).map_err(|error| error.to_string())?;
    let mut key = PrivateKey::from(Ed25519Keypair::from_seed(&seed));
    key.set_comment("hermitage");
    let text = key.to_openssh(LineEnding::LF)?;

    let dir = path.parent().unwrap_or(Path::new("."));
    std::fs::DirBuilder::new().recursive(true).mode(0o700).create(dir)?;
    // Written beside and renamed: a key that is there is whole, and stays.
    let beside = path.with_extension("new");
    let _ = std::fs::remove_file(&beside);
    let mut file =
        std::fs::OpenOptions::new().write(true).create_new(true).mode(0o600).open(&beside)?;
    file.write_all(text.as_bytes())?;
    file.sync_all()?;
    std::fs::rename(&beside, path)?;
    std::fs::File::open(dir)?.sync_all()?;
    Ok(key)
}

/// What russh is told.
pub fn server_config(ssh: &Ssh, key: PrivateKey) -> russh::server::Config {
    russh::server::Config {
        // No version: it helps whoever looks for a bug more than anybody else.
        server_id: SshId::Standard(Cow::Borrowed("SSH-2.0-OpenSSH_compatible_Hermitage")),
        methods: methods(),
        // Rejected offers cost nothing; the authenticator makes failures slow.
        auth_rejection_time: Duration::ZERO,
        auth_rejection_time_initial: None,
        keys: vec![key],
        window_size: WINDOW,
        maximum_packet_size: PACKET,
        // Its queues are not used: data goes to the handler's callbacks.
        channel_buffer_size: 1,
        preferred: preferred(),
        max_auth_attempts: MAX_ATTEMPTS,
        // It would end idle shells, and is reset by any packet.
        inactivity_timeout: None,
        // Keeps middleboxes from forgetting the connection. It never ends one (0): while a program
        // leaves its input unread, answers are not read either. A peer that is gone is noticed by TCP.
        keepalive_interval: Some(Duration::from_secs(ssh.keepalive)),
        keepalive_max: 0,
        nodelay: true,
        ..Default::default()
    }
}

/// The methods this server knows. They are said again with every failure: russh would otherwise drop
/// a method for good when it failed once.
pub fn methods() -> MethodSet {
    MethodSet::from([MethodKind::PublicKey, MethodKind::Password].as_slice())
}

/// No SHA-1, no finite-field or NIST key exchange, post-quantum first. A MAC without encrypt-then-MAC comes
/// last, for libssh2 before 1.11 (curl, libgit2 and PHP of Debian 12, Ubuntu 22.04), which has no other.
fn preferred() -> Preferred {
    Preferred {
        kex: Cow::Borrowed(&[
            kex::MLKEM768X25519_SHA256,
            kex::CURVE25519,
            kex::CURVE25519_PRE_RFC_8731,
            kex::EXTENSION_SUPPORT_AS_SERVER,
            kex::EXTENSION_OPENSSH_STRICT_KEX_AS_SERVER,
        ]),
        // Also what clients may authenticate with (RFC 8308 server-sig-algs). The host key is ed25519.
        key: Cow::Owned(vec![
            Algorithm::Ed25519,
            Algorithm::SkEd25519,
            Algorithm::SkEcdsaSha2NistP256,
            Algorithm::Ecdsa { curve: EcdsaCurve::NistP256 },
            Algorithm::Ecdsa { curve: EcdsaCurve::NistP384 },
            Algorithm::Ecdsa { curve: EcdsaCurve::NistP521 },
            Algorithm::Rsa { hash: Some(HashAlg::Sha512) },
            Algorithm::Rsa { hash: Some(HashAlg::Sha256) },
        ]),
        host_key_certificates: Cow::Borrowed(&[]),
        cipher: Cow::Borrowed(&[
            cipher::CHACHA20_POLY1305,
            cipher::AES_256_GCM,
            cipher::AES_128_GCM,
            cipher::AES_256_CTR,
        ]),
        mac: Cow::Borrowed(&[mac::HMAC_SHA256_ETM, mac::HMAC_SHA512_ETM, mac::HMAC_SHA256]),
        compression: Cow::Borrowed(&[compression::NONE]),
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::PermissionsExt;

    use super::*;

    #[test]
    fn the_host_key_is_made_once_private_and_kept() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("host-keys/ssh_host_ed25519_key");
        let made = host_key(&path).unwrap();
        let mode = std::fs::metadata(&path).unwrap().permissions().mode();
        assert_eq!(mode & 0o777, 0o600);
        let kept = host_key(&path).unwrap();
        assert_eq!(made.public_key().to_bytes().unwrap(), kept.public_key().to_bytes().unwrap());
    }

    #[test]
    fn a_damaged_host_key_is_not_replaced() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("key");
        std::fs::write(&path, "-----BEGIN OPENSSH PRIVATE KEY-----\nnot\n").unwrap();
        let error = host_key(&path).unwrap_err().to_string();
        assert!(error.contains("restore it"), "{error}");
        assert!(std::fs::read_to_string(&path).unwrap().contains("not"));
    }
}
