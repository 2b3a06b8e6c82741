//! The list of packages. Every word of it ends on a tool's command line, so it is parsed, not passed.

use anyhow::{Result, bail};

/// The list used when the operator gives none.
pub const DEFAULT: &str = include_str!("../packages.txt");

/// Package names of a list: one a line, `#` begins a comment.
pub fn parse(list: &str) -> Result<Vec<String>> {
    let mut names: Vec<String> = Vec::new();
    for (number, line) in list.lines().enumerate() {
        let name = line.split('#').next().unwrap_or_default().trim();
        if name.is_empty() {
            continue;
        }
        if !is_package_name(name) {
            bail!("line {}: {name:?} is not a package name", number + 1);
        }
        if !names.iter().any(|known| known == name) {
            names.push(name.to_owned());
        }
    }
    Ok(names)
}

/// Debian Policy §5.6.1, with `/suite` and `:arch` left out on purpose.
fn is_package_name(name: &str) -> bool {
    name.len() >= 2
        && name.starts_with(|c: char| c.is_ascii_lowercase() || c.is_ascii_digit())
        && name.chars().all(|c| c.is_ascii_lowercase() || c.is_ascii_digit() || "+-.".contains(c))
}

pub fn check_suite(suite: &str) -> Result<()> {
    let good = !suite.is_empty()
        && suite.starts_with(|c: char| c.is_ascii_lowercase())
        && suite.chars().all(|c| c.is_ascii_lowercase() || c.is_ascii_digit() || c == '-');
    if !good {
        bail!("--suite {suite:?} is not the name of a Debian release (trixie, for example)");
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_built_in_list_is_sound_and_complete() {
        let names = parse(DEFAULT).unwrap();
        // design: what a person expects on a shell account
        for wanted in
            ["bash", "sudo", "openssh-client", "openssh-sftp-server", "rsync", "git", "vim"]
        {
            assert!(names.iter().any(|name| name == wanted), "{wanted} is missing");
        }
    }

    #[test]
    fn comments_blanks_and_doubles() {
        assert_eq!(parse("# all\n\nbash # the shell\n g++\nbash\n").unwrap(), ["bash", "g++"]);
    }

    #[test]
    fn nothing_but_names_reaches_a_command_line() {
        for bad in ["--variant=x", "a,b", "bash;id", "Bash", "x", "./x.deb", "a b"] {
            assert!(parse(bad).is_err(), "{bad} was taken");
        }
        assert!(check_suite("trixie").is_ok());
        assert!(check_suite("--help").is_err());
        assert!(check_suite("").is_err());
    }
}
