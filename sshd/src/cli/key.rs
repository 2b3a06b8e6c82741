//! `hermitage account key …`.

use super::account_show::{key_json, key_table};
use super::context::Context;
use super::output::count;
use super::{NotFound, admin, date};
use anyhow::{Context as _, bail};
use clap::Subcommand;
use hermitage_storage::accounts::{KeyOptions, PublicKey, StoredKey, parse_keys};
use serde_json::json;
use std::fs::File;
use std::io::{self, Read};
use std::path::{Path, PathBuf};

/// Longest file of keys.
const MAX_FILE: u64 = 1 << 20;

#[derive(Debug, Subcommand)]
pub enum Command {
    /// Add SSH public keys to an account
    #[command(after_help = "\
Examples:
  hermitage account key add alice ~/.ssh/id_ed25519.pub
  ssh-add -L | hermitage account key add alice -
  hermitage account key add alice backup.pub --options 'restrict,command=\"borg serve\"'
  hermitage account key add alice laptop.pub --label 'the borrowed laptop' --expires 2027-06-30

A line may have options before its key, as in an authorized_keys file; docs/ssh.md has those that are kept.
Others are refused.")]
    Add {
        name: String,
        /// Files with public keys, one a line (- for standard input)
        #[arg(required = true, value_name = "FILE")]
        files: Vec<PathBuf>,
        /// What the keys may do, as before a key in an authorized_keys file
        #[arg(long, value_name = "OPTIONS", value_parser = KeyOptions::parse)]
        options: Option<KeyOptions>,
        /// What to call the key, in place of the comment in the file
        #[arg(long, value_name = "TEXT")]
        label: Option<String>,
        /// From when on it opens nothing: 2027-06-30, 2027-06-30T18:00 (UTC) or 90d
        #[arg(long, value_name = "TIME", value_parser = date::parse)]
        expires: Option<i64>,
    },
    /// List the keys of an account
    List { name: String },
    /// Take a key away from an account
    #[command(after_help = "\
A running session that used the key goes on; hermitage account disable ends it.

Examples:
  hermitage account key remove alice SHA256:qyR+xwf14QOt5pYZQm5bUE/UmFTZSWnVBytCLcOP9X4
  hermitage account key remove alice alice@laptop")]
    Remove {
        name: String,
        /// Its fingerprint (or the start of it), or its comment
        #[arg(value_name = "KEY")]
        which: String,
    },
}

impl Command {
    /// Whether it is noted in the audit log ([`super::audit`]).
    pub fn changes(&self) -> bool {
        match self {
            Self::List { .. } => false,
            Self::Add { .. } | Self::Remove { .. } => true,
        }
    }
}

pub fn run(context: &Context, command: Command) -> anyhow::Result<()> {
    match command {
        Command::Add { name, files, options, label, expires } => {
            let wanted = Wanted { options, label, expires };
            add(context, &name, &files, &wanted)
        }
        Command::List { name } => list(context, &name),
        Command::Remove { name, which } => remove(context, &name, &which),
    }
}

/// The keys in a file, or on standard input for `-`.
pub fn read(file: &Path) -> anyhow::Result<Vec<PublicKey>> {
    let stdin = file.as_os_str() == "-";
    let shown = if stdin { "standard input".into() } else { file.display().to_string() };
    let read = || -> anyhow::Result<Vec<PublicKey>> {
        let mut text = String::new();
        let source: Box<dyn Read> =
            if stdin { Box::new(io::stdin()) } else { Box::new(File::open(file)?) };
        if source.take(MAX_FILE + 1).read_to_string(&mut text)? as u64 > MAX_FILE {
            bail!("it has more than {MAX_FILE} bytes");
        }
        Ok(parse_keys(&text)?)
    };
    read().with_context(|| format!("reading public keys from {shown}"))
}

/// What keys are given beside what stands in their files.
struct Wanted {
    options: Option<KeyOptions>,
    label: Option<String>,
    expires: Option<i64>,
}

