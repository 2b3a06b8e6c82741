//! Terminals outlive links: what a client finds that comes back.

use std::{
    io::{Read, Write},
    process::{Child, ChildStdin, Command, Stdio},
    sync::mpsc::{Receiver, RecvTimeoutError, channel},
    thread,
    time::Duration,
};

use crate::harness::{Service, at, stderr, stdout, wait_for};

/// An `ssh -tt` with a shell, typed to and read from over pipes.
pub struct Shell {
    child: Child,
    typing: ChildStdin,
    /// What it shows, as it comes. Closed: it has ended.
    showing: Receiver<Vec<u8>>,
    shown: String,
}

/// How long a terminal may show nothing while something is expected of it.
const SILENCE: Duration = Duration::from_secs(60);

impl Shell {
    pub fn open(service: &Service, user: &str) -> Self {
        let mut ssh = service.ssh_with(&["-o", "BatchMode=yes", "-tt"]);
        Self::of(ssh.arg(at(user)).stdin(Stdio::piped()).stdout(Stdio::piped()))
    }

    /// Of a client whose standard input and output are pipes.
    pub fn of(ssh: &mut Command) -> Self {
        let mut child = ssh.spawn().unwrap();
        let (typing, mut out) = (child.stdin.take().unwrap(), child.stdout.take().unwrap());
        let (shows, showing) = channel();
        thread::spawn(move || {
            let mut chunk = [0; 4096];
            while let Ok(count @ 1..) = out.read(&mut chunk)
                && shows.send(chunk[..count].to_vec()).is_ok()
            {}
        });
        Self { child, typing, showing, shown: String::new() }
    }

    /// Types a line, whose output must be `wanted`.
    pub fn run(&mut self, line: &str, wanted: &str) {
        self.typing.write_all(format!("{line}\n").as_bytes()).unwrap();
        self.expect(wanted);
    }

    /// Reads until this was shown; returns what came before it.
    pub fn expect(&mut self, wanted: &str) -> String {
        loop {
            if let Some(at) = self.shown.find(wanted) {
                let rest = self.shown.split_off(at + wanted.len());
                return std::mem::replace(&mut self.shown, rest);
            }
            match self.showing.recv_timeout(SILENCE) {
                Ok(chunk) => self.shown.push_str(&String::from_utf8_lossy(&chunk)),
                Err(RecvTimeoutError::Disconnected) => {
                    panic!("ended before it showed {wanted:?}: {:?}", self.shown)
                }
                Err(RecvTimeoutError::Timeout) => {
                    panic!("waited in vain for {wanted:?}: {:?}", self.shown)
                }
            }
        }
    }

    /// What was shown and not yet expected.
    pub fn shown(&self) -> &str {
        &self.shown
    }

    /// The link is gone from one moment to the next.
    pub fn cut(mut self, service: &Service) {
        let before = service.log().matches(LEFT).count();
        self.child.kill().unwrap();
        self.child.wait().unwrap();
        wait_for("the loss", || (service.log().matches(LEFT).count() > before).then_some(()));
    }

    pub fn pid(&self) -> i32 {
        self.child.id() as i32
    }

    /// Waits for the client's own end.
    pub fn wait(&mut self) -> i32 {
        loop {
            match self.showing.recv_timeout(SILENCE) {
                Ok(_) => {}
                Err(RecvTimeoutError::Disconnected) => break,
                Err(RecvTimeoutError::Timeout) => panic!("the client does not end"),
            }
        }
        self.child.wait().unwrap().code().unwrap()
    }

    pub fn exit(mut self) -> i32 {
        self.typing.write_all(b"exit 7\n").unwrap();
        self.wait()
    }
}

