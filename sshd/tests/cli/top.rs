//! `hermitage top`, once and on a terminal.

use crate::host::Host;
use crate::service::Service;
use hermitage::admin::protocol::{AccountStatus, Reply, Status};
use nix::pty::{Winsize, openpty};
use std::fs::File;
use std::io::{Read, Write};
use std::process::{Child, Command, Stdio};
use std::sync::mpsc;
use std::time::{Duration, Instant};

/// A process that does nothing but run.
struct Busy(Child);

impl Drop for Busy {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

fn account(name: &str, pid: Option<i32>) -> AccountStatus {
    AccountStatus {
        account: name.into(),
        state: if pid.is_some() { "running" } else { "saved" }.into(),
        since: 60,
        why: format!("{name} has a reason"),
        machine_pid: pid,
        base: None,
        sessions: u32::from(pid.is_some()),
        awake: None,
        cgroup: None,
        size: None,
        unused: None,
    }
}

fn serving(host: &Host, accounts: Vec<AccountStatus>) -> Service {
    Service::start(host, move |_| {
        Reply::Status(Status {
            version: "0.1.0".into(),
            pid: 4711,
            since: 0,
            listen: vec![],
            base: None,
            connections: 3,
            accounts: accounts.clone(),
            limits: Default::default(),
        })
    })
}

#[test]
fn it_shows_what_machines_take() {
    let host = Host::new();
    host.run(&["top"]).fails(1, "not running");
    let busy = Busy(Command::new("sh").args(["-c", "while :; do :; done"]).spawn().unwrap());
    let _service =
        serving(&host, vec![account("alice", None), account("bob", Some(busy.0.id() as i32))]);
    let top = host.json(&["top"]);
    assert_eq!(top["connections"], 3);
    let [bob, alice] = &top["accounts"].as_array().unwrap()[..] else { panic!("{top}") };
    assert_eq!((&bob["account"], &alice["account"]), (&"bob".into(), &"alice".into()));
    assert!(bob["cpu_percent"].as_f64().unwrap() > 3.0, "{bob}");
    assert!(bob["memory_bytes"].as_u64().unwrap() > 10_000, "{bob}");
    assert_eq!((&alice["cpu_percent"], &alice["memory_bytes"]), (&().into(), &().into()));
    let text = host.run(&["top", "--once", "--sort", "name"]).success().out;
    let lines: Vec<_> = text.lines().collect();
    assert!(lines[0].starts_with("1 machines, 1 sessions, 3 connections"), "{text}");
    assert!(lines[1].contains("ACCOUNT*") && lines[2].starts_with("alice"), "{text}");
    assert!(lines[3].contains("bob has a reason"), "{text}");
}

#[test]
fn on_a_terminal_it_goes_on_until_q_and_leaves_it_as_it_was() {
    let host = Host::new();
    let _service = serving(&host, vec![account("alice", None), account("bob", Some(1))]);
    let size = Winsize { ws_row: 24, ws_col: 120, ws_xpixel: 0, ws_ypixel: 0 };
    let pty = openpty(Some(&size), None).unwrap();
    let end = || Stdio::from(pty.slave.try_clone().unwrap());
    let mut top = host
        .command(&["top", "--interval", "1"])
        .stdin(end())
        .stdout(end())
        .stderr(end())
        .spawn()
        .unwrap();
    let mut terminal = Terminal::of(pty.master.into());
    terminal.expect("alice has a reason");
    // By itself, again.
    terminal.expect("alice has a reason");
    terminal.keys.write_all(b"n").unwrap();
    terminal.expect("ACCOUNT*");
    terminal.keys.write_all(b"q").unwrap();
    terminal.expect("\x1b[?1049l");
    assert!(top.wait().unwrap().success());
    let modes = nix::sys::termios::tcgetattr(&pty.slave).unwrap();
    assert!(modes.local_flags.contains(nix::sys::termios::LocalFlags::ICANON));
}

/// The near end of a terminal, read by a thread so that nothing waits for ever.
struct Terminal {
    keys: File,
    shows: mpsc::Receiver<Vec<u8>>,
    shown: String,
}

impl Terminal {
    fn of(master: File) -> Self {
        let mut reading = master.try_clone().unwrap();
        let (sender, shows) = mpsc::channel();
        std::thread::spawn(move || {
            let mut bytes = [0; 4096];
            while let Ok(count @ 1..) = reading.read(&mut bytes) {
                if sender.send(bytes[..count].to_vec()).is_err() {
                    break;
                }
            }
        });
        Self { keys: master, shows, shown: String::new() }
    }

    fn expect(&mut self, wanted: &str) {
        let until = Instant::now() + Duration::from_secs(20);
        loop {
            if let Some(at) = self.shown.find(wanted) {
                self.shown.drain(..at + wanted.len());
                return;
            }
            match self.shows.recv_timeout(until.saturating_duration_since(Instant::now())) {
                Ok(bytes) => self.shown.push_str(&String::from_utf8_lossy(&bytes)),
                Err(_) => panic!("{wanted:?} was not shown; this was: {:?}", self.shown),
            }
        }
    }
}
