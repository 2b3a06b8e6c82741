//! OpenSSH's key revocation lists (PROTOCOL.krl), as `ssh-keygen -k` makes them. What is not understood makes
//! the whole list an error, because it may name somebody.

use russh::keys::ssh_key::Fingerprint;

use super::revoked::{Revoked, RevokedCertificates};

pub const MAGIC: &[u8] = b"SSHKRL\n\0";
const VERSION: u32 = 1;

/// Sections.
const CERTIFICATES: u8 = 1;
const EXPLICIT_KEY: u8 = 2;
const FINGERPRINT_SHA1: u8 = 3;
const SIGNATURE: u8 = 4;
const FINGERPRINT_SHA256: u8 = 5;
const EXTENSION: u8 = 255;

/// Sections of [`CERTIFICATES`].
const SERIAL_LIST: u8 = 0x20;
const SERIAL_RANGE: u8 = 0x21;
const SERIAL_BITMAP: u8 = 0x22;
const KEY_ID: u8 = 0x23;
const CERTIFICATES_EXTENSION: u8 = 0x39;

pub fn parse(bytes: &[u8]) -> Result<Revoked, String> {
    let mut list = Reader(bytes);
    list.take(MAGIC.len())?;
    let version = list.u32()?;
    if version != VERSION {
        return Err(format!("it is a KRL of format {version}; {VERSION} is known here"));
    }
    // Its version, when it was made, flags of which there are none, a reserved field, a comment.
    list.take(3 * 8)?;
    list.string()?;
    list.string()?;
    let mut revoked = Revoked::default();
    while !list.0.is_empty() {
        let (kind, mut section) = (list.u8()?, Reader(list.string()?));
        match kind {
            CERTIFICATES => revoked.certificates.push(certificates(section)?),
            EXPLICIT_KEY => {
                while !section.0.is_empty() {
                    revoked.keys.insert(section.string()?.to_owned());
                }
            }
            FINGERPRINT_SHA256 => {
                while !section.0.is_empty() {
                    let print = section.string()?;
                    let print = print.try_into().map_err(|_| "it has a fingerprint cut short")?;
                    revoked.fingerprints.insert(Fingerprint::Sha256(print).to_string());
                }
            }
            FINGERPRINT_SHA1 => {
                return Err("it has SHA-1 fingerprints, which can be forged; list the keys or \
                            their SHA-256 fingerprints"
                    .into());
            }
            SIGNATURE => {
                return Err("it is signed, and signatures of lists are not verified here".into());
            }
            EXTENSION => extension(section)?,
            _ => return Err(format!("it has a section of the kind {kind}, which is not known")),
        }
    }
    Ok(revoked)
}

fn certificates(mut section: Reader) -> Result<RevokedCertificates, String> {
    let authority = section.string()?;
    section.string()?;
    let mut revoked = RevokedCertificates {
        authority: (!authority.is_empty()).then(|| authority.to_owned()),
        ..RevokedCertificates::default()
    };
    while !section.0.is_empty() {
        let (kind, mut part) = (section.u8()?, Reader(section.string()?));
        match kind {
            SERIAL_LIST => {
                while !part.0.is_empty() {
                    let serial = part.u64()?;
                    revoked.serials.push((serial, serial));
                }
            }
            SERIAL_RANGE => revoked.serials.push((part.u64()?, part.u64()?)),
            SERIAL_BITMAP => {
                let offset = part.u64()?;
                revoked.bitmaps.push((offset, part.string()?.to_owned()));
            }
            KEY_ID => {
                while !part.0.is_empty() {
                    let id = String::from_utf8(part.string()?.to_owned());
                    // A certificate with such an id is none that russh reads.
                    revoked.ids.extend(id);
                }
            }
            CERTIFICATES_EXTENSION => extension(Reader(part.0))?,
            _ => return Err(format!("it has certificates by a kind {kind}, which is not known")),
        }
        if matches!(kind, SERIAL_RANGE | SERIAL_BITMAP) && !part.0.is_empty() {
            return Err("something follows a range of serials".into());
        }
    }
    Ok(revoked)
}

/// None are known; those that matter are marked.
fn extension(mut section: Reader) -> Result<(), String> {
    let name = String::from_utf8_lossy(section.string()?).escape_default().to_string();
    match section.u8()? {
        0 => Ok(()),
        _ => Err(format!("it has the critical extension {name}, which is not known here")),
    }
}

struct Reader<'a>(&'a [u8]);

impl<'a> Reader<'a> {
    fn take(&mut self, length: usize) -> Result<&'a [u8], String> {
        let (taken, rest) = self.0.split_at_checked(length).ok_or("it is cut short")?;
        self.0 = rest;
        Ok(taken)
    }

    fn array<const N: usize>(&mut self) -> Result<[u8; N], String> {
        let (taken, rest) = self.0.split_first_chunk().ok_or("it is cut short")?;
        self.0 = rest;
        Ok(*taken)
    }

    fn u8(&mut self) -> Result<u8, String> {
        Ok(self.array::<1>()?[0])
    }

    fn u32(&mut self) -> Result<u32, String> {
        Ok(u32::from_be_bytes(self.array()?))
    }

    fn u64(&mut self) -> Result<u64, String> {
        Ok(u64::from_be_bytes(self.array()?))
    }

    fn string(&mut self) -> Result<&'a [u8], String> {
        let length = self.u32()?;
        self.take(usize::try_from(length).map_err(|error| error.to_string())?)
    }
}
