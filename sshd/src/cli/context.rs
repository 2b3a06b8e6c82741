//! What every command stands on: configuration, state directory, database, the form of its output.

use super::Global;
use super::output::Output;
use super::template;
use anyhow::Context as _;
use hermitage::config::Config;
use hermitage_storage::StateDir;
use hermitage_storage::accounts::{Account, Accounts};
use hermitage_storage::base::Base;
use hermitage_storage::image::{self, ImageId};
use hermitage_storage::{disk, publish};
use std::cell::RefCell;
use std::path::PathBuf;

/// Details of one command: it may add a class's keys.
const MOST_DETAILS: usize = 256;

pub struct Context {
    pub config: Config,
    /// Where the configuration comes from.
    pub source: Source,
    pub state: StateDir,
    pub out: Output,
    /// What the command changed, for the audit log.
    details: RefCell<Vec<String>>,
}

/// The configuration's file and what the command line says instead.
#[derive(Clone)]
pub struct Source {
    pub file: Option<PathBuf>,
    state_dir: Option<PathBuf>,
    run_dir: Option<PathBuf>,
}

impl Source {
    pub fn read(&self) -> anyhow::Result<Config> {
        let mut config = Config::load(self.file.as_deref())?;
        if let Some(dir) = &self.state_dir {
            config.state_dir = dir.clone();
        }
        if let Some(dir) = &self.run_dir {
            config.run_dir = dir.clone();
        }
        Ok(config)
    }
}

impl Context {
    pub fn new(global: &Global) -> anyhow::Result<Self> {
        let source = Source {
            file: global.config.clone(),
            state_dir: global.state_dir.clone(),
            run_dir: global.run_dir.clone(),
        };
        let config = source.read()?;
        let state = StateDir::new(&config.state_dir);
        Ok(Self {
            config,
            state,
            source,
            out: Output::new(global.json),
            details: RefCell::default(),
        })
    }

    /// Notes for the audit log what was changed, where the command's words do not say.
    pub fn detail(&self, detail: String) {
        let mut details = self.details.borrow_mut();
        if details.len() < MOST_DETAILS {
            details.push(detail);
        }
    }

    pub fn details(&self) -> Vec<String> {
        self.details.take()
    }

    /// The database, made if there is none.
    pub fn accounts(&self) -> anyhow::Result<Accounts> {
        self.state.create().with_context(|| self.not_ours())?;
        Ok(Accounts::open(&self.state.database())?)
    }

    pub fn not_ours(&self) -> String {
        format!(
            "the state directory {} can't be used (run this as the service's user, or name another \
             with --state-dir)",
            self.state.root().display()
        )
    }

    /// The template of new disks of `size` bytes: of the image that the current base was made from. `None`
    /// while there is no base.
    fn disk_template(&self, size: u64) -> anyhow::Result<Option<PathBuf>> {
        let Some(id) = self.state.current_base()? else { return Ok(None) };
        let manifest = Base::manifest(&self.state.base(&id))?;
        let image = ImageId::parse(&manifest.content.image)
            .with_context(|| format!("base {id} names the image \"{}\"", manifest.content.image))?;
        let small = self.state.image(&image).join(image::DISK_TEMPLATE);
        Ok(Some(template::of_size(&self.state, &image, small, size)))
    }

    /// Gives the account a new, empty disk. Nobody may have the one that it has.
    pub fn renew_disk(&self, account: &Account) -> anyhow::Result<()> {
        let path = self.state.disk(account.id);
        if !path.exists() {
            return self.provision(account).map(drop);
        }
        let template = self.disk_template(account.disk_bytes)?;
        let template = template.context("there is no base to take a new disk from")?;
        publish::sweep(&self.state.account_dir(account.id))?;
        Ok(disk::renew(&path, &template, account.disk_bytes)?)
    }

    /// Makes the account's disk unless it has one. False: there is no base yet, so none can be made.
    pub fn provision(&self, account: &Account) -> anyhow::Result<bool> {
        if self.state.disk(account.id).exists() {
            return Ok(true);
        }
        let Some(template) = self.disk_template(account.disk_bytes)? else { return Ok(false) };
        disk::provision(&self.state, account.id, &template, account.disk_bytes)?;
        Ok(true)
    }
}
