//! Tests of [`super`]: real ptys and programs, a socket in the port's place.

use std::io::{Read, Write};
use std::os::unix::net::UnixStream;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use super::*;
use crate::sys::Poller;

/// A program on a terminal, and the host's end of its port.
struct Bench {
    terminal: Terminal,
    port: UnixStream,
    host: UnixStream,
    program: Child,
}

impl Bench {
    fn start(script: &str) -> Bench {
        let owner = nix::unistd::getuid().as_raw();
        let window = Window { columns: 80, rows: 24, ..Window::default() };
        // OPOST off: bytes come as they were written
        let pty = Pty::open(owner, window, &[(70, 0), (53, 0)]).unwrap();
        let stream = || Stdio::from(pty.slave.try_clone().unwrap());
        let program = Command::new("/bin/sh")
            .args(["-c", script])
            .stdin(stream())
            .stdout(stream())
            .stderr(stream())
            .spawn()
            .unwrap();
        let (port, host) = UnixStream::pair().unwrap();
        port.set_nonblocking(true).unwrap();
        host.set_nonblocking(true).unwrap();
        Bench { terminal: Terminal::new(0, pty.master), port, host, program }
    }

    /// One turn of the agent's loop.
    fn turn(&mut self) {
        let mut poller = Poller::new();
        if let Some(master) = self.terminal.master() {
            let wanted = self.terminal.master_interest();
            poller.add(master, (), wanted.readable, wanted.writable);
        }
        let wanted = self.terminal.port_interest();
        poller.add(&self.port, (), wanted.readable, wanted.writable);
        poller.wait(Some(Duration::from_millis(5))).unwrap();
        if poller.ready().next().is_some() {
            self.terminal.relay(self.port.as_fd());
        }
    }

    fn read(&mut self, output: &mut Vec<u8>) {
        let mut bytes = [0; 65536];
        while let Ok(count) = self.host.read(&mut bytes)
            && count > 0
        {
            output.extend_from_slice(&bytes[..count]);
        }
    }

    /// Turns until the program has ended and everything is out, as the agent does.
    fn finish(&mut self) -> Vec<u8> {
        let mut output = Vec::new();
        let deadline = Instant::now() + Duration::from_secs(20);
        loop {
            assert!(Instant::now() < deadline, "not drained after {} bytes", output.len());
            self.turn();
            self.read(&mut output);
            if self.program.try_wait().unwrap().is_some() {
                self.terminal.program_ended();
                if self.terminal.is_drained(self.port.as_fd()) {
                    self.read(&mut output);
                    return output;
                }
            }
        }
    }
}

impl Drop for Bench {
    fn drop(&mut self) {
        let _ = self.program.kill();
        let _ = self.program.wait();
    }
}

#[test]
fn all_output_is_out_before_the_end() {
    let mut bench = Bench::start("seq 1 30000");
    let expected: String = (1..=30000).map(|number| format!("{number}\n")).collect();
    assert_eq!(String::from_utf8(bench.finish()).unwrap(), expected);
}

#[test]
fn input_reaches_the_program_and_every_byte_passes() {
    let mut bench =
        Bench::start("stty raw; echo ready; head -c 256 | od -An -v -tu1 | tr -d ' \\n'");
    let mut greeting = Vec::new();
    let deadline = Instant::now() + Duration::from_secs(10);
    while greeting != b"ready\n" {
        assert!(Instant::now() < deadline, "{greeting:?}");
        bench.turn();
        bench.read(&mut greeting);
    }
    let bytes: Vec<u8> = (0..=255).collect();
    bench.host.write_all(&bytes).unwrap();
    let expected: String = bytes.iter().map(u8::to_string).collect();
    assert_eq!(String::from_utf8(bench.finish()).unwrap(), expected);
}

#[test]
fn a_host_that_does_not_read_stops_the_program() {
    let mut bench = Bench::start("yes");
    let until = Instant::now() + Duration::from_millis(300);
    while Instant::now() < until {
        bench.turn();
    }
    assert!(!bench.terminal.master_interest().readable, "still read though the port takes nothing");
    assert!(bench.terminal.port_interest().writable);
    // and goes on when it reads again
    let mut output = Vec::new();
    bench.read(&mut output);
    let before = output.len();
    for _ in 0..200 {
        bench.turn();
        bench.read(&mut output);
    }
    assert!(output.len() > before + 100_000, "{} after {before}", output.len());
    assert!(output.chunks_exact(2).all(|pair| pair == b"y\n"), "bytes were lost");
}

#[test]
fn others_that_hold_the_terminal_do_not_hold_its_end() {
    let started = Instant::now();
    let mut bench = Bench::start("(trap '' HUP; exec sleep 30) & echo done");
    assert_eq!(bench.finish(), b"done\n");
    assert!(bench.terminal.master().is_none(), "not hung up");
    assert!(started.elapsed() < Duration::from_secs(10));
}

#[test]
fn others_that_go_on_writing_are_cut_off() {
    let mut bench = Bench::start("(trap '' HUP; exec yes) & sleep 0.1");
    let output = bench.finish();
    assert!(bench.terminal.master().is_none(), "not hung up");
    assert!(output.starts_with(b"y\n"));
}

#[test]
fn hanging_up_ends_the_program() {
    let mut bench = Bench::start("exec sleep 30");
    bench.turn();
    // The slave is not this test's controlling terminal, so the kernel's SIGHUP is not sent; that
    // the pty is closed shows in the program's reads and writes.
    bench.terminal.hang_up();
    assert!(bench.terminal.master().is_none());
    assert_eq!(bench.terminal.port_interest(), Interest::default());
    assert!(bench.terminal.is_drained(bench.port.as_fd()));
}

#[test]
fn a_port_whose_host_side_closed_hangs_up() {
    let mut bench = Bench::start("yes");
    bench.turn();
    bench.host.shutdown(std::net::Shutdown::Both).unwrap();
    let deadline = Instant::now() + Duration::from_secs(5);
    while bench.terminal.master().is_some() {
        assert!(Instant::now() < deadline);
        bench.turn();
    }
    assert_eq!(bench.terminal.port_interest(), Interest::default());
}
