//! The serving machine: where `hermitage serve` runs, be it this one or the emulated one.

use std::ffi::{OsStr, OsString};
use std::fs;
use std::path::Path;
use std::process::{Command, Output, Stdio};

use anyhow::{Context, Result, bail};
use nix::fcntl::{Flock, FlockArg};

use crate::emulator::{self, EXCHANGE_DEVICE};
use crate::layout::Layout;
use crate::process::{privileged, run_captured};
use crate::ssh::{Ssh, quote};
use crate::state::{Place, State};

/// A running lab.
pub struct Serving {
    layout: Layout,
    state: State,
}

impl Serving {
    /// The lab of that name, or why there is none.
    pub fn find(layout: &Layout) -> Result<Self> {
        let name = layout.name();
        let Some(state) = State::load(layout)? else {
            bail!("lab {name} is not up; start it with `cargo lab up --detach`");
        };
        if let Place::Emulated { process, .. } = &state.place
            && !process.is_alive()
        {
            bail!(
                "the machine of lab {name} has ended; its console said last:\n{}start it again with `cargo lab up --detach`",
                emulator::last_words(layout)
            );
        }
        Ok(Self { layout: layout.clone(), state })
    }

    pub fn new(layout: &Layout, state: State) -> Result<Self> {
        state.save(layout)?;
        Ok(Self { layout: layout.clone(), state })
    }

    pub fn state(&self) -> &State {
        &self.state
    }

    pub fn layout(&self) -> &Layout {
        &self.layout
    }

    pub fn is_native(&self) -> bool {
        matches!(self.state.place, Place::Native)
    }

    /// Makes sure that commands find their way; a dead machine is told from a slow one.
    pub fn connect(&self) -> Result<()> {
        match &self.state.place {
            Place::Native => Ok(()),
            Place::Emulated { ssh_port, .. } => Ssh::new(&self.layout, *ssh_port).connect(),
        }
    }

    /// A root command on the serving machine, its streams ours.
    pub fn command<S: AsRef<OsStr>>(&self, arguments: &[S], terminal: bool) -> Command {
        match &self.state.place {
            Place::Emulated { ssh_port, .. } => {
                Ssh::new(&self.layout, *ssh_port).command(arguments, terminal)
            }
            Place::Native => {
                let mut path = OsString::from(self.native_bin());
                path.push(":");
                path.push(std::env::var_os("PATH").unwrap_or_default());
                path.push(":/usr/sbin:/sbin");
                let mut assignment = OsString::from("PATH=");
                assignment.push(path);
                let mut command = privileged("env");
                command.arg(assignment).args(arguments);
                command
            }
        }
    }

    /// Runs a shell line there and takes its output.
    pub fn run(&self, line: &str) -> Result<Output> {
        run_captured(&mut self.command(&["sh", "-ec", line], false)).with_context(|| {
            format!("on the serving machine: {}", line.lines().next().unwrap_or(""))
        })
    }

    /// Runs a command there with `input` as its standard input.
    pub fn run_with_input(&self, arguments: &[&str], input: &[u8]) -> Result<Output> {
        let mut child = self
            .command(arguments, false)
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .context("start a command on the serving machine")?;
        let mut stdin = child.stdin.take().context("the command's standard input")?;
        let written = std::io::Write::write_all(&mut stdin, input);
        drop(stdin);
        let output = child.wait_with_output()?;
        if !output.status.success() {
            bail!(
                "`{}` on the serving machine ended with {}: {}",
                arguments.join(" "),
                output.status,
                String::from_utf8_lossy(&output.stderr).trim_end()
            );
        }
        written.context("give the command its input")?;
        Ok(output)
    }

    /// Writes down a program's digest; true when it is another than before.
    pub fn note_digest(&mut self, name: &str, digest: &str) -> Result<bool> {
        let before = self.state.pushed.insert(name.to_owned(), digest.to_owned());
        self.state.save(&self.layout)?;
        Ok(before.as_deref() != Some(digest))
    }

