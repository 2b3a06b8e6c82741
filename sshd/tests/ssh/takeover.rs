//! A terminal that somebody else is attached to: by a link that is dead, or not.

use std::{
    io::{Read as _, Write as _},
    net::{Shutdown, TcpListener, TcpStream},
    process::{Command, Stdio},
    thread,
    time::{Duration, Instant},
};

use nix::{
    sys::signal::{Signal, kill},
    unistd::Pid,
};
use socket2::{SockFilter, SockRef};

use crate::{
    harness::{Options, Service, wait_for},
    terminals::Shell,
};

/// A wire between a client and the service, which can be cut without either of them being told.
struct Wire {
    port: u16,
    far: std::sync::mpsc::Receiver<TcpStream>,
}

impl Wire {
    fn to(service: &Service) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let port = listener.local_addr().unwrap().port();
        let to = service.port;
        let (sender, far) = std::sync::mpsc::channel();
        thread::spawn(move || {
            let (near, _) = listener.accept().unwrap();
            let far = TcpStream::connect(("127.0.0.1", to)).unwrap();
            sender.send(far.try_clone().unwrap()).unwrap();
            let (back_from, back_to) = (far.try_clone().unwrap(), near.try_clone().unwrap());
            thread::spawn(move || carry(back_from, back_to));
            carry(near, far);
        });
        Self { port, far }
    }

    /// From here on nothing that the service sends arrives, not even at the kernel on this side.
    fn cut(&self) -> TcpStream {
        let far = self.far.recv().unwrap();
        SockRef::from(&far).attach_filter(&[SockFilter::new(0x06, 0, 0, 0)]).unwrap();
        far
    }
}

fn carry(mut from: TcpStream, mut to: TcpStream) {
    let mut bytes = [0; 16 * 1024];
    while let Ok(count @ 1..) = from.read(&mut bytes) {
        if to.write_all(&bytes[..count]).is_err() {
            break;
        }
    }
    let _ = to.shutdown(Shutdown::Write);
}

fn through(wire: &Wire, service: &Service, user: &str) -> Shell {
    let mut ssh = Command::new("ssh");
    service.client_options(&mut ssh);
    ssh.arg("-i").arg(service.path("id")).arg("-p").arg(wire.port.to_string());
    ssh.args(["-o", "BatchMode=yes", "-tt"]).arg(format!("{user}@127.0.0.1"));
    Shell::of(ssh.stdin(Stdio::piped()).stdout(Stdio::piped()))
}

#[test]
fn whose_link_is_dead_gets_her_terminal_back() {
    let service = Service::start();
    service.account("alice");
    let wire = Wire::to(&service);
    let mut before = through(&wire, &service, "alice");
    before.run("kept=here; echo it-is-$kept", "it-is-here");
    let _open = wire.cut();
    // Who was heard of within a second counts as there.
    thread::sleep(Duration::from_millis(1500));
    let begun = Instant::now();
    let mut shell = Shell::open(&service, "alice");
    shell.run("echo again-$kept", "again-here");
    assert!(begun.elapsed() < Duration::from_secs(30), "{:?}", begun.elapsed());
    // She has it for good: another login finds her link alive.
    let mut other = Shell::open(&service, "alice");
    other.run("echo now-$kept.", "now-.");
    shell.run("echo still-$kept", "still-here");
}

#[test]
fn a_client_that_stands_still_keeps_its_terminal() {
    let service = Service::start();
    service.account("alice");
    let mut first = Shell::open(&service, "alice");
    first.run("n=first; echo it-is-$n", "it-is-first");
    let pid = Pid::from_raw(first.pid());
    kill(pid, Signal::SIGSTOP).unwrap();
    let mut second = Shell::open(&service, "alice");
    second.run("echo it-is-$n.", "it-is-.");
    kill(pid, Signal::SIGCONT).unwrap();
    first.run("echo still-$n", "still-first");
}

#[test]
fn take_takes_the_terminal_attached_last_and_tells_its_holder() {
    let service = Service::start();
    service.account("alice");
    let mut left = Shell::open(&service, "alice");
    left.run("n=left; echo it-is-$n", "it-is-left");
    left.cut(&service);
    let mut old = Shell::open(&service, "alice+new");
    old.run("n=old; echo it-is-$n", "it-is-old");
    let mut late = Shell::open(&service, "alice+new");
    late.run("n=late; echo it-is-$n", "it-is-late");

    let mut taker = Shell::open(&service, "alice+take");
    taker.run("echo have-$n", "have-late");
    late.expect("hermitage: this terminal was taken over by a login from 127.0.0.1:");
    assert_eq!(late.wait(), 255);
    old.run("echo still-$n", "still-old");

    // Never two at once: who takes it back has it, and the other one no longer.
    let mut back = Shell::open(&service, "alice+take");
    back.run("echo have-$n", "have-late");
    assert_eq!(taker.wait(), 255);
    assert_eq!(back.exit(), 7);
}

#[test]
fn take_with_nobody_attached_is_a_login_like_any_other() {
    let service = Service::with(Options::default());
    service.account("alice");
    let mut shell = Shell::open(&service, "alice+take");
    shell.run("n=one; echo it-is-$n", "it-is-one");
    shell.cut(&service);
    let mut shell = Shell::open(&service, "alice+take");
    shell.run("echo again-$n", "again-one");
    let refused = service.ssh("alice+take+new", "true");
    assert_eq!(refused.status.code(), Some(255));
}

#[test]
fn a_session_that_was_taken_over_on_a_dead_link_ends() {
    let service = Service::start();
    service.account("alice");
    let wire = Wire::to(&service);
    let mut before = through(&wire, &service, "alice");
    before.run("echo it-is-''there", "it-is-there");
    let _open = wire.cut();
    let mut shell = Shell::open(&service, "alice+take");
    shell.run("echo again-''there", "again-there");
    wait_for("the former session's end", || {
        (service.account_status("alice")?.sessions == 1).then_some(())
    });
}
