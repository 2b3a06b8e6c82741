//! Account names: what a person types before the `@`.
//!
//! A name also becomes the login name, the home directory and the host name inside the machine, and a
//! field in `/etc/passwd`. So it takes the narrowest of those rules; whatever is refused is refused with
//! the reason, because the person reading it is choosing a name.

use std::fmt;

/// Longest account name: Linux' `LOGIN_NAME_MAX` would allow more, but `utmp` and `ps` cut at 32.
pub const MAX_NAME: usize = 32;

/// Users and groups that Debian's root file system already has, and names that would mislead.
#[rustfmt::skip]
const RESERVED: &[&str] = &[
    "adm", "admin", "administrator", "apt", "audio", "avahi", "backup", "bin", "cdrom", "crontab",
    "daemon", "dialout", "dip", "disk", "fax", "floppy", "ftp", "games", "gnats", "guest", "halt",
    "hermitage", "input", "irc", "kmem", "kvm", "list", "localhost", "lp", "mail", "man",
    "messagebus", "mysql", "netdev", "news", "nobody", "nogroup", "operator", "plugdev",
    "polkitd", "postgres", "proxy", "render", "root", "sasl", "sgx", "shadow", "src", "ssh",
    "sshd", "staff", "sudo", "sync", "sys", "syslog", "tape", "tty", "users", "utmp", "uucp",
    "video", "voice", "wheel", "www-data",
];

/// A name that may be given to an account. Lowercase letters, digits, `-` and `_`; starts with a
/// letter, does not end with `-`; at most [`MAX_NAME`] bytes; not reserved.
///
/// `+` stays free: `name+suffix` is kept for addressing variants of an account.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct AccountName(String);

impl AccountName {
    pub fn parse(name: &str) -> Result<Self, NameError> {
        let refuse = |reason| Err(NameError { name: shown(name), reason });
        let Some(first) = name.chars().next() else {
            return refuse(Reason::Empty);
        };
        if name.len() > MAX_NAME {
            return refuse(Reason::TooLong(name.len()));
        }
        let allowed = |c: char| matches!(c, 'a'..='z' | '0'..='9' | '-' | '_');
        if let Some(bad) = name.chars().find(|&c| !allowed(c)) {
            return refuse(Reason::Character(bad));
        }
        if !first.is_ascii_lowercase() {
            return refuse(Reason::Start(first));
        }
        if name.ends_with('-') {
            return refuse(Reason::EndsWithHyphen);
        }
        if RESERVED.contains(&name) || name.starts_with("systemd-") {
            return refuse(Reason::Reserved);
        }
        Ok(Self(name.to_owned()))
    }

    pub fn as_str(&self) -> &str {
        &self.0
    }

    /// The machine's host name. RFC 952 and 1123 have no `_`.
    pub fn hostname(&self) -> String {
        self.0.replace('_', "-").trim_end_matches('-').to_owned()
    }
}

impl fmt::Display for AccountName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

/// What can be repeated in a message without bringing control characters or pages of text along.
fn shown(name: &str) -> String {
    name.chars().take(MAX_NAME + 8).flat_map(char::escape_default).collect()
}

#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("\"{name}\" can't be an account's name: {reason}")]
pub struct NameError {
    name: String,
    reason: Reason,
}

#[derive(Clone, Debug, PartialEq, Eq)]
enum Reason {
    Empty,
    TooLong(usize),
    Character(char),
    Start(char),
    EndsWithHyphen,
    Reserved,
}

impl fmt::Display for Reason {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Reason::Empty => write!(f, "it is empty"),
            Reason::TooLong(n) => write!(f, "it has {n} bytes; at most {MAX_NAME} are allowed"),
            Reason::Character('+') => write!(f, "'+' is kept for suffixes"),
            Reason::Character(c) if c.is_ascii_uppercase() => {
                write!(f, "it has the capital letter '{c}'; use lowercase letters")
            }
            Reason::Character(c) => write!(
                f,
                "it has '{}'; use lowercase letters, digits, '-' and '_'",
                c.escape_default()
            ),
            Reason::Start(c) => write!(f, "it starts with '{c}'; start with a lowercase letter"),
            Reason::EndsWithHyphen => write!(f, "it ends with '-', which a host name must not"),
            Reason::Reserved => {
                write!(f, "it is reserved for the system inside the machine; choose another")
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn ordinary_names_are_taken() {
        for name in ["demo", "alice", "a", "bob-2", "x_y", &"a".repeat(32)] {
            assert_eq!(AccountName::parse(name).unwrap().as_str(), name);
        }
        assert_eq!(AccountName::parse("x_y_").unwrap().hostname(), "x-y");
    }

    #[test]
    fn refusals_say_why() {
        let why = |name: &str| AccountName::parse(name).unwrap_err().to_string();
        assert!(why("").contains("empty"));
        assert!(why(&"a".repeat(33)).contains("33 bytes"));
        assert!(why("Alice").contains("capital letter 'A'"));
        assert!(why("alice+git").contains("suffixes"));
        assert!(why("2pac").contains("starts with '2'"));
        assert!(why("../etc").contains("has '.'"));
        assert!(why("root").contains("reserved"));
        assert!(why("a\n").contains(r"has '\n'"));
        assert!(why("abc-").contains("ends with"));
        assert!(!why("a\x1b[2J").contains('\x1b'), "control characters must not reach a terminal");
    }

    proptest! {
        /// Whatever is taken is safe as a field of /etc/passwd, a path component and a host name.
        #[test]
        fn what_is_taken_is_safe(name in "\\PC{0,40}") {
            if let Ok(name) = AccountName::parse(&name) {
                prop_assert!(name.as_str().bytes().all(|b| b.is_ascii_lowercase() || b.is_ascii_digit() || b == b'-' || b == b'_'));
                prop_assert!(!name.hostname().is_empty() && !name.hostname().ends_with('-'));
            }
        }
    }
}
