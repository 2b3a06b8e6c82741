//! A service of its own for each test, and clients for it.

use std::{
    io::{BufRead, BufReader, Write},
    os::unix::{fs::PermissionsExt, net::UnixStream},
    path::{Path, PathBuf},
    process::{Child, Command, Output, Stdio},
    time::{Duration, Instant},
};

use hermitage::admin::protocol::{AccountStatus, Reply, Request, Status};
use hermitage_storage::{
    StateDir,
    accounts::{Account, AccountName, Accounts, NewAccount, hash_password, parse_keys},
    base::{BaseId, BaseWriter, Description, HostKind, Machine},
};
use tempfile::TempDir;

use crate::processes;

pub const PASSWORD: &str = "correct horse battery staple";

pub struct Service {
    dir: TempDir,
    child: Option<Child>,
    pub port: u16,
}

/// What a test changes of the configuration: lines of `[ssh]` and of `[machines]`.
#[derive(Clone, Copy, Default)]
pub struct Options {
    pub ssh: &'static str,
    pub machines: &'static str,
}

impl Service {
    pub fn start() -> Self {
        Self::with(Options::default())
    }

    pub fn with(options: Options) -> Self {
        let mut service = Self::prepare(options);
        service.run();
        service
    }

    /// Everything there, nothing running.
    pub fn prepare(options: Options) -> Self {
        let dir = tempfile::tempdir().unwrap();
        let state = StateDir::new(dir.path().join("state"));
        state.create().unwrap();
        let base = BaseId::parse(&"0f".repeat(16)).unwrap();
        std::fs::create_dir_all(state.base(&base)).unwrap();
        state.set_current_base(&base).unwrap();
        let libexec = dir.path().join("libexec");
        std::fs::create_dir(&libexec).unwrap();
        let vmm = libexec.join("hermitage-vmm");
        let line = processes::command_line("fork_server");
        // What it is told on its command line: `fork-server --base DIR`.
        let script = format!("#!/bin/sh\nexport HERMITAGE_BASE=\"$3\"\n{line}\n");
        std::fs::write(&vmm, script).unwrap();
        std::fs::set_permissions(&vmm, PermissionsExt::from_mode(0o755)).unwrap();
        let Options { ssh, machines } = options;
        // Tests do all kinds of things from this address.
        let exempt = match ssh.contains("penalty_exempt") {
            true => "",
            false => "penalty_exempt = [\"127.0.0.1\"]",
        };
        let config = format!(
            "state_dir = {:?}\nrun_dir = {:?}\nlibexec_dir = {:?}\n\
             [ssh]\nlisten = [\"127.0.0.1:0\"]\n{exempt}\n{ssh}\n\
             [machines]\nmin_free_mib = 1\n{machines}\n",
            dir.path().join("state"),
            dir.path().join("run"),
            libexec,
        );
        std::fs::write(dir.path().join("hermitage.toml"), config).unwrap();
        let keygen = ["-q", "-t", "ed25519", "-N", "", "-f"];
        for name in ["id", "stranger"] {
            let made = Command::new("ssh-keygen").args(keygen).arg(dir.path().join(name)).status();
            assert!(made.unwrap().success());
        }
        Self { dir, child: None, port: 0 }
    }

    /// More lines of `[ssh]`, for what is to be known of the service's folder first.
    pub fn configure(&self, ssh: &str) {
        let path = self.path("hermitage.toml");
        let text = std::fs::read_to_string(&path).unwrap();
        std::fs::write(&path, text.replacen("[ssh]\n", &format!("[ssh]\n{ssh}\n"), 1)).unwrap();
    }

    pub fn run(&mut self) {
        self.run_with(&[]);
    }

    /// The same with more in its environment.
    pub fn run_with(&mut self, environment: &[(&str, &str)]) {
        let child = self.serve_command().envs(environment.iter().copied()).spawn().unwrap();
        self.child = Some(child);
        let status = wait_for("the service to listen", || match self.try_admin(&Request::Status) {
            Some(Reply::Status(status)) => Some(status),
            _ => None,
        });
        self.port = status.listen[0].rsplit(':').next().unwrap().parse().unwrap();
    }

    pub fn serve_command(&self) -> Command {
        let mut command = processes::command("serve");
        command.env("HERMITAGE_TEST_CONFIG", self.path("hermitage.toml")).stdout(Stdio::null());
        let log = std::fs::File::options().create(true).append(true).open(self.path("log"));
        command.stderr(log.unwrap());
        command
    }

