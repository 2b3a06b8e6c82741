//! The login measurement against a real sshd and the real client.

use std::path::Path;

use bench::{
    clock,
    login::{client::Client, openssh::OpenSsh},
};

/// Says so and does nothing where there is no sshd, or no root to give a shell.
#[test]
fn a_login_is_timed_from_the_connect_to_the_prompt() {
    if !Path::new("/usr/sbin/sshd").exists() || !nix::unistd::Uid::effective().is_root() {
        eprintln!("skipped: needs root and /usr/sbin/sshd");
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let client = Client::new(dir.path(), env!("CARGO_BIN_EXE_hermitage-bench").as_ref()).unwrap();
    let peer = OpenSsh::start(dir.path(), &client.public_key()).unwrap();
    let started = clock::now();
    let took = client.login("root", peer.port).unwrap();
    assert!(took > 0 && took < clock::now() - started);
    let error = format!("{:#}", client.login("nobody-here", peer.port).unwrap_err());
    assert!(error.contains("nobody-here") && error.contains("Permission denied"), "{error}");
}
