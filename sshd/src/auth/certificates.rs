//! Logins by certificate (OpenSSH's PROTOCOL.certkeys): a key that an authority has signed for names.
//!
//! The authorities and what is revoked are files, read when they are needed: who is taken off a list is out
//! with the next login. A list that can't be read lets nobody in by a certificate, and if it is the list
//! of what is revoked, nobody by a key.
//!
//! russh has checked the signature of the authority and that of the client before a certificate gets here;
//! all else is ours. It looks at the times as well, but takes those that are no time for it (beyond 2^63) as
//! "always".

use std::{
    fs::File,
    io::{self, Read as _},
    net::IpAddr,
    path::{Path, PathBuf},
};

use hermitage_storage::accounts::{KeyOptions, PublicKey, SourcePattern, fingerprint, parse_keys};
use russh::keys::{Algorithm, Certificate, ssh_key::public::KeyData};

use super::{Refusal, revoked::Revoked};

/// Longest file of authorities or revoked keys.
const MAX_FILE: u64 = 4 << 20;

/// Longest command that a certificate may force, as that of a key.
const MAX_COMMAND: usize = 8 * 1024;

#[derive(Clone, Debug, Default)]
pub struct Trust {
    /// Public keys of the authorities that may sign users' keys. None: certificates are refused.
    pub authorities: Option<PathBuf>,
    /// Keys, fingerprints, serials and ids that open nothing.
    pub revoked: Option<PathBuf>,
}

impl Trust {
    /// Whether the files can be used at all: what is wrong with them is to be known when the service starts.
    pub fn check(&self) -> Result<(), Refusal> {
        if let Some(path) = &self.authorities {
            authorities(path)?;
        }
        self.revoked().map(drop)
    }

    /// What the certificate's owner may do as `user`, at `now` in seconds since 1970. Blocks on files.
    pub fn judge(
        &self,
        certificate: &Certificate,
        user: &str,
        source: IpAddr,
        now: u64,
    ) -> Result<KeyOptions, Refusal> {
        let path = self.authorities.as_deref().ok_or(Refusal::NoAuthorities)?;
        let authorities = authorities(path)?;
        let authority = blob(certificate.signature_key())?;
        if !authorities.iter().any(|known| known.blob() == authority) {
            return Err(Refusal::Authority(fingerprint(&authority)));
        }
        if certificate.signature().algorithm() == (Algorithm::Rsa { hash: None }) {
            return Err(Refusal::Sha1);
        }
        if !certificate.cert_type().is_user() {
            return Err(Refusal::Host);
        }
        // One without names would be good for everybody's account: sshd refuses it here as well.
        let principals = certificate.valid_principals();
        if !principals.iter().any(|principal| principal == user) {
            let names: Vec<_> = principals.iter().take(8).map(|name| shown(name)).collect();
            let names = if names.is_empty() { "nobody".to_owned() } else { names.join(", ") };
            return Err(Refusal::Principals(names));
        }
        if now < certificate.valid_after() {
            return Err(Refusal::Early);
        }
        if now >= certificate.valid_before() {
            return Err(Refusal::Expired);
        }
        let options = options(certificate)?;
        if !options.allows_source(source) {
            return Err(Refusal::Source(source));
        }
        let key = acceptable(certificate.public_key())?;
        let revoked = self.revoked()?;
        for blob in [&key, &authority] {
            revoked.check_key(blob)?;
        }
        revoked.check_certificate(&authority, certificate.serial(), certificate.key_id())?;
        Ok(options)
    }

    /// Whether a plain key may still be used. Blocks on files.
    pub fn check_key(&self, blob: &[u8]) -> Result<(), Refusal> {
        self.revoked()?.check_key(blob)
    }

    fn revoked(&self) -> Result<Revoked, Refusal> {
        match &self.revoked {
            None => Ok(Revoked::default()),
            Some(path) => Revoked::parse(&read(path)?)
                .map_err(|reason| Refusal::Parse { path: path.clone(), reason }),
        }
    }
}

fn authorities(path: &Path) -> Result<Vec<PublicKey>, Refusal> {
    let refused = |reason: String| Refusal::Parse { path: path.into(), reason };
    let text = String::from_utf8(read(path)?).map_err(|_| refused("it is no text".into()))?;
    let keys = parse_keys(&text).map_err(|error| refused(error.to_string()))?;
    match keys.iter().find(|key| !key.options().is_empty()) {
        // Nothing would keep them.
        Some(key) => Err(refused(format!(
            "the authority {} has options (\"{}\"); give the key alone",
            key.fingerprint(),
            key.options()
        ))),
        None => Ok(keys),
    }
}

/// The certificate's critical options and extensions as a key's.
fn options(certificate: &Certificate) -> Result<KeyOptions, Refusal> {
    let mut options = KeyOptions::restricted();
    for (name, value) in certificate.critical_options().iter() {
        match name.as_str() {
            "force-command" if value.len() > MAX_COMMAND || value.contains('\0') => {
                return Err(Refusal::Value("force-command", shown(value)));
            }
            "force-command" => options.command = Some(value.clone()),
            "source-address" => {
                let pattern = |text: &str| SourcePattern::parse(text);
                let patterns: Option<Vec<_>> = value.split(',').map(pattern).collect();
                options.from =
                    patterns.ok_or_else(|| Refusal::Value("source-address", shown(value)))?;
            }
            _ => return Err(Refusal::Critical(shown(name))),
        }
    }
    // Unknown extensions are to be ignored.
    for (name, _) in certificate.extensions().iter() {
        match name.as_str() {
            "permit-pty" => options.pty = true,
            "permit-agent-forwarding" => options.agent_forwarding = true,
            "permit-port-forwarding" => options.port_forwarding = true,
            _ => {}
        }
    }
    Ok(options)
}

/// A key that would be taken without a certificate, too: an authority may have signed a short one.
fn acceptable(key: &KeyData) -> Result<Vec<u8>, Refusal> {
    let line = russh::keys::PublicKey::new(key.clone(), "").to_openssh();
    let key = PublicKey::parse_line(&line.map_err(|_| Refusal::Encode)?);
    let key = key.map_err(|error| Refusal::Value("key", error.to_string()))?;
    key.map(|key| key.blob().to_owned()).ok_or(Refusal::Encode)
}

fn blob(key: &KeyData) -> Result<Vec<u8>, Refusal> {
    russh::keys::PublicKey::new(key.clone(), "").to_bytes().map_err(|_| Refusal::Encode)
}

fn read(path: &Path) -> Result<Vec<u8>, Refusal> {
    let failed = |source| Refusal::Read { path: path.into(), source };
    let mut bytes = Vec::new();
    let file = File::open(path).map_err(failed)?;
    let length = file.take(MAX_FILE + 1).read_to_end(&mut bytes).map_err(failed)?;
    if length as u64 > MAX_FILE {
        return Err(failed(io::Error::other(format!("it has more than {MAX_FILE} bytes"))));
    }
    Ok(bytes)
}

pub(super) fn shown(text: &str) -> String {
    text.chars().take(64).flat_map(char::escape_default).collect()
}

#[cfg(test)]
#[path = "certificates_tests.rs"]
mod tests;
