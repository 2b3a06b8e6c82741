//! Where the lab keeps its things: everything lies under `target/lab`, so that `rm -rf target/lab`
//! (after `cargo lab down`) is the whole clean-up.

use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail};

/// Places of one lab. Several may run side by side, each with its own name and data.
#[derive(Clone, Debug)]
pub struct Layout {
    name: String,
    root: PathBuf,
    target: PathBuf,
}

impl Layout {
    pub fn new(name: &str) -> Result<Self> {
        let valid = !name.is_empty()
            && name.len() <= 20
            && name.bytes().all(|b| b.is_ascii_lowercase() || b.is_ascii_digit() || b == b'-')
            && !name.starts_with('-');
        if !valid {
            bail!("lab name {name:?}: use 1 to 20 lower-case letters, digits and dashes");
        }
        if ["machine", "image", "key", "python", "tools", "results"].contains(&name) {
            bail!("lab name {name:?} is the name of a folder of the lab's own; choose another");
        }
        let manifest = std::env::var_os("CARGO_MANIFEST_DIR")
            .map(PathBuf::from)
            .filter(|dir| dir.ends_with("tests/lab"))
            .unwrap_or_else(|| PathBuf::from(env!("CARGO_MANIFEST_DIR")));
        let root = manifest.join("../..").canonicalize().with_context(|| {
            format!("the checkout that this lab was built in is gone: {}", manifest.display())
        })?;
        let target = match std::env::var_os("CARGO_TARGET_DIR") {
            Some(dir) => root.join(dir),
            None => root.join("target"),
        };
        Ok(Self { name: name.to_owned(), root, target })
    }

    /// A lab beside this one, for another part of the same run.
    pub fn beside(&self, part: &str) -> Result<Self> {
        let start: String = self.name.chars().take(19 - part.len()).collect();
        Self::new(&format!("{start}-{part}"))
    }

    pub fn name(&self) -> &str {
        &self.name
    }

    /// The checkout.
    pub fn root(&self) -> &Path {
        &self.root
    }

    /// What all labs share.
    pub fn shared(&self) -> PathBuf {
        self.target.join("lab")
    }

    /// What belongs to this lab alone.
    pub fn own(&self) -> PathBuf {
        self.shared().join(&self.name)
    }

    pub fn state_file(&self) -> PathBuf {
        self.own().join("state.json")
    }

    pub fn serial_log(&self) -> PathBuf {
        self.own().join("serial.log")
    }

    /// Output of the tools that `up` ran, kept to be shown when one fails.
    pub fn step_log(&self) -> PathBuf {
        self.own().join("steps.log")
    }

    pub fn data_disk(&self) -> PathBuf {
        self.own().join("data.raw")
    }

    /// A raw disk over which files are handed to the emulated machine.
    pub fn exchange_disk(&self) -> PathBuf {
        self.own().join("exchange.raw")
    }

    /// Python modules that tests use and Debian does not have.
    pub fn python_modules(&self) -> PathBuf {
        self.shared().join("python")
    }

    /// Programs that the lab installs for itself.
    pub fn tools(&self) -> PathBuf {
        self.shared().join("tools")
    }

    pub fn results(&self) -> PathBuf {
        self.shared().join("results")
    }

    /// A program of this workspace, as `cargo build --release` leaves it.
    pub fn program(&self, name: &str) -> PathBuf {
        self.target.join("release").join(name)
    }

    /// A program that is linked statically, for a target of its own.
    pub fn static_program(&self, name: &str) -> PathBuf {
        self.target.join("x86_64-unknown-linux-gnu/release").join(name)
    }

    pub fn agent(&self) -> PathBuf {
        self.static_program("hermitage-agent")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_stay_inside_the_lab_folder() {
        for bad in ["", "..", "a/b", "A", "-x", "machine", "a very long name that ends nowhere"] {
            assert!(Layout::new(bad).is_err(), "{bad:?} was taken");
        }
        let lab = Layout::new("dev").unwrap();
        assert!(lab.own().ends_with("lab/dev"));
        assert_eq!(lab.beside("package").unwrap().name(), "dev-package");
        let long = Layout::new("a-name-of-20-letters").unwrap().beside("package").unwrap();
        assert_eq!(long.name(), "a-name-of-20-package");
        assert!(lab.root().join("tests/lab/Cargo.toml").exists());
    }
}