impl Wanted {
    fn give(&self, keys: Vec<PublicKey>) -> anyhow::Result<Vec<PublicKey>> {
        let own = |key: &PublicKey| !key.options().is_empty();
        if self.options.is_some()
            && let Some(key) = keys.iter().find(|key| own(key))
        {
            bail!(
                "{} has options of its own; give them by --options or with the key",
                key.fingerprint()
            );
        }
        let give = |mut key: PublicKey| -> anyhow::Result<PublicKey> {
            if let Some(options) = &self.options {
                key = key.with_options(options.clone());
            }
            if let Some(at) = self.expires {
                let options = key.options().until(&date::digits(at));
                let options = options.with_context(|| format!("the key {}", key.fingerprint()))?;
                key = key.with_options(options);
            }
            Ok(match &self.label {
                Some(label) => key.with_comment(label),
                None => key,
            })
        };
        keys.into_iter().map(give).collect()
    }
}

fn add(context: &Context, name: &str, files: &[PathBuf], wanted: &Wanted) -> anyhow::Result<()> {
    let mut accounts = context.accounts()?;
    let account = accounts.named(name)?;
    let mut keys = Vec::new();
    for file in files {
        keys.extend(read(file)?);
    }
    let keys = wanted.give(keys)?;
    let added = accounts.add_keys(account.id, &keys)?;
    keys.iter().for_each(|key| context.detail(format!("key {}", key.fingerprint())));
    admin::account_changed(context, name);
    let keys = accounts.keys(account.id)?;
    let object = json!({
        "account": name,
        "added": added,
        "keys": keys.iter().map(key_json).collect::<Vec<_>>(),
    });
    context.out.show(&object, || {
        format!("{} added to {name}, which has {} now", count(added, "key"), keys.len())
    })
}

fn list(context: &Context, name: &str) -> anyhow::Result<()> {
    let accounts = context.accounts()?;
    let keys = accounts.keys(accounts.named(name)?.id)?;
    let object = json!({ "account": name, "keys": keys.iter().map(key_json).collect::<Vec<_>>() });
    context.out.show(&object, || key_table(&keys))
}

fn remove(context: &Context, name: &str, which: &str) -> anyhow::Result<()> {
    let accounts = context.accounts()?;
    let account = accounts.named(name)?;
    let keys = accounts.keys(account.id)?;
    let key = pick(&keys, which).with_context(|| format!("the keys of {name}"))?;
    accounts.remove_key(account.id, &key.fingerprint)?;
    context.detail(format!("key {}", key.fingerprint));
    admin::account_changed(context, name);
    let object = json!({ "account": name, "removed": key_json(key) });
    context.out.show(&object, || {
        format!("{} ({}) is taken away from {name}", key.fingerprint, key.comment)
    })
}

/// The one key that is meant. Half a dozen characters of a fingerprint are enough to name it.
fn pick<'a>(keys: &'a [StoredKey], which: &str) -> anyhow::Result<&'a StoredKey> {
    let bare = which.strip_prefix("SHA256:").unwrap_or(which);
    let fits = |key: &&StoredKey| {
        let fingerprint = key.fingerprint.strip_prefix("SHA256:").unwrap_or(&key.fingerprint);
        key.comment == which || (bare.len() >= 6 && fingerprint.starts_with(bare))
    };
    let mut found = keys.iter().filter(fits);
    match (found.next(), found.next()) {
        (Some(key), None) => Ok(key),
        (None, _) => Err(NotFound(format!(
            "none has the fingerprint or comment \"{which}\" (hermitage account key list shows them)"
        ))
        .into()),
        (Some(_), Some(_)) => bail!("\"{which}\" fits more than one; name it by its fingerprint"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn key(fingerprint: &str, comment: &str) -> StoredKey {
        StoredKey {
            key_type: "ssh-ed25519".into(),
            blob: vec![],
            fingerprint: format!("SHA256:{fingerprint}"),
            comment: comment.into(),
            added: 0,
            options: String::new(),
        }
    }

    #[test]
    fn a_key_is_named_by_fingerprint_or_comment() {
        let keys = [key("abcdef111", "laptop"), key("abcdef222", "home"), key("xyz", "home")];
        let picked = |which: &str| pick(&keys, which).map(|key| key.fingerprint.clone()).ok();
        assert_eq!(picked("SHA256:abcdef2"), Some("SHA256:abcdef222".into()));
        assert_eq!(picked("abcdef1"), Some("SHA256:abcdef111".into()));
        assert_eq!(picked("laptop"), Some("SHA256:abcdef111".into()));
        assert_eq!(picked("home"), None, "two have that comment");
        assert_eq!(picked("abcdef"), None, "two start so");
        assert_eq!(picked("xyz"), None, "too short to be meant");
        assert!(pick(&keys, "nothing").unwrap_err().is::<NotFound>());
    }
}
