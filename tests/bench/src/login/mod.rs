//! Login, TCP connect to prompt, against OpenSSH's sshd giving a bare shell on the same host.

mod account;
pub mod client;
pub mod dial;
pub mod openssh;

use std::path::Path;

use account::Account;
use anyhow::Context as _;
use client::Client;
use openssh::OpenSsh;
use tempfile::TempDir;

use crate::{progress, report::Section, stats::Samples};

pub struct Config<'a> {
    pub hermitage: &'a Path,
    pub state_dir: &'a Path,
    pub run_dir: &'a Path,
    pub port: u16,
    pub rounds: usize,
}

/// Both servers, and a client that both let in.
pub struct Servers {
    // They are ended in this order, the folder with the client's key last.
    pub account: Account,
    pub peer: OpenSsh,
    pub client: Client,
    pub dir: TempDir,
}

impl Servers {
    pub fn start(config: &Config<'_>) -> anyhow::Result<Self> {
        let dir = tempfile::tempdir()?;
        let program = std::env::current_exe().context("find this program")?;
        let client = Client::new(dir.path(), &program)?;
        let key = client.public_key();
        let peer = OpenSsh::start(dir.path(), &key)?;
        let account = Account::add(config.hermitage, config.state_dir, config.run_dir, &key)?;
        Ok(Self { account, peer, client, dir })
    }
}

pub fn measure(config: &Config<'_>) -> anyhow::Result<Section> {
    let Servers { account, peer, client, dir: _dir } = &Servers::start(config)?;

    // The first login ever grows the disk's file system and makes the home; the peer's warms its
    // program. Neither is what a login costs from then on.
    progress!("login: the first ones, not counted");
    client.login("root", peer.port)?;
    let first = client.login(&account.name, config.port)?;

    let [mut bare, mut cold, mut warm] = [const { Samples::new() }; 3];
    for round in 1..=config.rounds {
        progress!("login: round {round} of {}", config.rounds);
        bare.push(client.login("root", peer.port)?);
        account.stop_machine()?;
        cold.push(client.login(&account.name, config.port)?);
        bare.push(client.login("root", peer.port)?);
        warm.push(client.login(&account.name, config.port)?);
    }

    let mut section = Section::new("login", "Login by ssh with a key, TCP connect to prompt");
    section.time("OpenSSH sshd, bare host shell", &bare);
    let peer = Some(bare.p50());
    section.time("Hermitage, machine forked", &cold).over(peer, "OpenSSH").ratio_goal(1.0);
    section.time("Hermitage, machine running", &warm).over(peer, "OpenSSH");
    section.time("Hermitage, first login ever", &Samples::from_iter([first])).over(peer, "OpenSSH");
    Ok(section)
}
