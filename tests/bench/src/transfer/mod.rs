//! What people do over ssh, against OpenSSH's sshd doing it on the same host with the same client and the
//! same cipher: commands, copies, many small files, a terminal's output, streams beside each other.
//!
//! Times are whole client runs, from start to exit, key exchange included, as their user waits for them.

mod files;

use std::{path::Path, process::Command};

use anyhow::{Context as _, ensure};

use super::login::{self, Servers, client::Client};
use crate::{progress, report::Section, stats::Samples};
use files::Files;

/// The design's goals, as ratios of times: half of the peer's throughput is twice its time.
const COMMAND_GOAL: f64 = 1.5;
const THROUGHPUT_GOAL: f64 = 2.0;
/// Ten streams together, per byte, over one alone.
const STREAMS_GOAL: f64 = 1.1;

/// Streams beside each other.
const STREAMS: u64 = 10;

/// Both servers have it and the client would choose it; named, so that both sides do.
const CIPHER: &str = "Ciphers=chacha20-poly1305@openssh.com";

#[derive(Clone, Copy, Debug)]
pub struct Extent {
    /// MiB of the big file.
    pub file_mib: u64,
    /// How many small files.
    pub files: u64,
}

#[derive(Default)]
struct Figures {
    command: Samples,
    copy_in: Samples,
    copy_out: Samples,
    files_in: Samples,
    files_out: Samples,
    terminal: Samples,
    one_stream: Samples,
    streams: Samples,
}

pub fn measure(config: &login::Config<'_>, extent: Extent) -> anyhow::Result<Section> {
    let Servers { account, peer, client, dir } = &Servers::start(config)?;
    progress!("transfer: the first login, not counted");
    client.login(&account.name, config.port)?;
    let files = Files::make(dir.path(), extent)?;
    let home = dir.path().join("peer");
    std::fs::create_dir(&home).with_context(|| format!("make {}", home.display()))?;
    // Where each server's side puts things: the account's home, and a folder of this run's.
    let ours = Side { client, user: &account.name, port: config.port, folder: "." };
    let folder = home.to_str().context("the temporary folder's path is not UTF-8")?;
    let bare = Side { client, user: "root", port: peer.port, folder };

    let [mut theirs, mut figures] = [Figures::default(), Figures::default()];
    for round in 1..=config.rounds {
        progress!("transfer: round {round} of {}", config.rounds);
        bare.round(&files, extent, &mut theirs).context("OpenSSH's sshd")?;
        ours.round(&files, extent, &mut figures).context("Hermitage")?;
    }
    Ok(section(extent, &figures, &theirs))
}

/// One server, as a client sees it.
struct Side<'a> {
    client: &'a Client,
    user: &'a str,
    port: u16,
    folder: &'a str,
}

impl Side<'_> {
    fn round(&self, files: &Files, extent: Extent, figures: &mut Figures) -> anyhow::Result<()> {
        figures.command.push(self.run(self.ssh(&["true"]))?);
        let (remote, back) = (self.path("big"), files.dir.join("back"));
        figures.copy_in.push(self.run(self.scp(&files.big, self.named(&remote)))?);
        figures.copy_out.push(self.run(self.scp(self.named(&remote), &back))?);
        files.compare(&back)?;

        let (tree, fetched) = (self.path("tree"), files.dir.join("fetched"));
        let batch = format!("mkdir {tree}\nput -r {}/* {tree}\n", files.tree.display());
        figures.files_in.push(self.run(self.sftp(&files.batch(&batch)?))?);
        let batch = format!("get -r {tree} {}\n", fetched.display());
        figures.files_out.push(self.run(self.sftp(&files.batch(&batch)?))?);
        files.compare_tree(&fetched)?;

        let cat = format!("cat {remote}");
        figures.terminal.push(self.run(self.on_terminal(&cat))?);
        let stream = |bytes: u64| format!("head -c {bytes} /dev/zero");
        let all = extent.file_mib << 20;
        figures.one_stream.push(self.run(self.ssh(&[&stream(all)]))?);
        let part = stream(all / STREAMS);
        let commands = (0..STREAMS).map(|_| self.ssh(&[&part])).collect();
        figures.streams.push(self.client.run_all(commands)?);
        self.run(self.ssh(&[&format!("rm -r {remote} {tree}")])).map(drop)
    }

    fn path(&self, name: &str) -> String {
        format!("{}/{name}", self.folder)
    }

    fn named(&self, path: &str) -> String {
        format!("{}@127.0.0.1:{path}", self.user)
    }

    fn run(&self, command: Command) -> anyhow::Result<u64> {
        self.client.run_all(vec![command])
    }

    fn tool(&self, program: &str) -> Command {
        let mut command = self.client.tool(program);
        command.args(["-o", CIPHER, "-o", &format!("Port={}", self.port)]);
        command
    }

    fn ssh(&self, words: &[&str]) -> Command {
        let mut command = self.tool("ssh");
        command.arg(format!("{}@127.0.0.1", self.user)).args(words);
        command
    }

    fn on_terminal(&self, words: &str) -> Command {
        let mut command = self.tool("ssh");
        command.arg("-tt").arg(format!("{}@127.0.0.1", self.user)).arg(words);
        command
    }

    fn scp(&self, from: impl AsRef<std::ffi::OsStr>, to: impl AsRef<std::ffi::OsStr>) -> Command {
        let mut command = self.tool("scp");
        command.arg("-q").arg(from).arg(to);
        command
    }

    fn sftp(&self, batch: &Path) -> Command {
        let mut command = self.tool("sftp");
        command.arg("-q").arg("-b").arg(batch).arg(format!("{}@127.0.0.1", self.user));
        command
    }
}

fn section(extent: Extent, ours: &Figures, theirs: &Figures) -> Section {
    let Extent { file_mib, files } = extent;
    let mut section =
        Section::new("transfer", "Commands, copies and streams by ssh, beside OpenSSH's sshd");
    let rows = [
        ("ssh host true".to_owned(), &ours.command, &theirs.command, COMMAND_GOAL),
        (format!("scp of {file_mib} MiB in"), &ours.copy_in, &theirs.copy_in, THROUGHPUT_GOAL),
        (format!("scp of {file_mib} MiB out"), &ours.copy_out, &theirs.copy_out, THROUGHPUT_GOAL),
        (format!("sftp of {files} files in"), &ours.files_in, &theirs.files_in, THROUGHPUT_GOAL),
        (format!("sftp of {files} files out"), &ours.files_out, &theirs.files_out, THROUGHPUT_GOAL),
        (
            format!("cat of {file_mib} MiB on a terminal"),
            &ours.terminal,
            &theirs.terminal,
            THROUGHPUT_GOAL,
        ),
    ];
    for (name, ours, theirs, goal) in rows {
        section.time(format!("OpenSSH: {name}"), theirs);
        section.time(name, ours).over(Some(theirs.p50()), "OpenSSH").ratio_goal(goal);
    }
    for (whose, figures) in [("OpenSSH: ", theirs), ("", ours)] {
        section.time(format!("{whose}{file_mib} MiB out of a command"), &figures.one_stream);
        let all =
            section.time(format!("{whose}as many out of {STREAMS} at once"), &figures.streams);
        all.over(Some(figures.one_stream.p50()), "one");
        if whose.is_empty() {
            all.ratio_goal(STREAMS_GOAL);
        }
    }
    section
}

/// So that a figure is of a copy and not of an error.
fn same(a: &[u8], b: &[u8], what: &Path) -> anyhow::Result<()> {
    ensure!(a == b, "{} is not what was sent", what.display());
    Ok(())
}