    /// Brings a file or folder to `destination` (an absolute path whose last part it replaces in one
    /// rename) unless what is there has the same digest. Says whether anything was done.
    pub fn push(&mut self, source: &Path, destination: &str, digest: &str) -> Result<bool> {
        if self.state.pushed.get(destination).is_some_and(|there| there == digest) {
            return Ok(false);
        }
        let (dir, name) = destination.rsplit_once('/').context("destinations are absolute")?;
        let incoming = format!("{dir}/.incoming-{name}");
        let source_dir = source.parent().context("source has a folder")?;
        let source_name = source.file_name().context("source has a name")?.to_string_lossy();
        // A file is replaced by one rename; a folder that is already there has to go first.
        let put = format!(
            "if [ -d {to} ]; then rm -rf {to}; fi; mv -fT {incoming}/{source} {to}; rm -rf {incoming}",
            to = quote(destination),
            incoming = quote(&incoming),
            source = quote(&source_name),
        );
        let prepare = format!("rm -rf {0}; mkdir -p {0}", quote(&incoming));
        match &self.state.place {
            Place::Native => {
                self.run(&format!(
                    "{prepare}; cp -a --sparse=always {} {}/; {put}",
                    quote(&source.to_string_lossy()),
                    quote(&incoming)
                ))?;
            }
            Place::Emulated { .. } => {
                let _claim = self.fill_exchange(source_dir, &source_name)?;
                self.run(&format!(
                    "{prepare}; blockdev --flushbufs {EXCHANGE_DEVICE}; \
                     tar -b 512 --no-same-owner -xSf {EXCHANGE_DEVICE} -C {}; {put}",
                    quote(&incoming)
                ))?;
            }
        }
        self.state.pushed.insert(destination.to_owned(), digest.to_owned());
        self.state.save(&self.layout)?;
        Ok(true)
    }

    /// Makes an empty folder there in the place of what may be there, or may have gone without this lab's doing.
    pub fn empty(&mut self, dir: &str) -> Result<()> {
        self.state.forget(dir);
        self.state.save(&self.layout)?;
        self.run(&format!("rm -rf {0}; mkdir {0}", quote(dir)))?;
        Ok(())
    }

    /// Writes an archive over the exchange disk. The emulated machine reads it at the speed of its
    /// virtual disk, where ssh would spend its time on emulated encryption.
    fn fill_exchange(&self, dir: &Path, name: &str) -> Result<Flock<fs::File>> {
        let path = self.layout.exchange_disk();
        let disk = fs::OpenOptions::new()
            .write(true)
            .open(&path)
            .with_context(|| format!("open {}", path.display()))?;
        let claim = Flock::lock(disk.try_clone()?, FlockArg::LockExclusive)
            .map_err(|(_, error)| error)
            .with_context(|| format!("lock {}", path.display()))?;
        let status = Command::new("tar")
            .args(["-b", "512", "-cSf", "-", "-C"])
            .arg(dir)
            .arg(name)
            .stdin(Stdio::null())
            .stdout(disk)
            .status()
            .context("start tar")?;
        if !status.success() {
            bail!("tar of {}/{name} ended with {status}", dir.display());
        }
        Ok(claim)
    }

    /// The service's state directory on the serving machine.
    pub fn state_path(&self) -> String {
        match &self.state.place {
            Place::Native => self.layout.own().join("native/state").to_string_lossy().into_owned(),
            Place::Emulated { .. } => "/var/lib/hermitage".to_owned(),
        }
    }

    /// The same as a shell's word.
    pub fn state_dir(&self) -> String {
        quote(&self.state_path())
    }

    /// The service's run directory on the serving machine.
    pub fn run_dir(&self) -> String {
        match &self.state.place {
            Place::Native => self.layout.own().join("native/run").to_string_lossy().into_owned(),
            Place::Emulated { .. } => "/run/hermitage".to_owned(),
        }
    }

    /// The service's log on the serving machine.
    pub fn log_file(&self) -> String {
        match &self.state.place {
            Place::Native => {
                self.layout.own().join("native/serve.log").to_string_lossy().into_owned()
            }
            Place::Emulated { .. } => "/var/log/hermitage.log".to_owned(),
        }
    }

    /// Where the native lab's `hermitage` (a wrapper that adds our configuration) lies.
    pub fn native_bin(&self) -> std::path::PathBuf {
        self.layout.own().join("native/bin")
    }

    /// Ends the machine where it stands; for one that nobody will look into again.
    pub fn discard(self) -> Result<()> {
        if let Place::Emulated { process, ssh_port, .. } = &self.state.place {
            emulator::discard(&self.layout, *process, *ssh_port)?;
        }
        State::remove(&self.layout)
    }

    /// Reboots the machine, in order.
    pub fn reboot(&self) -> Result<()> {
        match &self.state.place {
            Place::Emulated { process, ssh_port, .. } => {
                emulator::reboot(&self.layout, process, *ssh_port)
            }
            Place::Native => bail!("this machine is no lab's to reboot"),
        }
    }

    /// Ends the machine; the service must have stopped.
    pub fn end(self) -> Result<()> {
        if let Place::Emulated { process, ssh_port, .. } = &self.state.place {
            emulator::stop(&self.layout, *process, *ssh_port)?;
        }
        State::remove(&self.layout)
    }
}
