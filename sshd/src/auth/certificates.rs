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
    collections::HashSet,
    fs::File,
    io::{self, Read as _},
    net::IpAddr,
    path::{Path, PathBuf},
};

use hermitage_storage::accounts::{KeyOptions, PublicKey, SourcePattern, fingerprint, parse_keys};
use russh::keys::{Algorithm, Certificate, ssh_key::public::KeyData};

use super::Refusal;

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
        let revoked = self.revoked()?;
        let key = blob(certificate.public_key())?;
        for blob in [&key, &authority] {
            revoked.check_key(blob)?;
        }
        let (serial, id) = (certificate.serial(), certificate.key_id());
        // 0: the authority does not number its certificates.
        if serial != 0 && revoked.serials.contains(&serial) {
            return Err(Refusal::Revoked(format!("serial {serial}")));
        }
        if revoked.ids.contains(id) {
            return Err(Refusal::Revoked(format!("id {}", shown(id))));
        }
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
    let keys = parse_keys(&read(path)?).map_err(|error| refused(error.to_string()))?;
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

#[derive(Debug, Default)]
struct Revoked {
    keys: HashSet<Vec<u8>>,
    fingerprints: HashSet<String>,
    serials: HashSet<u64>,
    ids: HashSet<String>,
}

impl Revoked {
    /// Lines of public keys, and of `serial: N`, `id: NAME` and `SHA256:…` as in the specification of
    /// ssh-keygen(1), "KEY REVOCATION LISTS".
    fn parse(text: &str) -> Result<Self, String> {
        if text.starts_with("SSHKRL") {
            return Err(
                "this is a binary key revocation list; list the keys, fingerprints, serials \
                        and ids as text"
                    .into(),
            );
        }
        let mut revoked = Self::default();
        for (number, line) in (1..).zip(text.lines()) {
            let line = line.trim();
            if let Some(serial) = line.strip_prefix("serial:") {
                let serial = serial.trim().parse();
                revoked.serials.insert(serial.map_err(|error| format!("line {number}: {error}"))?);
            } else if let Some(id) = line.strip_prefix("id:") {
                revoked.ids.insert(id.trim().to_owned());
            } else if line.starts_with("SHA256:") {
                revoked.fingerprints.insert(line.trim_end_matches('=').to_owned());
            } else if let Some(key) =
                PublicKey::parse_line(line).map_err(|error| format!("line {number}: {error}"))?
            {
                if !key.options().is_empty() {
                    return Err(format!("line {number}: a revoked key has no options"));
                }
                revoked.keys.insert(key.blob().to_owned());
            }
        }
        Ok(revoked)
    }

    fn check_key(&self, blob: &[u8]) -> Result<(), Refusal> {
        let print = fingerprint(blob);
        match self.keys.contains(blob) || self.fingerprints.contains(&print) {
            true => Err(Refusal::Revoked(print)),
            false => Ok(()),
        }
    }
}

fn blob(key: &KeyData) -> Result<Vec<u8>, Refusal> {
    russh::keys::PublicKey::new(key.clone(), "").to_bytes().map_err(|_| Refusal::Encode)
}

fn read(path: &Path) -> Result<String, Refusal> {
    let failed = |source| Refusal::Read { path: path.into(), source };
    let mut text = String::new();
    let file = File::open(path).map_err(failed)?;
    let length = file.take(MAX_FILE + 1).read_to_string(&mut text).map_err(failed)?;
    if length as u64 > MAX_FILE {
        return Err(failed(io::Error::other(format!("it has more than {MAX_FILE} bytes"))));
    }
    Ok(text)
}

fn shown(text: &str) -> String {
    text.chars().take(64).flat_map(char::escape_default).collect()
}

#[cfg(test)]
#[path = "certificates_tests.rs"]
mod tests;
