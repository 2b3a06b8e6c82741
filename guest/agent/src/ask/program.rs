//! `hermitage` as it is in the machine: `/usr/bin/hermitage` in its root file system.

use std::io::Write;
use std::os::fd::{AsRawFd, OwnedFd};
use std::path::Path;

use hermitage_guest_proto::MAX_ANSWER;
use nix::errno::Errno;
use nix::sys::socket::{self, AddressFamily, MsgFlags, SockFlag, SockType, UnixAddr};

use super::{Question, SOCKET, UNASKED};

/// What it is called, which is also how this program knows that it is one.
pub const NAME: &str = "hermitage";

/// Asks; returns what to exit with.
pub fn main() -> i32 {
    let arguments: Vec<_> = std::env::args_os().skip(1).collect();
    let arguments: Option<Vec<_>> = arguments.iter().map(|argument| argument.to_str()).collect();
    let packet = arguments.and_then(|arguments| question(&arguments).packet());
    let Some(packet) = packet else {
        return fail(1, "that is no question, or it is too long; \"hermitage help\" lists them");
    };
    match ask(&packet) {
        // A pipe that nobody reads is no trouble of the host's.
        Ok(Told { status: 0, text }) => i32::from(std::io::stdout().write_all(&text).is_err()),
        Ok(Told { status, text }) => fail(status, &String::from_utf8_lossy(&text)),
        Err(Errno::ENOENT | Errno::ECONNREFUSED) => {
            fail(UNASKED, "this host does not answer questions from inside")
        }
        Err(Errno::EACCES) => fail(UNASKED, "only the account's own user asks the host"),
        Err(error) => fail(UNASKED, &format!("the host can't be asked: {}", error.desc())),
    }
}

fn question(arguments: &[&str]) -> Question {
    let (word, rest) = match arguments {
        [] | ["-h" | "--help", ..] => ("help", &[][..]),
        [word, rest @ ..] => (*word, rest),
    };
    Question { word: word.into(), argument: rest.join(" ") }
}

fn fail(status: u8, words: &str) -> i32 {
    eprintln!("{NAME}: {words}");
    status.into()
}

/// An answer.
pub struct Told {
    pub status: u8,
    pub text: Vec<u8>,
}

fn ask(packet: &[u8]) -> nix::Result<Told> {
    let socket = connect(Path::new(SOCKET))?;
    send(&socket, packet)?;
    told(&socket)
}

pub fn connect(path: &Path) -> nix::Result<OwnedFd> {
    let flags = SockFlag::SOCK_CLOEXEC;
    let socket = socket::socket(AddressFamily::Unix, SockType::SeqPacket, flags, None)?;
    socket::connect(socket.as_raw_fd(), &UnixAddr::new(path)?)?;
    Ok(socket)
}

pub fn send(socket: &OwnedFd, packet: &[u8]) -> nix::Result<()> {
    socket::send(socket.as_raw_fd(), packet, MsgFlags::MSG_NOSIGNAL).map(drop)
}

/// Waits for the answer. PID 1 sees to it that there is one, sooner or later.
pub fn told(socket: &OwnedFd) -> nix::Result<Told> {
    let mut packet = vec![0; 1 + MAX_ANSWER];
    let count = loop {
        match socket::recv(socket.as_raw_fd(), &mut packet, MsgFlags::empty()) {
            Err(Errno::EINTR) => {}
            received => break received?,
        }
    };
    packet.truncate(count);
    let (status, text) = packet.split_first().ok_or(Errno::ECONNRESET)?;
    Ok(Told { status: *status, text: text.into() })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn words_on_the_command_line_are_a_question() {
        for (arguments, word, argument) in [
            (&[][..], "help", ""),
            (&["--help"], "help", ""),
            (&["-h", "hold"], "help", ""),
            (&["status"], "status", ""),
            (&["hold", "2h"], "hold", "2h"),
            (&["hold", "2h", "please"], "hold", "2h please"),
        ] {
            let wanted = Question { word: word.into(), argument: argument.into() };
            assert_eq!(question(arguments), wanted);
        }
    }
}
