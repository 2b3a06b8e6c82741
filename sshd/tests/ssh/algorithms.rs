//! What the server offers, as `ssh-audit` would look at it, and the keys it takes.

use std::{
    io::{BufRead, BufReader, Read, Write},
    net::TcpStream,
    process::Command,
};

use hermitage_storage::accounts::parse_keys;

use crate::fake_security_key;
use crate::harness::{Service, at, finish, stderr, stdout};

/// The ten name-lists of the server's SSH_MSG_KEXINIT (RFC 4253 §7.1).
fn offered(service: &Service) -> Vec<Vec<String>> {
    let socket = TcpStream::connect(("127.0.0.1", service.port)).unwrap();
    let mut reader = BufReader::new(socket.try_clone().unwrap());
    let mut greeting = String::new();
    reader.read_line(&mut greeting).unwrap();
    (&socket).write_all(b"SSH-2.0-audit\r\n").unwrap();
    let mut length = [0; 4];
    reader.read_exact(&mut length).unwrap();
    let mut packet = vec![0; u32::from_be_bytes(length) as usize];
    reader.read_exact(&mut packet).unwrap();
    // Padding length, message number, cookie.
    assert_eq!(packet[1], 20);
    let mut rest = &packet[18..];
    (0..10)
        .map(|_| {
            let (length, after) = rest.split_first_chunk::<4>().unwrap();
            let (names, after) = after.split_at(u32::from_be_bytes(*length) as usize);
            rest = after;
            let names = std::str::from_utf8(names).unwrap();
            names.split(',').filter(|name| !name.is_empty()).map(str::to_owned).collect()
        })
        .collect()
}

#[test]
fn only_what_is_strong_is_offered() {
    let service = Service::start();
    let lists = offered(&service);
    let [kex, host_keys, ciphers_in, ciphers_out, macs_in, macs_out, ..] = &lists[..] else {
        panic!("{lists:?}");
    };
    assert_eq!(kex[0], "mlkem768x25519-sha256", "post-quantum first");
    assert!(kex.contains(&"kex-strict-s-v00@openssh.com".into()), "{kex:?}");
    let strong = ["mlkem768x25519-sha256", "curve25519-sha256", "curve25519-sha256@libssh.org"];
    let markers = ["ext-info-s", "kex-strict-s-v00@openssh.com"];
    assert!(
        kex.iter().all(|name| strong.contains(&name.as_str()) || markers.contains(&name.as_str()))
    );
    assert_eq!(host_keys, &["ssh-ed25519"]);
    for ciphers in [ciphers_in, ciphers_out] {
        assert!(ciphers.iter().all(|name| !name.contains("cbc") && name != "none"), "{ciphers:?}");
    }
    for macs in [macs_in, macs_out] {
        // Those without encrypt-then-MAC are for clients that have no other: after all that have it.
        let without = macs.iter().skip_while(|name| name.ends_with("-etm@openssh.com"));
        let without: Vec<_> = without.collect();
        assert_eq!(without, ["hmac-sha2-256"]);
        assert!(macs.len() > without.len(), "{macs:?}");
        assert!(!macs.iter().any(|name| name.contains("sha1") || name.contains("md5")));
    }
}

#[test]
fn keys_of_every_kind_log_in_but_no_sha1_signature() {
    let service = Service::start();
    let account = service.account("alice");
    for (kind, bits) in [("rsa", "3072"), ("ecdsa", "256"), ("ecdsa", "384"), ("ecdsa", "521")] {
        let name = format!("{kind}{bits}");
        let mut keygen = Command::new("ssh-keygen");
        keygen.args(["-q", "-t", kind, "-b", bits, "-N", "", "-f"]).arg(service.path(&name));
        assert!(keygen.status().unwrap().success());
        let line = std::fs::read_to_string(service.path(&format!("{name}.pub"))).unwrap();
        for key in parse_keys(&line).unwrap() {
            service.accounts().add_key(account.id, &key).unwrap();
        }
        let output = finish(service.ssh_with_keys(&[&name]).args([&at("alice"), "echo in"]));
        assert_eq!(stdout(&output), "in\n", "{name}: {}", stderr(&output));
    }
    for algorithm in ["rsa-sha2-256", "rsa-sha2-512"] {
        let mut rsa = service.ssh_with_keys(&["rsa3072"]);
        rsa.args(["-o", &format!("PubkeyAcceptedAlgorithms={algorithm}"), &at("alice"), "echo in"]);
        assert_eq!(stdout(&finish(&mut rsa)), "in\n", "{algorithm}");
    }
    let mut sha1 = service.ssh_with_keys(&["rsa3072"]);
    sha1.args(["-o", "PubkeyAcceptedAlgorithms=ssh-rsa", &at("alice"), "echo in"]);
    assert_eq!(finish(&mut sha1).status.code(), Some(255));
}

#[test]
fn security_keys_log_in() {
    let service = Service::start();
    let account = service.account("alice");
    let dir = service.path("");
    for (name, kind, lies) in [
        ("ed25519", "sk-ssh-ed25519@openssh.com", false),
        ("ecdsa", "sk-ecdsa-sha2-nistp256@openssh.com", false),
        ("liar", "sk-ssh-ed25519@openssh.com", true),
    ] {
        let (key, agent) = fake_security_key::plug_in(&dir, name, kind, lies);
        service.accounts().add_key(account.id, &key).unwrap();
        let mut ssh = service.ssh_with_keys(&[&format!("{name}.pub")]);
        let output = finish(ssh.env("SSH_AUTH_SOCK", agent).args([&at("alice"), "echo in"]));
        // How it was used is part of what it signs.
        let expected = if lies { "" } else { "in\n" };
        assert_eq!(stdout(&output), expected, "{kind}: {}", stderr(&output));
    }
}

#[test]
fn a_client_that_changes_keys_often_loses_nothing() {
    let service = Service::start();
    service.account("alice");
    let sent: Vec<u8> = (0..6_000_000u32).map(|n| (n >> 3) as u8).collect();
    std::fs::write(service.path("sent"), &sent).unwrap();
    for cipher in ["chacha20-poly1305@openssh.com", "aes256-gcm@openssh.com", "aes256-ctr"] {
        let ciphers = format!("Ciphers={cipher}");
        let options = ["-o", "BatchMode=yes", "-o", "RekeyLimit=512K", "-o", &ciphers];
        let mut ssh = service.ssh_with(&options);
        ssh.args([&at("alice"), "cat"]).stdin(std::fs::File::open(service.path("sent")).unwrap());
        let output = finish(&mut ssh);
        assert!(output.stdout == sent, "{cipher}: {}", stderr(&output));
    }
}
