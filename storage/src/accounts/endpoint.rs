//! Places that a key may forward to, or listen on: the values of `permitopen="…"` and `permitlisten="…"`.

/// `localhost:5432`, `[::1]:80`, `localhost:*`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Endpoint {
    /// As the client has to say it: names are not looked up. `None`: any.
    host: Option<String>,
    /// `None`: any.
    port: Option<u16>,
}

impl Endpoint {
    /// None: it is no place. A port alone is one where a listener may be anywhere (`bare_port`).
    pub fn parse(text: &str, bare_port: bool) -> Option<Self> {
        let (host, port) = match text.strip_prefix('[') {
            Some(bracketed) => bracketed.split_once("]:")?,
            None => match text.rsplit_once(':') {
                Some(parts) => parts,
                None if bare_port => ("*", text),
                None => return None,
            },
        };
        let bracketed = text.starts_with('[');
        if host.is_empty() || (host.contains(':') && !bracketed) {
            return None;
        }
        let port = match port {
            "*" => None,
            digits if digits.bytes().all(|b| b.is_ascii_digit()) => {
                Some(digits.parse().ok().filter(|port| *port != 0)?)
            }
            _ => return None,
        };
        Some(Self { host: (host != "*").then(|| host.to_owned()), port })
    }

    pub fn matches(&self, host: &str, port: u16) -> bool {
        self.host.as_deref().is_none_or(|known| known == host)
            && self.port.is_none_or(|known| known == port)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn places_are_matched_as_they_are_said() {
        let matches = |text: &str, host: &str, port: u16| {
            Endpoint::parse(text, true).unwrap().matches(host, port)
        };
        assert!(matches("localhost:5432", "localhost", 5432));
        assert!(!matches("localhost:5432", "127.0.0.1", 5432));
        assert!(!matches("localhost:5432", "localhost", 5433));
        assert!(matches("localhost:*", "localhost", 1) && !matches("localhost:*", "other", 1));
        assert!(matches("*:80", "other", 80) && !matches("*:80", "other", 81));
        assert!(matches("[::1]:80", "::1", 80));
        assert!(matches("8080", "localhost", 8080) && !matches("8080", "localhost", 0));
    }

    #[test]
    fn what_is_no_place_is_refused() {
        for text in
            ["", ":", "a", "a:", ":1", "a:0", "a:65536", "a:b", "::1:80", "[::1", "[::1]80", "a:+1"]
        {
            assert_eq!(Endpoint::parse(text, false), None, "{text}");
        }
        assert_eq!(Endpoint::parse("8080", false), None);
    }
}
