//! `hermitage snapshot …`: what is saved of the memory of accounts' machines.

use super::context::Context;
use super::output::table;
use super::{NotFound, Said, account_machine, size, time};
use anyhow::Context as _;
use clap::Subcommand;
use hermitage_storage::accounts::Account;
use hermitage_storage::base::BaseId;
use hermitage_storage::disk;
use hermitage_storage::snapshot::{self, Header};
use serde_json::{Value, json};
use std::fs::File;

#[derive(Debug, Subcommand)]
pub enum Command {
    /// List what is saved
    List,
    /// Show what is saved of an account's machine
    Show { account: String },
    /// Read all of it and check it against its checksums
    Verify {
        /// The account; all of them if none is named
        account: Option<String>,
    },
    /// Delete it: the next login starts from the disk
    Drop { account: String },
}

impl Command {
    /// Whether it is noted in the audit log ([`super::audit`]).
    pub fn changes(&self) -> bool {
        match self {
            Self::List | Self::Show { .. } | Self::Verify { .. } => false,
            Self::Drop { .. } => true,
        }
    }
}

pub fn run(context: &Context, command: Command) -> anyhow::Result<()> {
    match command {
        Command::List => list(context),
        Command::Show { account } => show(context, &account),
        Command::Verify { account } => verify(context, account.as_deref()),
        Command::Drop { account } => {
            existing(context, &account)?;
            account_machine::reset(context, &account)
        }
    }
}

/// A snapshot and whether it belongs to the disk that is there now.
struct Found {
    account: Account,
    file: File,
    header: Result<Header, String>,
    fits: bool,
}

impl Found {
    /// None: nothing is saved.
    fn of(context: &Context, account: Account) -> anyhow::Result<Option<Self>> {
        let path = context.state.snapshot(account.id);
        let file = match File::open(&path) {
            Ok(file) => file,
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(None),
            Err(error) => return Err(error).context(path.display().to_string()),
        };
        let header = snapshot::read_header(&file).map_err(|error| error.to_string());
        let disk = File::open(context.state.disk(account.id)).ok();
        let tag = disk.and_then(|disk| disk::tag(&disk).ok().flatten());
        let fits = header.as_ref().is_ok_and(|h| {
            Some(h.description.disk_tag) == tag && h.description.account == account.id
        });
        Ok(Some(Self { account, file, header, fits }))
    }

    fn verdict(&self) -> String {
        match (&self.header, self.fits) {
            (Err(reason), _) => reason.clone(),
            (Ok(_), false) => {
                "not of the disk as it is now; the next login starts from that".into()
            }
            (Ok(_), true) => "is resumed by the next login".into(),
        }
    }

    fn bytes(&self) -> u64 {
        self.file.metadata().map_or(0, |metadata| metadata.len())
    }

    fn json(&self) -> Value {
        let header = self.header.as_ref().ok();
        json!({
            "account": self.account.name,
            "bytes": self.bytes(),
            "usable": self.fits,
            "state": self.verdict(),
            "created": header.map(|h| time::rfc3339(h.description.created)),
            "base": header.map(|h| h.description.base.as_str().to_owned()),
            "data_pages": header.map(|h| h.data_pages),
            "zero_pages": header.map(|h| h.zero_pages),
            "ram_bytes": header.map(|h| h.description.ram),
            "vcpus": header.map(|h| h.description.vcpus),
        })
    }
}

fn all(context: &Context) -> anyhow::Result<Vec<Found>> {
    let mut found = vec![];
    for account in context.accounts()?.list(false)? {
        found.extend(Found::of(context, account)?);
    }
    Ok(found)
}

/// The accounts whose machines were saved and can still be resumed, each with the base it needs.
pub fn sleepers(context: &Context) -> anyhow::Result<Vec<(BaseId, String)>> {
    let needed = |one: Found| {
        let base = one.header.ok().filter(|_| one.fits)?.description.base;
        Some((base, one.account.name))
    };
    Ok(all(context)?.into_iter().filter_map(needed).collect())
}

fn existing(context: &Context, name: &str) -> anyhow::Result<Found> {
    let account = context.accounts()?.named(name)?;
    Found::of(context, account)?
        .ok_or_else(|| NotFound(format!("nothing is saved of {name}'s machine")).into())
}

fn list(context: &Context) -> anyhow::Result<()> {
    let found = all(context)?;
    let object = json!({ "snapshots": found.iter().map(Found::json).collect::<Vec<_>>() });
    context.out.show(&object, || {
        if found.is_empty() {
            return "nothing is saved".to_owned();
        }
        let mut table = table(["ACCOUNT", "SAVED", "SIZE", "BASE", "STATE"]);
        for one in &found {
            let about = one.header.as_ref().ok().map(|header| &header.description);
            table.add_row([
                one.account.name.clone(),
                about.map_or("-".into(), |about| time::short(about.created)),
                size::show(one.bytes()),
                about.map_or("-".into(), |about| about.base.as_str().to_owned()),
                one.verdict(),
            ]);
        }
        table.trim_fmt()
    })
}

fn show(context: &Context, name: &str) -> anyhow::Result<()> {
    let one = existing(context, name)?;
    context.out.show(&one.json(), || {
        let mut facts = vec![
            ("account", one.account.name.clone()),
            ("size", size::show(one.bytes())),
            ("state", one.verdict()),
        ];
        if let Ok(header) = &one.header {
            let about = &header.description;
            let pages = format!("{} with data, {} zero", header.data_pages, header.zero_pages);
            facts.extend([
                ("saved", time::short(about.created)),
                ("base", about.base.as_str().to_owned()),
                ("pages", pages),
                ("machine", format!("{} of memory, {} CPUs", size::show(about.ram), about.vcpus)),
            ]);
        }
        facts.iter().map(|(name, value)| format!("{name:<10}{value}\n")).collect()
    })
}

fn verify(context: &Context, name: Option<&str>) -> anyhow::Result<()> {
    let found = match name {
        Some(name) => vec![existing(context, name)?],
        None => all(context)?,
    };
    let mut damaged = 0;
    let mut lines = vec![];
    let mut objects = vec![];
    for one in &found {
        let outcome = snapshot::verify(&one.file).map_err(|error| error.to_string());
        damaged += usize::from(outcome.is_err());
        let words = outcome.as_ref().map_or_else(Clone::clone, |_| "whole".to_owned());
        lines.push(format!("{}: {words}", one.account.name));
        objects
            .push(json!({ "account": one.account.name, "whole": outcome.is_ok(), "says": words }));
    }
    context.out.show(&json!({ "snapshots": objects }), || match lines.is_empty() {
        true => "nothing is saved".to_owned(),
        false => lines.join("\n"),
    })?;
    if damaged > 0 { Err(Said.into()) } else { Ok(()) }
}
