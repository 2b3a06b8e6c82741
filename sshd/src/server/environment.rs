//! Environment variables that a client may set in its session (RFC 4254 §6.4): locale and terminal,
//! and what the operator allows. Others could change what the login shell runs before the user's own
//! files are read.

use std::net::SocketAddr;

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

    /// With these over what the client has said.
    pub fn into_pairs(mut self, ours: &[(String, String)]) -> Vec<(String, String)> {
        self.0.retain(|(name, _)| !ours.iter().any(|(known, _)| known == name));
        self.0.extend_from_slice(ours);
        self.0
    }
}

/// Where a session comes from, in the variables that sshd(8) has for it (ENVIRONMENT in ssh(1)): prompts,
/// editors and scripts tell by them that they are far away.
pub fn connection(peer: SocketAddr, local: Option<SocketAddr>) -> Vec<(String, String)> {
    // A socket for both families shows an IPv4 client as ::ffff:192.0.2.1.
    let (from, port) = (peer.ip().to_canonical(), peer.port());
    let Some(local) = local else { return Vec::new() };
    let (to, here) = (local.ip().to_canonical(), local.port());
    vec![
        ("SSH_CLIENT".into(), format!("{from} {port} {here}")),
        ("SSH_CONNECTION".into(), format!("{from} {port} {to} {here}")),
    ]
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
        assert_eq!(env.into_pairs(&[]).len(), 3);
    }

    #[test]
    fn the_ends_of_the_connection_are_ours_to_say() {
        let peer = "[::ffff:192.0.2.1]:50000".parse().unwrap();
        let ours = connection(peer, "[::ffff:192.0.2.9]:22".parse().ok());
        let mut env = Env::default();
        assert!(env.set("SSH_CLIENT", "10.0.0.1 1 22", &["SSH_*".into()]));
        let pairs = env.into_pairs(&ours);
        let value = |name: &str| {
            let mut values =
                pairs.iter().filter(|(known, _)| known == name).map(|(_, v)| v.as_str());
            (values.next(), values.next())
        };
        assert_eq!(value("SSH_CLIENT"), (Some("192.0.2.1 50000 22"), None));
        assert_eq!(value("SSH_CONNECTION"), (Some("192.0.2.1 50000 192.0.2.9 22"), None));
    }

    #[test]
    fn there_are_not_more_than_there_may_be() {
        let mut env = Env::default();
        let taken = (0..1000).filter(|n| env.set(&format!("LC_{n}"), "x", &[])).count();
        assert_eq!(taken, MAX_VARIABLES);
        assert!(env.set("LC_0", "changed", &[]));
    }
}
