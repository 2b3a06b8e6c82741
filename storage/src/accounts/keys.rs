//! OpenSSH public keys, as people paste them: `[OPTIONS] TYPE BASE64 [COMMENT]`, one a line.
//!
//! The blob is taken apart far enough (RFC 4253 §6.6, RFC 5656 §3.1, RFC 8709 §4, OpenSSH's PROTOCOL.u2f)
//! to know that it is a whole key of the named type: a key that was cut while pasting is refused when it
//! is added, where somebody can do something about it, and not at a login.

use super::key_options::{self, KeyOptions, OptionError};
use base64ct::{Base64, Base64Unpadded, Encoding};
use sha2::{Digest, Sha256};
use std::fmt;

/// Longest line: an RSA key of 16384 bits has some 2,800 characters, and options up to 8 KiB.
const MAX_LINE: usize = 16 * 1024;
/// Most keys of one file.
pub const MAX_KEYS: usize = 256;
/// Shorter RSA keys are within reach of factoring (NIST SP 800-57).
const MIN_RSA_BITS: usize = 2048;
const MAX_RSA_BITS: usize = 16384;

/// A public key that may log in.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PublicKey {
    key_type: KeyType,
    blob: Vec<u8>,
    comment: String,
    options: KeyOptions,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum KeyType {
    Ed25519,
    EcdsaP256,
    EcdsaP384,
    EcdsaP521,
    Rsa,
    SkEd25519,
    SkEcdsaP256,
}

const TYPES: &[(KeyType, &str)] = &[
    (KeyType::Ed25519, "ssh-ed25519"),
    (KeyType::EcdsaP256, "ecdsa-sha2-nistp256"),
    (KeyType::EcdsaP384, "ecdsa-sha2-nistp384"),
    (KeyType::EcdsaP521, "ecdsa-sha2-nistp521"),
    (KeyType::Rsa, "ssh-rsa"),
    (KeyType::SkEd25519, "sk-ssh-ed25519@openssh.com"),
    (KeyType::SkEcdsaP256, "sk-ecdsa-sha2-nistp256@openssh.com"),
];

#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum KeyError {
    #[error("this is a private key; give the public one (the file ending in .pub)")]
    PrivateKey,
    #[error("{} bytes on one line; at most {MAX_LINE} are allowed", .0)]
    TooLong(usize),
    #[error(
        "\"{0}\" is no key type known here (ssh-ed25519, ecdsa-sha2-…, ssh-rsa, sk-…), and no option that \
         comes before one"
    )]
    UnknownType(String),
    #[error("there is no key after the options")]
    NoKey,
    #[error(transparent)]
    Options(#[from] OptionError),
    #[error("\"{0}\" is a certificate; give the plain public key")]
    Certificate(String),
    #[error("DSA keys are not accepted; make one with: ssh-keygen -t ed25519")]
    Dsa,
    #[error("there is nothing after the key type {0}; is the line complete?")]
    NoBlob(&'static str),
    #[error("what follows {0} is not base64; is the line complete?")]
    NotBase64(&'static str),
    #[error("the key is not a whole {key_type} key ({what}); is the line complete?")]
    Malformed { key_type: &'static str, what: &'static str },
    #[error(
        "an RSA key of {0} bits; {MIN_RSA_BITS} to {MAX_RSA_BITS} are accepted (ssh-keygen -t ed25519 makes a short and strong key)"
    )]
    RsaSize(usize),
}

#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum KeyFileError {
    #[error("line {line}: {source}")]
    Line { line: usize, source: KeyError },
    #[error("there is no key in it")]
    Empty,
    #[error("line {0}: that key is in it before, with other options")]
    Twice(usize),
    #[error("more than {MAX_KEYS} keys")]
    TooMany,
}

