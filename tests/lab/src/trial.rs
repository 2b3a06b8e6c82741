//! The package's trial: a fresh Debian with systemd in an emulated machine of its own, where the script
//! `tests/lab/machine/try-package` installs, upgrades, removes and purges the package, with a reboot in between. Beside the end-to-end
//! suite it is a process of its own, whose output is shown when both are done.

use std::fs::{self, File};
use std::net::TcpListener;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};

use anyhow::{Context, Result};

use crate::MachineOptions;
use crate::guest_image::GuestImage;
use crate::layout::Layout;
use crate::package::{self, Pair};
use crate::process::{run_captured, tail};
use crate::programs::digest;
use crate::serving::Serving;
use crate::state::Claim;
use crate::steps::{note, step};
use crate::suite::remove_tree;
use crate::tally::{Tally, add_up, check, closing_line, counted, judge};
use crate::up;

/// What a filter is compared with, and the end of its lab's name.
pub const NAME: &str = "package";

/// Seconds, for a script that takes some four minutes when nothing else runs.
const BOUND: &str = "2400";

const FORMER: &str = "/srv/trial/former.deb";
const NEXT: &str = "/srv/trial/next.deb";
const IMAGE: &str = "/srv/trial/image";
const SCRIPT: &str = "/srv/trial/try-package";

/// True beside the tally when nothing failed.
pub fn run(layout: &Layout, keep: bool) -> Result<(Tally, bool)> {
    note("the package's trial");
    let layout = layout.beside(NAME)?;
    up::make_folder(&layout)?;
    let _run = Claim::run(&layout)?;
    let pair = package::build_pair(&layout)?;
    if let Some(why) = package::why_not_in_trixie(&pair.former)? {
        println!("skipped the package's trial: {why}");
        return Ok((Tally { skipped: 1, ..Tally::default() }, true));
    }
    let image = up::guest_image(&layout)?;
    // Nobody comes from outside: the script logs in from within.
    let port = TcpListener::bind(("127.0.0.1", 0))?.local_addr()?.port();
    let options = MachineOptions { port: Some(port), ..MachineOptions::default() };
    let mut serving = up::fresh_debian(&layout, &options)?;
    let outcome = try_in(&layout, &mut serving, &pair, &image);
    if keep {
        note(&format!("lab {} stays up: `cargo lab --lab {0} shell`", layout.name()));
    } else {
        serving.discard()?;
    }
    outcome
}

fn try_in(
    layout: &Layout,
    serving: &mut Serving,
    pair: &Pair,
    image: &GuestImage,
) -> Result<(Tally, bool)> {
    step("bring the packages and the guest image", || {
        let script = layout.root().join("tests/lab/machine/try-package");
        let lab = std::env::current_exe().context("find this program")?;
        let files: [(&Path, &str); 4] = [
            (&lab, "/usr/local/bin/lab"),
            (&pair.former, FORMER),
            (&pair.next, NEXT),
            (&script, SCRIPT),
        ];
        for (file, place) in files {
            serving.push(file, place, &digest(file)?)?;
        }
        serving.push(image.dir(), IMAGE, image.key())
    })?;
    let outcome = both_parts(serving);
    bring_logs(serving, &outcome)?;
    outcome
}

fn both_parts(serving: &Serving) -> Result<(Tally, bool)> {
    let part = |which| {
        let script = ["timeout", "-k", "10", BOUND, "sh", SCRIPT, which, FORMER, NEXT, IMAGE];
        counted(&mut serving.command(&script, false), check)
    };
    let (mut tally, passed) = part("--until-reboot")?;
    if !passed {
        return Ok((tally, false));
    }
    step("reboot the machine", || serving.reboot())?;
    let (rest, passed) = part("--after-reboot")?;
    tally.add(rest);
    Ok((tally, passed))
}

/// The journal and the console; their ends are shown if something failed.
fn bring_logs(serving: &Serving, outcome: &Result<(Tally, bool)>) -> Result<()> {
    let results = serving.layout().results().join(NAME);
    remove_tree(&results)?;
    fs::create_dir_all(&results).with_context(|| format!("make {}", results.display()))?;
    let console = results.join("serial.log");
    fs::copy(serving.layout().serial_log(), &console).context("copy the serial log")?;
    let mut shown = vec![(console, 20)];
    for (name, words) in [
        ("journal.log", &["journalctl", "--no-pager", "-o", "short-precise"][..]),
        ("service.log", &["journalctl", "--no-pager", "-u", "hermitage"]),
        ("dpkg.log", &["cat", "/var/log/dpkg.log"]),
    ] {
        let Ok(said) = run_captured(&mut serving.command(words, false)) else { continue };
        let file = results.join(name);
        fs::write(&file, said.stdout).with_context(|| format!("write {}", file.display()))?;
        if name == "service.log" {
            shown.push((file, 60));
        }
    }
    if !matches!(outcome, Ok((_, true))) {
        for (file, lines) in shown {
            println!("{} ends:\n{}", file.display(), tail(&file, lines));
        }
    }
    note(&format!("logs: {}", results.display()));
    Ok(())
}

/// The trial as a process beside this one.
pub struct Beside {
    child: Child,
    output: PathBuf,
}

impl Beside {
    pub fn start(layout: &Layout, keep: bool) -> Result<Self> {
        let output = layout.own().join("trial.log");
        let file = File::create(&output).with_context(|| format!("make {}", output.display()))?;
        let lab = std::env::current_exe().context("find this program")?;
        let child = Command::new(lab)
            .args(["--lab", layout.name(), "test", "--package"])
            .args(keep.then_some("--keep"))
            .stdin(Stdio::null())
            .stdout(file.try_clone()?)
            .stderr(file)
            .spawn()
            .context("start the package's trial")?;
        note(&format!("the package's trial runs beside; it writes {}", output.display()));
        Ok(Self { child, output })
    }

    /// Waits for it and shows what it said. A trial that could not be held is one that failed: the other tests'
    /// results are to be told all the same.
    pub fn finish(mut self) -> (Tally, bool) {
        let outcome = self.wait().and_then(|status| {
            let output = File::open(&self.output)
                .with_context(|| format!("open {}", self.output.display()))?;
            judge(add_up(output, "the trial", closing_line)?, status, "the package's trial")
        });
        outcome.unwrap_or_else(|error| {
            println!("FAILED the package's trial: {error:#}");
            (Tally { failed: 1, ..Tally::default() }, false)
        })
    }

    fn wait(&mut self) -> Result<ExitStatus> {
        match self.child.try_wait()? {
            Some(status) => Ok(status),
            None => step("wait for the package's trial", || Ok(self.child.wait()?)),
        }
    }
}
