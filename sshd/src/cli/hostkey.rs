//! `hermitage hostkey`: what lets a first login be checked instead of trusted.

use std::collections::BTreeSet;

use anyhow::{Context as _, bail};
use hermitage::server::read_host_key;
use russh::keys::{Algorithm, HashAlg, PublicKey};
use serde_json::json;

use super::{NotFound, context::Context};

/// Longest name in the DNS, in text (RFC 1035 §3.1).
const MAX_HOST: usize = 253;

pub fn run(context: &Context, host: Option<String>) -> anyhow::Result<()> {
    let host = match host {
        Some(host) => host,
        None => this_host()?,
    };
    check(&host)?;
    let path = context.state.host_key();
    let Some(key) = read_host_key(&path)? else {
        let words = "there is no host key yet; the first start of `hermitage serve` makes it";
        return Err(NotFound(format!("{words} ({})", path.display())).into());
    };
    let key = key.public_key();
    let listen = &context.config.ssh.listen;
    let ports: BTreeSet<u16> = listen.iter().map(|address| address.port()).collect();
    let fingerprint = key.fingerprint(HashAlg::Sha256).to_string();
    let known_hosts = known_hosts(key, &host, &ports)?;
    let sshfp = sshfp(key, &host);
    let object = json!({
        "host": host,
        "type": key.algorithm().as_str(),
        "fingerprint": fingerprint,
        "known_hosts": known_hosts,
        "sshfp": sshfp,
    });
    context.out.show(&object, || {
        let mut text = format!(
            "what ssh shows at a first login\n  {} {fingerprint}\n\n\
             a line for known_hosts\n  {known_hosts}\n",
            key.algorithm()
        );
        if let Some(record) = &sshfp {
            text.push_str(&format!(
                "\na record for a zone with DNSSEC (clients: VerifyHostKeyDNS yes)\n  {record}\n"
            ));
        }
        text.trim_end().to_owned()
    })
}

fn this_host() -> anyhow::Result<String> {
    let name = nix::unistd::gethostname().context("this machine's name can't be read; give one")?;
    name.into_string().ok().context("this machine's name is no text; give one")
}

/// What goes into files and zones must not bring lines and fields of its own.
fn check(host: &str) -> anyhow::Result<()> {
    let fits = |c: char| c.is_ascii_alphanumeric() || ".-_:".contains(c);
    if host.is_empty() || host.len() > MAX_HOST || !host.chars().all(fits) {
        bail!("{host:?} is no host name; give one such as shell.example.org, or an address");
    }
    Ok(())
}

/// sshd(8), "SSH_KNOWN_HOSTS FILE FORMAT".
fn known_hosts(key: &PublicKey, host: &str, ports: &BTreeSet<u16>) -> anyhow::Result<String> {
    let name = |port: &u16| match port {
        22 => host.to_owned(),
        port => format!("[{host}]:{port}"),
    };
    let names: Vec<_> = ports.iter().map(name).collect();
    let mut key = key.clone();
    key.set_comment("");
    Ok(format!("{} {}", names.join(","), key.to_openssh()?.trim_end()))
}

/// RFC 4255 §3.1; the numbers of algorithms are those of RFC 6594 and RFC 7479, SHA-256 is type 2.
fn sshfp(key: &PublicKey, host: &str) -> Option<String> {
    let algorithm = match key.algorithm() {
        Algorithm::Rsa { .. } => 1,
        Algorithm::Ecdsa { .. } => 3,
        Algorithm::Ed25519 => 4,
        _ => return None,
    };
    let fingerprint = key.fingerprint(HashAlg::Sha256);
    let hex: String = fingerprint.as_bytes().iter().map(|byte| format!("{byte:02x}")).collect();
    Some(format!("{host} IN SSHFP {algorithm} 2 {hex}"))
}
