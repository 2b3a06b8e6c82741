//! What the options of a key, or of a certificate, leave of what a client asks for.

use hermitage_guest_proto::forward::Place;
use hermitage_storage::accounts::KeyOptions;
use russh::ChannelOpenFailure;

use crate::session::Kind;

/// Where a forced command finds what was asked for (sshd(8), "AUTHORIZED_KEYS FILE FORMAT").
const ORIGINAL_COMMAND: &str = "SSH_ORIGINAL_COMMAND";

const NOT_PERMITTED: &str = "this login's key or certificate does not permit it";

/// The forced command that is a service of the machine's own, as sshd has it.
const INTERNAL_SFTP: &str = "internal-sftp";

/// What the subsystem is to a forced command: a command that it may run.
const SFTP_SERVER: &str = "/usr/lib/openssh/sftp-server";

/// What runs; or why nothing can. A forced command is told in its environment what was asked for.
pub fn program(
    options: &KeyOptions,
    asked: Kind,
    env: &mut Vec<(String, String)>,
) -> Result<Kind, String> {
    let Some(command) = &options.command else { return Ok(asked) };
    // The client's word for it counts for nothing.
    env.retain(|(name, _)| name != ORIGINAL_COMMAND);
    if command == INTERNAL_SFTP {
        return Ok(Kind::Sftp);
    }
    let original = match asked {
        Kind::Shell => None,
        Kind::Sftp => Some(SFTP_SERVER.to_owned()),
        // It decides what is done. Something else than was asked for must not reach it.
        Kind::Exec(line) => Some(String::from_utf8(line).map_err(|_| {
            "this login runs one command, which is told yours in UTF-8, and it is not".to_owned()
        })?),
    };
    env.extend(original.map(|line| (ORIGINAL_COMMAND.to_owned(), line)));
    Ok(Kind::Exec(command.clone().into_bytes()))
}

pub fn connect(options: &KeyOptions, to: &Place) -> Result<(), String> {
    let may = match to {
        Place::Tcp { host, port } => options.may_open(host, *port),
        Place::Unix { .. } => options.may_open_sockets(),
        Place::Private => false,
    };
    if may { Ok(()) } else { Err(NOT_PERMITTED.into()) }
}

pub fn listen(options: &KeyOptions, at: &Place) -> Result<(), String> {
    let may = match at {
        Place::Tcp { host, port } => options.may_listen(host, *port),
        Place::Unix { .. } => options.may_listen_on_sockets(),
        Place::Private => options.agent_forwarding,
    };
    if may { Ok(()) } else { Err(NOT_PERMITTED.into()) }
}

/// SSH_OPEN_ADMINISTRATIVELY_PROHIBITED (RFC 4254 §5.1).
pub fn prohibited(reason: String) -> ChannelOpenFailure {
    ChannelOpenFailure::Other { code: 1, reason }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn ran(options: &str, asked: Kind) -> Result<(String, Option<String>), String> {
        let options = KeyOptions::parse(options).unwrap();
        let mut env = vec![(ORIGINAL_COMMAND.to_owned(), "the client's".to_owned())];
        let kind = program(&options, asked, &mut env)?;
        let ran = match kind {
            Kind::Exec(line) => String::from_utf8(line).unwrap(),
            other => format!("{other:?}"),
        };
        Ok((ran, env.pop().map(|(_, value)| value)))
    }

    #[test]
    fn whatever_is_asked_for_the_forced_command_runs() {
        let forced = "command=\"borg serve\"";
        let exec = |line: &str| Kind::Exec(line.into());
        assert_eq!(ran(forced, Kind::Shell), Ok(("borg serve".into(), None)));
        assert_eq!(ran(forced, exec("rm -r /")), Ok(("borg serve".into(), Some("rm -r /".into()))));
        let (ran_instead, original) = ran(forced, Kind::Sftp).unwrap();
        assert_eq!((&*ran_instead, original.as_deref()), ("borg serve", Some(SFTP_SERVER)));
        assert!(ran(forced, Kind::Exec(vec![b'a', 0xff])).unwrap_err().contains("UTF-8"));
        assert_eq!(ran("command=\"internal-sftp\"", exec("ls")), Ok(("Sftp".into(), None)));
        let free = ("ls".into(), Some("the client's".into()));
        assert_eq!(ran("restrict", exec("ls")), Ok(free));
    }
}
