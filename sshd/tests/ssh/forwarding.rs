//! Forwarding: the service's part of it, with a stand-in for the machine's.

use std::{
    io::{Read, Write},
    net::{Shutdown, TcpListener, TcpStream},
    process::{Child, Command, Stdio},
    thread,
    time::Duration,
};

use crate::{
    fake_forwarder::{HOSTILE, SILENT},
    harness::{Options, Service, at, finish, finish_child, stderr, stdout, wait_for},
};

/// A server that sends everything back when it has all of it.
fn echo() -> u16 {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let port = listener.local_addr().unwrap().port();
    thread::spawn(move || {
        for stream in listener.incoming().flatten() {
            thread::spawn(move || {
                let (mut stream, mut got) = (stream, vec![]);
                let _ = stream.read_to_end(&mut got);
                let _ = stream.write_all(&got);
            });
        }
    });
    port
}

fn free_port() -> u16 {
    TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port()
}

struct Client(Child);

impl Drop for Client {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

fn ssh(service: &Service, options: &[&str], user: &str) -> Command {
    let mut command = Command::new("ssh");
    // The first value of an option counts.
    command.args(["-N", "-o", "BatchMode=yes", "-o", "LogLevel=INFO"]);
    service.client_options(&mut command);
    command.arg("-i").arg(service.path("id")).arg("-p").arg(service.port.to_string());
    command.args(options).arg(at(user));
    command.stderr(Stdio::piped()).stdout(Stdio::piped());
    command
}

/// A client whose standard input and output are forwarded.
fn through(service: &Service, to: &str, user: &str) -> Command {
    let mut command = ssh(service, &["-W", to], user);
    command.stdin(Stdio::null());
    command
}

fn connect(port: u16) -> TcpStream {
    let stream = wait_for("the local port", || TcpStream::connect(("127.0.0.1", port)).ok());
    stream.set_read_timeout(Some(Duration::from_secs(30))).unwrap();
    stream
}

fn answer(mut stream: TcpStream, question: &[u8]) -> Vec<u8> {
    let mut writing = stream.try_clone().unwrap();
    let question = question.to_vec();
    let feeding = thread::spawn(move || {
        let _ = writing.write_all(&question);
        let _ = writing.shutdown(Shutdown::Write);
    });
    let mut got = vec![];
    let _ = stream.read_to_end(&mut got);
    feeding.join().unwrap();
    got
}

#[test]
fn bytes_pass_both_ways_with_their_ends() {
    let service = Service::start();
    service.account("alice");
    let (near, far) = (free_port(), echo());
    let forward = format!("{near}:127.0.0.1:{far}");
    let _client = Client(ssh(&service, &["-L", &forward], "alice").spawn().unwrap());
    let question: Vec<u8> = (0..5_000_000u32).map(|n| (n >> 3) as u8).collect();
    assert!(answer(connect(near), &question) == question);
    // Many at once, none of which ends before all are open.
    let streams: Vec<TcpStream> = (0..50).map(|_| connect(near)).collect();
    for (n, stream) in streams.into_iter().enumerate() {
        assert_eq!(answer(stream, &n.to_le_bytes()), n.to_le_bytes());
    }
    assert_eq!(service.account_status("alice").unwrap().sessions, 1);
    wait_for("the machine to be let go", || {
        (service.account_status("alice").is_none_or(|status| status.sessions == 0)).then_some(())
    });
}

#[test]
fn a_refusal_says_why_and_harms_nobody_else() {
    let service = Service::start();
    service.account("alice");
    let far = echo();
    let refused = finish(&mut through(&service, "127.0.0.1:1", "alice"));
    assert!(!refused.status.success());
    let said = stderr(&refused);
    assert!(said.contains("Connection refused") && !said.contains('\x1b'), "{said}");
    let (near, hostile) = (free_port(), free_port());
    let forwards = [format!("{near}:127.0.0.1:{far}"), format!("{hostile}:127.0.0.1:{HOSTILE}")];
    let options = ["-L", &forwards[0], "-L", &forwards[1]];
    let _client = Client(ssh(&service, &options, "alice").spawn().unwrap());
    assert_eq!(answer(connect(near), b"before"), b"before");
    // A forwarder that talks nonsense is given up, its machine is not; the next stream has another.
    assert_eq!(answer(connect(hostile), b""), b"");
    assert_eq!(answer(connect(near), b"after"), b"after");
    assert_eq!(stdout(&service.ssh("alice", "echo still here")), "still here\n");
}

/// Who closes first forgets it, and that is the client.
#[test]
fn streams_that_are_over_are_forgotten() {
    let service = Service::with(Options { ssh: "max_ended_channels = 2", machines: "" });
    service.account("alice");
    let (near, far) = (free_port(), echo());
    let forward = format!("{near}:127.0.0.1:{far}");
    let _client = Client(ssh(&service, &["-L", &forward], "alice").spawn().unwrap());
    for n in 0..6u8 {
        assert_eq!(answer(connect(near), &[n]), [n]);
    }
}

#[test]
fn limits_are_kept_and_given_back() {
    let service =
        Service::with(Options { ssh: "max_streams = 2\nmax_listeners = 1", machines: "" });
    service.account("alice");
    let (near, far, silent) = (free_port(), echo(), free_port());
    let forwards = [format!("{near}:127.0.0.1:{far}"), format!("{silent}:127.0.0.1:{SILENT}")];
    let options = ["-L", &forwards[0], "-L", &forwards[1]];
    let client = Client(ssh(&service, &options, "alice").spawn().unwrap());
    let held = [connect(near), connect(silent)];
    // The client takes those of one listener before the other's, unless they come apart.
    std::thread::sleep(std::time::Duration::from_millis(300));
    assert_eq!(answer(connect(near), b"one too many"), b"");
    drop(held);
    wait_for("a place", || (answer(connect(near), b"again") == b"again").then_some(()));
    drop(client);

    let (one, two) = ("0:127.0.0.1:1", "0:127.0.0.1:2");
    let options = ["-o", "ExitOnForwardFailure=yes", "-R", one, "-R", two];
    let ended = finish_child(ssh(&service, &options, "alice").spawn().unwrap());
    assert_eq!(ended.status.code(), Some(255));
    assert!(service.log().contains("ssh.max_listeners"));
}

#[test]
fn somebody_in_the_machine_reaches_the_client() {
    let service = Service::start();
    service.account("alice");
    let (near, far) = (echo(), free_port());
    let forward = format!("{far}:127.0.0.1:{near}");
    let client = Client(ssh(&service, &["-R", &forward], "alice").spawn().unwrap());
    let question = vec![7; 3_000_000];
    assert!(answer(connect(far), &question) == question);
    let streams: Vec<TcpStream> = (0..30).map(|_| connect(far)).collect();
    for (n, stream) in streams.into_iter().enumerate() {
        assert_eq!(answer(stream, &n.to_le_bytes()), n.to_le_bytes());
    }
    assert_eq!(service.account_status("alice").unwrap().sessions, 1);
    drop(client);
    wait_for("the machine to be let go", || {
        (service.account_status("alice").is_none_or(|status| status.sessions == 0)).then_some(())
    });
}

#[test]
fn who_listens_is_told_when_the_machine_goes() {
    let service = Service::start();
    service.account("alice");
    let far = free_port();
    let child = ssh(&service, &["-R", &format!("{far}:127.0.0.1:1")], "alice").spawn().unwrap();
    drop(connect(far));
    let stop = hermitage::admin::protocol::Request::StopAccount { account: "alice".into() };
    service.admin(&stop);
    let ended = finish_child(child);
    assert!(stderr(&ended).contains("nothing listens any more"), "{}", stderr(&ended));
}

#[test]
fn a_login_that_drops_the_machine_forwards_nothing() {
    let service = Service::start();
    service.account("alice");
    let far = echo();
    let refused = finish(&mut through(&service, &format!("127.0.0.1:{far}"), "alice+fresh"));
    assert!(stderr(&refused).contains("+fresh"), "{}", stderr(&refused));
}

#[test]
fn a_session_is_told_where_the_key_agent_is() {
    let service = Service::start();
    service.account("alice");
    let agent = service.path("agent");
    let mut command = Command::new("ssh-agent");
    let _agent = Client(command.args(["-D", "-a"]).arg(&agent).spawn().unwrap());
    wait_for("the agent", || agent.exists().then_some(()));
    let mut command = service.ssh_with(&["-o", "BatchMode=yes", "-A", &at("alice")]);
    let told = finish(command.arg("echo $SSH_AUTH_SOCK").env("SSH_AUTH_SOCK", &agent));
    assert!(stdout(&told).starts_with("/tmp/hermitage-fake-"), "{}", stdout(&told));
    assert_eq!(stdout(&service.ssh("alice", "echo ${SSH_AUTH_SOCK:-none}")), "none\n");
}
