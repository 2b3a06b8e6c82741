//! A host of its own for each test.

use hermitage_storage::StateDir;
use hermitage_storage::accounts::Accounts;
use hermitage_storage::base::{BaseId, BaseWriter, Description, HostKind, Machine};
use hermitage_storage::saved;
use hermitage_storage::snapshot::{Description as SnapshotDescription, PAGE, Writer};
use serde_json::{Value, json};
use std::fs::{self, Permissions};
use std::io::Write;
use std::os::unix::fs::{FileExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};

pub const KEYS: &str = include_str!("../../../storage/testdata/authorized_keys");
pub const IMAGE_ID: &str = "00112233445566778899aabbccddeeff";

pub struct Host {
    dir: tempfile::TempDir,
}

/// What a command left behind.
pub struct Done {
    pub code: i32,
    pub out: String,
    pub err: String,
}

impl Host {
    pub fn new() -> Self {
        let host = Self { dir: tempfile::tempdir().unwrap() };
        fs::create_dir(host.path("run")).unwrap();
        fs::create_dir(host.path("libexec")).unwrap();
        host
    }

    pub fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    pub fn state(&self) -> StateDir {
        StateDir::new(self.path("state"))
    }

    pub fn accounts(&self) -> Accounts {
        Accounts::open(&self.state().database()).unwrap()
    }

    /// The configuration of the commands that don't name one, from now on.
    pub fn configure(&self, text: &str) {
        fs::write(self.path("configured.toml"), text).unwrap();
    }

    pub fn command(&self, arguments: &[&str]) -> Command {
        let mut command = Command::new(env!("CARGO_BIN_EXE_hermitage"));
        if self.path("configured.toml").exists() {
            command.arg("--config").arg(self.path("configured.toml"));
        }
        command
            .arg("--state-dir")
            .arg(self.path("state"))
            .arg("--run-dir")
            .arg(self.path("run"))
            .args(arguments)
            .env("HERMITAGE_LIBEXEC", self.path("libexec"));
        command
    }

    pub fn run_with(&self, arguments: &[&str], input: &str) -> Done {
        let mut child = self
            .command(arguments)
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .unwrap();
        // One that doesn't read its input has it closed under us.
        let _ = child.stdin.take().unwrap().write_all(input.as_bytes());
        child.wait_with_output().unwrap().into()
    }

    /// The same, when something that was let go of is free: a child that another test is starting has a copy
    /// of every descriptor, and with it of locks, until it runs its program.
    pub fn run_soon(&self, arguments: &[&str]) -> Done {
        let deadline = std::time::Instant::now() + std::time::Duration::from_secs(10);
        loop {
            let done = self.run(arguments);
            if done.code == 0 || std::time::Instant::now() > deadline {
                return done.success();
            }
            std::thread::sleep(std::time::Duration::from_millis(50));
        }
    }

    /// The same of one that may fail for another reason.
    pub fn run_when_free(&self, arguments: &[&str]) -> Done {
        let deadline = std::time::Instant::now() + std::time::Duration::from_secs(10);
        loop {
            let done = self.run(arguments);
            let held = ["in use", "machine runs", "somebody else works"];
            let held = held.iter().any(|words| done.err.contains(words));
            if !held || std::time::Instant::now() > deadline {
                return done;
            }
            std::thread::sleep(std::time::Duration::from_millis(50));
        }
    }

    pub fn run(&self, arguments: &[&str]) -> Done {
        self.run_with(arguments, "")
    }

    /// The object that a command prints with `--json`; it must succeed.
    pub fn json(&self, arguments: &[&str]) -> Value {
        let done = self.run(&[arguments, &["--json"]].concat()).success();
        serde_json::from_str(&done.out).expect(&done.out)
    }

    /// A program beside `hermitage`.
    pub fn install(&self, name: &str, script: &str) {
        let path = self.path("libexec").join(name);
        fs::write(&path, format!("#!/bin/sh\nset -eu\n{script}")).unwrap();
        fs::set_permissions(path, Permissions::from_mode(0o755)).unwrap();
    }

