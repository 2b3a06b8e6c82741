//! Passwords from a terminal or a pipe; never from the command line, where the process list shows them.

use anyhow::{Context as _, bail};
use hermitage_storage::accounts::{MAX_PASSWORD, MIN_PASSWORD, hash_password};
use nix::sys::termios::{LocalFlags, SetArg, Termios, tcgetattr, tcsetattr};
use std::fs::{File, OpenOptions};
use std::io::{self, BufRead, BufReader, IsTerminal, Read, Write};

/// Asks twice on the terminal, or reads a line from standard input if that is none.
pub fn ask(account: &str) -> anyhow::Result<String> {
    if !io::stdin().is_terminal() {
        return read_line();
    }
    let terminal = OpenOptions::new()
        .read(true)
        .write(true)
        .open("/dev/tty")
        .context("opening the terminal to ask for the password")?;
    let first = prompt(&terminal, &format!("New password for {account}: "))?;
    check(&first)?;
    if prompt(&terminal, "Again: ")? != first {
        bail!("the two are not the same; nothing was changed");
    }
    Ok(first)
}

/// A line from standard input.
pub fn read_line() -> anyhow::Result<String> {
    let password =
        line(&mut io::stdin().lock()).context("reading the password from standard input")?;
    check(&password)?;
    Ok(password)
}

pub fn hash(password: &str) -> anyhow::Result<String> {
    Ok(hash_password(password.as_bytes())?)
}

/// Whether it may be one; before it is hashed, which takes longer.
pub fn check(password: &str) -> anyhow::Result<()> {
    match password.len() {
        0 => bail!("the password is empty; nothing was changed"),
        1..MIN_PASSWORD => {
            bail!("the password is shorter than {MIN_PASSWORD} characters; nothing was changed")
        }
        _ => Ok(()),
    }
}

/// Only the line's end is taken off: a password may begin or end with spaces.
fn line(source: &mut impl BufRead) -> anyhow::Result<String> {
    let mut text = String::new();
    source.take(MAX_PASSWORD as u64 + 3).read_line(&mut text)?;
    let text = text.strip_suffix('\n').unwrap_or(&text);
    Ok(text.strip_suffix('\r').unwrap_or(text).to_owned())
}

fn prompt(terminal: &File, words: &str) -> anyhow::Result<String> {
    let mut out = terminal;
    out.write_all(words.as_bytes())?;
    let echo = NoEcho::begin(terminal)?;
    let answer = line(&mut BufReader::new(terminal));
    drop(echo);
    out.write_all(b"\n")?;
    answer
}

/// The terminal shows what is typed again when this is dropped.
struct NoEcho<'a> {
    terminal: &'a File,
    before: Termios,
}

impl<'a> NoEcho<'a> {
    fn begin(terminal: &'a File) -> anyhow::Result<Self> {
        let before = tcgetattr(terminal).context("the terminal's modes")?;
        let mut silent = before.clone();
        silent.local_flags.remove(LocalFlags::ECHO);
        tcsetattr(terminal, SetArg::TCSAFLUSH, &silent)
            .context("turning the terminal's echo off")?;
        Ok(Self { terminal, before })
    }
}

impl Drop for NoEcho<'_> {
    fn drop(&mut self) {
        let _ = tcsetattr(self.terminal, SetArg::TCSAFLUSH, &self.before);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_line_loses_its_end_only() {
        for (given, password) in
            [("pass word \n", "pass word "), ("x\r\ny\n", "x"), ("no end", "no end"), ("\n", "")]
        {
            assert_eq!(line(&mut given.as_bytes()).unwrap(), password);
        }
        let endless = vec![b'x'; 1 << 20];
        assert!(line(&mut &endless[..]).unwrap().len() > MAX_PASSWORD, "refused when hashed");
        assert!(line(&mut &[0xff, b'\n'][..]).is_err(), "not UTF-8");
    }

    #[test]
    fn short_passwords_are_refused() {
        assert!(check("").is_err());
        assert!(check("seven77").is_err());
        assert!(check("eight888").is_ok());
    }
}
