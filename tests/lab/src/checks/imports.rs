//! Which crate may know which: the protocols are leaves, the part that holds accounts and the part
//! that runs guests meet only in their messages.

use super::Metadata;

/// A crate of ours and those of ours that it may depend on. Tests may depend on all.
const MAY_IMPORT: &[(&str, &[&str])] = &[
    ("hermitage-guest-proto", &[]),
    ("hermitage-vmm-proto", &[]),
    ("hermitage-storage", &[]),
    ("hermitage-agent", &["hermitage-guest-proto"]),
    ("hermitage-image", &["hermitage-guest-proto"]),
    ("hermitage-vmm", &["hermitage-vmm-proto", "hermitage-guest-proto", "hermitage-storage"]),
    ("hermitage", &["hermitage-vmm-proto", "hermitage-guest-proto", "hermitage-storage"]),
];
const TESTS: &[&str] = &["bench", "e2e", "lab"];

/// Beyond our own crates: what would pull an async runtime or the accounts into the jailed process.
const NEVER: &[(&str, &[&str])] = &[
    ("hermitage-vmm", &["tokio", "russh", "rusqlite"]),
    ("hermitage-agent", &["tokio", "russh", "rusqlite"]),
    ("hermitage", &["kvm-ioctls", "vm-memory"]),
];

pub fn findings(metadata: &Metadata) -> Vec<String> {
    let ours: Vec<_> =
        metadata.packages.iter().filter(|package| metadata.is_ours(package)).collect();
    let mut findings = Vec::new();
    for package in &ours {
        let name = package.name.as_str();
        if TESTS.contains(&name) {
            continue;
        }
        let Some((_, allowed)) = MAY_IMPORT.iter().find(|(known, _)| *known == name) else {
            findings
                .push(format!("{name} has no row in the table of tests/lab/src/checks/imports.rs"));
            continue;
        };
        let never =
            NEVER.iter().find(|(known, _)| *known == name).map_or(&[][..], |(_, never)| never);
        for dependency in package.dependencies.iter().filter(|d| d.kind.as_deref() != Some("dev")) {
            let is_ours = ours.iter().any(|other| other.name == dependency.name);
            if is_ours && !allowed.contains(&dependency.name.as_str()) {
                findings.push(format!("{name} may not import {}", dependency.name));
            }
            if never.contains(&dependency.name.as_str()) {
                findings.push(format!("{name} may not use {}", dependency.name));
            }
        }
    }
    findings
}

#[cfg(test)]
mod tests {
    use super::super::{Dependency, Package};
    use super::*;

    fn package(name: &str, dependencies: &[(&str, Option<&str>)]) -> Package {
        Package {
            id: name.into(),
            name: name.into(),
            version: "1.0.0".into(),
            license: None,
            dependencies: dependencies
                .iter()
                .map(|(name, kind)| Dependency { name: (*name).into(), kind: kind.map(Into::into) })
                .collect(),
        }
    }

    #[test]
    fn a_wrong_direction_is_found() {
        let packages = vec![
            package("hermitage", &[("hermitage-vmm", Some("dev")), ("hermitage-storage", None)]),
            package("hermitage-vmm", &[("hermitage", None), ("tokio", None)]),
            package("hermitage-storage", &[]),
            package("newcomer", &[]),
        ];
        let workspace_members = packages.iter().map(|package| package.id.clone()).collect();
        let findings = findings(&Metadata { packages, workspace_members });
        assert_eq!(findings.len(), 3, "{findings:?}");
        assert!(findings[0].contains("hermitage-vmm may not import hermitage"));
        assert!(findings[1].contains("tokio"));
        assert!(findings[2].contains("newcomer"));
    }
}