    /// A guest image's folder, its manifest as `docs/guest-image.md` says.
    pub fn image(&self) -> PathBuf {
        let dir = self.path("image");
        if dir.exists() {
            return dir;
        }
        fs::create_dir(&dir).unwrap();
        let mut files = serde_json::Map::new();
        for name in ["vmlinuz", "initrd.img", "root.erofs", "disk-template.img"] {
            let content = format!("content of {name}").repeat(500);
            fs::write(dir.join(name), &content).unwrap();
            let digest = blake3_of(&content);
            files.insert(name.into(), json!({ "bytes": content.len(), "blake3": digest }));
        }
        let manifest = json!({
            "format": 1, "id": IMAGE_ID, "suite": "stable", "kernel": "6.12", "agent_protocol": 1,
            "files": files,
        });
        fs::write(dir.join("image.json"), manifest.to_string()).unwrap();
        dir
    }

    /// A base's folder at `target`, of this host, with `mark` in its memory.
    pub fn write_base(&self, target: &Path, mark: u8) -> BaseId {
        let machine = Machine { memory_bytes: 1 << 20, vcpus: 1, most: None };
        self.write_base_of(target, mark, machine)
    }

    /// The same, with machines of other sizes.
    pub fn write_base_of(&self, target: &Path, mark: u8, machine: Machine) -> BaseId {
        let writer = BaseWriter::create(target, machine.most().memory_bytes).unwrap();
        writer.memory().write_all_at(&[mark; 100], 4096).unwrap();
        let description = Description {
            image: IMAGE_ID.into(),
            agent_protocol: 1,
            guest_kernel: "6.12".into(),
            machine,
            restorable_on: HostKind::here(1, "digest".into()).unwrap(),
        };
        writer.finish(description, b"state", &self.image().join("root.erofs")).unwrap()
    }

    /// Saves something as the memory of the account's machine, of one page, on a base that need not exist.
    pub fn save_on(&self, account: &str, base: &BaseId) {
        let (state, account) = (self.state(), self.accounts().named(account).unwrap().id);
        let file = saved::create(&state, account).unwrap();
        let mut writer = Writer::new(&file).unwrap();
        writer.data(1, &[[7; PAGE]]).unwrap();
        let tag = [9; 16];
        let description = SnapshotDescription {
            base: base.clone(),
            account,
            disk_tag: tag,
            created: 1_700_000_000,
            ram: 1 << 20,
            vcpus: 1,
            state_version: 1,
        };
        writer.finish(description, b"state").unwrap();
        saved::publish(&state, account, tag).unwrap();
    }

    /// A `hermitage-vmm` that builds a base by copying one that was made for it.
    pub fn install_vmm(&self, mark: u8) -> BaseId {
        let ready = self.path(&format!("ready-base-{mark}"));
        let id = self.write_base(&ready, mark);
        self.install(
            "hermitage-vmm",
            &format!(
                "[ \"$1 $2 $4\" = 'build-base --image --out' ] || {{ echo \"what: $*\" >&2; exit 9; }}\n\
                 [ -f \"$3/vmlinuz\" ]\n\
                 cp -a {} \"$5\"\necho progress >&2\n",
                ready.display()
            ),
        );
        id
    }
}

fn blake3_of(content: &str) -> String {
    blake3::hash(content.as_bytes()).to_string()
}

impl Done {
    #[track_caller]
    pub fn success(self) -> Self {
        assert_eq!(self.code, 0, "{}{}", self.out, self.err);
        self
    }

    /// It must have failed with this status and said this.
    #[track_caller]
    pub fn fails(self, code: i32, words: &str) -> Self {
        assert_eq!(self.code, code, "{}{}", self.out, self.err);
        assert!(self.err.contains(words), "{words:?} is not in {:?}", self.err);
        self
    }
}

impl From<Output> for Done {
    fn from(output: Output) -> Self {
        let text = |bytes| String::from_utf8(bytes).unwrap();
        Self {
            code: output.status.code().expect("ended by a signal"),
            out: text(output.stdout),
            err: text(output.stderr),
        }
    }
}

impl Done {
    /// For commands whose answer, not an error, tells of the failure.
    #[track_caller]
    pub fn fails_saying(self, words: &str) {
        assert_eq!(self.code, 1, "{}{}", self.out, self.err);
        assert!(self.out.contains(words), "{words:?} is not in {:?}", self.out);
    }
}
