//! Where a client may be: the patterns of `from="…"` and of a certificate's source-address.

use std::net::IpAddr;

/// `192.0.2.0/24`, `10.*`, `!10.0.0.1`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct SourcePattern {
    negated: bool,
    kind: PatternKind,
}

#[derive(Clone, Debug, PartialEq, Eq)]
enum PatternKind {
    /// Address and number of leading bits that count.
    Network(IpAddr, u8),
    /// With `*` and `?`, compared with the address as text.
    Glob(String),
}

impl SourcePattern {
    /// None: it is no address, network or pattern.
    pub fn parse(text: &str) -> Option<Self> {
        let text = text.trim();
        let (negated, bare) = match text.strip_prefix('!') {
            Some(bare) => (true, bare),
            None => (false, text),
        };
        let kind = match bare.split_once('/') {
            Some((address, bits)) => {
                let address: IpAddr = address.parse().ok()?;
                let bits: u8 = bits.parse().ok()?;
                let most = if address.is_ipv4() { 32 } else { 128 };
                if bits > most {
                    return None;
                }
                PatternKind::Network(address, bits)
            }
            None => match bare.parse::<IpAddr>() {
                Ok(address) => {
                    let address = address.to_canonical();
                    PatternKind::Network(address, if address.is_ipv4() { 32 } else { 128 })
                }
                // Letters of an IPv6 address; a name has others, or is one only by chance.
                Err(_)
                    if bare.contains(['*', '?'])
                        && bare.chars().all(|c| c.is_ascii_hexdigit() || ".:*?".contains(c)) =>
                {
                    PatternKind::Glob(bare.to_ascii_lowercase())
                }
                Err(_) => return None,
            },
        };
        Some(Self { negated, kind })
    }

    /// It says who is left out, not who is let in.
    pub fn is_exception(&self) -> bool {
        self.negated
    }

    pub fn matches(&self, source: IpAddr) -> bool {
        match &self.kind {
            PatternKind::Glob(pattern) => glob(pattern.as_bytes(), source.to_string().as_bytes()),
            PatternKind::Network(network, bits) => match (network, source) {
                (IpAddr::V4(network), IpAddr::V4(source)) => {
                    let differ = u32::from(*network) ^ u32::from(source);
                    differ.checked_shr(32 - u32::from(*bits)).unwrap_or(0) == 0
                }
                (IpAddr::V6(network), IpAddr::V6(source)) => {
                    let differ = u128::from(*network) ^ u128::from(source);
                    differ.checked_shr(128 - u32::from(*bits)).unwrap_or(0) == 0
                }
                _ => false,
            },
        }
    }
}

/// With `*` for any number of characters and `?` for one. Each `*` takes as little as will do: when what
/// follows does not fit, only the last one takes more.
fn glob(pattern: &[u8], text: &[u8]) -> bool {
    let (mut p, mut t) = (0, 0);
    let mut star: Option<(usize, usize)> = None;
    while t < text.len() {
        match pattern.get(p) {
            Some(b'*') => {
                star = Some((p, t));
                p += 1;
            }
            Some(&c) if c == b'?' || c == text[t] => (p, t) = (p + 1, t + 1),
            _ => {
                let Some((at, taken)) = star else { return false };
                star = Some((at, taken + 1));
                (p, t) = (at + 1, taken + 1);
            }
        }
    }
    pattern[p..].iter().all(|&c| c == b'*')
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn globs_match_as_in_ssh() {
        for (pattern, text, matching) in [
            ("10.*", "10.1.2.3", true),
            ("10.*", "110.1.2.3", false),
            ("*.3", "10.1.2.3", true),
            ("1?.1.*.3", "10.1.2.3", true),
            ("1?.1.*.3", "1.1.2.3", false),
            ("*", "::1", true),
            ("", "", true),
            ("?", "", false),
        ] {
            assert_eq!(glob(pattern.as_bytes(), text.as_bytes()), matching, "{pattern} {text}");
        }
        // Not for ever, either.
        assert!(!glob("*a".repeat(2000).as_bytes(), "a".repeat(45).as_bytes()));
    }
}