/// Reads a public key file or an `authorized_keys` file: a key a line, `#` starts a comment line.
pub fn parse_keys(text: &str) -> Result<Vec<PublicKey>, KeyFileError> {
    let mut keys: Vec<PublicKey> = Vec::new();
    for (index, line) in text.lines().enumerate() {
        let key = PublicKey::parse_line(line)
            .map_err(|source| KeyFileError::Line { line: index + 1, source })?;
        let Some(key) = key else { continue };
        match keys.iter().find(|known| known.blob == key.blob) {
            None => {}
            Some(known) if known.options == key.options => continue,
            // Which of them was meant? In an authorized_keys file one may widen the other.
            Some(_) => return Err(KeyFileError::Twice(index + 1)),
        }
        if keys.len() == MAX_KEYS {
            return Err(KeyFileError::TooMany);
        }
        keys.push(key);
    }
    if keys.is_empty() { Err(KeyFileError::Empty) } else { Ok(keys) }
}

impl PublicKey {
    /// One line; `None` for an empty or comment line.
    pub fn parse_line(line: &str) -> Result<Option<Self>, KeyError> {
        if line.len() > MAX_LINE {
            return Err(KeyError::TooLong(line.len()));
        }
        let line = line.trim();
        if line.is_empty() || line.starts_with('#') {
            return Ok(None);
        }
        if line.starts_with("-----BEGIN") || line.starts_with("PuTTY-User-Key-File") {
            return Err(KeyError::PrivateKey);
        }
        let (options, line) = split_options(line)?;
        let (word, rest) = split_word(line);
        let (key_type, name) = named(word)?;
        let (base64, comment) = split_word(rest);
        if base64.is_empty() {
            return Err(KeyError::NoBlob(name));
        }
        let blob = Base64::decode_vec(base64)
            .or_else(|_| Base64Unpadded::decode_vec(base64))
            .map_err(|_| KeyError::NotBase64(name))?;
        check(key_type, name, &blob)?;
        let comment = comment.chars().filter(|c| !c.is_control()).take(256).collect();
        Ok(Some(Self { key_type, blob, comment, options }))
    }

    /// `ssh-ed25519`, …
    pub fn key_type(&self) -> &'static str {
        self.key_type.name()
    }

    /// As on the wire (RFC 4253 §6.6): what a client offers is compared with this.
    pub fn blob(&self) -> &[u8] {
        &self.blob
    }

    pub fn comment(&self) -> &str {
        &self.comment
    }

    pub fn with_comment(mut self, comment: &str) -> Self {
        self.comment = comment.chars().filter(|c| !c.is_control()).take(256).collect();
        self
    }

    /// What a login by it may do.
    pub fn options(&self) -> &KeyOptions {
        &self.options
    }

    pub fn with_options(self, options: KeyOptions) -> Self {
        Self { options, ..self }
    }

    pub fn fingerprint(&self) -> String {
        fingerprint(&self.blob)
    }
}

impl fmt::Display for PublicKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if !self.options.is_empty() {
            write!(f, "{} ", self.options)?;
        }
        write!(f, "{} {}", self.key_type(), Base64::encode_string(&self.blob))?;
        if self.comment.is_empty() { Ok(()) } else { write!(f, " {}", self.comment) }
    }
}

/// As `ssh-keygen -l` prints it.
pub fn fingerprint(blob: &[u8]) -> String {
    format!("SHA256:{}", Base64Unpadded::encode_string(&Sha256::digest(blob)))
}

impl KeyType {
    fn name(self) -> &'static str {
        TYPES.iter().find(|(key_type, _)| *key_type == self).map_or("", |(_, name)| name)
    }
}

/// A line that doesn't start with a key type starts with options (sshd(8)).
fn split_options(line: &str) -> Result<(KeyOptions, &str), KeyError> {
    let first = named(split_word(line).0);
    let Err(KeyError::UnknownType(_)) = first else { return Ok((KeyOptions::default(), line)) };
    let end = key_options::end_of_options(line);
    let options = match KeyOptions::parse(&line[..end]) {
        Ok(options) => options,
        // A lone word is as likely to be meant as a type.
        Err(OptionError::Unknown(_)) if !line[..end].contains([',', '=']) => {
            return first.map(|_| (KeyOptions::default(), line));
        }
        Err(error) => return Err(error.into()),
    };
    match line[end..].trim_start() {
        "" => Err(KeyError::NoKey),
        key => Ok((options, key)),
    }
}

