//! Whom machines run as.

use anyhow::{Context as _, bail};
use nix::unistd::User;

use crate::config::MACHINE_USER;

/// `None`: whom the fork server takes by itself, which is nobody.
pub fn uid(name: &str) -> anyhow::Result<Option<u32>> {
    let user = User::from_name(name).with_context(|| format!("looking up the user \"{name}\""))?;
    match user {
        // The jail sets the group to the same number: it must not be somebody else's.
        Some(user) if user.uid.is_root() || user.uid.as_raw() != user.gid.as_raw() => bail!(
            "machines.user = \"{name}\" has uid {} and gid {}; it needs a uid that is not 0, and a group of \
             its own with the same number",
            user.uid,
            user.gid
        ),
        Some(user) => Ok(Some(user.uid.as_raw())),
        None if name == MACHINE_USER => Ok(None),
        None => {
            bail!("machines.user = \"{name}\" is no user of this host; adduser --system makes one")
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn machines_run_as_a_user_of_their_own_and_never_as_root() {
        // Debian's static users (base-passwd).
        assert_eq!(uid("nobody").unwrap(), Some(65534));
        assert_eq!(uid("daemon").unwrap(), Some(1));
        assert!(uid("root").unwrap_err().to_string().contains("not 0"));
        assert!(uid("sync").unwrap_err().to_string().contains("same number"));
        assert!(uid("no-such-user").unwrap_err().to_string().contains("no-such-user"));
        if User::from_name(MACHINE_USER).unwrap().is_none() {
            assert_eq!(uid(MACHINE_USER).unwrap(), None);
        }
    }
}