    pub fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    pub fn log(&self) -> String {
        std::fs::read_to_string(self.path("log")).unwrap_or_default()
    }

    pub fn state(&self) -> StateDir {
        StateDir::new(self.path("state"))
    }

    pub fn accounts(&self) -> Accounts {
        Accounts::open(&self.state().database()).unwrap()
    }

    pub fn pid(&self) -> i32 {
        self.child.as_ref().unwrap().id() as i32
    }

    /// An account with the test's key and [`PASSWORD`].
    /// Makes a base of nothing, with machines of those sizes, the current one.
    pub fn install_base(&self, machine: Machine) {
        self.install_base_of(machine, hermitage_guest_proto::VERSION);
    }

    /// The same with an agent of that version.
    pub fn install_base_of(&self, machine: Machine, agent_protocol: u16) {
        let unnamed = self.path("state/bases/.new-test");
        let writer = BaseWriter::create(&unnamed, machine.most().memory_bytes).unwrap();
        let root = self.path("root.erofs");
        std::fs::write(&root, "nothing").unwrap();
        let description = Description {
            image: "00112233445566778899aabbccddeeff".into(),
            agent_protocol,
            guest_kernel: "6.12".into(),
            machine,
            restorable_on: HostKind::here(1, "digest".into()).unwrap(),
        };
        let id = writer.finish(description, b"state", &root).unwrap();
        std::fs::rename(&unnamed, self.state().base(&id)).unwrap();
        self.state().set_current_base(&id).unwrap();
    }

    pub fn account(&self, name: &str) -> Account {
        let line = std::fs::read_to_string(self.path("id.pub")).unwrap();
        let mut new = NewAccount::new(AccountName::parse(name).unwrap());
        new.keys = parse_keys(&line).unwrap();
        new.password_hash = Some(hash_password(PASSWORD.as_bytes()).unwrap());
        let account = self.accounts().create(&new).unwrap();
        let disk = self.state().disk(account.id);
        std::fs::create_dir_all(disk.parent().unwrap()).unwrap();
        std::fs::File::create(disk).unwrap().set_len(1 << 20).unwrap();
        account
    }

    /// `ssh` with its options; the caller adds `user@127.0.0.1` ([`at`]) and a command.
    pub fn ssh_with(&self, options: &[&str]) -> Command {
        let mut command = Command::new("ssh");
        self.client_options(&mut command);
        command.arg("-i").arg(self.path("id"));
        command.arg("-p").arg(self.port.to_string()).args(options);
        command
    }

    /// `ssh` with other keys than the right one.
    pub fn ssh_with_keys(&self, keys: &[&str]) -> Command {
        let mut command = Command::new("ssh");
        self.client_options(&mut command);
        for key in keys {
            command.arg("-i").arg(self.path(key));
        }
        command.args(["-o", "BatchMode=yes", "-p"]).arg(self.port.to_string());
        command
    }

    /// `ssh -W` with one key; it says why it is refused.
    pub fn through(&self, key: &str, to: &str, user: &str) -> String {
        let mut command = Command::new("ssh");
        // The first value of an option counts.
        command.args(["-o", "LogLevel=INFO", "-o", "BatchMode=yes", "-W", to]);
        self.client_options(&mut command);
        command.arg("-i").arg(self.path(key)).arg("-p").arg(self.port.to_string()).arg(at(user));
        stderr(&finish(&mut command))
    }

    /// The options that all OpenSSH clients share.
    pub fn client_options(&self, command: &mut Command) {
        command
            .args(["-F", "/dev/null", "-o", "StrictHostKeyChecking=accept-new"])
            .args(["-o", "LogLevel=ERROR", "-o", "IdentitiesOnly=yes"])
            .arg("-o")
            .arg(format!("UserKnownHostsFile={}", self.path("known_hosts").display()))
            .stdin(Stdio::null());
        command.env_remove("SSH_AUTH_SOCK");
    }

    pub fn ssh(&self, user: &str, command: &str) -> Output {
        let mut ssh = self.ssh_with(&["-o", "BatchMode=yes", &at(user), command]);
        finish(&mut ssh)
    }

    pub fn ssh_by_password(&self, user: &str, password: &str) -> Output {
        self.ssh_by_password_from("127.0.0.1", user, password)
    }

