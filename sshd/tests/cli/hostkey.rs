//! `hermitage hostkey`, against what OpenSSH's tools say of the same key.

use std::{fs, path::Path, process::Command};

use crate::host::Host;

fn keygen(arguments: &[&str], file: &Path) -> String {
    let output = Command::new("ssh-keygen").args(arguments).arg(file).output().unwrap();
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    String::from_utf8(output.stdout).unwrap()
}

#[test]
fn the_host_key_is_told_as_openssh_tells_it() {
    let host = Host::new();
    let refused = host.run(&["hostkey", "shell.example.org"]);
    assert_eq!(refused.code, 3, "{}", refused.err);
    assert!(refused.err.contains("hermitage serve"), "{}", refused.err);

    fs::create_dir_all(host.state().host_keys_dir()).unwrap();
    let path = host.state().host_key();
    keygen(&["-q", "-t", "ed25519", "-N", "", "-f"], &path);
    let config = host.path("hermitage.toml");
    fs::write(&config, "[ssh]\nlisten = [\"127.0.0.1:22\", \"127.0.0.1:2222\", \"[::1]:22\"]\n")
        .unwrap();
    let config = config.to_str().unwrap();
    let told = host.json(&["--config", config, "hostkey", "shell.example.org"]);

    let fingerprint = told["fingerprint"].as_str().unwrap();
    assert!(keygen(&["-l", "-f"], &path).contains(fingerprint), "{told}");
    let records = keygen(&["-r", "shell.example.org", "-f"], &path);
    assert!(records.lines().any(|line| Some(line) == told["sshfp"].as_str()), "{records}{told}");
    let known = host.path("known_hosts");
    fs::write(&known, told["known_hosts"].as_str().unwrap()).unwrap();
    for name in ["shell.example.org", "[shell.example.org]:2222"] {
        assert!(keygen(&["-F", name, "-f"], &known).contains("ssh-ed25519 "), "{name}: {told}");
    }

    let odd = host.run(&["hostkey", "a host\nevil ssh-rsa AAAA"]);
    assert!(odd.code != 0 && odd.err.contains("no host name"), "{}", odd.err);
    fs::write(&path, "damaged").unwrap();
    let damaged = host.run(&["hostkey"]);
    assert!(damaged.code != 0 && damaged.err.contains("backup"), "{}", damaged.err);
}
