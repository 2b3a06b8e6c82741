//! Names of the machine itself. A machine has no network but its loopback, so there is nobody to ask
//! but `/etc/hosts` (hosts(5)), which is read here: static glibc can't load what getaddrinfo(3) needs.

use std::fs;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

const HOSTS: &str = "/etc/hosts";

/// More than a name of ours has.
const ADDRESSES_MAX: usize = 8;

pub const LOOPBACK: [IpAddr; 2] =
    [IpAddr::V4(Ipv4Addr::LOCALHOST), IpAddr::V6(Ipv6Addr::LOCALHOST)];
const ANY: [IpAddr; 2] = [IpAddr::V4(Ipv4Addr::UNSPECIFIED), IpAddr::V6(Ipv6Addr::UNSPECIFIED)];

/// The addresses that a client means by this host.
pub fn resolve(host: &str) -> Result<Vec<IpAddr>, String> {
    let number = host.strip_prefix('[').and_then(|h| h.strip_suffix(']')).unwrap_or(host);
    if let Ok(address) = number.parse::<IpAddr>() {
        return Ok(vec![address]);
    }
    // RFC 6761 §6.3
    if host.eq_ignore_ascii_case("localhost") {
        return Ok(LOOPBACK.to_vec());
    }
    let found = look_up(&fs::read(HOSTS).unwrap_or_default(), host);
    match found.is_empty() {
        false => Ok(found),
        true => Err(format!("{host:?} is no name of this machine ({HOSTS} has those)")),
    }
}

/// The addresses that a client wants to be listened on (RFC 4254 §7.1).
pub fn resolve_bind(host: &str) -> Result<Vec<IpAddr>, String> {
    if host.is_empty() || host == "*" {
        return Ok(ANY.to_vec());
    }
    resolve(host)
}

fn look_up(hosts: &[u8], name: &str) -> Vec<IpAddr> {
    let text = String::from_utf8_lossy(hosts);
    let mut found = Vec::new();
    for line in text.lines() {
        let line = line.split('#').next().unwrap_or_default();
        let mut words = line.split_ascii_whitespace();
        let Some(address) = words.next().and_then(|word| word.parse::<IpAddr>().ok()) else {
            continue;
        };
        if words.any(|word| word.eq_ignore_ascii_case(name)) && found.len() < ADDRESSES_MAX {
            found.push(address);
        }
    }
    found
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_and_names_of_this_machine() {
        assert_eq!(resolve("127.0.0.2").unwrap(), ["127.0.0.2".parse::<IpAddr>().unwrap()]);
        assert_eq!(resolve("[::1]").unwrap(), [LOOPBACK[1]]);
        assert_eq!(resolve("LocalHost").unwrap(), LOOPBACK);
        assert!(resolve("example.org").unwrap_err().contains("example.org"));
        assert_eq!(resolve_bind("").unwrap(), ANY);
        assert_eq!(resolve_bind("*").unwrap(), ANY);
        assert_eq!(resolve_bind("localhost").unwrap(), LOOPBACK);
    }

    #[test]
    fn hosts_are_read_as_hosts_5_has_them() {
        let hosts = b"# 10.0.0.9 db\n127.0.1.1\talice DB # not cache\n::1 db\nnonsense db\n\xff\n";
        let found: Vec<String> = look_up(hosts, "db").iter().map(IpAddr::to_string).collect();
        assert_eq!(found, ["127.0.1.1", "::1"]);
        assert!(look_up(hosts, "cache").is_empty());
        assert!(look_up(hosts, "127.0.1.1").is_empty());
    }
}
