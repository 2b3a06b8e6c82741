//! Documents name files; files move. Every path of the repository that README.md or a page below
//! docs/ names has to exist.

use std::collections::BTreeSet;
use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result};

pub fn findings(root: &Path) -> Result<Vec<String>> {
    let mut pages = Vec::new();
    markdown(&root.join("docs"), &mut pages)?;
    let readme = root.join("README.md");
    if readme.exists() {
        pages.push(readme);
    }
    let mut names = BTreeSet::new();
    file_names(root, &mut names)?;
    let mut findings = Vec::new();
    for page in pages {
        let text = fs::read_to_string(&page).with_context(|| format!("read {}", page.display()))?;
        let name = page.strip_prefix(root).unwrap_or(&page).display().to_string();
        let folder = page.parent().unwrap_or(root);
        for (number, line) in text.lines().enumerate() {
            let missing = quoted(line)
                .filter(|word| looks_like_ours(root, word))
                .filter(|word| !root.join(word).exists() && !folder.join(word).exists())
                // A page about one folder may call its files by name alone.
                .filter(|word| word.contains('/') || !names.contains(*word))
                .chain(linked(line).filter(|target| !folder.join(target).exists()));
            findings.extend(
                missing.map(|path| format!("{name}:{}: {path} does not exist", number + 1)),
            );
        }
    }
    Ok(findings)
}

fn markdown(dir: &Path, pages: &mut Vec<PathBuf>) -> Result<()> {
    if !dir.exists() {
        return Ok(());
    }
    let mut entries: Vec<PathBuf> = fs::read_dir(dir)
        .with_context(|| format!("list {}", dir.display()))?
        .filter_map(|entry| entry.ok().map(|entry| entry.path()))
        .collect();
    entries.sort();
    for path in entries {
        if path.is_dir() {
            markdown(&path, pages)?;
        } else if path.extension().is_some_and(|extension| extension == "md") {
            pages.push(path);
        }
    }
    Ok(())
}

/// Names of all files of the repository.
fn file_names(dir: &Path, names: &mut BTreeSet<String>) -> Result<()> {
    for entry in fs::read_dir(dir).with_context(|| format!("list {}", dir.display()))? {
        let entry = entry?;
        let name = entry.file_name().to_string_lossy().into_owned();
        let file_type = entry.file_type()?;
        if file_type.is_dir() && name != "target" && name != ".git" {
            file_names(&entry.path(), names)?;
        } else if file_type.is_file() {
            names.insert(name);
        }
    }
    Ok(())
}

/// What stands between backticks.
fn quoted(line: &str) -> impl Iterator<Item = &str> {
    line.split('`').skip(1).step_by(2).map(|word| word.trim_end_matches(['/', ',', '.', ':']))
}

/// Targets of links that stay in the repository.
fn linked(line: &str) -> impl Iterator<Item = &str> {
    line.split("](").skip(1).filter_map(|rest| {
        let target = rest.split(')').next()?.split('#').next()?;
        (!target.is_empty() && !target.contains("://") && !target.starts_with("mailto:"))
            .then_some(target)
    })
}

/// A path of the repository starts with one of its top entries, and has no placeholder in it.
fn looks_like_ours(root: &Path, word: &str) -> bool {
    let plain = |c: char| c.is_ascii_alphanumeric() || "._-/".contains(c);
    // `target` comes and goes with builds.
    if !word.chars().all(plain) || word.starts_with("target") {
        return false;
    }
    match word.split_once('/') {
        // The parts of a name in capitals are placeholders: `accounts/UUID/disk.img`.
        Some((top, rest)) => {
            let placeholder = rest
                .split('/')
                .any(|part| !part.is_empty() && part.chars().all(|c| c.is_ascii_uppercase()));
            !top.is_empty() && !placeholder && root.join(top).is_dir()
        }
        None => [".rs", ".md", ".sql"].iter().any(|end| word.ends_with(end)),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_file_that_moved_is_found() {
        let root = std::env::temp_dir().join(format!("lab-paths-{}", std::process::id()));
        fs::create_dir_all(root.join("docs/deep")).unwrap();
        fs::create_dir_all(root.join("vmm/src")).unwrap();
        fs::write(root.join("vmm/src/here.rs"), "").unwrap();
        fs::write(
            root.join("docs/deep/page.md"),
            "`vmm/src/here.rs` and `vmm/src/gone.rs`, `here.rs`, `lost.rs`\n`/dev/kvm`, `vmm/UUID/x`, `cargo lab up`, `a/b`\n\
             [up](../../vmm/src/here.rs) [no](nowhere.md) [web](https://example.org/x.md)\n",
        )
        .unwrap();
        let found = findings(&root).unwrap();
        fs::remove_dir_all(&root).unwrap();
        assert_eq!(
            found,
            [
                "docs/deep/page.md:1: vmm/src/gone.rs does not exist",
                "docs/deep/page.md:1: lost.rs does not exist",
                "docs/deep/page.md:3: nowhere.md does not exist"
            ]
        );
    }
}
