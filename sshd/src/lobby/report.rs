//! The texts.

use std::{fs, path::PathBuf};

use hermitage_storage::{
    accounts::{Account, Policy},
    disk,
};

use super::Desk;
use crate::{limits::Limits, size, span, store::StoreError, time};

pub fn help(name: &str) -> String {
    format!(
        "\
Words after your name, as in: ssh {name}+status@…

  +status    your machine, its files and sessions
  +keys      what logs in to your account
  +passwd    set a new password, if you have one
  +hold      how long your machine is kept awake; with a time or \"off\" (ssh {name}+hold@… 2h)
             that is set: it is not put to sleep meanwhile, though nobody is logged in
  +reset     drop your machine's memory, should it hang; your files stay
  +checkpoint  what there is of your machine and files as they were; with a name they are kept as
             they are now; \"restore NAME\" brings them back, \"drop NAME\" deletes them
  +help      this

  +new       a terminal beside the one that you left
  +take      the terminal that you have open elsewhere
  +fresh     a machine started anew from your files

Some of it can be asked in your machine's shell as well: hermitage help
"
    )
}

pub fn help_inside(name: &str) -> String {
    format!(
        "\
What your host does for you, asked from inside of your machine:

  hermitage status             your machine, its files and sessions
  hermitage keys               what logs in to your account
  hermitage hold [TIME|off]    how long your machine is kept awake; with a time (2h) or \"off\" that is
                               set: it is not put to sleep meanwhile, though nobody is logged in
  hermitage checkpoint [NAME]  what there is of your machine and files as they were; with a name they
                               are kept as they are now (ssh {name}+checkpoint@… brings them back)
  hermitage help               this

The rest is asked over ssh: ssh {name}+help@… lists it.
"
    )
}

pub async fn status(desk: &Desk, account: &Account) -> Result<String, String> {
    let id = account.id;
    let running = desk.registry.status_of(id);
    let recorded = desk.store.intent(id).await.map_err(unreadable)?;
    let last = desk.store.last_shell(id).await.map_err(unreadable)?;
    let used = Used::of(desk.state_dir.disk(id), desk.state_dir.snapshot(id)).await;

    let (state, since, why) = match (&running, recorded) {
        (Some(now), _) => (now.state.clone(), Some(now.since), Some(now.why.clone())),
        (None, Some(record)) if used.saved.is_some() => {
            ("saved".into(), Some(record.since), record.detail)
        }
        (None, Some(record)) => ("stopped".into(), Some(record.since), record.detail),
        (None, None) => ("stopped".into(), None, None),
    };
    let mut machine = state;
    if let Some(since) = since {
        machine.push_str(&format!(" since {} UTC", time::short(since)));
    }
    if let Some(why) = why.filter(|why| !why.is_empty()) {
        machine.push_str(&format!(": {why}"));
    }
    let limits = Limits::of(&desk.config, account);
    let sessions = running.as_ref().map_or(0, |now| now.sessions);
    let disk = size::show(account.disk_bytes);
    let mut facts = vec![
        ("account", account.name.clone()),
        ("machine", machine),
        ("sessions", format!("{sessions} of at most {}", limits.max_sessions)),
        (
            "files",
            match used.disk {
                Some(bytes) => format!("{} of {disk}", size::show(bytes)),
                None => format!("none yet, of {disk}"),
            },
        ),
    ];
    if let Ok(quota) = desk.quota(account).await
        && let Some(percent) = quota.percent()
    {
        facts.push(("quota", format!("{}, {percent} %: {}", quota.shown(), quota.parts())));
    }
    if let Some(bytes) = used.saved {
        facts.push(("memory", format!("{} saved", size::show(bytes))));
    }
    facts.extend(running.and_then(|now| now.awake).map(|awake| ("awake", awake)));
    facts.push(("idle", idle(desk, account)));
    if let Some(until) = account.hold_at(time::now()) {
        facts.push(("hold", format!("until {} UTC", time::short(until))));
    }
    if let Some((when, _)) = last {
        facts.push(("last shell", format!("{} UTC", time::short(when))));
    }
    Ok(facts.into_iter().map(|(name, value)| format!("{name:<11}{}\n", plain(&value))).collect())
}

/// What becomes of the machine when nobody is there.
fn idle(desk: &Desk, account: &Account) -> String {
    let limits = Limits::of(&desk.config, account);
    let linger = span::show(limits.linger.as_secs().try_into().unwrap_or(u32::MAX));
    match limits.policy {
        Policy::Save => format!("saved {linger} after the last session, and resumed at the next"),
        Policy::Keep => "keeps running when nobody is logged in".into(),
        Policy::Discard => format!("powered off {linger} after the last session; files stay"),
    }
}

pub async fn keys(desk: &Desk, account: &Account) -> Result<String, String> {
    let keys = desk.store.keys(account.id).await.map_err(unreadable)?;
    let mut text = String::new();
    for key in &keys {
        let (added, comment) = (time::short(key.added), plain(&key.comment));
        text.push_str(&format!("{} {} {comment}, added {added}\n", key.fingerprint, key.key_type));
        if !key.options.is_empty() {
            text.push_str(&format!("    {}\n", plain(&key.options)));
        }
    }
    if keys.is_empty() {
        text.push_str("no keys\n");
    }
    text.push_str(match account.password {
        Some(_) => "a password (ssh …+passwd@… changes it)\n",
        None => "no password\n",
    });
    if desk.config.ssh.user_ca_keys.is_some() {
        text.push_str("certificates of this host's authorities\n");
    }
    Ok(text)
}

pub fn held(until: Option<i64>) -> String {
    match until {
        Some(until) => format!("Your machine is held awake until {} UTC.\n", time::short(until)),
        None => "Your machine is not held.\n".into(),
    }
}

/// What an account takes of the host's disk.
#[derive(Default)]
struct Used {
    disk: Option<u64>,
    saved: Option<u64>,
}

impl Used {
    async fn of(disk: PathBuf, snapshot: PathBuf) -> Self {
        let look = move || Self {
            disk: disk::allocated(&disk).ok(),
            saved: fs::metadata(snapshot).ok().map(|metadata| metadata.len()),
        };
        tokio::task::spawn_blocking(look).await.unwrap_or_default()
    }
}

fn unreadable(error: StoreError) -> String {
    tracing::error!(%error, "can't read an account");
    "the accounts can't be read at the moment; try again later".into()
}

/// On a terminal words of others must not be more than words.
fn plain(text: &str) -> String {
    text.chars().map(|c| if c.is_control() { '?' } else { c }).collect()
}
