//! The environment of a session's first program: what login(1) sets, with what the client sent.

use std::ffi::CString;
use std::os::unix::ffi::OsStrExt;

use crate::account::User;

/// Debian's for users (login.defs, ENV_PATH); login shells set it again from /etc/profile.
const PATH: &str = "/usr/local/bin:/usr/bin:/bin:/usr/local/games:/usr/games";

/// What only a session on a terminal has.
pub struct OnTerminal<'a> {
    pub term: &'a str,
    /// N of /dev/pts/N
    pub number: u32,
}

/// `NAME=value` strings. The client's come over the defaults and under what names the user.
pub fn environment(
    user: &User,
    terminal: Option<&OnTerminal>,
    client: &[(String, String)],
) -> Vec<CString> {
    let mut set = Environment(Vec::with_capacity(16 + client.len()));
    set.put("PATH", PATH.as_bytes());
    set.put("LANG", b"C.UTF-8");
    for (name, value) in client {
        set.put(name, value.as_bytes());
    }
    set.put("HOME", user.home.as_os_str().as_bytes());
    set.put("USER", user.name.as_bytes());
    set.put("LOGNAME", user.name.as_bytes());
    set.put("SHELL", user.shell.as_os_str().as_bytes());
    set.put("MAIL", format!("/var/mail/{}", user.name).as_bytes());
    set.put("XDG_RUNTIME_DIR", format!("/run/user/{}", user.uid).as_bytes());
    if let Some(terminal) = terminal {
        set.put("TERM", if terminal.term.is_empty() { b"dumb" } else { terminal.term.as_bytes() });
        set.put("SSH_TTY", format!("/dev/pts/{}", terminal.number).as_bytes());
    }
    set.0
}

struct Environment(Vec<CString>);

impl Environment {
    /// Sets or replaces; what can't be a variable (NUL, `=` in the name, no name) is left out.
    fn put(&mut self, name: &str, value: &[u8]) {
        if name.is_empty() || name.contains('=') {
            return;
        }
        let prefix = [name.as_bytes(), b"="].concat();
        if let Ok(variable) = CString::new([&prefix, value].concat()) {
            self.0.retain(|known| !known.as_bytes().starts_with(&prefix));
            self.0.push(variable);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn alice() -> User {
        User {
            name: "alice".to_owned(),
            uid: 1000,
            gid: 1000,
            home: "/home/alice".into(),
            shell: "/bin/bash".into(),
            groups: vec![27],
        }
    }

    fn lines(terminal: Option<&OnTerminal>, client: &[(&str, &str)]) -> Vec<String> {
        let client: Vec<(String, String)> =
            client.iter().map(|(name, value)| ((*name).to_owned(), (*value).to_owned())).collect();
        environment(&alice(), terminal, &client)
            .into_iter()
            .map(|variable| variable.into_string().unwrap())
            .collect()
    }

    #[test]
    fn the_client_may_choose_its_language_but_not_its_name() {
        let set = lines(None, &[("LANG", "de_DE.UTF-8"), ("HOME", "/"), ("LC_TIME", "C")]);
        assert!(set.contains(&"LANG=de_DE.UTF-8".to_owned()));
        assert!(set.contains(&"LC_TIME=C".to_owned()));
        assert!(set.contains(&"HOME=/home/alice".to_owned()));
        assert_eq!(set.iter().filter(|line| line.starts_with("HOME=")).count(), 1);
        assert!(!set.iter().any(|line| line.starts_with("TERM=")));
    }

    #[test]
    fn a_terminal_has_its_type_and_name() {
        let set = lines(Some(&OnTerminal { term: "xterm", number: 3 }), &[("TERM", "evil")]);
        assert!(set.contains(&"TERM=xterm".to_owned()));
        assert!(set.contains(&"SSH_TTY=/dev/pts/3".to_owned()));
        assert!(set.contains(&"LANG=C.UTF-8".to_owned()));
    }

    #[test]
    fn what_is_no_variable_is_left_out() {
        let set = lines(None, &[("", "x"), ("A=B", "x"), ("NUL", "a\0b"), ("OK", "a=b")]);
        assert!(set.contains(&"OK=a=b".to_owned()));
        assert!(!set.iter().any(|line| line.starts_with('=')
            || line.starts_with("A=")
            || line.starts_with("NUL")));
    }
}
