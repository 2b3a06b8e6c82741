//! `hermitage account add`.

use super::account_limits::Wanted;
use super::context::Context;
use super::output::count;
use super::{Taken, account_show, admin, key, password, time};
use anyhow::{Context as _, bail};
use hermitage_storage::accounts::{
    Account, AccountName, Accounts, NewAccount, PublicKey, verify_password,
};
use std::path::PathBuf;

pub const HELP: &str = "\
Examples:
  hermitage account add alice --key alice.pub
  ssh-add -L | hermitage account add bob --key -
  echo 'a long pass phrase' | hermitage account add carol --password-stdin
  hermitage account add dave --key dave.pub --class student --expires 2027-06-30

It can be repeated: an account that is there with what is asked for is said to be. One that differs stays as
it is; what differs is said, with the command that would change it, and the exit status is 4.";

#[derive(Debug, clap::Args)]
pub struct Add {
    /// Login name: lowercase letters, digits, - and _
    name: String,
    /// File with SSH public keys, one a line (- for standard input); can be given again
    #[arg(long, value_name = "FILE")]
    key: Vec<PathBuf>,
    /// Read the password, a line, from standard input
    #[arg(long)]
    password_stdin: bool,
    #[command(flatten)]
    wanted: Wanted,
}

pub fn run(context: &Context, add: &Add) -> anyhow::Result<()> {
    let stdin_keys = add.key.iter().filter(|file| file.as_os_str() == "-").count();
    if stdin_keys + usize::from(add.password_stdin) > 1 {
        bail!("standard input can be read once: give keys or the password by it, not both");
    }
    let name = AccountName::parse(&add.name)?;
    add.wanted.check(context)?;
    let mut accounts = context.accounts()?;
    let mut new = NewAccount::new(name);
    for file in &add.key {
        new.keys.extend(key::read(file)?);
    }
    let password = match add.password_stdin {
        true => Some(password::read_line()?),
        false => None,
    };
    if let Some(there) = accounts.by_name(new.name.as_str())? {
        return compare(context, &accounts, &there, add, &new.keys, password.as_deref());
    }
    new.password_hash = password.as_deref().map(password::hash).transpose()?;
    add.wanted.fill(context, &mut new);

    let account = accounts.create(&new)?;
    let provisioned = match context.provision(&account) {
        Ok(provisioned) => provisioned,
        Err(error) => {
            // All of the account or nothing.
            accounts.forget(&[account.id])?;
            return Err(error).context("making the disk; no account was made");
        }
    };
    if !provisioned {
        context.out.note("its disk is made by the first: hermitage base build");
    }
    if new.keys.is_empty() && new.password_hash.is_none() {
        let name = &account.name;
        context.out.note(format!(
            "{name} can't log in yet: hermitage account key add {name} FILE, or hermitage account \
             passwd {name}"
        ));
    }
    if account.expires.is_some_and(|expires| expires <= time::now()) {
        context.out.note("its time is over already: nobody can log in");
    }
    context.detail(format!("account {}", account.id));
    new.keys.iter().for_each(|key| context.detail(format!("key {}", key.fingerprint())));
    admin::account_changed(context, &account.name);
    account_show::added(context, &accounts, &account, true)
}

/// There is such an account: is it what is asked for?
fn compare(
    context: &Context,
    accounts: &Accounts,
    there: &Account,
    add: &Add,
    keys: &[PublicKey],
    password: Option<&str>,
) -> anyhow::Result<()> {
    let name = &there.name;
    let mut differs = Vec::new();
    let mut remedies = Vec::new();
    let differences = add.wanted.differences(there);
    if !differences.is_empty() {
        let options: Vec<_> = differences.iter().map(|d| d.option.as_str()).collect();
        remedies.push(format!("hermitage account set {name} {}", options.join(" ")));
        differs.extend(differences.iter().map(|d| d.words.clone()));
    }
    let missing = missing_keys(accounts, there, keys)?;
    if !missing.is_empty() {
        differs.push(format!("{} given here not among its keys", is_are(missing.len())));
        remedies.push(format!("hermitage account key add {name} FILE"));
    }
    let fits = |password: &str| verify_password(there.password.as_deref(), password.as_bytes());
    if password.is_some_and(|password| !fits(password)) {
        differs.push("its password is another".into());
        remedies.push(format!("hermitage account passwd {name}"));
    }
    if differs.is_empty() {
        // Its disk may be missing since it could not be made.
        context.provision(there)?;
        return account_show::added(context, accounts, there, false);
    }
    Err(Taken(format!(
        "there is already an account \"{name}\", and it differs: {}\nto change it: {}",
        differs.join("; "),
        remedies.join("; ")
    ))
    .into())
}

/// Those that the account does not have with the same options.
pub fn missing_keys<'a>(
    accounts: &Accounts,
    account: &Account,
    keys: &'a [PublicKey],
) -> anyhow::Result<Vec<&'a PublicKey>> {
    let has = accounts.keys(account.id)?;
    let is_there = |key: &PublicKey| {
        has.iter().any(|has| has.blob == key.blob() && has.options == key.options().to_string())
    };
    Ok(keys.iter().filter(|key| !is_there(key)).collect())
}

fn is_are(n: usize) -> String {
    format!("{} {}", count(n, "key"), if n == 1 { "is" } else { "are" })
}
