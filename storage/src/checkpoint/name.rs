//! Names of checkpoints. They become names of folders, so they are as narrow as an account's.

use std::fmt;

use super::CheckpointError;

const LONGEST: usize = 32;

#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Name(String);

impl Name {
    pub fn parse(name: &str) -> Result<Self, CheckpointError> {
        let person = |byte: u8| byte.is_ascii_lowercase() || byte.is_ascii_digit();
        let good = (1..=LONGEST).contains(&name.len())
            && name.bytes().all(|byte| person(byte) || b"-_".contains(&byte))
            && name.bytes().next().is_some_and(person);
        match good {
            true => Ok(Self(name.to_owned())),
            false => {
                let shown = name.chars().take(40).flat_map(char::escape_default).collect();
                Err(CheckpointError::Name(shown))
            }
        }
    }

    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl fmt::Display for Name {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_name_is_a_folders() {
        for good in ["a", "before-20261121-101500", "0_x", &"x".repeat(32)] {
            assert_eq!(Name::parse(good).unwrap().to_string(), good);
        }
        for bad in ["", ".", "..", ".new-x", "a/b", "A", "-x", "_x", "a b", "é", &"x".repeat(33)] {
            assert!(Name::parse(bad).is_err(), "{bad}");
        }
    }
}