impl Drop for Shell {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

const LEFT: &str = "a terminal waits for its user";

#[test]
fn a_shell_survives_its_link_and_is_taken_up_again() {
    let service = Service::start();
    service.account("alice");
    let mut shell = Shell::open(&service, "alice");
    shell.run("kept=here; echo pid $$.", "pid ");
    let pid = shell.expect(".");
    let pid = if pid.contains('$') {
        shell.expect("pid ");
        shell.expect(".")
    } else {
        pid
    };
    shell.cut(&service);

    let mut shell = Shell::open(&service, "alice");
    let redrawn = shell.expect("]");
    assert!(redrawn.contains("[redrawn "), "{redrawn:?}");
    assert!(shell.expect(&pid).contains("kept=here"), "the screen is not what it was");
    shell.run("echo $$-$kept", &format!("{}-here", pid.trim_end_matches('.')));
    assert_eq!(shell.exit(), 7);

    // It has ended: the next login starts another.
    let mut shell = Shell::open(&service, "alice");
    shell.run("echo a-${kept}-b", "a--b");
    assert!(!shell.shown.contains("redrawn"));
}

#[test]
fn the_terminal_left_last_is_taken_up_first() {
    let service = Service::start();
    service.account("alice");
    let mut shells: Vec<Shell> = (0..3).map(|_| Shell::open(&service, "alice")).collect();
    for (n, shell) in shells.iter_mut().enumerate() {
        shell.run(&format!("n={n}; echo i-$n"), &format!("i-{n}"));
    }
    // In another order than they were opened in.
    let order = [1, 2, 0];
    let mut shells: Vec<Option<Shell>> = shells.into_iter().map(Some).collect();
    for n in order {
        shells[n].take().unwrap().cut(&service);
    }
    let mut taken = vec![];
    for n in order.iter().rev() {
        let mut shell = Shell::open(&service, "alice");
        shell.run("echo again-$n", &format!("again-{n}"));
        taken.push(shell);
    }
    // All of them are attached: two never share one.
    let mut another = Shell::open(&service, "alice");
    another.run("echo now-$n.", "now-.");
}

#[test]
fn new_is_a_terminal_beside_those_that_wait() {
    let service = Service::start();
    service.account("alice");
    let mut shell = Shell::open(&service, "alice");
    shell.run("n=first; echo it-is-$n", "it-is-first");
    shell.cut(&service);
    let mut new = Shell::open(&service, "alice+new");
    new.run("echo it-is-$n.", "it-is-.");
    let mut shell = Shell::open(&service, "alice");
    shell.run("echo again-$n", "again-first");
}

#[test]
fn with_all_terminals_waiting_new_is_refused_in_words_and_a_login_takes_one_up() {
    let service = Service::start();
    service.account("alice");
    for n in 0..8 {
        let mut shell = Shell::open(&service, "alice+new");
        shell.run(&format!("n={n}; echo i-$n"), &format!("i-{n}"));
        shell.cut(&service);
    }
    let mut ninth = Shell::open(&service, "alice+new");
    ninth.expect("all 8 terminals of this machine are in use; 8 of them wait for you");
    let mut shell = Shell::open(&service, "alice");
    shell.run("echo again-$n", "again-7");
}

#[test]
fn a_shell_that_ends_while_nobody_looks_frees_its_terminal() {
    let service = Service::start();
    service.account("alice");
    for _ in 0..9 {
        let mut shell = Shell::open(&service, "alice+new");
        let file = service.path("pid");
        shell.run(&format!("echo $$ > {}; echo not''ed", file.display()), "noted");
        shell.cut(&service);
        let ended = service.ssh("alice", &format!("kill -9 $(cat {})", file.display()));
        assert!(ended.status.success(), "{}", stderr(&ended));
    }
}

#[test]
fn an_unknown_word_is_refused_after_authentication_only() {
    let service = Service::start();
    service.account("alice");
    let output = service.ssh("alice+nwe", "echo in");
    assert_eq!((output.status.code(), stdout(&output).as_str()), (Some(255), ""));
    assert!(stderr(&output).contains("\"+nwe\" is nothing this service knows"), "{output:?}");
    assert!(service.account_status("alice").is_none(), "a machine was started for it");
    let mut stranger = service.ssh_with_keys(&["stranger"]);
    let output = crate::harness::finish(stranger.args([&at("alice+nwe"), "true"]));
    assert!(stderr(&output).contains("Permission denied"), "{output:?}");
    assert_eq!(stdout(&service.ssh("alice+new", "echo in")), "in\n");
}