    /// The same from another of this host's addresses, as another source.
    pub fn ssh_by_password_from(&self, from: &str, user: &str, password: &str) -> Output {
        let mut command = Command::new("sshpass");
        command.args(["-e", "ssh"]).env("SSHPASS", password);
        self.client_options(&mut command);
        command
            .args(["-b", from, "-o", "PubkeyAuthentication=no"])
            .args(["-o", "NumberOfPasswordPrompts=1", "-p"])
            .arg(self.port.to_string())
            .args([&at(user), "echo in"]);
        finish(&mut command)
    }

    pub fn admin(&self, request: &Request) -> Reply {
        self.try_admin(request).expect("the admin socket answers")
    }

    fn try_admin(&self, request: &Request) -> Option<Reply> {
        let mut stream = UnixStream::connect(self.path("run/admin.sock")).ok()?;
        stream
            .write_all(format!("{}\n", serde_json::to_string(request).unwrap()).as_bytes())
            .ok()?;
        let mut line = String::new();
        BufReader::new(stream).read_line(&mut line).ok()?;
        serde_json::from_str(&line).ok()
    }

    pub fn status(&self) -> Status {
        match self.admin(&Request::Status) {
            Reply::Status(status) => status,
            other => panic!("{other:?}"),
        }
    }

    /// Whether the account's machine is put away, saved or not.
    pub fn at_rest(&self, name: &str) -> bool {
        self.account_status(name).is_none_or(|status| status.state == "saved")
    }

    pub fn account_status(&self, name: &str) -> Option<AccountStatus> {
        self.status().accounts.into_iter().find(|status| status.account == name)
    }

    pub fn signal(&self, signal: nix::sys::signal::Signal) {
        nix::sys::signal::kill(nix::unistd::Pid::from_raw(self.pid()), signal).unwrap();
    }

    /// Waits for the service's own end.
    pub fn wait(&mut self) -> std::process::ExitStatus {
        let mut child = self.child.take().unwrap();
        wait_for("the service to end", || child.try_wait().unwrap())
    }
}

impl Drop for Service {
    fn drop(&mut self) {
        if std::thread::panicking() {
            eprintln!("--- the service's log\n{}", self.log());
        }
        if let Some(mut child) = self.child.take() {
            let _ = child.kill();
            let _ = child.wait();
        }
    }
}

pub fn at(user: &str) -> String {
    format!("{user}@127.0.0.1")
}

/// Runs a client, at most a minute.
pub fn finish(command: &mut Command) -> Output {
    let child = command.stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap();
    finish_child(child)
}

pub fn finish_child(child: Child) -> Output {
    let pid = nix::unistd::Pid::from_raw(child.id() as i32);
    let (done, waiting) = std::sync::mpsc::channel::<()>();
    let watchdog = std::thread::spawn(move || {
        let outcome = waiting.recv_timeout(Duration::from_secs(60));
        if outcome == Err(std::sync::mpsc::RecvTimeoutError::Timeout) {
            let _ = nix::sys::signal::kill(pid, nix::sys::signal::Signal::SIGKILL);
            panic!("a client did not end within a minute");
        }
    });
    let output = child.wait_with_output().unwrap();
    drop(done);
    watchdog.join().unwrap();
    output
}

pub fn stdout(output: &Output) -> String {
    String::from_utf8_lossy(&output.stdout).into_owned()
}

pub fn stderr(output: &Output) -> String {
    String::from_utf8_lossy(&output.stderr).into_owned()
}

/// Waits until `check` gives something, at most half a minute.
pub fn wait_for<T>(what: &str, mut check: impl FnMut() -> Option<T>) -> T {
    let deadline = Instant::now() + Duration::from_secs(30);
    loop {
        if let Some(found) = check() {
            return found;
        }
        assert!(Instant::now() < deadline, "waited in vain for {what}");
        std::thread::sleep(Duration::from_millis(20));
    }
}

/// Resident memory of a process in KiB.
pub fn resident_kib(pid: i32) -> u64 {
    let status = std::fs::read_to_string(Path::new("/proc").join(pid.to_string()).join("status"));
    let status = status.unwrap();
    let line = status.lines().find(|line| line.starts_with("VmRSS:")).unwrap();
    line.split_whitespace().nth(1).unwrap().parse().unwrap()
}
