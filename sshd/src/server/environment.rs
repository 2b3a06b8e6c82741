//! Environment variables that a client may set in its session (RFC 4254 §6.4): locale and terminal,
//! and what the operator allows. Others could change what the login shell runs before the user's own
//! files are read.

/// Always accepted. TERM comes with the pty as well.
const ACCEPTED: [&str; 4] = ["LANG", "LC_*", "TERM", "COLORTERM"];

/// Most variables, and longest value in bytes.
const MAX_VARIABLES: usize = 64;
const MAX_VALUE: usize = 1024;

#[derive(Debug, Default)]
pub struct Env(Vec<(String, String)>);

impl Env {
    /// Sets a variable if it may be set. `also` are the operator's patterns.
    pub fn set(&mut self, name: &str, value: &str, also: &[String]) -> bool {
        let named = !name.is_empty()
            && name.len() <= MAX_VALUE
            && name.bytes().all(|byte| byte.is_ascii_alphanumeric() || byte == b'_');
        let accepted = ACCEPTED.iter().copied().chain(also.iter().map(String::as_str));
        if !named
            || value.len() > MAX_VALUE
            || value.contains('\0')
            || !accepted.into_iter().any(|pattern| matches(pattern, name))
        {
            return false;
        }
        if let Some((_, old)) = self.0.iter_mut().find(|(known, _)| known == name) {
            *old = value.to_owned();
            return true;
        }
        if self.0.len() >= MAX_VARIABLES {
            return false;
        }
        self.0.push((name.to_owned(), value.to_owned()));
        true
    }

    pub fn into_pairs(self) -> Vec<(String, String)> {
        self.0
    }
}

fn matches(pattern: &str, name: &str) -> bool {
    match pattern.strip_suffix('*') {
        Some(prefix) => name.starts_with(prefix),
        None => name == pattern,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn locale_passes_and_the_loader_does_not() {
        let mut env = Env::default();
        assert!(env.set("LC_ALL", "C.UTF-8", &[]));
        assert!(env.set("LANG", "de_DE.UTF-8", &[]));
        assert!(!env.set("LD_PRELOAD", "/tmp/x.so", &[]));
        assert!(!env.set("LANGUAGE_", "x", &[]));
        assert!(!env.set("LC_X=Y", "x", &[]));
        assert!(!env.set("LANG", "a\0b", &[]));
        assert!(env.set("GIT_AUTHOR", "alice", &["GIT_*".into()]));
        assert_eq!(env.into_pairs().len(), 3);
    }

    #[test]
    fn there_are_not_more_than_there_may_be() {
        let mut env = Env::default();
        let taken = (0..1000).filter(|n| env.set(&format!("LC_{n}"), "x", &[])).count();
        assert_eq!(taken, MAX_VARIABLES);
        assert!(env.set("LC_0", "changed", &[]));
    }
}
