//! Stands in for a FIDO security key: a key agent (draft-ietf-sshm-ssh-agent) with one key, that signs as
//! OpenSSH's PROTOCOL.u2f has it. The hardware's part of that is a plain key that `ssh-keygen` made.

use std::{
    fs,
    io::{Read, Write},
    os::unix::net::{UnixListener, UnixStream},
    path::{Path, PathBuf},
    process::Command,
    thread,
};

use hermitage_storage::accounts::PublicKey;
use russh::keys::{
    PrivateKey,
    signature::Signer,
    ssh_key::sha2::{Digest, Sha256},
};

const APPLICATION: &[u8] = b"ssh:";
/// Somebody touched it.
const USER_PRESENT: u8 = 1;

pub struct SecurityKey {
    key: PrivateKey,
    kind: &'static str,
    blob: Vec<u8>,
    /// Says that it was used otherwise than it has signed.
    lies: bool,
}

/// A key of that kind whose public half is `NAME.pub` in the folder, and its agent's socket.
pub fn plug_in(dir: &Path, name: &str, kind: &'static str, lies: bool) -> (PublicKey, PathBuf) {
    let file = dir.join(format!("{name}-inside"));
    let plain = if kind.contains("ecdsa") { "ecdsa" } else { "ed25519" };
    let mut keygen = Command::new("ssh-keygen");
    keygen.args(["-q", "-t", plain, "-N", "", "-f"]).arg(&file);
    assert!(keygen.status().unwrap().success());
    let key = PrivateKey::from_openssh(fs::read_to_string(&file).unwrap()).unwrap();
    // The same fields after another type, then the application.
    let plain = key.public_key().to_bytes().unwrap();
    let (_, fields) = string(&plain);
    let blob = [&packed(kind.as_bytes()), fields, &packed(APPLICATION)].concat();
    let mut encode = Command::new("base64");
    fs::write(dir.join("blob"), &blob).unwrap();
    let base64 = encode.arg("-w0").arg(dir.join("blob")).output().unwrap().stdout;
    let line = format!("{kind} {} a security key\n", String::from_utf8(base64).unwrap());
    fs::write(dir.join(format!("{name}.pub")), &line).unwrap();

    let socket = dir.join(format!("{name}-agent"));
    let listener = UnixListener::bind(&socket).unwrap();
    let device = SecurityKey { key, kind, blob, lies };
    thread::spawn(move || {
        for mut client in listener.incoming().flatten() {
            while device.answer(&mut client).is_some() {}
        }
    });
    (PublicKey::parse_line(&line).unwrap().unwrap(), socket)
}

impl SecurityKey {
    /// One request; none when the client is gone.
    fn answer(&self, client: &mut UnixStream) -> Option<()> {
        let mut length = [0; 4];
        client.read_exact(&mut length).ok()?;
        let mut request = vec![0; u32::from_be_bytes(length) as usize];
        client.read_exact(&mut request).ok()?;
        let reply = match request[0] {
            // SSH_AGENTC_REQUEST_IDENTITIES
            11 => [&[12, 0, 0, 0, 1], &*packed(&self.blob), &packed(b"a security key")].concat(),
            // SSH_AGENTC_SIGN_REQUEST
            13 => {
                let (blob, rest) = string(&request[1..]);
                assert_eq!(blob, self.blob);
                [&[14], &*packed(&self.sign(string(rest).0))].concat()
            }
            // SSH_AGENT_FAILURE, to extensions
            _ => vec![5],
        };
        client.write_all(&packed(&reply)).ok()
    }

    fn sign(&self, message: &[u8]) -> Vec<u8> {
        let used = [&[USER_PRESENT][..], &7u32.to_be_bytes()].concat();
        let signed = [&Sha256::digest(APPLICATION)[..], &used, &Sha256::digest(message)].concat();
        let signature = self.key.try_sign(&signed).unwrap();
        let said = match self.lies {
            false => used,
            true => [&[USER_PRESENT | 4][..], &7u32.to_be_bytes()].concat(),
        };
        [&packed(self.kind.as_bytes())[..], &packed(signature.as_bytes()), &said].concat()
    }
}

/// A string of RFC 4251 §5.
fn packed(bytes: &[u8]) -> Vec<u8> {
    [&(bytes.len() as u32).to_be_bytes()[..], bytes].concat()
}

/// The first string, and what is after it.
fn string(bytes: &[u8]) -> (&[u8], &[u8]) {
    let (length, rest) = bytes.split_first_chunk::<4>().unwrap();
    rest.split_at(u32::from_be_bytes(*length) as usize)
}