fn split_word(text: &str) -> (&str, &str) {
    match text.split_once([' ', '\t']) {
        Some((word, rest)) => (word, rest.trim_start()),
        None => (text, ""),
    }
}

fn named(word: &str) -> Result<(KeyType, &'static str), KeyError> {
    if let Some((key_type, name)) = TYPES.iter().find(|(_, name)| *name == word) {
        return Ok((*key_type, name));
    }
    let shown: String = word.chars().take(48).flat_map(char::escape_default).collect();
    if word == "ssh-dss" {
        Err(KeyError::Dsa)
    } else if word.contains("-cert-v01@") {
        Err(KeyError::Certificate(shown))
    } else {
        Err(KeyError::UnknownType(shown))
    }
}

/// Takes the blob apart: the type again, the fields of that type, nothing after them.
fn check(key_type: KeyType, name: &'static str, blob: &[u8]) -> Result<(), KeyError> {
    let malformed = |what| KeyError::Malformed { key_type: name, what };
    let mut fields = Fields(blob);
    let mut next = |what| fields.next().ok_or(malformed(what));

    if next("it has no type")? != name.as_bytes() {
        return Err(malformed("the type inside differs from the type before it"));
    }
    let point = |field: &[u8], bytes: usize| {
        // Uncompressed points only (RFC 5656 §3.1 makes the others optional, OpenSSH has none).
        let whole = field.len() == 2 * bytes + 1 && field.first() == Some(&4);
        if whole { Ok(()) } else { Err(malformed("its point is not on that curve")) }
    };
    match key_type {
        KeyType::Ed25519 | KeyType::SkEd25519 => {
            if next("it has no public key")?.len() != 32 {
                return Err(malformed("its public key is not 32 bytes"));
            }
        }
        KeyType::EcdsaP256 | KeyType::EcdsaP384 | KeyType::EcdsaP521 | KeyType::SkEcdsaP256 => {
            let (curve, bytes): (&[u8], usize) = match key_type {
                KeyType::EcdsaP384 => (b"nistp384", 48),
                KeyType::EcdsaP521 => (b"nistp521", 66),
                _ => (b"nistp256", 32),
            };
            if next("it has no curve")? != curve {
                return Err(malformed("its curve is another"));
            }
            point(next("it has no point")?, bytes)?;
        }
        KeyType::Rsa => {
            positive(next("it has no exponent")?).ok_or(malformed("its exponent is no number"))?;
            let modulus = positive(next("it has no modulus")?)
                .ok_or(malformed("its modulus is no number"))?;
            let bits = modulus.len() * 8 - modulus[0].leading_zeros() as usize;
            if !(MIN_RSA_BITS..=MAX_RSA_BITS).contains(&bits) {
                return Err(KeyError::RsaSize(bits));
            }
        }
    }
    if matches!(key_type, KeyType::SkEd25519 | KeyType::SkEcdsaP256) {
        next("it has no application")?;
    }
    if fields.0.is_empty() { Ok(()) } else { Err(malformed("something follows it")) }
}

/// An mpint (RFC 4251 §5) that is greater than 0, without its leading zero byte.
fn positive(mpint: &[u8]) -> Option<&[u8]> {
    match mpint {
        [0, rest @ ..] if rest.first().is_some_and(|b| b & 0x80 != 0) => Some(rest),
        [first, ..] if (1..0x80).contains(first) => Some(mpint),
        _ => None,
    }
}

/// The strings (RFC 4251 §5) of a blob.
struct Fields<'a>(&'a [u8]);

impl<'a> Iterator for Fields<'a> {
    type Item = &'a [u8];

    fn next(&mut self) -> Option<&'a [u8]> {
        let (length, rest) = self.0.split_first_chunk::<4>()?;
        let (field, rest) = rest.split_at_checked(u32::from_be_bytes(*length) as usize)?;
        self.0 = rest;
        Some(field)
    }
}

#[cfg(test)]
#[path = "keys_tests.rs"]
mod tests;
