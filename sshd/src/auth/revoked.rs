//! What opens nothing any more: keys, and certificates by their serial or id. A list is text, or what
//! `ssh-keygen -k` makes ([`super::krl`]).

use std::collections::HashSet;

use hermitage_storage::accounts::{PublicKey, fingerprint};
use russh::keys::ssh_key::Fingerprint;

use super::{Refusal, certificates::shown, krl};

#[derive(Debug, Default)]
pub struct Revoked {
    /// As on the wire.
    pub keys: HashSet<Vec<u8>>,
    /// `SHA256:…`.
    pub fingerprints: HashSet<String>,
    pub certificates: Vec<RevokedCertificates>,
}

#[derive(Debug, Default)]
pub struct RevokedCertificates {
    /// Whose they are. `None`: any authority's.
    pub authority: Option<Vec<u8>>,
    /// First and last.
    pub serials: Vec<(u64, u64)>,
    /// The serial that the last byte's lowest bit stands for, and the bits.
    pub bitmaps: Vec<(u64, Vec<u8>)>,
    pub ids: HashSet<String>,
}

impl Revoked {
    pub fn parse(bytes: &[u8]) -> Result<Self, String> {
        if bytes.starts_with(krl::MAGIC) {
            return krl::parse(bytes);
        }
        let text = std::str::from_utf8(bytes).map_err(|_| "it is neither text nor a KRL")?;
        Self::parse_text(text)
    }

    /// Lines of public keys, and of `serial: N`, `id: NAME` and `SHA256:…` as in the specification of
    /// ssh-keygen(1), "KEY REVOCATION LISTS".
    fn parse_text(text: &str) -> Result<Self, String> {
        let (mut revoked, mut certificates) = (Self::default(), RevokedCertificates::default());
        for (number, line) in (1..).zip(text.lines()) {
            let line = line.trim();
            let wrong = |what: String| format!("line {number}: {what}");
            if let Some(serial) = line.strip_prefix("serial:") {
                let serial = serial.trim();
                let serial = serial
                    .parse()
                    .map_err(|_| wrong(format!("\"{}\" is no serial number", shown(serial))))?;
                certificates.serials.push((serial, serial));
            } else if let Some(id) = line.strip_prefix("id:") {
                certificates.ids.insert(id.trim().to_owned());
            } else if line.starts_with("SHA256:") {
                let print: Fingerprint = line
                    .trim_end_matches('=')
                    .parse()
                    .map_err(|_| wrong(format!("\"{}\" is no fingerprint", shown(line))))?;
                revoked.fingerprints.insert(print.to_string());
            } else if let Some(key) =
                PublicKey::parse_line(line).map_err(|error| wrong(error.to_string()))?
            {
                if !key.options().is_empty() {
                    return Err(wrong("a revoked key has no options".into()));
                }
                revoked.keys.insert(key.blob().to_owned());
            }
        }
        revoked.certificates.push(certificates);
        Ok(revoked)
    }

    pub fn check_key(&self, blob: &[u8]) -> Result<(), Refusal> {
        let print = fingerprint(blob);
        match self.keys.contains(blob) || self.fingerprints.contains(&print) {
            true => Err(Refusal::Revoked(print)),
            false => Ok(()),
        }
    }

    pub fn check_certificate(
        &self,
        authority: &[u8],
        serial: u64,
        id: &str,
    ) -> Result<(), Refusal> {
        let of_authority = self
            .certificates
            .iter()
            .filter(|listed| listed.authority.as_deref().is_none_or(|listed| listed == authority));
        for listed in of_authority {
            if listed.ids.contains(id) {
                return Err(Refusal::Revoked(format!("the id \"{}\"", shown(id))));
            }
            // 0: the authority does not number its certificates.
            if serial != 0 && listed.has_serial(serial) {
                return Err(Refusal::Revoked(format!("the serial {serial}")));
            }
        }
        Ok(())
    }
}

impl RevokedCertificates {
    fn has_serial(&self, serial: u64) -> bool {
        let in_bitmap = |(offset, bits): &(u64, Vec<u8>)| {
            let Some(bit) = serial.checked_sub(*offset) else { return false };
            let Ok(byte) = usize::try_from(bit / 8) else { return false };
            // The highest bits are first.
            bits.iter().rev().nth(byte).is_some_and(|byte| byte >> (bit % 8) & 1 == 1)
        };
        self.serials.iter().any(|(first, last)| (*first..=*last).contains(&serial))
            || self.bitmaps.iter().any(in_bitmap)
    }
}

#[cfg(test)]
#[path = "revoked_tests.rs"]
mod tests;
