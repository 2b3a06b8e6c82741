//! Only permissive licences are linked in: Hermitage is Apache-2.0 and wants no condition beyond it.

use super::Metadata;

const ALLOWED: &[&str] = &[
    "0BSD",
    "Apache-2.0",
    "Apache-2.0 WITH LLVM-exception",
    "BSD-2-Clause",
    "BSD-3-Clause",
    "BSL-1.0",
    "CC0-1.0",
    "ISC",
    "MIT",
    "MIT-0",
    "Unicode-3.0",
    "Unlicense",
    "Zlib",
];

pub fn findings(metadata: &Metadata) -> Vec<String> {
    let mut findings = Vec::new();
    for package in &metadata.packages {
        let who = format!("{} {}", package.name, package.version);
        match &package.license {
            None => findings.push(format!("{who} names no licence")),
            Some(text) => match permits(text) {
                Some(true) => {}
                Some(false) => {
                    findings.push(format!("{who} is under {text}, which is not among the allowed"))
                }
                None => findings.push(format!("{who}: the licence {text:?} is no SPDX expression")),
            },
        }
    }
    findings
}

/// Whether an SPDX expression can be satisfied by allowed licences; None when it can't be read.
fn permits(text: &str) -> Option<bool> {
    // The old form of `OR`.
    let text = text.replace('/', " OR ").replace('(', " ( ").replace(')', " ) ");
    let mut words = text.split_ascii_whitespace().peekable();
    let result = any(&mut words)?;
    words.next().is_none().then_some(result)
}

type Words<'a> = std::iter::Peekable<std::str::SplitAsciiWhitespace<'a>>;

fn any(words: &mut Words) -> Option<bool> {
    let mut result = every(words)?;
    while words.next_if_eq(&"OR").is_some() {
        result |= every(words)?;
    }
    Some(result)
}

fn every(words: &mut Words) -> Option<bool> {
    let mut result = one(words)?;
    while words.next_if_eq(&"AND").is_some() {
        result &= one(words)?;
    }
    Some(result)
}

fn one(words: &mut Words) -> Option<bool> {
    match words.next()? {
        "(" => {
            let result = any(words)?;
            (words.next()? == ")").then_some(result)
        }
        ")" | "AND" | "OR" | "WITH" => None,
        name => {
            let mut name = name.to_owned();
            if words.next_if_eq(&"WITH").is_some() {
                name = format!("{name} WITH {}", words.next()?);
            }
            Some(ALLOWED.contains(&name.as_str()))
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn expressions_are_read_as_spdx_means_them() {
        assert_eq!(permits("MIT OR GPL-3.0-only"), Some(true));
        assert_eq!(permits("MIT/Apache-2.0"), Some(true));
        assert_eq!(permits("MIT AND GPL-3.0-only"), Some(false));
        assert_eq!(permits("GPL-2.0-only OR MIT AND ISC"), Some(true));
        assert_eq!(permits("(GPL-2.0-only OR MIT) AND LGPL-2.1-or-later"), Some(false));
        assert_eq!(permits("Apache-2.0 WITH LLVM-exception"), Some(true));
        assert_eq!(permits("GPL-3.0-only WITH Classpath-exception-2.0"), Some(false));
        for broken in ["", "MIT OR", "(MIT", "MIT MIT", "AND"] {
            assert_eq!(permits(broken), None, "{broken:?}");
        }
    }
}
